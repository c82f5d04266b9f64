//! Micro-batches that go through the model at once, and what they are cut into where there are too few of them.
//!
//! A product of a micro-batch waits for the one before it. Where workers are far, the owner of a single micro-batch would mostly
//! wait: its sequences go in strands then, each as a smaller micro-batch, one of which is computed while the products of
//! the others travel. A step's gradient is a sum over its micro-batches, so that what is learnt is the same, but for the
//! last bits of sums in another order. Sequences whose losses depend on one another (preferences), or on their place in the micro-batch
//! (dropout, noise on the embeddings), stay together.

use std::borrow::Cow;
use std::time::Duration;

use super::TrainingConfig;
use super::config::MOST_IN_FLIGHT;
use super::flight;
use crate::data::MicroBatch;
use crate::transformer::Llama;

/// Workers that are nearer than this leave no gap that is worth what strands cost: their rows of a block are written and read once
/// more, and their products are smaller.
const FAR: Duration = Duration::from_millis(5);

/// What goes through the model, and how.
pub(super) struct Strands<'a> {
    /// In the order of the data.
    pub(super) batches: Cow<'a, [MicroBatch]>,
    /// How many of them at once.
    pub(super) at_once: usize,
    /// A way through the model for each.
    ways: Vec<Llama>,
}

impl<'a> Strands<'a> {
    /// For these micro-batches. `trained` says whether they are trained on, and not only evaluated.
    pub(super) fn of(batches: &'a [MicroBatch], llama: &Llama, config: &TrainingConfig, trained: bool) -> Self {
        let round_trip = llama.round_trip();
        let each = strands(config, round_trip, batches.len(), trained);
        let cut = |batch: &MicroBatch| batch.cut(each);
        let batches: Cow<'_, [MicroBatch]> =
            if each > 1 { batches.iter().flat_map(cut).collect::<Vec<_>>().into() } else { batches.into() };
        let at_once = match config.in_flight {
            0 => flight::planned(round_trip),
            given => given.saturating_mul(each).min(MOST_IN_FLIGHT),
        };
        let rows: Vec<usize> = batches.iter().map(|batch| batch.tokens.len()).collect();
        let ways = rows.chunks(at_once).flat_map(|rows| llama.side_by_side(rows)).collect();
        Self { batches, at_once, ways }
    }

    /// The way of one of them.
    pub(super) fn way(&self, index: usize) -> &Llama {
        &self.ways[index]
    }
}

/// Strands of each of so many micro-batches.
fn strands(config: &TrainingConfig, round_trip: Option<Duration>, batches: usize, trained: bool) -> usize {
    let whole = if trained { config.is_drawn_or_compared() } else { config.preference().is_some() };
    if whole {
        return 1;
    }
    match (config.strands, round_trip) {
        (0, Some(far)) if far >= FAR => flight::planned(round_trip).div_ceil(batches.max(1)),
        (0, _) => 1,
        (given, _) => given,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lora::LoraConfig;

    #[test]
    fn few_micro_batches_are_cut_where_workers_are_far() {
        let at = |config: &TrainingConfig, millis: u64, batches| {
            strands(config, Some(Duration::from_millis(millis)), batches, true)
        };
        let usual = TrainingConfig::default();
        assert_eq!([1, 2, 3, 4, 9].map(|batches| at(&usual, 20, batches)), [4, 2, 2, 1, 1]);
        assert_eq!([0, 1, 4, 5, 100].map(|millis| at(&usual, millis, 1)), [1, 1, 1, 3, 8]);
        assert_eq!(strands(&usual, None, 1, true), 1);
        let given = TrainingConfig { strands: 3, ..TrainingConfig::default() };
        assert_eq!([0, 20].map(|millis| at(&given, millis, 1)), [3, 3]);
        assert_eq!(at(&TrainingConfig { strands: 1, ..TrainingConfig::default() }, 100, 1), 1);
        // What is drawn for a micro-batch is drawn only where it is trained on.
        let lora = LoraConfig { dropout: 0.1, ..LoraConfig::default() };
        for drawn in [
            TrainingConfig { lora, ..TrainingConfig::default() },
            TrainingConfig { neftune_noise_alpha: 5.0, ..TrainingConfig::default() },
        ] {
            assert_eq!(at(&drawn, 20, 1), 1);
            assert_eq!(strands(&drawn, Some(FAR), 1, false), 3);
        }
    }
}
