//! What a worker sees of a batch's size changes nothing that is learnt.

use super::*;
use crate::data::{Batches, Dataset, Example};

#[actix::test]
async fn padding_to_a_multiple_changes_no_loss() {
    let example = |n: u32| {
        let tokens: Vec<u32> = (0..5 + n % 7).map(|i| (3 * n + i * i) % 40).collect();
        Example { learnt: (0..tokens.len()).map(|i| i > 1).collect(), tokens }
    };
    let texts = Dataset::from_examples((0..20).map(example).collect(), 0);
    let mut tokens = Vec::new();
    let mut runs = Vec::new();
    for pad_to in [1, 64] {
        let training = TrainingConfig { micro_batch: 3, accumulation: 2, ..config(6) };
        let data = TrainingData {
            train: Box::new(Batches::new(&texts, training.micro_batch, pad_to, 5)),
            evaluation: texts.in_order(3, pad_to).map(Result::unwrap).collect(),
        };
        let (events, _) = run(training, data).await;
        let step = |event: &TrainEvent| if let TrainEvent::Step(step) = event { Some(step.tokens) } else { None };
        tokens.push(events.iter().filter_map(step).collect::<Vec<_>>());
        runs.push(losses(&events));
    }
    assert!(tokens[0].iter().any(|&others| others != tokens[0][0]), "texts of several lengths are dealt");
    assert!(tokens[0].iter().all(|&tokens| tokens < 2 * 64), "nothing is padded: {:?}", tokens[0]);
    assert!(tokens[1].iter().all(|&tokens| tokens == 2 * 64), "all look alike: {:?}", tokens[1]);
    for (tight, padded) in runs[0].iter().zip(&runs[1]) {
        assert!((tight / padded - 1.0).abs() < 1e-5, "{:?} and {:?}", runs[0], runs[1]);
    }
}
