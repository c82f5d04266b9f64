//! An owner: reads model and data, finds workers, trains, and writes the results.
//!
//! A run may be interrupted anywhere. What it has reached is in its checkpoints, which are made while it lasts and
//! whenever it ends before its time: at the first Ctrl-C after the step under way, at the second at once, and before an
//! error is reported. `--resume` goes on from there.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use actors::backend::{LinearBackend, PlainBackend};
use actors::checkpoint::{Found, Identity};
use actors::data::{Batches, Dataset, fresh_seed};
use actors::lora::LoraAdapters;
use actors::owner::PhaseClock;
use actors::trainer::{
    AdapterTarget, Answering, CheckpointTarget, Saver, TrainEvent, TrainHandle, TrainOutcome, TrainState,
    TrainableModel, Trainer, TrainerConfig, TrainingData,
};
use anyhow::{Context as _, anyhow, bail, ensure};
use protocol::ids::ModelDigest;
use protocol::model::Model;

use super::answers::{self, Asking};
use super::cluster::Cluster;
use super::progress::Progress;
use super::results::{Results, Spent, empty_report};
use super::start::{self, Start};
use super::stop::StopSignals;
use super::{adapter, model_name, prefix};
use crate::config::{BackendChoice, Config};
use crate::data::{named, tell};
use crate::{output, protect};

/// What an owner begins with: all that can be wrong with it is found before a worker is asked for anything.
pub(super) struct Inputs {
    /// The configuration, with what follows from the data said in steps.
    pub(super) config: Arc<Config>,
    model: Arc<Model>,
    pub(super) digest: ModelDigest,
    pub(super) training: Dataset,
    pub(super) held_out: Dataset,
    /// What the run begins with in place of new adapters.
    adapter: Option<LoraAdapters>,
    /// Of the order of the data.
    pub(super) data_seed: u64,
    identity: Identity,
    /// What the run goes on from.
    resume: Option<Found<TrainState>>,
}

/// Runs an owner to the end of its training, or to Ctrl-C.
///
/// # Errors
/// Whatever is wrong with its inputs, and whatever stops the training; what was learnt until then is saved.
pub async fn run(config: Config, start: Start) -> anyhow::Result<()> {
    protect::shut_memory();
    let config = Arc::new(config);
    let mut progress = Progress::new();
    let mut stop = StopSignals::listen()?;
    let prepared = tokio::select! {
        prepared = prepare(&config, &start, &progress) => prepared,
        () = stop.next() => Err(anyhow!("stopped before the training began")),
    };
    let (inputs, cluster) = prepared.inspect_err(|_| start::forget_owner(&config.owner.out))?;
    let config = Arc::clone(&inputs.config);
    progress.begin(config.training.steps());
    let trained = train(&config, inputs, &start, cluster.as_ref(), &mut progress, &mut stop).await;
    progress.finish();
    if let Some(cluster) = cluster {
        cluster.stop().await;
    }
    trained
}

/// Reads the inputs and, for encrypted training, gathers the workers.
async fn prepare(
    config: &Arc<Config>,
    start: &Start,
    progress: &Progress,
) -> anyhow::Result<(Inputs, Option<Cluster>)> {
    progress.status("reading model and data");
    let (reading, begins) = (Arc::clone(config), start.clone());
    let inputs = tokio::task::spawn_blocking(move || read(&reading, &begins)).await;
    let inputs = inputs.context("reading model and data")??;
    let cluster = match config.owner.backend {
        BackendChoice::Encrypted => Some(Cluster::build(config, start, &inputs.model, inputs.digest, progress).await?),
        BackendChoice::Plain => None,
    };
    Ok((inputs, cluster))
}

/// Reads and checks model, data and the checkpoint to go on from. Blocks.
fn read(config: &Config, start: &Start) -> anyhow::Result<Inputs> {
    let (path, data) = (config.model()?, config.data_files()?);
    start.check(&config.owner.out)?;
    let model = Model::open(path)?;
    model.notes().iter().for_each(|note| tracing::warn!("{note}"));
    let (longest, positions) = (config.data.max_tokens, model.config().max_positions);
    if longest > positions {
        tracing::warn!(
            "{} was made for texts of {positions} tokens: what comes after in longer ones is at positions that it never saw \
             (data.max_tokens is {longest})",
            path.display()
        );
    }
    let tokenizer = model.tokenizer()?;
    let mut config = config.clone();
    config.training.lora =
        config.training.lora.with_numbered_tokens(|token| tokenizer.number(token)).context("[training]")?;
    let adapter = adapter::read(&mut config, model.config())?;
    let examples = match config.training.objective.of_pairs() {
        true => Dataset::load_pairs(&data, &config.data, &tokenizer)?,
        false => Dataset::load_files(&data, &config.data, &tokenizer)?,
    };
    tell(&examples, &named(&data), &config.data, &tokenizer);
    let (training, held_out) = examples.split(config.data.held_out, config.training.seed)?;
    ensure!(training.pass() > 0, "the weights under data.files leave nothing to train on; give larger ones");
    config.training = config.training.resolved(training.pass()).context("[training]")?;
    let config = Arc::new(config);
    let digest = model.digest()?;
    let resume = start.checkpoint(&config.owner.out, config.training.lora.values(model.config())?)?;
    let data_seed = match (config.training.data_seed, &resume) {
        (Some(seed), _) => seed,
        (None, Some(found)) => found.checkpoint.state.position.seed,
        (None, None) => fresh_seed().context("no randomness from the operating system")?,
    };
    let mut identity = start::identity(&config, data_seed, digest, training.digest()?, held_out.digest()?)?;
    if let Some(adapter) = &adapter {
        identity = identity.with("adapter to begin with (digest)", adapter.digest()?);
    }
    if let Some(found) = &resume {
        start::refuse_other(found, &identity)?;
    }
    Ok(Inputs { config, model: Arc::new(model), digest, training, held_out, adapter, data_seed, identity, resume })
}

/// Trains and writes the results, also where the training ends early.
async fn train(
    config: &Arc<Config>,
    mut inputs: Inputs,
    start: &Start,
    cluster: Option<&Cluster>,
    progress: &mut Progress,
    stop: &mut StopSignals,
) -> anyhow::Result<()> {
    let out = &config.owner.out;
    let name = model_name::of(config.model()?);
    let sets = cluster.map(Cluster::parameter_sets).unwrap_or_default();
    let report = empty_report(&name, &inputs, sets)?;
    let mut results = Results::create(out, report)?;
    start::check_disk(config, config.training.lora.values(inputs.model.config())?)?;
    progress.status("preparing the model");
    let backend = backend(&inputs, cluster.map(Cluster::backend)).await?;
    let model = trainable(config, &mut inputs, Arc::clone(&backend)).await?;
    let asking = asking(config, &inputs, backend).await?;
    start.make_room(out)?;
    let texts = prefix::Texts {
        model: inputs.model.config(),
        digest: inputs.digest.to_string(),
        training: &inputs.training,
        held_out: &inputs.held_out,
    };
    let model = match prefix::open(config, start, &texts, progress)? {
        Some(prefix) => model.with_prefix(prefix),
        None => model,
    };
    let resume = inputs.resume.take();
    let spent = spending(config.owner.backend, cluster.map(Cluster::clock), resume.as_ref(), asking.clone());
    match &resume {
        Some(found) => go_on(config, found, &mut results, progress),
        None if matches!(start, Start::Resume(_)) => progress.note("there is no checkpoint yet: the run begins"),
        None => {}
    }
    results.begin();
    let checkpoints = CheckpointTarget {
        store: start::store(out, config.checkpoint.keep),
        config: config.checkpoint,
        identity: inputs.identity.clone(),
        notes: Arc::new({
            let spent = Arc::clone(&spent);
            move || spent().to_notes()
        }),
    };
    let settings = TrainerConfig {
        adapter: Some(AdapterTarget { folder: results.adapter(), base_model: name }),
        checkpoints: Some(checkpoints),
        answering: asking
            .clone()
            .map(|asking| -> Answering { Arc::new(move |step, adapters| asking.ask(step, adapters)) }),
        resume: resume.map(|found| found.checkpoint),
        ..TrainerConfig::new(config.training.clone())
    };
    let data = training_data(config, &inputs)?;
    output::print(format_args!(
        "training {} steps, {} {}",
        config.training.steps(),
        inputs.training.units(),
        if config.training.objective.of_pairs() { "pairs" } else { "examples" }
    ));
    let outcome =
        follow(Trainer::launch(settings, model, data)?, asking.as_deref(), &mut results, progress, stop).await;
    if let Some(cluster) = cluster {
        // Nothing may come between the end of a run and its report.
        match cluster.health().await {
            Ok(workers) => results.workers(&workers, inputs.model.config()),
            Err(error) => tracing::warn!("the report does not say what the workers did: {error:#}"),
        }
    }
    let report = results.write(spent())?;
    let outcome = outcome.inspect_err(|_| {
        if start::store(out, 1).list().is_ok_and(|saved| !saved.is_empty()) {
            progress.note("what was learnt is saved: go on from there with --resume");
        }
    })?;
    if !outcome.stopped {
        prefix::close(config)?;
    }
    let stopped = if outcome.stopped { " (stopped early: go on with --resume)" } else { "" };
    output::print(format_args!("{} steps done{stopped}; the results are in {}", outcome.steps, out.display()));
    if let (Some(before), Some(after)) = (report.eval_loss_before, report.eval_loss_after) {
        output::print(format_args!("evaluation loss: {before:.4} before, {after:.4} after"));
    }
    Ok(())
}

/// Says what the run has spent so far, in earlier processes too.
fn spending(
    backend: BackendChoice,
    clock: Option<Arc<PhaseClock>>,
    resume: Option<&Found<TrainState>>,
    asking: Option<Arc<Asking>>,
) -> Arc<dyn Fn() -> Spent + Send + Sync> {
    let earlier = resume.map(|found| Spent::from_notes(&found.checkpoint.state.notes)).unwrap_or_default();
    let started = Instant::now();
    Arc::new(move || {
        let phases = clock.as_ref().map(|clock| clock.read());
        let answers = asking.as_ref().map(|asking| asking.answered()).unwrap_or_default();
        Spent::now(backend, phases, started.elapsed().as_secs_f64()).with_answers(answers).after(&earlier)
    })
}

/// Takes over what the checkpoint says of the run so far.
fn go_on(config: &Config, found: &Found<TrainState>, results: &mut Results, progress: &mut Progress) {
    let state = &found.checkpoint.state;
    results.resume(state);
    progress.resume(state);
    progress.note(&format!("going on after step {}, from {}", state.steps, found.path.display()));
    let before = Spent::from_notes(&state.notes).backend;
    let now = Spent::now(config.owner.backend, None, 0.0).backend;
    if before != now {
        progress.note(&format!("products were computed {before} until then, and are computed {now} from now on"));
    }
}

/// Where products come from: the workers, or the model's own weights.
async fn backend(inputs: &Inputs, encrypted: Option<Arc<dyn LinearBackend>>) -> anyhow::Result<Arc<dyn LinearBackend>> {
    if let Some(encrypted) = encrypted {
        return Ok(encrypted);
    }
    let model = Arc::clone(&inputs.model);
    let plain = tokio::task::spawn_blocking(move || PlainBackend::new(&model));
    Ok(Arc::new(plain.await.context("preparing the model")??))
}

/// What asks the model at each evaluation, if anything is to be asked.
async fn asking(
    config: &Arc<Config>,
    inputs: &Inputs,
    backend: Arc<dyn LinearBackend>,
) -> anyhow::Result<Option<Arc<Asking>>> {
    let (config, model, held_out) = (Arc::clone(config), Arc::clone(&inputs.model), inputs.held_out.clone());
    let begun = tokio::task::spawn_blocking(move || Asking::begin(&config.eval, &held_out, &model, backend));
    Ok(begun.await.context("preparing to ask")??.map(Arc::new))
}

/// The owner's half of the model over its backend.
async fn trainable(
    config: &Arc<Config>,
    inputs: &mut Inputs,
    backend: Arc<dyn LinearBackend>,
) -> anyhow::Result<TrainableModel> {
    let (config, model) = (Arc::clone(config), Arc::clone(&inputs.model));
    let adapter = inputs.adapter.take();
    tokio::task::spawn_blocking(move || {
        let trainable = TrainableModel::new(model, backend, &config.training)?;
        Ok(match adapter {
            Some(adapter) => trainable.starting_from(&adapter, &config.training)?,
            None => trainable,
        })
    })
    .await
    .context("preparing the model")?
}

fn training_data(config: &Config, inputs: &Inputs) -> anyhow::Result<TrainingData> {
    let (batch, pad_to) = (config.training.micro_batch, config.data.pad_to);
    let evaluated = match config.training.eval_batches {
        0 => usize::MAX,
        most => most,
    };
    Ok(TrainingData {
        train: Box::new(Batches::new(&inputs.training, batch, pad_to, inputs.data_seed)),
        evaluation: inputs.held_out.in_order(batch, pad_to).take(evaluated).collect::<Result<_, _>>()?,
    })
}

/// Shows and keeps what the run tells, and stops it at Ctrl-C.
async fn follow(
    mut run: TrainHandle,
    asking: Option<&Asking>,
    results: &mut Results,
    progress: &mut Progress,
    stop: &mut StopSignals,
) -> anyhow::Result<TrainOutcome> {
    let mut stopping = false;
    loop {
        tokio::select! {
            event = run.events.recv() => match event {
                Some(TrainEvent::EvaluationStarted { .. }) => progress.status("evaluating"),
                Some(TrainEvent::Evaluation(evaluation)) => {
                    results.evaluation(&evaluation);
                    progress.evaluation(&evaluation);
                }
                Some(TrainEvent::Answered { step }) => {
                    let told = asking.and_then(|asking| asking.answered().pop());
                    let told = told.filter(|told| told.step as usize == step);
                    told.iter().flat_map(answers::lines).for_each(|line| progress.note(&line));
                }
                Some(TrainEvent::Step(step)) => {
                    results.step(&step);
                    progress.step(&step);
                }
                Some(TrainEvent::Finished { steps, stopped, best }) => {
                    results.finished(best);
                    if !stopped {
                        progress.ended(steps, best);
                    }
                }
                None => break,
            },
            () = stop.next() => {
                if stopping {
                    bail!(stopped_at_once(run.saver()).await);
                }
                stopping = true;
                progress.note("stopping after this step, with everything saved; once more stops at once, with the steps before it saved");
                run.stopper().stop();
                // Now, while there is time: a second signal then finds it done. It is warned of where it cannot be.
                let saver = run.saver();
                drop(tokio::task::spawn_blocking(move || saver.save_or_warn()));
            }
        }
    }
    Ok(run.join().await?)
}

/// Saves the finished steps while another one is under way, and says so.
async fn stopped_at_once(saver: Arc<Saver>) -> String {
    let saved: Result<Option<PathBuf>, String> = match tokio::task::spawn_blocking(move || saver.save()).await {
        Ok(saved) => saved.map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    };
    match saved {
        Ok(Some(path)) => format!("stopped in the middle of a step; the steps before it are in {}", path.display()),
        Ok(None) => "stopped in the middle of the first step; no step was finished since the run began".to_owned(),
        Err(why) => format!("stopped in the middle of a step, and the steps before it cannot be saved: {why}"),
    }
}
