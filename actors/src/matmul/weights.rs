//! Int8 weights in the order in which every CPU kernel reads them.

use std::ops::Range;

use protocol::ids::{Direction, LinearShape};
use rayon::prelude::*;

use super::lines::{LINE_WORDS, Line};

/// Output columns of one packed panel.
pub(crate) const PANEL: usize = 32;
/// Output columns of half a panel: a line of 32-bit words, a row of an AMX tile.
pub(crate) const HALF: usize = LINE_WORDS;
/// Inner elements of a block: a line of bytes.
pub(crate) const BLOCK: usize = 64;
/// Consecutive inner elements kept together: the dot product of one `vpdpbusd` lane, two of `vpmaddwd`.
pub(crate) const QUAD: usize = 4;
/// Lines of one block of a panel.
pub(crate) const BLOCK_LINES: usize = PANEL * BLOCK / 64;

/// An `inner × outer` int8 matrix, packed `[panel of 32 columns][inner / 64][half][16 quads][16 columns][4]` and
/// filled up with zeros.
///
/// One order serves all kernels: four consecutive inner elements of a column are the operand of a VNNI lane and two
/// pairs for the 16-bit multiply-add of AVX2; the sixteen lines of a half block are an AMX tile; and whatever is
/// multiplied over an inner range is one run of memory.
pub struct PackedMatrix {
    inner: usize,
    outer: usize,
    lines: Vec<Line>,
}

impl PackedMatrix {
    /// Packs the matrix whose element `(i, j)` is `element(i, j)`.
    fn pack(inner: usize, outer: usize, element: impl Fn(usize, usize) -> i8 + Sync) -> Self {
        let panel_lines = inner.div_ceil(BLOCK) * BLOCK_LINES;
        let mut lines = vec![Line::ZERO; outer.div_ceil(PANEL) * panel_lines];
        if panel_lines > 0 {
            lines.par_chunks_exact_mut(panel_lines).enumerate().for_each(|(panel, lines)| {
                for (index, line) in lines.iter_mut().enumerate() {
                    let (block, half, quad) = (index / BLOCK_LINES, index / HALF % 2, index % HALF);
                    let first_column = panel * PANEL + half * HALF;
                    let columns = first_column..(first_column + HALF).min(outer);
                    let first_row = block * BLOCK + quad * QUAD;
                    let rows = first_row..(first_row + QUAD).min(inner);
                    let bytes: &mut [i8] = bytemuck::cast_slice_mut(&mut line.0);
                    for (j, lane) in columns.zip(bytes.chunks_exact_mut(QUAD)) {
                        for (i, value) in rows.clone().zip(lane) {
                            *value = element(i, j);
                        }
                    }
                }
            });
        }
        Self { inner, outer, lines }
    }

    /// Rows: what a product sums over.
    pub fn inner(&self) -> usize {
        self.inner
    }

    /// Columns: what a product gives.
    pub fn outer(&self) -> usize {
        self.outer
    }

    /// Blocks of a panel.
    pub(crate) fn blocks(&self) -> usize {
        self.inner.div_ceil(BLOCK)
    }

    /// `[block][half][quad][column][4]` of one panel for some of its blocks.
    pub(crate) fn panel(&self, panel: usize, blocks: Range<usize>) -> &[Line] {
        let base = panel * self.blocks();
        &self.lines[(base + blocks.start) * BLOCK_LINES..(base + blocks.end) * BLOCK_LINES]
    }
}

/// A served matrix, packed for both directions.
pub struct PackedLinear {
    shape: LinearShape,
    forward: PackedMatrix,
    backward: PackedMatrix,
}

impl PackedLinear {
    /// Packs `values`, row-major `d_in × d_out`. `None` if their count is not the shape's.
    pub fn new(shape: LinearShape, values: &[i8]) -> Option<Self> {
        if shape.d_in.checked_mul(shape.d_out)? != values.len() {
            return None;
        }
        let d_out = shape.d_out;
        Some(Self {
            shape,
            forward: PackedMatrix::pack(shape.d_in, d_out, |i, j| values[i * d_out + j]),
            backward: PackedMatrix::pack(d_out, shape.d_in, |i, j| values[j * d_out + i]),
        })
    }

    /// Dimensions of the served matrix.
    pub fn shape(&self) -> LinearShape {
        self.shape
    }

    /// The matrix that a direction multiplies by.
    pub fn along(&self, direction: Direction) -> &PackedMatrix {
        match direction {
            Direction::Forward => &self.forward,
            Direction::Backward => &self.backward,
        }
    }

    /// Memory of both packings, bytes.
    pub fn memory_bytes(&self) -> u64 {
        (size_of_val(&self.forward.lines[..]) + size_of_val(&self.backward.lines[..])) as u64
    }

    /// What [`Self::memory_bytes`] will be for a shape, before anything is loaded.
    pub fn memory_for(shape: LinearShape) -> u64 {
        let packed = |inner: usize, outer: usize| {
            (inner as u64).next_multiple_of(BLOCK as u64).saturating_mul((outer as u64).next_multiple_of(PANEL as u64))
        };
        packed(shape.d_in, shape.d_out).saturating_add(packed(shape.d_out, shape.d_in))
    }
}
