//! The order in which examples are trained on.

use std::sync::Arc;

use rand::{RngCore, SeedableRng, TryRngCore};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::{Dataset, Example, MicroBatch};

/// Where a run is in its data: the next example to take. What a checkpoint stores.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// What all orders are drawn from.
    pub seed: u64,
    /// Passes over the data that are complete.
    pub epoch: u64,
    /// Examples of the current pass that were taken.
    pub index: usize,
}

/// Micro-batches to train on, which a resumed run takes up where an earlier one left them.
pub trait BatchSource: Send {
    /// The next one; `None` at the end of data that have one.
    fn next_batch(&mut self) -> Option<MicroBatch>;

    /// The next example to take.
    fn position(&self) -> Position;

    /// Goes on from a position of an earlier run over the same data.
    fn seek(&mut self, position: Position);
}

/// Micro-batches without end: every pass over the data in another order, all orders from one seed.
///
/// Micro-batches are always full: the last one of a pass is filled with the first examples of the next.
#[derive(Clone, Debug)]
pub struct Batches {
    examples: Arc<Vec<Example>>,
    /// Examples that are dealt together.
    unit: usize,
    padding: u32,
    batch: usize,
    pad_to: usize,
    position: Position,
    order: Vec<usize>,
}

impl Batches {
    /// Deals `dataset`, which must not be empty, in micro-batches of `batch ≥ 1` examples, or pairs of them, whose tokens
    /// together are made up to a multiple of `pad_to`.
    ///
    /// # Panics
    /// When the data set or the batch is empty.
    pub fn new(dataset: &Dataset, batch: usize, pad_to: usize, seed: u64) -> Self {
        let examples = dataset.shared();
        assert!(!examples.is_empty() && batch > 0, "there is something to deal");
        let order = shuffled(dataset.units(), seed, 0);
        let position = Position { seed, ..Position::default() };
        Self { examples, unit: dataset.unit(), padding: dataset.padding(), batch, pad_to, position, order }
    }

    fn take(&mut self) -> usize {
        if self.position.index >= self.order.len() {
            self.seek(Position { epoch: self.position.epoch + 1, index: 0, ..self.position });
        }
        let example = self.order[self.position.index];
        self.position.index += 1;
        example
    }

    /// The next micro-batch.
    pub fn deal(&mut self) -> MicroBatch {
        let chosen: Vec<usize> = (0..self.batch).map(|_| self.take()).collect();
        let examples = |&number: &usize| &self.examples[number * self.unit..(number + 1) * self.unit];
        let examples: Vec<&Example> = chosen.iter().flat_map(examples).collect();
        MicroBatch::of(&examples, chosen, self.padding, self.pad_to)
    }
}

impl BatchSource for Batches {
    fn next_batch(&mut self) -> Option<MicroBatch> {
        Some(self.deal())
    }

    fn position(&self) -> Position {
        self.position
    }

    fn seek(&mut self, position: Position) {
        self.position = position;
        self.order = shuffled(self.examples.len() / self.unit, position.seed, position.epoch);
    }
}

/// A seed that nobody can guess, for an order that tells a worker nothing. It fits TOML's integers, so that a run can be
/// repeated with it.
///
/// # Errors
/// When the operating system has no random numbers.
pub fn fresh_seed() -> std::io::Result<u64> {
    rand::rngs::OsRng.try_next_u64().map(|seed| seed >> 1).map_err(std::io::Error::other)
}

/// The numbers below `count` in random order (Fisher and Yates). Written out here, since a resumed run relies on the
/// order, and a library's shuffle may change with its version.
pub(super) fn shuffled(count: usize, seed: u64, stream: u64) -> Vec<usize> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    random.set_stream(stream);
    let mut order: Vec<usize> = (0..count).collect();
    for last in (1..count).rev() {
        // The high half of a 64-by-64-bit product is a number below the bound; its bias is below 2^-32 for any data
        // set that fits a memory.
        let bound = last as u128 + 1;
        order.swap(last, ((u128::from(random.next_u64()) * bound) >> 64) as usize);
    }
    order
}
