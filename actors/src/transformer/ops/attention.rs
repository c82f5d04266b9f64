//! Causal attention over grouped heads with rotary positions, from the fused projections to the heads' outputs.
//!
//! Its input, `q | k | v` of each token, is what the worker's product gives; each head's part is copied out of it.
//! Queries and keys are turned to their positions where they lie. Probabilities are computed in blocks of queries and
//! never kept, only the logarithm of each query's sum: the backward pass computes them again from it, so memory stays
//! linear in the sequence's length. A block of queries only looks at keys up to its end, which saves almost half of
//! the products, and in layers with a window at none before its first query's window.
//!
//! Sequences lie one after the other, each as long as it is, and none sees another.

use std::sync::Arc;

use protocol::buffer::Buffer;
use protocol::parts::Part;
use rayon::prelude::*;

use super::sequences::Sequence;
use super::{RopeTables, Sequences};
use crate::transformer::gemm::{Before, Matrix, MatrixMut, Threads, multiply};
use crate::transformer::vector::{
    add, dot, exp_row, maximum, multiply_by, scale, soft_cap, soft_cap_slopes, vectorised,
};

/// Queries that are scored together.
const BLOCK: usize = 32;

/// The heads of a model's attention.
#[derive(Clone, Copy)]
pub(crate) struct Heads {
    /// Query heads.
    pub(crate) queries: usize,
    /// Key and value heads; divides `queries`.
    pub(crate) keys: usize,
    /// Features of a head.
    pub(crate) features: usize,
    /// What scores are multiplied by.
    pub(crate) scale: f32,
    /// The bound that scores approach, if there is one: `cap · tanh(score / cap)`.
    pub(crate) cap: Option<f32>,
}

/// `tokens × (queries + 2·keys)·features` to `tokens × queries·features`.
pub(crate) struct CausalAttention {
    /// Where the sequences lie.
    pub(crate) sequences: Sequences,
    /// What attends.
    pub(crate) heads: Heads,
}

/// What layers do differently.
#[derive(Clone, Copy)]
pub(crate) struct LayerAttention<'a> {
    /// Rotations of as many positions as the longest sequence has, if queries and keys turn at all.
    pub(crate) rope: Option<&'a RopeTables>,
    /// How many keys a query sees, its own among them; `usize::MAX` where it sees all.
    pub(crate) window: usize,
}

impl LayerAttention<'_> {
    /// The first key that a query sees.
    pub(super) fn first_key(&self, query: usize) -> usize {
        (query + 1).saturating_sub(self.window)
    }
}

/// What attention gives.
pub(crate) struct Attended {
    /// The heads' outputs, `tokens × heads·head_dim`.
    pub(crate) rows: Arc<Buffer>,
    /// For each sequence, head and query the logarithm of the sum of its scores' exponentials.
    pub(crate) log_sums: Buffer,
}

/// The part of the turned input that one query head of one sequence sees, copied side by side: in the input each row
/// lies on another page of memory.
pub(super) struct Head {
    /// Tokens of the sequence.
    length: usize,
    /// Those of them, the last ones, that ask.
    rows: usize,
    /// `rows × features`.
    queries: Buffer,
    /// `length × features`, like the next one.
    keys: Buffer,
    values: Buffer,
    /// `features × length`.
    turned_keys: Buffer,
}

impl Head {
    /// From queries, which belong to the last of as many tokens as there are keys and values.
    pub(super) fn new(queries: Buffer, keys: Buffer, values: Buffer, features: usize) -> Self {
        let (rows, length) = (queries.len() / features, keys.len() / features);
        Self { length, rows, queries, turned_keys: transposed(&keys, features), keys, values }
    }

    /// Tokens before the first one that asks.
    fn past(&self) -> usize {
        self.length - self.rows
    }
}

/// Rows of `width` values, which begin `stride` apart, one after the other.
pub(super) fn gathered(from: &[f32], stride: usize, rows: usize, width: usize) -> Buffer {
    let mut to = Buffer::scratch(rows * width);
    for (to, from) in to.chunks_exact_mut(width).zip(from.chunks(stride)) {
        to.copy_from_slice(&from[..width]);
    }
    to
}

/// The transpose of a matrix of `width` columns.
fn transposed(from: &[f32], width: usize) -> Buffer {
    let rows = from.len() / width;
    let mut to = Buffer::scratch(from.len());
    // A few rows at a time: they stay in the cache while their columns are read.
    for (block, from) in from.chunks(16 * width).enumerate() {
        for (column, to) in to.chunks_exact_mut(rows).enumerate() {
            let from = from[column..].iter().step_by(width);
            to[16 * block..].iter_mut().zip(from).for_each(|(to, from)| *to = *from);
        }
    }
    to
}

impl Heads {
    /// Features of a row of the input.
    pub(crate) fn width(&self) -> usize {
        (self.queries + 2 * self.keys) * self.features
    }

    /// Query heads that share a key head.
    pub(super) fn sharing(&self) -> usize {
        self.queries / self.keys
    }

    /// Features of the queries and keys of a row of the input, which come first.
    pub(crate) fn turned_width(&self) -> usize {
        (self.queries + self.keys) * self.features
    }

    /// Scores of the queries `start .. end` with the keys from `begin` to that of the last of them, row-major.
    fn scores(&self, head: &Head, begin: usize, (start, end): (usize, usize), out: &mut [f32]) {
        let (d, last) = (self.features, head.past() + end);
        let queries = Matrix::new(&head.queries[start * d..], end - start, d);
        let keys = Matrix::strided(&head.turned_keys[begin..], d, last - begin, head.length);
        let written = MatrixMut::new(out, end - start, last - begin);
        multiply(written, Before::Replaced, self.scale, queries, keys, Threads::One);
        if let Some(cap) = self.cap {
            soft_cap(&mut out[..(end - start) * (last - begin)], cap);
        }
    }

    /// One head's output, `rows × features`, and the logarithms of its queries' sums.
    pub(super) fn head_forward(&self, layer: LayerAttention<'_>, head: &Head, out: &mut [f32], log_sums: &mut [f32]) {
        let (d, past) = (self.features, head.past());
        let mut scores = Buffer::scratch(BLOCK.min(head.rows) * head.length);
        for start in (0..head.rows).step_by(BLOCK) {
            let end = (start + BLOCK).min(head.rows);
            let begin = layer.first_key(past + start);
            let keys = past + end - begin;
            self.scores(head, begin, (start, end), &mut scores);
            let mut inverses = [0.0; BLOCK];
            for ((row, query), inverse) in scores.chunks_exact_mut(keys).zip(start..end).zip(&mut inverses) {
                let position = past + query;
                let seen = seen(row, layer.first_key(position) - begin, position + 1 - begin);
                let largest = maximum(seen);
                let sum = exp_row(seen, largest);
                log_sums[query] = largest + sum.ln();
                *inverse = sum.recip();
            }
            let seen = Matrix::new(&scores, end - start, keys);
            let out = &mut out[start * d..end * d];
            let values = Matrix::new(&head.values[begin * d..], keys, d);
            multiply(MatrixMut::new(out, end - start, d), Before::Replaced, 1.0, seen, values, Threads::One);
            out.chunks_exact_mut(d).zip(inverses).for_each(|(row, inverse)| scale(row, inverse));
        }
    }
}

impl CausalAttention {
    /// Turns the queries and keys of some rows, of which the first has number `first`, to their positions.
    pub(crate) fn turn_rows(&self, layer: LayerAttention<'_>, first: usize, qkv: &mut [f32]) {
        let (Some(rope), turned) = (layer.rope, self.heads.turned_width()) else { return };
        for (row, token) in qkv.chunks_exact_mut(self.heads.width()).zip(first..) {
            let heads = row[..turned].chunks_exact_mut(self.heads.features);
            let (sequence, position) = self.sequences.of_row(token);
            let table = rope.of(sequence.length);
            heads.for_each(|head| table.turn(position, head));
        }
    }

    fn head(&self, qkv: &[f32], Sequence { first, length }: Sequence, head: usize) -> Head {
        let Heads { queries, keys, features, .. } = self.heads;
        let (kv_head, width) = (head / self.heads.sharing(), self.heads.width());
        let rows = &qkv[first * width..];
        let part = |head: usize| gathered(&rows[head * features..], width, length, features);
        Head::new(part(head), part(queries + kv_head), part(queries + keys + kv_head), features)
    }

    /// Gradients of one head's queries, keys and values, each `length × head_dim`, one after the other. `out` and
    /// `dout` are its output and the gradient of that, rows apart by `heads·head_dim`.
    fn head_backward(
        &self,
        layer: LayerAttention<'_>,
        head: &Head,
        log_sums: &[f32],
        (out, dout): (&[f32], &[f32]),
        gradients: &mut [f32],
    ) {
        let Heads { queries, features: d, .. } = self.heads;
        let (length, stride) = (head.length, queries * d);
        let (dq, rest) = gradients.split_at_mut(length * d);
        let (dk, dv) = rest.split_at_mut(length * d);
        dk.fill(0.0);
        dv.fill(0.0);
        let largest = BLOCK.min(length) * length;
        let (mut probabilities, mut dscores) = (Buffer::scratch(largest), Buffer::scratch(largest));
        let mut slopes = Buffer::scratch(if self.heads.cap.is_some() { largest } else { 0 });
        let (out, dout) = (gathered(out, stride, length, d), gathered(dout, stride, length, d));
        let turned_values = transposed(&head.values, d);
        for start in (0..length).step_by(BLOCK) {
            let end = (start + BLOCK).min(length);
            let begin = layer.first_key(start);
            let (rows, keys) = (end - start, end - begin);
            self.heads.scores(head, begin, (start, end), &mut probabilities);
            if let Some(cap) = self.heads.cap {
                soft_cap_slopes(&probabilities[..rows * keys], cap, &mut slopes);
            }
            let of_block = Matrix::new(&dout[start * d..], rows, d);
            let values = Matrix::strided(&turned_values[begin..], d, keys, length);
            let block = MatrixMut::new(&mut dscores, rows, keys);
            multiply(block, Before::Replaced, 1.0, of_block, values, Threads::One);
            let pairs = probabilities.chunks_exact_mut(keys).zip(dscores.chunks_exact_mut(keys));
            for ((probabilities, dscores), query) in pairs.zip(start..end) {
                exp_row(seen(probabilities, layer.first_key(query) - begin, query + 1 - begin), log_sums[query]);
                let row = query * d..(query + 1) * d;
                let mean = dot(&out[row.clone()], &dout[row]);
                through_softmax(probabilities, mean, self.heads.scale, dscores);
            }
            if self.heads.cap.is_some() {
                multiply_by(&mut dscores[..rows * keys], &slopes);
            }
            let seen = Matrix::new(&probabilities, rows, keys);
            let block = MatrixMut::new(&mut dv[begin * d..end * d], keys, d);
            multiply(block, Before::Kept, 1.0, seen.transposed(), of_block, Threads::One);
            let dscores = Matrix::new(&dscores, rows, keys);
            let of_keys = Matrix::new(&head.keys[begin * d..], keys, d);
            let queries = Matrix::new(&head.queries[start * d..], rows, d);
            let block = MatrixMut::new(&mut dq[start * d..end * d], rows, d);
            multiply(block, Before::Replaced, 1.0, dscores, of_keys, Threads::One);
            let block = MatrixMut::new(&mut dk[begin * d..end * d], keys, d);
            multiply(block, Before::Kept, 1.0, dscores.transposed(), queries, Threads::One);
        }
    }

    /// Attention over rows whose queries and keys are turned already.
    pub(crate) fn forward(&self, layer: LayerAttention<'_>, qkv: &[f32]) -> Attended {
        let Heads { queries: heads, features: d, .. } = self.heads;
        let width = heads * d;
        let tokens = self.sequences.rows();
        let mut log_sums = Buffer::scratch(heads * tokens);
        let mut by_head = Buffer::scratch(tokens * width);
        let outs = self.sequences.by_head(heads, d, &mut by_head);
        let tasks = outs.into_par_iter().zip(self.sequences.by_head(heads, 1, &mut log_sums));
        tasks.with_max_len(1).for_each(|((sequence, head, out), (.., log_sums))| {
            let _part = Part::Own.mark();
            self.heads.head_forward(layer, &self.head(qkv, sequence, head), out, log_sums);
        });
        let mut rows = Buffer::scratch(tokens * width);
        rows.par_chunks_mut(width).with_min_len(16).enumerate().for_each(|(token, row)| {
            let _part = Part::Own.mark();
            let (sequence, position) = self.sequences.of_row(token);
            for (head, to) in row.chunks_exact_mut(d).enumerate() {
                let from = sequence.head(head, heads, d).start + position * d;
                to.copy_from_slice(&by_head[from..from + d]);
            }
        });
        Attended { rows: Arc::new(rows), log_sums }
    }

    /// Replaces turned rows of queries, keys and values by their gradients, before they were turned.
    pub(crate) fn backward(&self, layer: LayerAttention<'_>, qkv: &mut [f32], attended: &Attended, dout: &[f32]) {
        let Heads { queries: heads, keys: kv_heads, features: d, .. } = self.heads;
        let mut by_head = Buffer::scratch(self.sequences.rows() * heads * 3 * d);
        let tasks = self.sequences.by_head(heads, 3 * d, &mut by_head);
        tasks.into_par_iter().with_max_len(1).for_each(|(sequence, head, gradients)| {
            let _part = Part::Own.mark();
            let first = (sequence.first * heads + head) * d;
            let log_sums = &attended.log_sums[sequence.head(head, heads, 1)];
            let head = self.head(qkv, sequence, head);
            let outs = (&attended.rows[first..], &dout[first..]);
            self.head_backward(layer, &head, log_sums, outs, gradients);
        });
        qkv.par_chunks_mut(self.heads.width()).with_min_len(16).enumerate().for_each(|(token, row)| {
            let _part = Part::Own.mark();
            let (sequence, position) = self.sequences.of_row(token);
            let part = sequence.length * d;
            let (dq, rest) = row.split_at_mut(heads * d);
            let (dk, dv) = rest.split_at_mut(kv_heads * d);
            dk.fill(0.0);
            dv.fill(0.0);
            for head in 0..heads {
                let gradients = &by_head[sequence.head(head, heads, 3 * d)];
                let at = |part: usize| &gradients[part + position * d..part + (position + 1) * d];
                let kv = (head / self.heads.sharing()) * d;
                dq[head * d..(head + 1) * d].copy_from_slice(at(0));
                add(&mut dk[kv..kv + d], at(part));
                add(&mut dv[kv..kv + d], at(2 * part));
            }
            if let Some(rope) = layer.rope {
                let table = rope.of(sequence.length);
                dq.chunks_exact_mut(d).chain(dk.chunks_exact_mut(d)).for_each(|head| table.turn_back(position, head));
            }
        });
    }
}

/// The part of a query's row that it sees; what it does not see becomes zero.
fn seen(row: &mut [f32], first: usize, end: usize) -> &mut [f32] {
    row[..first].fill(0.0);
    row[end..].fill(0.0);
    &mut row[first..end]
}

vectorised! {
    /// Gradients of a query's scores from those of its probabilities, whose mean is given.
    fn through_softmax(probabilities: &[f32], mean: f32, scale: f32, gradients: &mut [f32]) {
        for (d, p) in gradients.iter_mut().zip(probabilities) {
            *d = p * (*d - mean) * scale;
        }
    }
}
