//! The part of a forward product that the owner computes itself, beside the adapters: see `crate::compensation`.

use half::bf16;
use half::slice::HalfFloatSliceExt as _;
use protocol::buffer::Buffer;
use protocol::ids::LinearShape;

use super::rows::{block, for_each_block, for_each_block2};
use crate::transformer::gemm::{Before, Matrix, MatrixMut, Threads, multiply};

/// Directions of the inputs of a matrix, and what the matrix makes of them: `y = (x − l·P)·W + l·(P·W)`, `l = x·Pᵀ`, whatever the
/// directions are.
#[derive(Clone, Debug, PartialEq)]
pub struct KnownPart {
    shape: LinearShape,
    directions: Vec<bf16>,
    outputs: Vec<f32>,
}

impl KnownPart {
    /// Of a matrix: directions `P`, `[rank][d_in]`, and `P·W`, `[rank][d_out]`; `None` where they are not of this shape.
    pub fn new(shape: LinearShape, directions: Vec<bf16>, outputs: Vec<f32>) -> Option<Self> {
        let LinearShape { d_in, d_out } = shape;
        let rank = directions.len().checked_div(d_in)?;
        let fits = directions.len() == rank * d_in && outputs.len() == rank * d_out;
        fits.then_some(Self { shape, directions, outputs })
    }

    /// Directions.
    pub fn rank(&self) -> usize {
        self.directions.len() / self.shape.d_in
    }

    /// `P`.
    pub fn directions(&self) -> &[bf16] {
        &self.directions
    }

    /// `P·W`.
    pub fn outputs(&self) -> &[f32] {
        &self.outputs
    }

    /// Ready for the rows of a product.
    pub(crate) fn widened(&self) -> Known<'_> {
        let mut directions = Buffer::scratch(self.directions.len());
        self.directions.convert_to_f32_slice(&mut directions);
        Known { shape: self.shape, directions, outputs: &self.outputs }
    }
}

/// A [`KnownPart`] whose numbers can be multiplied by. What rows have of the directions lies in `low`, of which a row may have other
/// values in front: its last ones are these.
pub(crate) struct Known<'a> {
    shape: LinearShape,
    directions: Buffer,
    outputs: &'a [f32],
}

impl Known<'_> {
    /// Directions.
    pub(crate) fn rank(&self) -> usize {
        self.directions.len() / self.shape.d_in
    }

    /// Takes out of rows, `any × d_in`, what they have of the directions.
    pub(crate) fn take_rows(&self, x: &mut [f32], low: &mut [f32]) {
        let (d_in, rank) = (self.shape.d_in, self.rank());
        let rows = x.len() / d_in;
        let (width, directions) = (low.len() / rows.max(1), Matrix::new(&self.directions, rank, d_in));
        let low = &mut low[width - rank..];
        let to = MatrixMut::strided(low, rows, rank, width);
        multiply(to, Before::Replaced, 1.0, Matrix::new(x, rows, d_in), directions.transposed(), Threads::One);
        let (to, low) = (MatrixMut::new(x, rows, d_in), Matrix::strided(low, rows, rank, width));
        multiply(to, Before::Kept, -1.0, low, directions, Threads::One);
    }

    /// Adds to the product of what was left, `any × d_out`, that of what was [taken](Self::take_rows).
    pub(crate) fn give_back_rows(&self, low: &[f32], y: &mut [f32]) {
        let (d_out, rank) = (self.shape.d_out, self.rank());
        let rows = y.len() / d_out;
        let width = low.len() / rows.max(1);
        let (to, low) = (MatrixMut::new(y, rows, d_out), Matrix::strided(&low[width - rank..], rows, rank, width));
        multiply(to, Before::Kept, 1.0, low, Matrix::new(self.outputs, rank, d_out), Threads::One);
    }

    /// What all of so many rows have of the directions, and what is left of them.
    pub(crate) fn take(&self, rows: &[f32], tokens: usize) -> (Buffer, Buffer) {
        let (d_in, rank) = (self.shape.d_in, self.rank());
        let (mut low, mut rest) = (Buffer::scratch(tokens * rank), Buffer::scratch(tokens * d_in));
        for_each_block2(tokens, (&mut low, rank), (&mut rest, d_in), |first, low, rest| {
            rest.copy_from_slice(block(rows, d_in, first));
            self.take_rows(rest, low);
        });
        (low, rest)
    }

    /// [`Self::give_back_rows`] for all of so many rows.
    pub(crate) fn give_back(&self, low: &[f32], y: &mut [f32], tokens: usize) {
        for_each_block(tokens, (y, self.shape.d_out), |first, y| {
            self.give_back_rows(block(low, self.rank(), first), y);
        });
    }
}
