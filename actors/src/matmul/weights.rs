//! Int8 weights in the order in which every CPU kernel reads them.

use protocol::model::{Direction, LinearShape};
use rayon::prelude::*;

/// Output columns of one packed panel.
pub(crate) const PANEL: usize = 16;
/// Consecutive inner elements kept together: the dot product of one `vpdpbusd` lane, two of `vpmaddwd`.
pub(crate) const QUAD: usize = 4;

/// An `inner × outer` int8 matrix, packed `[panel of 16 columns][inner / 4][column][4]` and filled up with zeros.
///
/// One order serves all kernels: four consecutive inner elements of a column are the operand of a VNNI lane (and,
/// sixteen such rows together, of an AMX tile), and two pairs for the 16-bit multiply-add of AVX2.
pub struct PackedMatrix {
    inner: usize,
    outer: usize,
    bytes: Vec<i8>,
}

impl PackedMatrix {
    /// Packs the matrix whose element `(i, j)` is `element(i, j)`.
    fn pack(inner: usize, outer: usize, element: impl Fn(usize, usize) -> i8 + Sync) -> Self {
        let panel_bytes = inner.div_ceil(QUAD) * QUAD * PANEL;
        let mut bytes = vec![0i8; outer.div_ceil(PANEL) * panel_bytes];
        if panel_bytes > 0 {
            bytes.par_chunks_exact_mut(panel_bytes).enumerate().for_each(|(panel, bytes)| {
                let columns = panel * PANEL..((panel + 1) * PANEL).min(outer);
                for (quad, group) in bytes.chunks_exact_mut(QUAD * PANEL).enumerate() {
                    for (j, lane) in columns.clone().zip(group.chunks_exact_mut(QUAD)) {
                        for (i, value) in (quad * QUAD..inner).zip(lane) {
                            *value = element(i, j);
                        }
                    }
                }
            });
        }
        Self { inner, outer, bytes }
    }

    /// Rows: what a product sums over.
    pub fn inner(&self) -> usize {
        self.inner
    }

    /// Columns: what a product gives.
    pub fn outer(&self) -> usize {
        self.outer
    }

    /// Groups of four inner elements in a panel.
    pub(crate) fn quads(&self) -> usize {
        self.inner.div_ceil(QUAD)
    }

    /// `[quad][column][4]` of one panel for some of its quads; empty for a panel beyond the last.
    pub(crate) fn panel(&self, panel: usize, quads: std::ops::Range<usize>) -> &[i8] {
        if panel >= self.outer.div_ceil(PANEL) {
            return &[];
        }
        let base = panel * self.quads() * QUAD * PANEL;
        &self.bytes[base + quads.start * QUAD * PANEL..base + quads.end * QUAD * PANEL]
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
        (self.forward.bytes.len() + self.backward.bytes.len()) as u64
    }

    /// What [`Self::memory_bytes`] will be for a shape, before anything is loaded.
    pub fn memory_for(shape: LinearShape) -> u64 {
        let packed = |inner: usize, outer: usize| {
            (inner as u64).next_multiple_of(QUAD as u64).saturating_mul((outer as u64).next_multiple_of(PANEL as u64))
        };
        packed(shape.d_in, shape.d_out).saturating_add(packed(shape.d_out, shape.d_in))
    }
}
