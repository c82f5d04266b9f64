//! Whole runs of the trainer on a tiny random model.

#![allow(clippy::unwrap_used)]

mod padding;
mod preference;
mod prefix;
mod resume;
mod stopping;

use std::sync::atomic::AtomicUsize;

use protocol::buffer::Buffer;
use protocol::ids::ProductId;

use super::*;
use crate::adapter;
use crate::backend::{BackendError, PlainBackend, Product};
use crate::data::{DataError, IGNORED, Position};
use crate::lora::{Layers, LoraConfig};
use crate::testing::TinyModel;

/// Sequences of a language in which each token is followed by its successor's double.
fn micro_batch(first: u32, batch: usize) -> MicroBatch {
    let (length, vocabulary) = (8, 40);
    let sequence = |first: u32| std::iter::successors(Some(first % vocabulary), |t| Some((2 * t + 2) % vocabulary));
    let lengths = vec![length; batch];
    let mut micro_batch = MicroBatch::new([], 0, 1);
    micro_batch.lengths = lengths;
    for s in 0..batch as u32 {
        micro_batch.tokens.extend(sequence(first + s).take(length));
        // Sequences carry loss on different numbers of tokens, so that averages must be weighted.
        let ignored = (first + s) as usize % 4;
        micro_batch.targets.extend((0..ignored).map(|_| IGNORED));
        micro_batch.targets.extend(sequence(first + s).skip(1 + ignored).take(length - ignored));
    }
    micro_batch
}

/// Micro-batches of so many sequences, one after the other, up to an end.
struct Sequences {
    batch: usize,
    next: Position,
    end: usize,
}

impl BatchSource for Sequences {
    fn next_batch(&mut self) -> Result<Option<MicroBatch>, DataError> {
        let first = self.next.index;
        self.next.index += 1;
        Ok((first < self.end).then(|| micro_batch((first * self.batch) as u32, self.batch)))
    }

    fn position(&self) -> Position {
        self.next
    }

    fn seek(&mut self, position: Position) {
        self.next = position;
    }
}

fn sequences(batch: usize, end: usize) -> Box<dyn BatchSource> {
    Box::new(Sequences { batch, next: Position::default(), end })
}

fn data(batch: usize) -> TrainingData {
    TrainingData { train: sequences(batch, usize::MAX), evaluation: (0..5).map(|n| micro_batch(7 * n, 2)).collect() }
}

fn config(steps: usize) -> TrainingConfig {
    TrainingConfig {
        steps: Some(steps),
        micro_batch: 1,
        accumulation: 4,
        in_flight: 1,
        learning_rate: 2e-2,
        seed: 3,
        lora: LoraConfig { rank: 4, ..LoraConfig::default() },
        ..TrainingConfig::default()
    }
}

fn launch(
    tiny: &TinyModel,
    backend: Arc<dyn LinearBackend>,
    training: TrainingConfig,
    data: TrainingData,
) -> TrainHandle {
    let model = TrainableModel::new(tiny.model.clone(), backend, &training).unwrap();
    Trainer::launch(TrainerConfig::new(training), model, data).unwrap()
}

async fn run(training: TrainingConfig, data: TrainingData) -> (Vec<TrainEvent>, TrainOutcome) {
    let tiny = TinyModel::new();
    let mut handle = launch(&tiny, Arc::new(PlainBackend::new(&tiny.model).unwrap()), training, data);
    let mut events = Vec::new();
    while let Some(event) = handle.events.recv().await {
        events.push(event);
    }
    (events, handle.join().await.unwrap())
}

fn losses(events: &[TrainEvent]) -> Vec<f64> {
    let loss = |event: &TrainEvent| match event {
        TrainEvent::Step(step) => Some(step.loss),
        TrainEvent::Evaluation(evaluation) => Some(evaluation.loss),
        _ => None,
    };
    events.iter().filter_map(loss).collect()
}

#[actix::test]
async fn learns_and_reports_each_step() {
    let (events, outcome) = run(TrainingConfig { eval_every: 10, eval_batches: 3, ..config(25) }, data(1)).await;
    let (before, after) = (outcome.evaluation_before.unwrap(), outcome.evaluation_after.unwrap());
    assert!(after < 0.5 * before, "{before} to {after}");
    assert!(!outcome.stopped && outcome.steps == 25);
    let steps: Vec<&StepReport> =
        events.iter().filter_map(|event| if let TrainEvent::Step(step) = event { Some(step) } else { None }).collect();
    assert!(steps.iter().map(|step| step.step).eq(1..=25));
    assert!(steps.iter().all(|step| step.tokens == 32 && step.loss_tokens == 26 && step.gradient_norm > 0.0));
    let evaluations = events.iter().filter_map(|event| match event {
        TrainEvent::Evaluation(evaluation) => Some(evaluation.step),
        _ => None,
    });
    assert!(evaluations.eq([0, 10, 20, 25]));
    let started = |event: &&TrainEvent| matches!(event, TrainEvent::EvaluationStarted { micro_batches: 3, .. });
    assert_eq!(events.iter().filter(started).count(), 4);
    assert_eq!(events.last(), Some(&TrainEvent::Finished { steps: 25, stopped: false, best: None }));
}

#[actix::test]
async fn the_same_seed_gives_the_same_losses_however_many_are_in_flight() {
    let with_dropout = |in_flight, seed| {
        let lora = LoraConfig { dropout: 0.2, rank: 4, ..LoraConfig::default() };
        TrainingConfig { in_flight, seed, lora, ..config(4) }
    };
    let (first, _) = run(with_dropout(1, 3), data(1)).await;
    for in_flight in [0, 1, 3] {
        assert_eq!(losses(&first), losses(&run(with_dropout(in_flight, 3), data(1)).await.0));
    }
    assert_ne!(losses(&first), losses(&run(with_dropout(1, 4), data(1)).await.0));
}

#[actix::test]
async fn accumulated_micro_batches_are_one_large_batch() {
    let (small, _) = run(config(5), data(1)).await;
    let (large, _) = run(TrainingConfig { micro_batch: 4, accumulation: 1, ..config(5) }, data(4)).await;
    for (small, large) in losses(&small).into_iter().zip(losses(&large)) {
        assert!((small / large - 1.0).abs() < 1e-4, "{small} and {large}");
    }
}

#[actix::test]
async fn strands_of_a_micro_batch_learn_what_it_learns() {
    let whole = TrainingConfig { micro_batch: 4, accumulation: 2, strands: 1, ..config(5) };
    let (expected, _) = run(whole.clone(), data(4)).await;
    for strands in [2, 3, 4, 9] {
        let (found, _) = run(TrainingConfig { strands, ..whole.clone() }, data(4)).await;
        for (found, expected) in losses(&found).into_iter().zip(losses(&expected)) {
            assert!((found / expected - 1.0).abs() < 1e-5, "{found} and {expected}");
        }
    }
}

/// Fails after so many products.
struct Failing {
    plain: PlainBackend,
    left: AtomicUsize,
}

impl LinearBackend for Failing {
    fn apply(&self, product: ProductId, rows: Arc<Buffer>, n: usize) -> Result<Product, BackendError> {
        match self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)) {
            Ok(_) => self.plain.apply(product, rows, n),
            Err(_) => Err(BackendError { product, why: "every worker is gone".into() }),
        }
    }
}

#[actix::test]
async fn a_run_that_is_stopped_or_fails_leaves_the_adapter_of_its_last_step() {
    let tiny = TinyModel::new();
    let folder = tempfile::tempdir().unwrap();
    let start = |name: &str, products: usize| {
        let backend = Failing { plain: PlainBackend::new(&tiny.model).unwrap(), left: AtomicUsize::new(products) };
        let training = config(1000);
        let model = TrainableModel::new(tiny.model.clone(), Arc::new(backend), &training).unwrap();
        let adapter = Some(AdapterTarget { folder: folder.path().join(name), base_model: "tiny".into() });
        let data = TrainingData { evaluation: Vec::new(), ..data(1) };
        Trainer::launch(TrainerConfig { adapter, ..TrainerConfig::new(training) }, model, data).unwrap()
    };

    let mut stopped = start("stopped", usize::MAX);
    let first = stopped.events.recv().await.unwrap();
    assert!(matches!(first, TrainEvent::Step(StepReport { step: 1, .. })), "{first:?}");
    stopped.stopper().stop();
    let outcome = stopped.join().await.unwrap();
    assert!(outcome.stopped && outcome.steps >= 1 && outcome.steps < 1000);
    let saved = adapter::load(&folder.path().join("stopped"), tiny.config()).unwrap();
    for (saved, trained) in saved.parameters().iter().zip(outcome.model.adapters.parameters()) {
        let values = |var: &candle_core::Var| var.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(values(saved), values(&trained));
    }

    // A step is 4 micro-batches of 8 products forward and 7 backward.
    for (name, products, saved) in [("fails-late", 4 * 15 + 20, true), ("fails-early", 20, false)] {
        let error = start(name, products).join().await.err().unwrap().to_string();
        assert!(error.contains("every worker is gone"), "{error}");
        assert_eq!(adapter::load(&folder.path().join(name), tiny.config()).is_ok(), saved, "{name}");
        assert_eq!(folder.path().join(name).exists(), saved, "{name}");
    }
}

#[actix::test]
async fn data_that_ends_and_settings_that_cannot_be_are_errors() {
    let tiny = TinyModel::new();
    let backend = Arc::new(PlainBackend::new(&tiny.model).unwrap());
    let few = TrainingData { train: sequences(1, 6), evaluation: Vec::new() };
    let error = launch(&tiny, backend.clone(), config(5), few).join().await.err().unwrap();
    assert!(matches!(error, TrainError::DataEnded { step: 2 }), "{error}");
    let error = TrainableModel::new(tiny.model.clone(), backend, &TrainingConfig { steps: Some(0), ..config(1) })
        .err()
        .unwrap();
    assert!(error.to_string().starts_with("steps is 0"), "{error}");
    let lora = LoraConfig { layers: Layers::Top(3), ..LoraConfig::default() };
    let backend = Arc::new(PlainBackend::new(&tiny.model).unwrap());
    let error = TrainableModel::new(tiny.model.clone(), backend, &TrainingConfig { lora, ..config(1) }).err().unwrap();
    assert!(error.to_string().starts_with("lora.layers asks for the top 3"), "{error}");
}
