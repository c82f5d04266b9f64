//! What the owner computes beside a pass: the same adapters beside all of its rows, or others beside the rows of each sequence; and
//! the known part of a product, which is taken out of its rows.

use std::ops::Range;

use super::ops::{Adapter, Known};

/// That of one fused group. Whatever adapters make of a row between their projections takes as much room as that of the widest
/// of them; behind it lies what the row has of the known directions.
pub(super) struct Beside<'a> {
    parts: Vec<(Range<usize>, Adapter<'a>)>,
    known: Option<Known<'a>>,
    width: usize,
}

impl<'a> Beside<'a> {
    /// Adapters with the rows that each is beside, which do not overlap, and what is known of all rows.
    pub(super) fn new(parts: Vec<(Range<usize>, Adapter<'a>)>, known: Option<Known<'a>>) -> Self {
        let widest = parts.iter().map(|(_, adapter)| adapter.width()).max().unwrap_or(0);
        let width = widest + known.as_ref().map_or(0, Known::rank);
        Self { parts, known, width }
    }

    /// Nothing.
    pub(super) fn nothing() -> Self {
        Self::new(Vec::new(), None)
    }

    /// Room of a row between the projections; 0 if there is nothing beside it.
    pub(super) fn width(&self) -> usize {
        self.width
    }

    /// Whether rows change on their way to the product.
    pub(super) fn takes(&self) -> bool {
        self.known.is_some()
    }

    /// Those that have some of `count` rows from `first` on, with the rows as counted from there.
    fn among(&self, first: usize, count: usize) -> impl Iterator<Item = (Range<usize>, &Adapter<'a>)> {
        self.parts.iter().filter_map(move |(rows, adapter)| {
            let (start, end) = (rows.start.max(first), rows.end.min(first + count));
            (start < end).then(|| (start - first..end - first, adapter))
        })
    }

    /// What adapters make of rows between their projections; `first` is the number of the first row.
    pub(super) fn down_rows(&self, first: usize, x: &[f32], low: &mut [f32]) {
        let Some(count) = low.len().checked_div(self.width) else { return };
        let d_in = x.len() / count;
        for (rows, adapter) in self.among(first, count) {
            let to = &mut low[rows.start * self.width..rows.end * self.width];
            adapter.down_rows(first + rows.start, &x[rows.start * d_in..rows.end * d_in], to);
        }
    }

    /// Takes what is known out of rows that adapters have seen.
    pub(super) fn take_rows(&self, x: &mut [f32], low: &mut [f32]) {
        if let Some(known) = &self.known {
            known.take_rows(x, low);
        }
    }

    /// Adds to a product's rows what belongs to them; `low` is what [`Self::down_rows`] and [`Self::take_rows`] made of the
    /// same rows.
    pub(super) fn up_rows(&self, first: usize, low: &[f32], y: &mut [f32]) {
        let Some(count) = low.len().checked_div(self.width) else { return };
        let d_out = y.len() / count;
        for (rows, adapter) in self.among(first, count) {
            let from = &low[rows.start * self.width..rows.end * self.width];
            adapter.up_rows(from, &mut y[rows.start * d_out..rows.end * d_out]);
        }
        if let Some(known) = &self.known {
            known.give_back_rows(low, y);
        }
    }
}
