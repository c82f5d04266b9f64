//! The head and the cross entropy together, without the logits.
//!
//! A step's logits would be `tokens × vocabulary`: more than all activations of a layer together. So the vocabulary is walked
//! through slice by slice: the logits of a slice are made, and since a sum of losses is wanted, what they add to the
//! gradient of the hidden states is multiplied by the same part of the head at once and the logits are forgotten.
//! Exponentials are taken relative to the largest logit of a row in the slice; slices are put together when all of them
//! are there. Who multiplies by the head is a matter of [`HeadSlices`].
//!
//! How many rows go through the head shows to whoever waits for the next product, or serves the head. So the number of
//! positions that have a target is made up to a multiple with rows of zeros, whose results are thrown away.

use std::ops::Range;
use std::sync::Arc;

use protocol::buffer::Buffer;
use protocol::model::ModelError;
use protocol::parts::Part;

use crate::data::IGNORED;
use crate::transformer::vector::{add_scaled, exp_row, maximum, multiply_by, scale, soft_cap, soft_cap_slopes};

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

/// Rows that go through the head together.
#[derive(Clone, Copy)]
pub(crate) struct HeadBatch<'a> {
    /// `rows × features`; those behind the last target's are zeros.
    pub(crate) states: &'a Arc<Buffer>,
    pub(crate) rows: usize,
    pub(crate) features: usize,
    /// For each of the first rows an entry of the vocabulary.
    pub(crate) targets: &'a [u32],
    /// The bound that logits approach, if there is one.
    pub(crate) cap: Option<f32>,
    /// Whether the gradient is wanted.
    pub(crate) differentiable: bool,
}

/// Who multiplies by the head, slice by slice of the vocabulary.
pub(crate) trait HeadSlices {
    /// Why it may fail.
    type Error: From<ModelError>;

    /// Tokens that go through the head together, at most.
    fn tokens(&self) -> usize;

    /// What the slices, which cover the vocabulary once, add to each row.
    ///
    /// # Errors
    /// When the head cannot be read or multiplied by.
    fn slices(&self, batch: HeadBatch<'_>) -> Result<Vec<Slice>, Self::Error>;
}

/// From `tokens × features` hidden states to the cross entropies at positions with a target.
pub(crate) struct HeadLoss<'a, H, S> {
    pub(crate) head: &'a H,
    pub(crate) slices: S,
    /// Features of a hidden state.
    pub(crate) features: usize,
    /// For each token an entry of the vocabulary or [`IGNORED`].
    pub(crate) targets: &'a [u32],
    /// The bound that logits approach, if there is one: `cap · tanh(logit / cap)`.
    pub(crate) cap: Option<f32>,
    /// Whether the gradient is wanted.
    pub(crate) differentiable: bool,
}

/// What the head made of hidden states.
pub(crate) struct Losses {
    /// The loss of each token in nats, 0 without a target.
    pub(crate) of_tokens: Vec<f64>,
    /// The logarithm of the sum of each token's exponentials, 0 without a target.
    pub(crate) log_sums: Vec<f32>,
    /// The gradient of the sum of the losses with respect to the hidden states, if it was wanted.
    pub(crate) gradient: Option<Buffer>,
}

/// What a slice of the vocabulary adds to each row.
pub(crate) struct Slice {
    /// The largest logit.
    largest: Vec<f32>,
    /// The sum of the exponentials of the logits' distances to it.
    sums: Vec<f32>,
    /// The rows of the head, weighted by these exponentials (and the slopes of bounded logits) and summed; empty where no gradient is wanted.
    pub(crate) weighted: Buffer,
    /// Logits of the targets that lie in the slice.
    at_target: Vec<(usize, f32)>,
}

impl<H: HeadRows, S: HeadSlices> HeadLoss<'_, H, S> {
    /// See [`Losses`].
    ///
    /// # Errors
    /// When the head cannot be read or multiplied by.
    pub(crate) fn compute(&self, hidden: &[f32]) -> Result<Losses, S::Error> {
        let lossy: Vec<usize> = (0..self.targets.len()).filter(|&token| self.targets[token] != IGNORED).collect();
        let gradient = self.differentiable.then(|| Buffer::zeroed(hidden.len()));
        let count = self.targets.len();
        let mut losses = Losses { of_tokens: vec![0.0; count], log_sums: vec![0.0; count], gradient };
        for tokens in lossy.chunks(self.slices.tokens()) {
            self.tokens(tokens, hidden, &mut losses)?;
        }
        Ok(losses)
    }

    /// Writes the losses of some tokens, and their rows of the gradient.
    fn tokens(&self, tokens: &[usize], hidden: &[f32], losses: &mut Losses) -> Result<(), S::Error> {
        let features = self.features;
        let rows = tokens.len().next_multiple_of(ROWS);
        let mut states = Buffer::zeroed(rows * features);
        for (to, &token) in states.chunks_exact_mut(features).zip(tokens) {
            to.copy_from_slice(&hidden[token * features..(token + 1) * features]);
        }
        let states = Arc::new(states);
        let targets: Vec<u32> = tokens.iter().map(|&token| self.targets[token]).collect();
        let (cap, differentiable) = (self.cap, self.differentiable);
        let batch = HeadBatch { states: &states, rows, features, targets: &targets, cap, differentiable };
        let slices = self.slices.slices(batch)?;

        let mut at_target = vec![0.0; tokens.len()];
        slices.iter().flat_map(|slice| &slice.at_target).for_each(|&(row, logit)| at_target[row] = logit);
        let mut sums = Vec::with_capacity(tokens.len());
        for (row, &at_target) in at_target.iter().enumerate() {
            let largest = slices.iter().map(|slice| slice.largest[row]).fold(f32::NEG_INFINITY, f32::max);
            let sum: f32 = slices.iter().map(|slice| (slice.largest[row] - largest).exp() * slice.sums[row]).sum();
            losses.of_tokens[tokens[row]] = f64::from(largest - at_target + sum.ln());
            losses.log_sums[tokens[row]] = largest + sum.ln();
            sums.push((largest, sum));
        }
        if let Some(gradient) = losses.gradient.as_deref_mut() {
            self.combine(tokens, &slices, &sums, &at_target, gradient)?;
        }
        Ok(())
    }

    /// Probabilities × head minus the target's row; where logits are bounded, each by the slope of its bound.
    fn combine(
        &self,
        tokens: &[usize],
        slices: &[Slice],
        sums: &[(f32, f32)],
        at_target: &[f32],
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
            let slope = self.cap.map_or(1.0, |cap| 1.0 - (at_target[row] / cap).powi(2));
            add_scaled(gradient, -slope, &target);
        }
        Ok(())
    }
}

impl Slice {
    /// Of so many rows, before any logit; `weighted` has `rows × features` values where a gradient is wanted.
    pub(crate) fn new(rows: usize, weighted: Buffer) -> Self {
        Self { largest: vec![f32::NEG_INFINITY; rows], sums: vec![0.0; rows], weighted, at_target: Vec::new() }
    }

    /// Replaces logits of these entries of the vocabulary, with which each of the rows begins, by exponentials, which are
    /// summed; where logits are bounded, what is left is multiplied by the slopes. Behind them, and in rows without a target, zeros are written.
    pub(crate) fn absorb(&mut self, batch: &HeadBatch<'_>, entries: Range<usize>, logits: &mut [f32]) {
        let _part = Part::Own.mark();
        let width = logits.len() / batch.rows;
        let mut slopes = vec![0.0; if batch.cap.is_some() { entries.len() } else { 0 }];
        for (row, logits) in logits.chunks_exact_mut(width).enumerate() {
            let Some(&target) = batch.targets.get(row) else {
                logits.fill(0.0);
                continue;
            };
            let (logits, behind) = logits.split_at_mut(entries.len());
            if let Some(cap) = batch.cap {
                soft_cap(logits, cap);
                soft_cap_slopes(logits, cap, &mut slopes);
            }
            if let Some(&logit) = logits.get((target as usize).wrapping_sub(entries.start)) {
                self.at_target.push((row, logit));
            }
            self.absorb_row(row, batch.features, logits);
            if batch.cap.is_some() {
                multiply_by(logits, &slopes);
            }
            behind.fill(0.0);
        }
    }

    fn absorb_row(&mut self, row: usize, features: usize, logits: &mut [f32]) {
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
