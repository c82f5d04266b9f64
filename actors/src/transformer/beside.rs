//! The adapters beside a pass: the same ones beside all of its rows, or others beside the rows of each sequence.

use std::ops::Range;

use super::ops::Adapter;

/// Those of one fused group. Whatever they make of a row between their projections takes as much room as that of the widest
/// of them.
pub(super) struct Beside<'a> {
    parts: Vec<(Range<usize>, Adapter<'a>)>,
    width: usize,
}

impl<'a> Beside<'a> {
    /// Adapters with the rows that each is beside; rows do not overlap.
    pub(super) fn new(parts: Vec<(Range<usize>, Adapter<'a>)>) -> Self {
        let width = parts.iter().map(|(_, adapter)| adapter.width()).max().unwrap_or(0);
        Self { parts, width }
    }

    /// Room of a row between the projections; 0 without adapters.
    pub(super) fn width(&self) -> usize {
        self.width
    }

    /// Those that have some of `count` rows from `first` on, with the rows as counted from there.
    fn among(&self, first: usize, count: usize) -> impl Iterator<Item = (Range<usize>, &Adapter<'a>)> {
        self.parts.iter().filter_map(move |(rows, adapter)| {
            let (start, end) = (rows.start.max(first), rows.end.min(first + count));
            (start < end).then(|| (start - first..end - first, adapter))
        })
    }

    /// See [`Adapter::down_rows`].
    pub(super) fn down_rows(&self, first: usize, x: &[f32], low: &mut [f32]) {
        let Some(d_in) = self.parts.first().map(|(_, adapter)| adapter.shape.d_in) else { return };
        for (rows, adapter) in self.among(first, x.len() / d_in) {
            let to = &mut low[rows.start * self.width..][..rows.len() * adapter.width()];
            adapter.down_rows(first + rows.start, &x[rows.start * d_in..rows.end * d_in], to);
        }
    }

    /// See [`Adapter::up_rows`]; `low` is what [`Self::down_rows`] made of the same rows.
    pub(super) fn up_rows(&self, first: usize, low: &[f32], y: &mut [f32]) {
        let Some(d_out) = self.parts.first().map(|(_, adapter)| adapter.shape.d_out) else { return };
        for (rows, adapter) in self.among(first, y.len() / d_out) {
            let from = &low[rows.start * self.width..][..rows.len() * adapter.width()];
            adapter.up_rows(from, &mut y[rows.start * d_out..rows.end * d_out]);
        }
    }
}
