//! The head in the owner's own process: f32 products with blocks of it, each read once from the model's files.
//!
//! The head itself, in f32, may be more than everything else that the owner holds, so it is never held as a whole. Slices of
//! the vocabulary are tasks. Their number is fixed, so that sums do not depend on the threads.

use protocol::buffer::Buffer;
use protocol::model::ModelError;
use rayon::prelude::*;

use super::loss::{HeadBatch, HeadRows, HeadSlices, Slice};
use crate::transformer::gemm::{Before, Matrix, MatrixMut, Threads, multiply};

/// Entries of the vocabulary whose logits are made at once: their part of the head stays in the cache between its two
/// products.
const BLOCK: usize = 256;
/// Parts of the vocabulary that are walked through side by side; each sums up a gradient of its own.
const SLICES: usize = 8;
/// Tokens that go through the head together.
const TOKENS: usize = 512;

/// See the module's documentation.
pub(crate) struct LocalHead<'a, H> {
    pub(crate) head: &'a H,
    /// Entries of a block of the vocabulary.
    pub(crate) block: usize,
}

impl<'a, H: HeadRows> LocalHead<'a, H> {
    /// With blocks of the usual size.
    pub(crate) fn new(head: &'a H) -> Self {
        Self { head, block: BLOCK }
    }

    /// Walks through the entries `start .. end` of the vocabulary.
    fn slice(&self, start: usize, end: usize, batch: &HeadBatch<'_>) -> Result<Slice, ModelError> {
        let HeadBatch { states, rows, features, differentiable, .. } = *batch;
        let mut slice = Slice::new(rows, Buffer::zeroed(if differentiable { rows * features } else { 0 }));
        let mut head = Buffer::scratch(self.block * features);
        let mut logits = Buffer::scratch(self.block * rows);
        for first in (start..end).step_by(self.block) {
            let entries = self.block.min(end - first);
            let head = &mut head[..entries * features];
            self.head.read(first, head)?;
            let head = Matrix::new(head, entries, features);
            let logits = &mut logits[..rows * entries];
            let out = MatrixMut::new(logits, rows, entries);
            multiply(out, Before::Replaced, 1.0, Matrix::new(states, rows, features), head.transposed(), Threads::One);
            slice.absorb(batch, first..first + entries, logits);
            if differentiable {
                let out = MatrixMut::new(&mut slice.weighted, rows, features);
                multiply(out, Before::Kept, 1.0, Matrix::new(logits, rows, entries), head, Threads::One);
            }
        }
        Ok(slice)
    }
}

impl<H: HeadRows> HeadSlices for LocalHead<'_, H> {
    type Error = ModelError;

    fn tokens(&self) -> usize {
        TOKENS
    }

    fn slices(&self, batch: HeadBatch<'_>) -> Result<Vec<Slice>, ModelError> {
        let vocabulary = self.head.vocabulary();
        let length = vocabulary.div_ceil(SLICES).next_multiple_of(self.block);
        let starts: Vec<usize> = (0..vocabulary).step_by(length).collect();
        let slices = starts.into_par_iter().with_max_len(1);
        slices.map(|start| self.slice(start, (start + length).min(vocabulary), &batch)).collect()
    }
}
