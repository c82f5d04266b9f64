//! The adapters of one fused group beside its base product.
//!
//! They read the product's input and write into their slices of its output where both already are. Without dropout all
//! projections of a group see the same input, and their down projections, which lie one below the other, are one product.

use std::ops::Range;

use protocol::buffer::Buffer;
use protocol::ids::LinearShape;
use protocol::parts::Part;
use rayon::prelude::*;

use super::rows::{ROWS, block, for_each_block2};
use crate::lora::{Dropout, Slot, Values};
use crate::transformer::gemm::{Before, Matrix, MatrixMut, Threads, multiply};
use crate::transformer::vector::{add_product, multiply_into};

/// Features whose gradients one task sums over all tokens.
const FEATURES: usize = 192;

/// The adapters of a group in one pass.
pub(crate) struct Adapter<'a> {
    /// Where each projection's output lies, in the order of the parameters' rows.
    pub(crate) slots: &'a [Slot],
    /// Dimensions of the group's matrix.
    pub(crate) shape: LinearShape,
    /// The slots' down projections one below the other, as many rows as their ranks together `× d_in`.
    pub(crate) a: Values<'a>,
    /// The slots' up projections one after the other, `d_out × rank` each.
    pub(crate) b: Values<'a>,
    /// For each slot what drops features of its input; `None` outside training or at a rate of zero.
    pub(crate) dropout: Option<Vec<Dropout>>,
}

/// Gradients of a group's parameters, in their shapes.
pub(crate) struct AdapterGradient {
    pub(crate) a: Vec<f32>,
    pub(crate) b: Vec<f32>,
}

impl Adapter<'_> {
    /// Values of a row between the down and the up projections: the slots' ranks together.
    pub(crate) fn width(&self) -> usize {
        self.slots.last().map_or(0, |slot| slot.row + slot.rank)
    }

    /// Slots that see the same input, as parts of the rows between the projections, and what drops their features.
    fn inputs(&self) -> impl Iterator<Item = (Range<usize>, Option<&Dropout>)> {
        let width = self.width();
        let shared = self.dropout.is_none().then_some((0..width, None));
        let each = self.slots.iter().zip(self.dropout.iter().flatten());
        shared.into_iter().chain(each.map(|(slot, dropout)| (slot.row..slot.row + slot.rank, Some(dropout))))
    }

    fn down(&self, part: &Range<usize>) -> Matrix<'_> {
        let d_in = self.shape.d_in;
        Matrix::new(&self.a[part.start * d_in..part.end * d_in], part.len(), d_in)
    }

    fn up(&self, slot: &Slot) -> Matrix<'_> {
        Matrix::new(&self.b[slot.up..], slot.d_out, slot.rank)
    }

    /// The rows' values between the projections: `low = dropout(x)·Aᵀ`. `first` is the number of the first row. A row of `low` may have
    /// other values behind these.
    pub(crate) fn down_rows(&self, first: usize, x: &[f32], low: &mut [f32]) {
        let d_in = self.shape.d_in;
        let rows = x.len() / d_in;
        let width = low.len() / rows.max(1);
        for (part, dropout) in self.inputs() {
            let masked = dropout.map(|dropout| dropped(dropout, first, x, d_in));
            let x = Matrix::new(masked.as_deref().unwrap_or(x), rows, d_in);
            let out = MatrixMut::strided(&mut low[part.start..], rows, part.len(), width);
            multiply(out, Before::Replaced, 1.0, x, self.down(&part).transposed(), Threads::One);
        }
    }

    /// Adds the adapters' outputs to rows of the base product: `y += scaling · low·Bᵀ`.
    pub(crate) fn up_rows(&self, low: &[f32], y: &mut [f32]) {
        let d_out = self.shape.d_out;
        let rows = y.len() / d_out;
        let width = low.len() / rows.max(1);
        for slot in self.slots {
            let low = Matrix::strided(&low[slot.row..], rows, slot.rank, width);
            let out = MatrixMut::strided(&mut y[slot.offset..], rows, slot.d_out, d_out);
            multiply(out, Before::Kept, slot.scaling, low, self.up(slot).transposed(), Threads::One);
        }
    }

    /// Gradients of `low` from those of the outputs, `dlow = scaling · dy·B`, and what they add to those of the inputs,
    /// where these are wanted.
    pub(crate) fn backward_rows(&self, first: usize, dy: &[f32], dlow: &mut [f32], dx: Option<&mut [f32]>) {
        let (LinearShape { d_in, d_out }, width) = (self.shape, self.width());
        let rows = dy.len() / d_out;
        for slot in self.slots {
            let dy = Matrix::strided(&dy[slot.offset..], rows, slot.d_out, d_out);
            let out = MatrixMut::strided(&mut dlow[slot.row..], rows, slot.rank, width);
            multiply(out, Before::Replaced, slot.scaling, dy, self.up(slot), Threads::One);
        }
        let Some(dx) = dx else { return };
        for (part, dropout) in self.inputs() {
            let dlow = Matrix::strided(&dlow[part.start..], rows, part.len(), width);
            let Some(dropout) = dropout else {
                let out = MatrixMut::new(dx, rows, d_in);
                multiply(out, Before::Kept, 1.0, dlow, self.down(&part), Threads::One);
                continue;
            };
            let mut through = Buffer::scratch(dx.len());
            let out = MatrixMut::new(&mut through, rows, d_in);
            multiply(out, Before::Replaced, 1.0, dlow, self.down(&part), Threads::One);
            let mut factors = Buffer::scratch(d_in);
            for ((dx, through), token) in dx.chunks_exact_mut(d_in).zip(through.chunks_exact(d_in)).zip(first..) {
                dropout.factors(token, &mut factors);
                add_product(dx, through, &factors);
            }
        }
    }

    /// Gradients of the parameters, summed over all tokens: of `A` from `dlow` and the inputs, of `B` from `low` and
    /// the gradients of the outputs.
    pub(crate) fn gradient(&self, x: &[f32], low: &[f32], dy: &[f32], dlow: &[f32]) -> AdapterGradient {
        AdapterGradient { a: self.gradient_of_a(x, dlow), b: self.gradient_of_b(low, dy) }
    }

    /// `dA = dlowᵀ·dropout(x)`.
    fn gradient_of_a(&self, x: &[f32], dlow: &[f32]) -> Vec<f32> {
        let (d_in, width) = (self.shape.d_in, self.width());
        let tokens = x.len() / d_in;
        let mut gradient = vec![0.0; self.a.len()];
        for (part, dropout) in self.inputs() {
            let masked = dropout.map(|dropout| {
                let mut masked = Buffer::scratch(x.len());
                let blocks = masked.par_chunks_mut(ROWS * d_in).enumerate();
                blocks.for_each(|(index, out)| {
                    let _part = Part::Own.mark();
                    out.copy_from_slice(&dropped(dropout, index * ROWS, block(x, d_in, index * ROWS), d_in));
                });
                masked
            });
            let x = masked.as_deref().unwrap_or(x);
            // Columns of features by task; each task's part is put in its place afterwards.
            let of_features = |first: usize| {
                let features = FEATURES.min(d_in - first);
                let mut out = vec![0.0; part.len() * features];
                let dlow = Matrix::strided(&dlow[part.start..], tokens, part.len(), width);
                let x = Matrix::strided(&x[first..], tokens, features, d_in);
                let to = MatrixMut::new(&mut out, part.len(), features);
                multiply(to, Before::Replaced, 1.0, dlow.transposed(), x, Threads::One);
                out
            };
            let starts: Vec<usize> = (0..d_in).step_by(FEATURES).collect();
            let columns: Vec<Vec<f32>> = starts.par_iter().map(|&first| of_features(first)).collect();
            for (first, columns) in starts.into_iter().zip(columns) {
                let features = columns.len() / part.len();
                for (row, values) in part.clone().zip(columns.chunks_exact(features)) {
                    gradient[row * d_in + first..][..features].copy_from_slice(values);
                }
            }
        }
        gradient
    }

    /// `dB = scaling · dyᵀ·low` of each slot.
    fn gradient_of_b(&self, low: &[f32], dy: &[f32]) -> Vec<f32> {
        let d_out = self.shape.d_out;
        let tokens = dy.len() / d_out;
        let width = low.len() / tokens.max(1);
        let mut gradient = vec![0.0; self.b.len()];
        let mut tasks = Vec::new();
        let mut rest = gradient.as_mut_slice();
        for slot in self.slots {
            let (of_slot, others) = std::mem::take(&mut rest).split_at_mut(slot.d_out * slot.rank);
            rest = others;
            let parts = of_slot.chunks_mut(FEATURES * slot.rank).zip((0..).step_by(FEATURES));
            tasks.extend(parts.map(|(out, first)| (slot, slot.offset + first, out)));
        }
        tasks.into_par_iter().for_each(|(slot, first, out)| {
            let rank = slot.rank;
            let features = out.len() / rank;
            let dy = Matrix::strided(&dy[first..], tokens, features, d_out);
            let low = Matrix::strided(&low[slot.row..], tokens, rank, width);
            // By rows of the rank: a row of `dy` is read once and whole, and what comes out is small.
            let mut turned = Buffer::scratch(out.len());
            let to = MatrixMut::new(&mut turned, rank, features);
            multiply(to, Before::Replaced, slot.scaling, low.transposed(), dy, Threads::One);
            for (feature, out) in out.chunks_exact_mut(rank).enumerate() {
                out.iter_mut().zip(turned[feature..].iter().step_by(features)).for_each(|(to, from)| *to = *from);
            }
        });
        gradient
    }

    /// The whole of [`Self::backward_rows`]: returns `dlow` of all tokens.
    pub(crate) fn backward(&self, dy: &[f32], dx: Option<&mut [f32]>) -> Buffer {
        let LinearShape { d_in, d_out } = self.shape;
        let tokens = dy.len() / d_out;
        let mut dlow = Buffer::scratch(tokens * self.width());
        let wanted = dx.is_some();
        let dx = dx.unwrap_or_default();
        let dx_width = if wanted { d_in } else { 0 };
        for_each_block2(tokens, (&mut dlow, self.width()), (dx, dx_width), |first, dlow, dx| {
            self.backward_rows(first, block(dy, d_out, first), dlow, wanted.then_some(dx));
        });
        dlow
    }
}

/// `x` without its dropped features; `first` is the number of its first row.
fn dropped(dropout: &Dropout, first: usize, x: &[f32], features: usize) -> Buffer {
    let mut masked = Buffer::scratch(x.len());
    let mut factors = Buffer::scratch(features);
    for ((x, masked), token) in x.chunks_exact(features).zip(masked.chunks_exact_mut(features)).zip(first..) {
        dropout.factors(token, &mut factors);
        multiply_into(masked, x, &factors);
    }
    masked
}
