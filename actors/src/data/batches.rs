//! The order in which examples are trained on.

use rand::TryRngCore;
use serde::{Deserialize, Serialize};

use super::{DataError, Dataset, MicroBatch};

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
    ///
    /// # Errors
    /// When the data cannot be read.
    fn next_batch(&mut self) -> Result<Option<MicroBatch>, DataError>;

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
    dataset: Dataset,
    batch: usize,
    pad_to: usize,
    position: Position,
    order: Vec<u32>,
}

impl Batches {
    /// Deals `dataset`, of which a pass must take something, in micro-batches of `batch ≥ 1` examples, or pairs of them, whose tokens
    /// together are made up to a multiple of `pad_to`.
    ///
    /// # Panics
    /// When the data set or the batch is empty.
    pub fn new(dataset: &Dataset, batch: usize, pad_to: usize, seed: u64) -> Self {
        assert!(dataset.pass() > 0 && batch > 0, "there is something to deal");
        let position = Position { seed, ..Position::default() };
        Self { dataset: dataset.clone(), batch, pad_to, position, order: dataset.order(seed, 0) }
    }

    fn take(&mut self) -> usize {
        if self.position.index >= self.order.len() {
            self.seek(Position { epoch: self.position.epoch + 1, index: 0, ..self.position });
        }
        let example = self.order[self.position.index];
        self.position.index += 1;
        example as usize
    }

    /// The next micro-batch.
    ///
    /// # Errors
    /// When the examples cannot be read from where they are kept.
    pub fn deal(&mut self) -> Result<MicroBatch, DataError> {
        let chosen: Vec<usize> = (0..self.batch).map(|_| self.take()).collect();
        self.dataset.batch(chosen, self.pad_to)
    }
}

impl BatchSource for Batches {
    fn next_batch(&mut self) -> Result<Option<MicroBatch>, DataError> {
        self.deal().map(Some)
    }

    fn position(&self) -> Position {
        self.position
    }

    fn seek(&mut self, position: Position) {
        self.position = position;
        self.order = self.dataset.order(position.seed, position.epoch);
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
