//! Runs that end before their last step, and with adapters that are not their last.

use super::resume::{Place, Ran, every, ran, training};
use super::*;
use crate::checkpoint::Checkpoint;

/// An evaluation after every step, of which two in a row may be in vain. The rate is so large that they soon are.
fn impatient() -> TrainingConfig {
    let schedule = Schedule::Constant;
    TrainingConfig { learning_rate: 0.1, schedule, eval_every: 1, early_stopping_patience: Some(2), ..training(40) }
}

async fn run(place: &Place, training: TrainingConfig, save: usize, resume: Option<Checkpoint<TrainState>>) -> Ran {
    let model = TrainableModel::new(place.tiny.model.clone(), Arc::new(place.plain()), &training).unwrap();
    ran(place.launch_model(model, training, every(save), resume, Arc::new(String::new)).unwrap()).await
}

/// The parameters that a checkpoint has under a name.
fn kept(mut checkpoint: Checkpoint<TrainState>, kind: &str, count: usize) -> Vec<Vec<u32>> {
    let bits =
        |index| checkpoint.take(&format!("{kind}.{index}")).unwrap().iter().map(|value| value.to_bits()).collect();
    (0..count).map(bits).collect()
}

#[actix::test]
async fn a_run_that_is_no_longer_better_ends_with_its_best_adapters() {
    let (whole, place) = (Place::new(100), Place::new(1));
    let stopped = run(&whole, impatient(), 1, None).await;
    let best = stopped.best.unwrap();
    assert!(best > 0 && stopped.steps == best + 2 && stopped.steps < 40, "{best} of {}", stopped.steps);
    assert_eq!(stopped.error, None);
    let count = stopped.parameters.len();
    assert_eq!(stopped.parameters, kept(whole.checkpoint(best), "parameter", count));
    // The evaluations are behind the steps' losses, the untouched model's first.
    let evaluations = &stopped.losses[stopped.steps..];
    assert!(evaluations.iter().all(|&loss| loss >= evaluations[best]));
    assert_eq!(stopped.after, Some(evaluations[best]));

    for step in [0, best - 1, best, best + 1, best + 2] {
        let resumed = run(&place, impatient(), 0, Some(whole.checkpoint(step))).await;
        assert_eq!((resumed.best, resumed.steps), (Some(best), best + 2), "after step {step}");
        assert_eq!(resumed.parameters, stopped.parameters, "after step {step}");
        assert_eq!(resumed.losses, stopped.losses, "after step {step}");
    }

    // Without the best it ends with its last, and without patience it does not end.
    let last = run(&place, TrainingConfig { load_best: Some(false), ..impatient() }, 1, None).await;
    assert_eq!((last.best, last.steps), (None, best + 2));
    assert_eq!(last.parameters, kept(whole.checkpoint(best + 2), "parameter", count));
    let patient = TrainingConfig { early_stopping_patience: None, load_best: Some(true), ..impatient() };
    let all = run(&place, TrainingConfig { steps: Some(best + 4), ..patient }, 1, None).await;
    assert_eq!(all.steps, best + 4);
    assert!(all.after.unwrap() <= evaluations[best]);
}
