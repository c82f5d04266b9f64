//! Runs that learn what is preferred.

use std::sync::Mutex;

use candle_core::{Device, Tensor};
use protocol::ids::{Direction, Group};

use super::resume::{Place, every, ran, training};
use super::*;
use crate::data::{Dataset, Example};
use crate::lora::Draw;
use crate::testing::nudge;
use crate::trainer::scoring::Scoring;

const DRAW: Draw = Draw { seed: 5, step: 0, micro_batch: 0 };

/// Five pairs, of which the preferred answers go up and the others down.
pub(super) fn pairs() -> Dataset {
    let answer = |n: u32, up: bool| {
        let length = 7 + n % 3;
        let token = |i: u32| if up { (n + i) % 40 } else { (n + 40 - i % 40) % 40 };
        let tokens: Vec<u32> = (0..length).map(|i| if i < 3 { n } else { token(i) }).collect();
        Example { learnt: (0..length).map(|i| i >= 3).collect(), tokens }
    };
    Dataset::from_pairs((0..5).map(|n| (answer(n, true), answer(n, false))).collect(), 0)
}

fn preferring(objective: Objective, steps: usize) -> TrainingConfig {
    TrainingConfig { objective, beta: Some(0.5), ..training(steps) }
}

#[test]
fn gradients_of_preferences_are_finite_differences() {
    let tiny = TinyModel::new();
    let batch = pairs().in_order(3, 8).next().unwrap().unwrap();
    for objective in [Objective::Dpo, Objective::Orpo] {
        let config =
            TrainingConfig { lora: LoraConfig { rank: 2, ..LoraConfig::default() }, ..preferring(objective, 1) };
        let model = TrainableModel::new(tiny.model.clone(), Arc::new(PlainBackend::new(&tiny.model).unwrap()), &config);
        let model = model.unwrap();
        let parameters = model.adapters.parameters();
        parameters.iter().enumerate().for_each(|(i, var)| nudge(var, i as u64, 0.1));
        let scoring = Scoring::new(&model, config.preference(), ReferenceCosts::new(), 1);
        let reference = scoring.reference(0, &batch).unwrap();
        let loss = || {
            let costs = model.llama.costs(&batch, Some(&model.adapters), true).unwrap();
            scoring.judge(&batch, &costs, &reference).0.loss
        };
        let weigh = |costs: &[f64]| scoring.judge(&batch, costs, &reference).1;
        let (_, gradients) = model.llama.weighted_gradient(&batch, &model.adapters, DRAW, 0.0, weigh).unwrap();
        for (index, (var, gradient)) in parameters.into_iter().zip(gradients).enumerate() {
            let gradient = Tensor::from_vec(gradient, var.shape(), &Device::Cpu).unwrap();
            let norm = f64::from(gradient.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt());
            assert!(norm > 1e-4, "parameter {index} has no gradient");
            let (start, step) = (var.as_tensor().copy().unwrap(), 1e-2);
            let along = (gradient / norm).unwrap();
            let moved = |by: f64| {
                var.set(&(&start + (&along * by).unwrap()).unwrap()).unwrap();
                loss()
            };
            let measured = (moved(step) - moved(-step)) / (2.0 * step);
            moved(0.0);
            // Costs of some hundred nats are known to a few parts in a million.
            assert!(
                (measured - norm).abs() < 0.02 * norm + 4e-3,
                "{objective:?}, parameter {index}: {measured} for {norm}"
            );
        }
    }
}

#[actix::test]
async fn what_is_preferred_is_learnt() {
    for objective in [Objective::Dpo, Objective::Orpo] {
        let training = TrainingConfig { learning_rate: 2e-2, ..preferring(objective, 20) };
        let data = TrainingData {
            train: Box::new(crate::data::Batches::new(&pairs(), 2, 1, 5)),
            evaluation: pairs().in_order(2, 1).map(Result::unwrap).collect(),
        };
        let (events, outcome) = run(training, data).await;
        let reports = events.iter().filter_map(|event| match event {
            TrainEvent::Evaluation(report) => Some((report.loss, report.preference.unwrap())),
            _ => None,
        });
        let reports: Vec<(f64, PreferenceReport)> = reports.collect();
        let ((before, first), (after, last)) = (reports[0], reports[reports.len() - 1]);
        if objective == Objective::Dpo {
            assert!((before - 2f64.ln()).abs() < 1e-6 && first.margin().abs() < 1e-5, "{before}, {first:?}");
        }
        assert!(after < 0.7 * before, "{objective:?}: {before} to {after}");
        assert!(last.accuracy == 1.0 && last.margin() > first.margin() + 0.3, "{objective:?}: {first:?} to {last:?}");
        assert_eq!(outcome.evaluation_after, Some(after));
        assert!(events.iter().all(|event| !matches!(event, TrainEvent::Step(StepReport { preference: None, .. }))));
    }
}

#[actix::test]
async fn a_resumed_run_of_preferences_is_the_run_that_was_not_interrupted() {
    for objective in [Objective::Dpo, Objective::Orpo] {
        let (whole, place) = (Place::new(100), Place::new(1));
        let run = async |place: &Place, save, resume| {
            let model =
                TrainableModel::new(place.tiny.model.clone(), Arc::new(place.plain()), &preferring(objective, 5));
            let launched = place.launch_model(
                model.unwrap(),
                preferring(objective, 5),
                every(save),
                resume,
                Arc::new(String::new),
            );
            ran(launched.unwrap()).await
        };
        let uninterrupted = run(&whole, 1, None).await;
        assert_eq!(uninterrupted.losses.len(), 5 + 3);
        for step in 0..=5 {
            let resumed = run(&place, 0, Some(whole.checkpoint(step))).await;
            assert_eq!(resumed.parameters, uninterrupted.parameters, "{objective:?} after step {step}");
            assert_eq!(resumed.losses, uninterrupted.losses, "{objective:?} after step {step}");
        }
        let references = whole.checkpoint(5).state.references;
        let expected = if objective == Objective::Dpo { 5 } else { 0 };
        assert_eq!((references.train.len(), references.evaluation.len()), (expected, expected));
    }
}

/// Adds up the rows that go forward through the first layer.
struct Counting(PlainBackend, Mutex<usize>);

impl LinearBackend for Counting {
    fn apply(&self, product: ProductId, rows: Arc<Buffer>, n: usize) -> Result<Product, BackendError> {
        let linear = product.linear;
        if product.direction == Direction::Forward && linear.group == Group::Qkv && linear.layer == 0 {
            *self.1.lock().unwrap() += n;
        }
        self.0.apply(product, rows, n)
    }
}

#[actix::test]
async fn the_reference_sees_each_pair_once_and_is_what_the_run_began_with() {
    let tiny = TinyModel::new();
    let backend = Arc::new(Counting(PlainBackend::new(&tiny.model).unwrap(), Mutex::new(0)));
    let tokens: usize = pairs().lengths().sum();
    let earlier = crate::lora::LoraAdapters::new(tiny.config(), &training(1).lora, 1).unwrap();
    earlier.parameters().iter().enumerate().for_each(|(i, var)| nudge(var, i as u64, 0.3));
    for (reference, separates) in [(Reference::Start, false), (Reference::Base, true)] {
        // Three passes over five pairs, one at a time.
        let training = TrainingConfig {
            micro_batch: 1,
            accumulation: 5,
            reference: Some(reference),
            lora: LoraConfig { dropout: 0.0, ..training(3).lora },
            ..preferring(Objective::Dpo, 3)
        };
        let earlier_config = crate::lora::LoraAdapters::new(tiny.config(), &training.lora, 1).unwrap();
        earlier_config.set(&earlier).unwrap();
        let model = TrainableModel::new(tiny.model.clone(), backend.clone(), &training).unwrap();
        let model = model.starting_from(&earlier_config, &training).unwrap();
        let data =
            TrainingData { train: Box::new(crate::data::Batches::new(&pairs(), 1, 1, 5)), evaluation: Vec::new() };
        *backend.1.lock().unwrap() = 0;
        let mut handle = Trainer::launch(TrainerConfig::new(training), model, data).unwrap();
        let mut first = None;
        while let Some(event) = handle.events.recv().await {
            if let TrainEvent::Step(step) = event {
                first.get_or_insert(step);
            }
        }
        handle.join().await.unwrap();
        assert_eq!(*backend.1.lock().unwrap(), (3 + 1) * tokens, "three passes and one of the reference");
        let loss = first.unwrap().loss;
        assert_eq!((loss - 2f64.ln()).abs() > 1e-3, separates, "{reference:?}: {loss}");
    }
}

#[actix::test]
async fn texts_are_no_pairs() {
    let tiny = TinyModel::new();
    let backend = Arc::new(PlainBackend::new(&tiny.model).unwrap());
    let error = launch(&tiny, backend, preferring(Objective::Dpo, 1), data(1)).join().await.err().unwrap().to_string();
    assert!(error.contains("no pairs"), "{error}");
}
