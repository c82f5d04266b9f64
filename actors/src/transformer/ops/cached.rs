//! Attention of rows that come after others, whose keys and values were kept.
//!
//! Rows of several sequences lie one after the other; each attends to what its own sequence has kept, and to the rows before
//! it. A few rows are gone through one by one, each reading the keys where they lie: so what comes out for a row does not
//! depend on what is computed beside it. More of them are a matter of matrices, as in training.

use std::sync::{Arc, Mutex, PoisonError};

use protocol::buffer::Buffer;
use protocol::parts::Part;
use rayon::prelude::*;

use super::attention::{Head, Heads, LayerAttention, gathered};
use crate::transformer::vector::{add_rows, dots, exp_row, maximum, scale, soft_cap};

/// Up to so many rows of a sequence are gone through one by one.
pub(crate) const FEW: usize = 16;
/// Positions whose keys, or values, lie together.
pub(crate) const PAGE: usize = 64;
/// Products of a query's and a key's feature that are worth a task for other threads.
const TASK: usize = 1 << 19;

/// Keys, or values, of a layer: position by position, in pages.
#[derive(Default)]
struct Pages(Vec<Buffer>);

impl Pages {
    /// Writes the rows of the positions from `first` on, `width` values each.
    fn write<'a>(&mut self, width: usize, first: usize, rows: impl Iterator<Item = &'a [f32]>) {
        for (position, row) in (first..).zip(rows) {
            if position / PAGE == self.0.len() {
                self.0.push(Buffer::scratch(PAGE * width));
            }
            self.0[position / PAGE][position % PAGE * width..][..width].copy_from_slice(row);
        }
    }

    /// The positions `begin .. end` page by page, each with the number of its first one behind `begin`, and all that follows in
    /// its page.
    fn parts(&self, width: usize, begin: usize, end: usize) -> impl Iterator<Item = (usize, usize, &[f32])> {
        let pages = self.0.iter().enumerate().skip(begin / PAGE);
        pages.map_while(move |(page, values)| {
            let (from, to) = (begin.max(page * PAGE), end.min((page + 1) * PAGE));
            (from < to).then(|| (from - begin, to - from, &values[(from % PAGE) * width..]))
        })
    }

    /// One head's part of the positions up to `end`, copied side by side.
    fn head(&self, width: usize, head: usize, features: usize, end: usize) -> Buffer {
        let mut to = Buffer::scratch(end * features);
        for (first, count, values) in self.parts(width, 0, end) {
            let rows = gathered(&values[head * features..], width, count, features);
            to[first * features..][..rows.len()].copy_from_slice(&rows);
        }
        to
    }
}

/// What a layer keeps of a sequence.
#[derive(Default)]
pub(crate) struct KeptLayer {
    keys: Pages,
    values: Pages,
}

impl KeptLayer {
    /// Bytes that it takes.
    pub(crate) fn bytes(&self) -> u64 {
        let pages = self.keys.0.iter().chain(&self.values.0);
        pages.map(|page| (page.len() * size_of::<f32>()) as u64).sum()
    }

    /// Lets go of what is not needed for so many positions.
    pub(crate) fn truncate(&mut self, positions: usize) {
        self.keys.0.truncate(positions.div_ceil(PAGE));
        self.values.0.truncate(positions.div_ceil(PAGE));
    }
}

/// Rows of one sequence.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece {
    /// The first of them.
    pub(crate) first: usize,
    /// How many, at least one.
    pub(crate) rows: usize,
    /// Positions of the sequence before it.
    pub(crate) past: usize,
}

/// See the module's documentation.
pub(crate) struct CachedAttention {
    pub(crate) heads: Heads,
    /// One after the other, from row 0 on; rows behind them belong to no sequence.
    pub(crate) pieces: Vec<Piece>,
}

impl CachedAttention {
    /// Keeps the keys and values of rows whose queries and keys are turned already, and attends. `kept` has a place for each
    /// piece, of this layer. Returns `rows × queries·features`.
    pub(crate) fn forward(&self, window: usize, kept: &mut [&mut KeptLayer], qkv: &[f32]) -> Buffer {
        let Heads { queries, keys, features, .. } = self.heads;
        let (width, kept_width) = (self.heads.width(), keys * features);
        let out_width = queries * features;
        let mut out = Buffer::scratch(qkv.len() / width * out_width);
        let mut rest = &mut out[..];
        for (piece, kept) in self.pieces.iter().zip(kept.iter_mut()) {
            let qkv = &qkv[piece.first * width..][..piece.rows * width];
            let part = |from: usize| qkv.chunks_exact(width).map(move |row| &row[from..from + kept_width]);
            kept.keys.write(kept_width, piece.past, part(out_width));
            kept.values.write(kept_width, piece.past, part(out_width + kept_width));
            let (out, behind) = rest.split_at_mut(piece.rows * out_width);
            rest = behind;
            match piece.rows <= FEW {
                true => self.few(window, *piece, kept, qkv, out),
                false => self.many(window, *piece, kept, qkv, out),
            }
        }
        rest.fill(0.0);
        out
    }

    /// Row by row, and key head by key head.
    fn few(&self, window: usize, piece: Piece, kept: &KeptLayer, qkv: &[f32], out: &mut [f32]) {
        let Heads { queries, keys, features, .. } = self.heads;
        let sharing = self.heads.sharing() * features;
        let work = |(task, out): (usize, &mut [f32])| {
            let _part = Part::Own.mark();
            let (row, head) = (task / keys, task % keys);
            let asked = &qkv[row * self.heads.width() + head * sharing..][..sharing];
            self.one(window, piece.past + row, kept, head, asked, out);
        };
        let seen = window.min(piece.past + piece.rows);
        let products = piece.rows * seen * queries * features;
        if products < TASK {
            out.chunks_exact_mut(sharing).enumerate().for_each(work);
        } else {
            out.par_chunks_exact_mut(sharing).enumerate().for_each(work);
        }
    }

    /// The queries of one row that share a key head.
    fn one(&self, window: usize, position: usize, kept: &KeptLayer, head: usize, asked: &[f32], out: &mut [f32]) {
        let Heads { keys, features, .. } = self.heads;
        let (width, end) = (keys * features, position + 1);
        let begin = end.saturating_sub(window);
        let mut scores = Buffer::scratch(end - begin);
        for (query, out) in asked.chunks_exact(features).zip(out.chunks_exact_mut(features)) {
            for (first, count, rows) in kept.keys.parts(width, begin, end) {
                dots(query, &rows[head * features..], width, self.heads.scale, &mut scores[first..first + count]);
            }
            if let Some(cap) = self.heads.cap {
                soft_cap(&mut scores, cap);
            }
            let largest = maximum(&scores);
            let sum = exp_row(&mut scores, largest);
            out.fill(0.0);
            for (first, count, rows) in kept.values.parts(width, begin, end) {
                add_rows(out, &scores[first..first + count], &rows[head * features..], width);
            }
            scale(out, sum.recip());
        }
    }

    /// Head by head, in blocks of queries.
    fn many(&self, window: usize, piece: Piece, kept: &KeptLayer, qkv: &[f32], out: &mut [f32]) {
        let Heads { queries, keys, features, .. } = self.heads;
        let (width, end) = (keys * features, piece.past + piece.rows);
        let layer = LayerAttention { rope: None, window };
        let of_head = |head: usize| {
            let _part = Part::Own.mark();
            let of_keys = |pages: &Pages| pages.head(width, head / self.heads.sharing(), features, end);
            let asked = gathered(&qkv[head * features..], self.heads.width(), piece.rows, features);
            let whole = Head::new(asked, of_keys(&kept.keys), of_keys(&kept.values), features);
            let (mut out, mut log_sums) = (Buffer::scratch(piece.rows * features), Buffer::scratch(piece.rows));
            self.heads.head_forward(layer, &whole, &mut out, &mut log_sums);
            out
        };
        let by_head: Vec<Buffer> = (0..queries).into_par_iter().with_max_len(1).map(of_head).collect();
        for (head, from) in by_head.iter().enumerate() {
            let to = out[head * features..].chunks_mut(queries * features);
            to.zip(from.chunks_exact(features)).for_each(|(to, from)| to[..features].copy_from_slice(from));
        }
    }
}

/// What layers keep of several sequences, in the order of their pieces: each layer is borrowed for as long as it attends.
pub(crate) struct KeptSequences<'a>(Mutex<Vec<&'a mut [KeptLayer]>>);

impl<'a> KeptSequences<'a> {
    /// Of sequences that keep something of each layer.
    pub(crate) fn new(sequences: Vec<&'a mut [KeptLayer]>) -> Self {
        Self(Mutex::new(sequences))
    }

    /// Attention of one layer; see [`CachedAttention::forward`].
    pub(crate) fn attend(&self, attention: &CachedAttention, layer: usize, window: usize, qkv: &[f32]) -> Arc<Buffer> {
        let mut sequences = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut kept: Vec<&mut KeptLayer> = sequences.iter_mut().map(|layers| &mut layers[layer]).collect();
        Arc::new(attention.forward(window, &mut kept, qkv))
    }
}
