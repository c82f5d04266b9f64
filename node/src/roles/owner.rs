//! An owner: reads model and data, finds workers, trains, and writes the results.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use actors::backend::{LinearBackend, PlainBackend};
use actors::data::{Batches, Dataset};
use actors::trainer::{
    AdapterTarget, TrainEvent, TrainHandle, TrainOutcome, TrainableModel, Trainer, TrainerConfig, TrainingConfig,
    TrainingData,
};
use anyhow::{Context as _, bail, ensure};
use protocol::ids::ModelDigest;
use protocol::model::Model;

use super::cluster::Cluster;
use super::progress::Progress;
use super::results::{Results, empty_report};
use super::stop::StopSignals;
use crate::config::{BackendChoice, Config};

/// What an owner begins with: all that can be wrong with it is found before a worker is asked for anything.
struct Inputs {
    model: Arc<Model>,
    digest: ModelDigest,
    training: Dataset,
    held_out: Dataset,
}

/// Runs an owner to the end of its training, or to Ctrl-C.
///
/// # Errors
/// Whatever is wrong with its inputs, and whatever stops the training; the adapter is saved as far as it got.
pub async fn run(config: Config) -> anyhow::Result<()> {
    let config = Arc::new(config);
    let mut progress = Progress::new(config.training.steps);
    let mut stop = StopSignals::listen()?;
    let (inputs, cluster) = tokio::select! {
        prepared = prepare(&config, &progress) => prepared?,
        () = stop.next() => bail!("stopped before the training began; nothing was written"),
    };
    let trained = train(&config, &inputs, cluster.as_ref(), &mut progress, &mut stop).await;
    progress.finish();
    if let Some(cluster) = cluster {
        cluster.stop().await;
    }
    trained
}

/// Reads the inputs and, for encrypted training, gathers the workers.
async fn prepare(config: &Arc<Config>, progress: &Progress) -> anyhow::Result<(Inputs, Option<Cluster>)> {
    progress.status("reading model and data");
    let reading = Arc::clone(config);
    let inputs = tokio::task::spawn_blocking(move || read(&reading)).await.context("reading model and data")??;
    let cluster = match config.owner.backend {
        BackendChoice::Encrypted => Some(Cluster::build(config, &inputs.model, inputs.digest, progress).await?),
        BackendChoice::Plain => None,
    };
    Ok((inputs, cluster))
}

/// Reads and checks model and data. Blocks.
fn read(config: &Config) -> anyhow::Result<Inputs> {
    let (path, data) = (config.model()?, config.data()?);
    let model = Model::open(path)?;
    let tokenizer = model.tokenizer()?;
    let examples = Dataset::load(data, &config.data, &tokenizer)?;
    report_cuts(&examples, data, config.data.max_tokens);
    let (training, held_out) = examples.split(config.data.held_out, config.training.seed)?;
    let digest = model.digest()?;
    Ok(Inputs { model: Arc::new(model), digest, training, held_out })
}

/// Says which examples were not used as they are.
fn report_cuts(examples: &Dataset, data: &Path, max_tokens: usize) {
    let data = data.display();
    if examples.truncated > 0 {
        tracing::warn!("{} examples of {data} were cut to {max_tokens} tokens (data.max_tokens)", examples.truncated);
    }
    if let Some(first) = examples.left_out.first() {
        tracing::warn!(
            "{} examples of {data} are left out, since {max_tokens} tokens leave nothing of them to learn; the first \
             is on line {first}",
            examples.left_out.len(),
        );
    }
}

/// Trains and writes the results, also where the training ends early.
async fn train(
    config: &Arc<Config>,
    inputs: &Inputs,
    cluster: Option<&Cluster>,
    progress: &mut Progress,
    stop: &mut StopSignals,
) -> anyhow::Result<()> {
    let path = config.model()?;
    let sets = cluster.map(Cluster::parameter_sets).unwrap_or_default();
    let report = empty_report(path, inputs.digest.to_string(), config.owner.backend, sets, config.training.seed);
    let mut results = Results::create(&config.owner.out, report)?;
    progress.status("preparing the model");
    let model = trainable(config, inputs, cluster.map(Cluster::backend)).await?;
    let settings = TrainerConfig {
        training: config.training.clone(),
        adapter: Some(AdapterTarget { folder: results.adapter(), base_model: path.display().to_string() }),
    };
    let data = training_data(&config.training, inputs);
    println!("training {} steps, {} examples", config.training.steps, inputs.training.examples().len());
    let started = Instant::now();
    let outcome = follow(Trainer::launch(settings, model, data)?, &mut results, progress, stop).await;
    let seconds = started.elapsed().as_secs_f64();
    match cluster {
        Some(cluster) => results.encrypted(cluster.times(), seconds, &cluster.health().await?),
        None => results.plain(seconds),
    }
    let report = results.write()?;
    let outcome = outcome?;
    let stopped = if outcome.stopped { " (stopped early)" } else { "" };
    println!("{} steps done{stopped}; the results are in {}", outcome.steps, config.owner.out.display());
    if let (Some(before), Some(after)) = (report.eval_loss_before, report.eval_loss_after) {
        println!("evaluation loss: {before:.4} before, {after:.4} after");
    }
    Ok(())
}

/// The owner's half of the model over its backend.
async fn trainable(
    config: &Arc<Config>,
    inputs: &Inputs,
    encrypted: Option<Arc<dyn LinearBackend>>,
) -> anyhow::Result<TrainableModel> {
    let (config, model) = (Arc::clone(config), Arc::clone(&inputs.model));
    tokio::task::spawn_blocking(move || {
        let backend = match encrypted {
            Some(backend) => backend,
            None => Arc::new(PlainBackend::new(&model)?),
        };
        Ok(TrainableModel::new(model, backend, &config.training)?)
    })
    .await
    .context("preparing the model")?
}

fn training_data(config: &TrainingConfig, inputs: &Inputs) -> TrainingData {
    TrainingData {
        train: Box::new(Batches::new(&inputs.training, config.micro_batch, None, config.seed)),
        evaluation: inputs.held_out.in_order(config.micro_batch).collect(),
    }
}

/// Shows and keeps what the run tells, and stops it at Ctrl-C.
async fn follow(
    mut run: TrainHandle,
    results: &mut Results,
    progress: &mut Progress,
    stop: &mut StopSignals,
) -> anyhow::Result<TrainOutcome> {
    let mut stopping = false;
    loop {
        tokio::select! {
            event = run.events.recv() => match event {
                Some(TrainEvent::EvaluationStarted { .. }) => progress.status("evaluating"),
                Some(TrainEvent::Evaluation { step, loss, .. }) => {
                    results.evaluation(step, loss);
                    progress.evaluation(step, loss);
                }
                Some(TrainEvent::Step(step)) => {
                    results.step(&step);
                    progress.step(&step);
                }
                Some(TrainEvent::Finished { .. }) => {}
                None => break,
            },
            () = stop.next() => {
                ensure!(!stopping, "stopped in the middle of a step: its adapter is not saved");
                stopping = true;
                progress.note("stopping after this step, with the adapter saved; once more stops at once");
                run.stopper().stop();
            }
        }
    }
    Ok(run.join().await?)
}
