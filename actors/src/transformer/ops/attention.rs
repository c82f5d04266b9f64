//! Causal attention over grouped heads with rotary positions, from the fused projections to the heads' outputs.
//!
//! Its input, `q | k | v` of each token, is what the worker's product gives; each head's part is copied out of it.
//! Queries and keys are turned to their positions where they lie. Probabilities are computed in blocks of queries and
//! never kept, only the logarithm of each query's sum: the backward pass computes them again from it, so memory stays
//! linear in the sequence's length. A block of queries only looks at keys up to its end, which saves almost half of
//! the products.
//!
//! Sequences lie one after the other, each as long as it is, and none sees another.

use std::sync::Arc;

use protocol::buffer::Buffer;
use protocol::parts::Part;
use rayon::prelude::*;

use super::sequences::Sequence;
use super::{RopeTable, Sequences};
use crate::transformer::gemm::{Before, Matrix, MatrixMut, Threads, multiply};
use crate::transformer::vector::{add, dot, exp_row, maximum, scale, vectorised};

/// Queries that are scored together.
const BLOCK: usize = 32;

/// `tokens × (heads + 2·kv_heads)·head_dim` to `tokens × heads·head_dim`.
pub(crate) struct CausalAttention {
    /// Where the sequences lie.
    pub(crate) sequences: Sequences,
    /// Query heads.
    pub(crate) heads: usize,
    /// Key and value heads; divides `heads`.
    pub(crate) kv_heads: usize,
    /// Features of a head.
    pub(crate) head_dim: usize,
    /// Rotations of as many positions as the longest sequence has.
    pub(crate) rope: RopeTable,
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
struct Head {
    /// Tokens of the sequence.
    length: usize,
    /// `length × head_dim`, like the next two.
    queries: Buffer,
    keys: Buffer,
    values: Buffer,
    /// `head_dim × length`.
    turned_keys: Buffer,
}

/// Rows of `width` values, which begin `stride` apart, one after the other.
fn gathered(from: &[f32], stride: usize, rows: usize, width: usize) -> Buffer {
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

impl CausalAttention {
    /// Features of a row of the input.
    pub(crate) fn width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    /// Query heads that share a key head.
    fn sharing(&self) -> usize {
        self.heads / self.kv_heads
    }

    fn scale(&self) -> f32 {
        (self.head_dim as f32).sqrt().recip()
    }

    /// Turns the queries and keys of some rows, of which the first has number `first`, to their positions.
    pub(crate) fn turn_rows(&self, first: usize, qkv: &mut [f32]) {
        let turned = (self.heads + self.kv_heads) * self.head_dim;
        for (row, token) in qkv.chunks_exact_mut(self.width()).zip(first..) {
            let heads = row[..turned].chunks_exact_mut(self.head_dim);
            let (_, position) = self.sequences.of_row(token);
            heads.for_each(|head| self.rope.turn(position, head));
        }
    }

    fn head(&self, qkv: &[f32], Sequence { first, length }: Sequence, head: usize) -> Head {
        let (d, kv_head) = (self.head_dim, head / self.sharing());
        let rows = &qkv[first * self.width()..];
        let part = |head: usize| gathered(&rows[head * d..], self.width(), length, d);
        let keys = part(self.heads + kv_head);
        let turned_keys = transposed(&keys, d);
        Head { length, queries: part(head), keys, values: part(self.heads + self.kv_heads + kv_head), turned_keys }
    }

    /// Scores of the queries `start .. end` with the keys `0 .. end`, row-major.
    fn scores(&self, head: &Head, start: usize, end: usize, out: &mut [f32]) {
        let d = self.head_dim;
        let queries = Matrix::new(&head.queries[start * d..], end - start, d);
        let keys = Matrix::strided(&head.turned_keys, d, end, head.length);
        let out = MatrixMut::new(out, end - start, end);
        multiply(out, Before::Replaced, self.scale(), queries, keys, Threads::One);
    }

    /// One head's output, `length × head_dim`, and the logarithms of its queries' sums.
    fn head_forward(&self, head: &Head, out: &mut [f32], log_sums: &mut [f32]) {
        let (d, length) = (self.head_dim, head.length);
        let mut scores = Buffer::scratch(BLOCK.min(length) * length);
        for start in (0..length).step_by(BLOCK) {
            let end = (start + BLOCK).min(length);
            self.scores(head, start, end, &mut scores);
            let mut inverses = [0.0; BLOCK];
            for ((row, query), inverse) in scores.chunks_exact_mut(end).zip(start..end).zip(&mut inverses) {
                let (seen, later) = row.split_at_mut(query + 1);
                let largest = maximum(seen);
                let sum = exp_row(seen, largest);
                later.fill(0.0);
                log_sums[query] = largest + sum.ln();
                *inverse = sum.recip();
            }
            let seen = Matrix::new(&scores, end - start, end);
            let out = &mut out[start * d..end * d];
            let values = Matrix::new(&head.values, end, d);
            multiply(MatrixMut::new(out, end - start, d), Before::Replaced, 1.0, seen, values, Threads::One);
            out.chunks_exact_mut(d).zip(inverses).for_each(|(row, inverse)| scale(row, inverse));
        }
    }

    /// Gradients of one head's queries, keys and values, each `length × head_dim`, one after the other. `out` and
    /// `dout` are its output and the gradient of that, rows apart by `heads·head_dim`.
    fn head_backward(&self, head: &Head, log_sums: &[f32], out: &[f32], dout: &[f32], gradients: &mut [f32]) {
        let (d, length, stride) = (self.head_dim, head.length, self.heads * self.head_dim);
        let (dq, rest) = gradients.split_at_mut(length * d);
        let (dk, dv) = rest.split_at_mut(length * d);
        dk.fill(0.0);
        dv.fill(0.0);
        let largest = BLOCK.min(length) * length;
        let (mut probabilities, mut dscores) = (Buffer::scratch(largest), Buffer::scratch(largest));
        let (out, dout) = (gathered(out, stride, length, d), gathered(dout, stride, length, d));
        let turned_values = transposed(&head.values, d);
        for start in (0..length).step_by(BLOCK) {
            let end = (start + BLOCK).min(length);
            let rows = end - start;
            self.scores(head, start, end, &mut probabilities);
            let of_block = Matrix::new(&dout[start * d..], rows, d);
            let values = Matrix::strided(&turned_values, d, end, length);
            let block = MatrixMut::new(&mut dscores, rows, end);
            multiply(block, Before::Replaced, 1.0, of_block, values, Threads::One);
            let pairs = probabilities.chunks_exact_mut(end).zip(dscores.chunks_exact_mut(end));
            for ((probabilities, dscores), query) in pairs.zip(start..end) {
                let (seen, later) = probabilities.split_at_mut(query + 1);
                exp_row(seen, log_sums[query]);
                later.fill(0.0);
                let row = query * d..(query + 1) * d;
                let mean = dot(&out[row.clone()], &dout[row]);
                through_softmax(probabilities, mean, self.scale(), dscores);
            }
            let seen = Matrix::new(&probabilities, rows, end);
            let block = MatrixMut::new(&mut dv[..end * d], end, d);
            multiply(block, Before::Kept, 1.0, seen.transposed(), of_block, Threads::One);
            let dscores = Matrix::new(&dscores, rows, end);
            let keys = Matrix::new(&head.keys, end, d);
            let queries = Matrix::new(&head.queries[start * d..], rows, d);
            let block = MatrixMut::new(&mut dq[start * d..end * d], rows, d);
            multiply(block, Before::Replaced, 1.0, dscores, keys, Threads::One);
            let block = MatrixMut::new(&mut dk[..end * d], end, d);
            multiply(block, Before::Kept, 1.0, dscores.transposed(), queries, Threads::One);
        }
    }

    /// Attention over rows whose queries and keys are turned already.
    pub(crate) fn forward(&self, qkv: &[f32]) -> Attended {
        let (d, heads, width) = (self.head_dim, self.heads, self.heads * self.head_dim);
        let tokens = self.sequences.rows();
        let mut log_sums = Buffer::scratch(heads * tokens);
        let mut by_head = Buffer::scratch(tokens * width);
        let outs = self.sequences.by_head(heads, d, &mut by_head);
        let tasks = outs.into_par_iter().zip(self.sequences.by_head(heads, 1, &mut log_sums));
        tasks.with_max_len(1).for_each(|((sequence, head, out), (.., log_sums))| {
            let _part = Part::Own.mark();
            self.head_forward(&self.head(qkv, sequence, head), out, log_sums);
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
    pub(crate) fn backward(&self, qkv: &mut [f32], attended: &Attended, dout: &[f32]) {
        let (d, heads) = (self.head_dim, self.heads);
        let mut by_head = Buffer::scratch(self.sequences.rows() * heads * 3 * d);
        let tasks = self.sequences.by_head(heads, 3 * d, &mut by_head);
        tasks.into_par_iter().with_max_len(1).for_each(|(sequence, head, gradients)| {
            let _part = Part::Own.mark();
            let first = (sequence.first * heads + head) * d;
            let log_sums = &attended.log_sums[sequence.head(head, heads, 1)];
            let head = self.head(qkv, sequence, head);
            self.head_backward(&head, log_sums, &attended.rows[first..], &dout[first..], gradients);
        });
        qkv.par_chunks_mut(self.width()).with_min_len(16).enumerate().for_each(|(token, row)| {
            let _part = Part::Own.mark();
            let (sequence, position) = self.sequences.of_row(token);
            let part = sequence.length * d;
            let (dq, rest) = row.split_at_mut(self.heads * d);
            let (dk, dv) = rest.split_at_mut(self.kv_heads * d);
            dk.fill(0.0);
            dv.fill(0.0);
            for head in 0..self.heads {
                let gradients = &by_head[sequence.head(head, heads, 3 * d)];
                let at = |part: usize| &gradients[part + position * d..part + (position + 1) * d];
                let kv = (head / self.sharing()) * d;
                dq[head * d..(head + 1) * d].copy_from_slice(at(0));
                add(&mut dk[kv..kv + d], at(part));
                add(&mut dv[kv..kv + d], at(2 * part));
            }
            dq.chunks_exact_mut(d).chain(dk.chunks_exact_mut(d)).for_each(|head| self.rope.turn_back(position, head));
        });
    }
}

vectorised! {
    /// Gradients of a query's scores from those of its probabilities, whose mean is given.
    fn through_softmax(probabilities: &[f32], mean: f32, scale: f32, gradients: &mut [f32]) {
        for (d, p) in gradients.iter_mut().zip(probabilities) {
            *d = p * (*d - mean) * scale;
        }
    }
}
