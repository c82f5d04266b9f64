//! Runs that are interrupted and go on: the same numbers, bit for bit.

use std::sync::Barrier;
use std::time::{Duration, Instant};

use super::*;
use crate::checkpoint::{CheckpointConfig, Found, Identity, Store};
use crate::data::{Batches, Dataset, Example};
use crate::lora::NamedToken;

/// Seven texts, so that a step of three times two is never the end of a pass.
pub(super) fn texts() -> Dataset {
    let example = |n: u32| {
        let tokens: Vec<u32> = (0..6 + n % 3).map(|i| (7 * n + i * i) % 40).collect();
        Example { learnt: (0..tokens.len()).map(|i| i > n as usize % 3).collect(), tokens }
    };
    Dataset::from_examples((0..7).map(example).collect(), 0)
}

pub(super) fn training(steps: usize) -> TrainingConfig {
    TrainingConfig {
        steps: Some(steps),
        micro_batch: 2,
        accumulation: 3,
        in_flight: 2,
        learning_rate: 1e-2,
        eval_every: 3,
        lora: LoraConfig { dropout: 0.2, rank: 2, ..LoraConfig::default() },
        ..TrainingConfig::default()
    }
}

/// A checkpoint after so many steps, and none for the time that passes.
pub(super) fn every(save_every: usize) -> CheckpointConfig {
    CheckpointConfig { save_every, save_minutes: 0, keep: 1 }
}

/// How one run over the texts came out.
pub(super) struct Ran {
    pub(super) parameters: Vec<Vec<u32>>,
    pub(super) losses: Vec<f64>,
    evaluated: Vec<usize>,
    pub(super) steps: usize,
    /// The step whose adapters are the result, where it is not the last one, and the loss with the result.
    pub(super) best: Option<usize>,
    pub(super) after: Option<f64>,
    pub(super) error: Option<String>,
}

pub(super) struct Place {
    pub(super) tiny: TinyModel,
    pub(super) folder: tempfile::TempDir,
    store: Store,
}

impl Place {
    pub(super) fn new(keep: usize) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(folder.path().join("checkpoints"), keep);
        Self { tiny: TinyModel::new(), folder, store }
    }

    pub(super) fn checkpoint(&self, step: usize) -> Checkpoint<TrainState> {
        let path = self.store.list().unwrap().into_iter().find(|&(s, _)| s == step).unwrap().1;
        Found::read(&path, 1 << 20).unwrap().checkpoint
    }

    pub(super) fn plain(&self) -> PlainBackend {
        PlainBackend::new(&self.tiny.model).unwrap()
    }

    /// Starts a run that is saved then.
    fn launch(
        &self,
        training: TrainingConfig,
        backend: Arc<dyn LinearBackend>,
        save: CheckpointConfig,
        resume: Option<Checkpoint<TrainState>>,
        notes: Arc<dyn Fn() -> String + Send + Sync>,
    ) -> Result<TrainHandle, TrainError> {
        let model = TrainableModel::new(self.tiny.model.clone(), backend, &training).unwrap();
        self.launch_model(model, training, save, resume, notes)
    }

    pub(super) fn launch_model(
        &self,
        model: TrainableModel,
        training: TrainingConfig,
        save: CheckpointConfig,
        resume: Option<Checkpoint<TrainState>>,
        notes: Arc<dyn Fn() -> String + Send + Sync>,
    ) -> Result<TrainHandle, TrainError> {
        let target = CheckpointTarget { store: self.store.clone(), config: save, identity: Identity::default(), notes };
        // A resumed run takes the order from its checkpoint, whatever the seed.
        let seed = if resume.is_some() { 99 } else { 5 };
        let examples = if training.objective.of_pairs() { preference::pairs() } else { texts() };
        let data = TrainingData {
            train: Box::new(Batches::new(&examples, training.micro_batch, 1, seed)),
            evaluation: examples.in_order(2, 1).map(Result::unwrap).collect(),
        };
        let config = TrainerConfig { checkpoints: Some(target), resume, ..TrainerConfig::new(training) };
        Trainer::launch(config, model, data)
    }

    async fn run(&self, steps: usize, save_every: usize, resume: Option<Checkpoint<TrainState>>) -> Ran {
        let backend = Arc::new(self.plain());
        let handle = self.launch(training(steps), backend, every(save_every), resume, Arc::new(String::new));
        ran(handle.unwrap()).await
    }
}

pub(super) async fn ran(mut handle: TrainHandle) -> Ran {
    let saver = handle.saver();
    let mut evaluated = Vec::new();
    while let Some(event) = handle.events.recv().await {
        if let TrainEvent::Evaluation(report) = event {
            evaluated.push(report.step);
        }
    }
    let (error, parameters, best, after) = match handle.join().await {
        Ok(outcome) => (None, outcome.model.adapters.parameters(), outcome.best, outcome.evaluation_after),
        Err(error) => (Some(error.to_string()), Vec::new(), None, None),
    };
    let bits = |var: &candle_core::Var| {
        var.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().map(|value| value.to_bits()).collect()
    };
    let state = saver.state().clone();
    let losses = state.history.iter().map(|step| step.loss).chain(state.evaluations.iter().map(|e| e.loss));
    let parameters = parameters.iter().map(bits).collect();
    Ran { parameters, losses: losses.collect(), evaluated, steps: state.steps, best, after, error }
}

#[actix::test]
async fn a_run_resumed_after_any_step_is_the_run_that_was_not_interrupted() {
    let (whole, place) = (Place::new(100), Place::new(1));
    let uninterrupted = whole.run(7, 1, None).await;
    assert_eq!((uninterrupted.losses.len(), &uninterrupted.evaluated), (7 + 4, &vec![0, 3, 6, 7]));
    for step in 0..=7 {
        let resumed = place.run(7, 0, Some(whole.checkpoint(step))).await;
        assert_eq!(resumed.parameters, uninterrupted.parameters, "after step {step}");
        assert_eq!(resumed.losses, uninterrupted.losses, "after step {step}");
        // The evaluation of that very step is in its checkpoint.
        let left: Vec<usize> = [0, 3, 6, 7].into_iter().filter(|&evaluated| evaluated > step).collect();
        assert_eq!(resumed.evaluated, left, "after step {step}");
    }
}

#[actix::test]
async fn trained_embeddings_go_on_with_the_rest() {
    let place = Place::new(100);
    let tokens = [1, 5, 11].map(NamedToken::Number).to_vec();
    let lora = LoraConfig { trainable_token_indices: tokens, ..training(4).lora };
    let run = |resume| {
        let training = TrainingConfig { lora: lora.clone(), ..training(4) };
        place.launch(training, Arc::new(place.plain()), every(1), resume, Arc::new(String::new)).unwrap()
    };
    let whole = ran(run(None)).await;
    // The last of the parameters are the embeddings, which begin as the model's.
    let begun: Vec<u32> = place.tiny.model.embed(&[1, 5, 11]).unwrap().iter().map(|value| value.to_bits()).collect();
    let learnt = whole.parameters.last().unwrap();
    assert!(learnt.len() == begun.len() && learnt.iter().zip(&begun).filter(|(a, b)| a != b).count() > begun.len() / 2);
    let resumed = ran(run(Some(place.checkpoint(2)))).await;
    assert_eq!((resumed.parameters, resumed.losses), (whole.parameters, whole.losses));
}

#[actix::test]
async fn a_stopped_run_and_a_failed_one_go_on_from_their_last_step() {
    let place = Place::new(2);
    let uninterrupted = Place::new(1).run(6, 0, None).await;
    let mut handle =
        place.launch(training(6), Arc::new(place.plain()), every(0), None, Arc::new(|| "noted".into())).unwrap();
    while !matches!(handle.events.recv().await, Some(TrainEvent::Step(_))) {}
    handle.stopper().stop();
    assert!(handle.join().await.unwrap().steps < 6, "it is stopped");
    let stopped = place.store.latest::<TrainState>(1 << 20).unwrap().unwrap().checkpoint;
    assert!(stopped.state.steps >= 1 && stopped.state.notes == "noted");

    // It fails in its second step, or in the evaluation before: a step is 3 micro-batches of 15 products.
    let left = AtomicUsize::new(3 * 15 + 20);
    let failing = Arc::new(Failing { plain: place.plain(), left });
    let handle = place.launch(training(6), failing, every(0), Some(stopped), Arc::new(String::new)).unwrap();
    assert!(ran(handle).await.error.is_some_and(|error| error.contains("every worker is gone")));
    let failed = place.store.latest::<TrainState>(1 << 20).unwrap().unwrap().checkpoint;
    assert!(failed.state.steps >= 2);
    let resumed = place.run(6, 0, Some(failed)).await;
    assert_eq!((resumed.parameters, resumed.losses), (uninterrupted.parameters, uninterrupted.losses));
}

/// Stops in its `at`th product until both sides of a barrier are there, twice.
struct Held {
    plain: PlainBackend,
    calls: AtomicUsize,
    at: usize,
    barrier: Arc<Barrier>,
}

impl LinearBackend for Held {
    fn apply(&self, product: ProductId, rows: Arc<Buffer>, n: usize) -> Result<Product, BackendError> {
        if self.calls.fetch_add(1, Ordering::Relaxed) == self.at {
            self.barrier.wait();
            self.barrier.wait();
        }
        self.plain.apply(product, rows, n)
    }
}

#[actix::test]
async fn finished_steps_are_saved_while_the_next_one_is_under_way() {
    let place = Place::new(1);
    let uninterrupted = Place::new(1).run(4, 0, None).await;
    let barrier = Arc::new(Barrier::new(2));
    // The evaluation is 4 micro-batches of 8 products; then two steps and half a one.
    let at = 4 * 8 + 2 * 3 * 15 + 20;
    let held = Held { plain: place.plain(), calls: AtomicUsize::new(0), at, barrier: barrier.clone() };
    let handle = place.launch(training(4), Arc::new(held), every(0), None, Arc::new(String::new)).unwrap();
    let saver = handle.saver();
    let saved = tokio::task::spawn_blocking(move || {
        barrier.wait();
        let saved = saver.save().unwrap();
        assert_eq!(saver.save().unwrap(), saved, "there is nothing new to save");
        barrier.wait();
        saved
    });
    let path = saved.await.unwrap().unwrap();
    let checkpoint = Found::<TrainState>::read(&path, 1 << 20).unwrap().checkpoint;
    assert_eq!(checkpoint.state.steps, 2);
    assert_eq!(ran(handle).await.parameters, uninterrupted.parameters);
    assert_eq!(place.run(4, 0, Some(checkpoint)).await.parameters, uninterrupted.parameters);
}

#[actix::test]
async fn minutes_are_those_since_the_last_checkpoint() {
    let (place, barrier, before) = (Place::new(1), Arc::new(Barrier::new(2)), Instant::now());
    // As above: two steps after the evaluation, with which the last checkpoint was made.
    let at = 4 * 8 + 2 * 3 * 15 + 20;
    let held = Held { plain: place.plain(), calls: AtomicUsize::new(0), at, barrier: barrier.clone() };
    let save = CheckpointConfig { save_every: 0, save_minutes: 5, keep: 1 };
    let handle = place.launch(training(4), Arc::new(held), save, None, Arc::new(String::new)).unwrap();
    let (saver, store) = (handle.saver(), place.store.clone());
    let newest = tokio::task::spawn_blocking(move || {
        barrier.wait();
        let minutes = Duration::from_secs(5 * 60);
        let newest = [before + minutes, Instant::now() + minutes].map(|now| {
            saver.after_step(now);
            store.list().unwrap()[0].0
        });
        barrier.wait();
        newest
    });
    assert_eq!(
        newest.await.unwrap(),
        [0, 2],
        "the last steps with a checkpoint just before the minutes are over, and after"
    );
    assert_eq!(ran(handle).await.error, None);
}

#[actix::test]
async fn a_full_disk_stops_no_run_and_is_tried_again() {
    let place = Place::new(1);
    // A file where the folder should be: nothing can be written there until it is gone.
    let folder = place.store.folder().to_owned();
    std::fs::write(&folder, b"full").unwrap();
    let attempts = Arc::new(AtomicUsize::new(0));
    let notes = {
        let (attempts, folder) = (attempts.clone(), folder.clone());
        move || {
            // The evaluation before the first step, then that and the second one, although only every fourth is due.
            if attempts.fetch_add(1, Ordering::Relaxed) == 2 {
                std::fs::remove_file(&folder).unwrap();
            }
            String::new()
        }
    };
    let handle = place.launch(training(4), Arc::new(place.plain()), every(4), None, Arc::new(notes)).unwrap();
    assert_eq!(ran(handle).await.error, None);
    assert_eq!(place.store.list().unwrap()[0].0, 4);
    // The three, after the evaluation of step 3, after step 4 and after its evaluation.
    assert_eq!(attempts.load(Ordering::Relaxed), 6);
}

#[actix::test]
async fn a_checkpoint_of_other_adapters_is_refused() {
    let place = Place::new(9);
    place.run(1, 1, None).await;
    let mut other = training(1);
    other.lora.rank = 3;
    let launched =
        place.launch(other, Arc::new(place.plain()), every(1), Some(place.checkpoint(1)), Arc::new(String::new));
    let error = launched.err().unwrap().to_string();
    assert!(error.contains("other adapters") && error.contains("parameter.0"), "{error}");
}
