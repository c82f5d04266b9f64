//! The head and the cross entropy together, without the logits.
//!
//! A step's logits would be `tokens × vocabulary`: more than all activations of a layer together. And the head
//! itself, in f32, may be more than everything else that the owner holds. So the vocabulary is walked through in
//! blocks: each block of the head is read once, its logits are made, and since a sum of losses is wanted, what they
//! add to the gradient of the hidden states is multiplied by the same block at once and the logits are forgotten.
//! Exponentials are taken relative to the largest logit so far; where a later one is larger, what was summed is
//! scaled down.
//!
//! How long this takes shows to whoever waits for the next product. So the number of positions that have a target is made
//! up to a multiple with rows of zeros, whose results are thrown away.
//!
//! Slices of the vocabulary are tasks. Their number is fixed, so that sums do not depend on the threads.

use protocol::buffer::Buffer;
use protocol::model::ModelError;
use rayon::prelude::*;

use crate::data::IGNORED;
use crate::llama::gemm::{Before, Matrix, MatrixMut, Threads, multiply};
use crate::llama::vector::{add_scaled, exp_row, maximum, scale};

/// Entries of the vocabulary whose logits are made at once: their part of the head stays in the cache between its two
/// products.
const BLOCK: usize = 256;
/// Parts of the vocabulary that are walked through side by side; each sums up a gradient of its own.
const SLICES: usize = 8;
/// Tokens that go through the head together.
const TOKENS: usize = 512;

/// The number of rows that go through the head together is a multiple of this: what is added to a micro-batch is less.
const ROWS: usize = 64;

/// Where rows of a head come from.
pub(crate) trait HeadRows: Sync {
    /// Entries of the vocabulary.
    fn vocabulary(&self) -> usize;

    /// Reads the rows from `first` on, as many as `out` holds, in f32.
    ///
    /// # Errors
    /// When the model's files cannot be read.
    fn read(&self, first: usize, out: &mut [f32]) -> Result<(), ModelError>;
}

/// From `tokens × features` hidden states to the sum of the cross entropies at positions with a target.
pub(crate) struct HeadLoss<'a, H> {
    pub(crate) head: &'a H,
    /// Features of a hidden state.
    pub(crate) features: usize,
    /// For each token an entry of the vocabulary or [`IGNORED`].
    pub(crate) targets: &'a [u32],
    /// Whether the gradient is wanted.
    pub(crate) differentiable: bool,
    /// Entries of a block of the vocabulary.
    pub(crate) block: usize,
}

/// What a slice of the vocabulary adds to each token.
struct Slice {
    /// The largest logit.
    largest: Vec<f32>,
    /// The sum of the exponentials of the logits' distances to it.
    sums: Vec<f32>,
    /// The rows of the head, weighted by these exponentials and summed.
    weighted: Buffer,
    /// Logits of the targets that lie in the slice.
    at_target: Vec<(usize, f32)>,
}

impl<'a, H: HeadRows> HeadLoss<'a, H> {
    /// With blocks of the usual size.
    pub(crate) fn new(head: &'a H, features: usize, targets: &'a [u32], differentiable: bool) -> Self {
        Self { head, features, targets, differentiable, block: BLOCK }
    }

    /// The loss in nats and, if wanted, its gradient with respect to `hidden`.
    ///
    /// # Errors
    /// When the head cannot be read.
    pub(crate) fn compute(&self, hidden: &[f32]) -> Result<(f64, Option<Buffer>), ModelError> {
        let lossy: Vec<usize> = (0..self.targets.len()).filter(|&token| self.targets[token] != IGNORED).collect();
        let mut gradient = self.differentiable.then(|| Buffer::zeroed(hidden.len()));
        let mut loss = 0.0;
        for tokens in lossy.chunks(TOKENS) {
            loss += self.tokens(tokens, hidden, gradient.as_deref_mut())?;
        }
        Ok((loss, gradient))
    }

    /// The loss of some tokens; their rows of the gradient are written.
    fn tokens(&self, tokens: &[usize], hidden: &[f32], gradient: Option<&mut [f32]>) -> Result<f64, ModelError> {
        let features = self.features;
        let rows = tokens.len().next_multiple_of(ROWS);
        let mut states = Buffer::zeroed(rows * features);
        for (to, &token) in states.chunks_exact_mut(features).zip(tokens) {
            to.copy_from_slice(&hidden[token * features..(token + 1) * features]);
        }
        let vocabulary = self.head.vocabulary();
        let length = vocabulary.div_ceil(SLICES).next_multiple_of(self.block);
        let starts: Vec<usize> = (0..vocabulary).step_by(length).collect();
        let slices = starts.into_par_iter().with_max_len(1);
        let slices: Vec<Slice> = slices
            .map(|start| self.slice(start, (start + length).min(vocabulary), tokens, rows, &states))
            .collect::<Result<_, _>>()?;

        let mut at_target = vec![0.0; tokens.len()];
        slices.iter().flat_map(|slice| &slice.at_target).for_each(|&(row, logit)| at_target[row] = logit);
        let (mut loss, mut sums) = (0.0, Vec::with_capacity(tokens.len()));
        for (row, at_target) in at_target.into_iter().enumerate() {
            let largest = slices.iter().map(|slice| slice.largest[row]).fold(f32::NEG_INFINITY, f32::max);
            let sum: f32 = slices.iter().map(|slice| (slice.largest[row] - largest).exp() * slice.sums[row]).sum();
            loss += f64::from(largest - at_target + sum.ln());
            sums.push((largest, sum));
        }
        if let Some(gradient) = gradient {
            self.combine(tokens, &slices, &sums, gradient)?;
        }
        Ok(loss)
    }

    /// Probabilities × head minus the target's row.
    fn combine(
        &self,
        tokens: &[usize],
        slices: &[Slice],
        sums: &[(f32, f32)],
        gradient: &mut [f32],
    ) -> Result<(), ModelError> {
        let features = self.features;
        let mut target = vec![0.0; features];
        for ((row, &token), &(largest, sum)) in tokens.iter().enumerate().zip(sums) {
            let gradient = &mut gradient[token * features..(token + 1) * features];
            for slice in slices {
                let factor = (slice.largest[row] - largest).exp() / sum;
                add_scaled(gradient, factor, &slice.weighted[row * features..(row + 1) * features]);
            }
            self.head.read(self.targets[token] as usize, &mut target)?;
            add_scaled(gradient, -1.0, &target);
        }
        Ok(())
    }

    /// Walks through the entries `start .. end` of the vocabulary, with `rows` rows, of which the first are the tokens'.
    fn slice(
        &self,
        start: usize,
        end: usize,
        tokens: &[usize],
        rows: usize,
        states: &[f32],
    ) -> Result<Slice, ModelError> {
        let features = self.features;
        let mut slice = Slice {
            largest: vec![f32::NEG_INFINITY; rows],
            sums: vec![0.0; rows],
            weighted: Buffer::zeroed(if self.differentiable { rows * features } else { 0 }),
            at_target: Vec::new(),
        };
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
            for (row, logits) in logits.chunks_exact_mut(entries).enumerate() {
                let target = tokens.get(row).map(|&token| (self.targets[token] as usize).wrapping_sub(first));
                if let Some(&logit) = target.and_then(|target| logits.get(target)) {
                    slice.at_target.push((row, logit));
                }
                slice.absorb(row, features, logits);
            }
            if self.differentiable {
                let out = MatrixMut::new(&mut slice.weighted, rows, features);
                multiply(out, Before::Kept, 1.0, Matrix::new(logits, rows, entries), head, Threads::One);
            }
        }
        Ok(slice)
    }
}

impl Slice {
    /// Replaces more of a token's logits by exponentials, which are summed.
    fn absorb(&mut self, row: usize, features: usize, logits: &mut [f32]) {
        let largest = maximum(logits);
        if largest > self.largest[row] {
            // From minus infinity this is zero, and so is what it scales.
            let shrink = (self.largest[row] - largest).exp();
            self.sums[row] *= shrink;
            if let Some(weighted) = self.weighted.get_mut(row * features..(row + 1) * features) {
                scale(weighted, shrink);
            }
            self.largest[row] = largest;
        }
        self.sums[row] += exp_row(logits, self.largest[row]);
    }
}
