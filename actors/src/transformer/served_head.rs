//! The head as products that the backend serves: logits of a slice of the vocabulary, forward, and what their exponentials
//! make of the head's rows, backward.
//!
//! A slice goes both ways before it is put together with the others, since the exponentials that go back are relative to
//! the row's largest logit in the slice itself: the rows that come back are scaled when all slices are known. So no more
//! than the slices in flight are held.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use protocol::buffer::{self, Buffer};
use protocol::ids::Direction;
use protocol::model::LlamaConfig;

use super::LlamaError;
use super::ops::{HeadBatch, HeadSlices, Slice};
use super::products::{product, whole_product};
use super::token_rows::Rows;
use crate::backend::{BackendError, LinearBackend};

/// Tokens that go through the head together: a block of a ciphertext has as many, and more of them would only take more
/// memory.
const TOKENS: usize = 1024;
/// Slices of so many tokens in flight at once: while a worker computes one, the owner encrypts or decrypts another. Each takes some
/// sixteen bytes for each of its logits.
const IN_FLIGHT: usize = 2;
/// Slices at once of fewer tokens, whose products are mostly on their way.
const MOST_IN_FLIGHT: usize = 4;

/// See the module's documentation.
pub(super) struct ServedHead<'a> {
    pub(super) config: &'a LlamaConfig,
    pub(super) backend: &'a dyn LinearBackend,
    /// Rows of the head that are the owner's own.
    pub(super) rows: Option<&'a Rows<'a>>,
}

impl ServedHead<'_> {
    fn slice(&self, number: usize, batch: &HeadBatch<'_>) -> Result<Slice, BackendError> {
        let linear = self.config.head_linear(number);
        let entries = self.config.head_entries(number);
        let mut logits = whole_product(self.config, self.backend, linear, batch.states, batch.rows)?;
        if let Some(rows) = self.rows {
            rows.replace_logits(batch.states, entries.clone(), &mut logits);
        }
        let mut slice = Slice::new(batch.rows, Buffer::default());
        slice.absorb(batch, entries.clone(), &mut logits);
        if batch.differentiable {
            let own = self.rows.map(|rows| (rows, rows.take(batch, entries, &mut logits)));
            let backward = linear.along(Direction::Backward);
            slice.weighted = product(self.config, self.backend, backward, Arc::new(logits), batch.rows)?;
            own.iter().for_each(|(rows, taken)| rows.add(taken, &mut slice.weighted));
        }
        Ok(slice)
    }
}

impl HeadSlices for ServedHead<'_> {
    type Error = LlamaError;

    fn tokens(&self) -> usize {
        TOKENS
    }

    fn slices(&self, batch: HeadBatch<'_>) -> Result<Vec<Slice>, LlamaError> {
        // A slice's buffers are larger than a layer's: neither serves in the other's place, and here is the most that a
        // step holds.
        buffer::free_idle();
        let (count, next) = (self.config.head_slices(), AtomicUsize::new(0));
        let work = || {
            let mine = std::iter::from_fn(|| Some(next.fetch_add(1, Ordering::Relaxed)).filter(|&slice| slice < count));
            let done = mine.map(|slice| Ok((slice, self.slice(slice, &batch)?)));
            // Where one fails, nobody begins another.
            done.collect::<Result<Vec<_>, BackendError>>().inspect_err(|_| next.store(count, Ordering::Relaxed))
        };
        let at_once = (IN_FLIGHT * TOKENS / batch.rows.max(1)).clamp(IN_FLIGHT, MOST_IN_FLIGHT).min(count);
        let done = thread::scope(|scope| {
            let threads: Vec<_> = (0..at_once).map(|_| scope.spawn(work)).collect();
            let join = |thread: thread::ScopedJoinHandle<'_, _>| {
                thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            };
            threads.into_iter().map(join).collect::<Result<Vec<_>, BackendError>>()
        })?;
        let mut slices: Vec<(usize, Slice)> = done.into_iter().flatten().collect();
        buffer::free_idle();
        // Sums do not depend on which thread was faster.
        slices.sort_unstable_by_key(|&(number, _)| number);
        Ok(slices.into_iter().map(|(_, slice)| slice).collect())
    }
}
