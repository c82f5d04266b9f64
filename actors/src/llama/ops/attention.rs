//! Causal attention over grouped heads with rotary positions, from the fused projections to the heads' outputs.
//!
//! One operation does it all, because its input, `q | k | v` of each token, is what the worker's product gives,
//! and heads can be read out of it by stride. Probabilities are computed in blocks of queries and never kept: the
//! backward pass computes them again, so memory stays linear in the sequence's length. A block of queries only
//! looks at keys up to its end, which saves almost half of the products.
//!
//! Sequences are padded at their end, so the causal order alone keeps padding from every real token.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::RopeTable;
use super::storage::{tensor, values, with_values};
use crate::llama::gemm::{Before, Matrix, MatrixMut, Threads, multiply};
use crate::llama::vector::{dot, exp_row};

/// Queries that are scored together.
const BLOCK: usize = 64;

/// `batch·length × (heads + 2·kv_heads)·head_dim` to `batch·length × heads·head_dim`.
pub(crate) struct CausalAttention {
    /// Sequences.
    pub(crate) batch: usize,
    /// Tokens of a sequence.
    pub(crate) length: usize,
    /// Query heads.
    pub(crate) heads: usize,
    /// Key and value heads; divides `heads`.
    pub(crate) kv_heads: usize,
    /// Features of a head.
    pub(crate) head_dim: usize,
    /// Rotations of at least `length` positions.
    pub(crate) rope: Arc<RopeTable>,
}

/// The part of the input that one query head of one sequence sees, rows apart by their strides.
struct HeadView<'a> {
    queries: &'a [f32],
    keys: &'a [f32],
    /// Stride of queries and keys.
    turned: usize,
    values: &'a [f32],
    /// Stride of values.
    plain: usize,
}

impl CausalAttention {
    fn width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    fn turned_width(&self) -> usize {
        (self.heads + self.kv_heads) * self.head_dim
    }

    /// Query heads that share a key head.
    fn sharing(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Queries and keys of every token, turned to their positions.
    fn turned(&self, qkv: &[f32]) -> Vec<f32> {
        let width = self.turned_width();
        let mut turned = vec![0.0; self.batch * self.length * width];
        turned.par_chunks_mut(width).zip(qkv.par_chunks(self.width())).enumerate().for_each(|(token, (to, from))| {
            to.copy_from_slice(&from[..width]);
            to.chunks_exact_mut(self.head_dim).for_each(|head| self.rope.turn(token % self.length, head));
        });
        turned
    }

    fn view<'a>(&self, qkv: &'a [f32], turned: &'a [f32], sequence: usize, head: usize) -> HeadView<'a> {
        let (first, kv_head) = (sequence * self.length, head / self.sharing());
        let start = first * self.turned_width();
        HeadView {
            queries: &turned[start + head * self.head_dim..],
            keys: &turned[start + (self.heads + kv_head) * self.head_dim..],
            turned: self.turned_width(),
            values: &qkv[first * self.width() + (self.heads + self.kv_heads + kv_head) * self.head_dim..],
            plain: self.width(),
        }
    }

    /// Probabilities of the queries `start .. end` over the keys `0 .. end`, row-major.
    fn probabilities(&self, view: &HeadView<'_>, start: usize, end: usize, out: &mut [f32]) {
        let d = self.head_dim;
        let queries = Matrix::strided(&view.queries[start * view.turned..], end - start, d, view.turned);
        let keys = Matrix::strided(view.keys, end, d, view.turned);
        let scale = (d as f32).sqrt().recip();
        let out = &mut out[..(end - start) * end];
        multiply(
            MatrixMut::new(out, end - start, end),
            Before::Replaced,
            scale,
            queries,
            keys.transposed(),
            Threads::One,
        );
        for (row, query) in out.chunks_exact_mut(end).zip(start..) {
            let (seen, later) = row.split_at_mut(query + 1);
            let (_, sum) = exp_row(seen);
            seen.iter_mut().for_each(|p| *p /= sum);
            later.fill(0.0);
        }
    }

    /// One head's output, `length × head_dim`.
    fn head_forward(&self, view: &HeadView<'_>) -> Vec<f32> {
        let d = self.head_dim;
        let mut out = vec![0.0; self.length * d];
        let mut probabilities = vec![0.0; BLOCK.min(self.length) * self.length];
        for start in (0..self.length).step_by(BLOCK) {
            let end = (start + BLOCK).min(self.length);
            self.probabilities(view, start, end, &mut probabilities);
            let seen = Matrix::new(&probabilities, end - start, end);
            let block = MatrixMut::new(&mut out[start * d..end * d], end - start, d);
            let values = Matrix::strided(view.values, end, d, view.plain);
            multiply(block, Before::Replaced, 1.0, seen, values, Threads::One);
        }
        out
    }

    /// Gradients of one head's queries, keys and values, each `length × head_dim`, one after the other. `dout` is
    /// the gradient of its output, rows apart by `heads·head_dim`.
    fn head_backward(&self, view: &HeadView<'_>, dout: &[f32]) -> Vec<f32> {
        let (d, stride) = (self.head_dim, self.heads * self.head_dim);
        let part = self.length * d;
        let mut gradients = vec![0.0; 3 * part];
        let (dq, rest) = gradients.split_at_mut(part);
        let (dk, dv) = rest.split_at_mut(part);
        let largest = BLOCK.min(self.length) * self.length;
        let (mut probabilities, mut dscores) = (vec![0.0; largest], vec![0.0; largest]);
        for start in (0..self.length).step_by(BLOCK) {
            let end = (start + BLOCK).min(self.length);
            let rows = end - start;
            self.probabilities(view, start, end, &mut probabilities);
            let dout = Matrix::strided(&dout[start * stride..], rows, d, stride);
            let values = Matrix::strided(view.values, end, d, view.plain);
            let block = MatrixMut::new(&mut dscores, rows, end);
            multiply(block, Before::Replaced, 1.0, dout, values.transposed(), Threads::One);
            let seen = Matrix::new(&probabilities, rows, end);
            let block = MatrixMut::new(&mut dv[..end * d], end, d);
            multiply(block, Before::Kept, 1.0, seen.transposed(), dout, Threads::One);

            let scale = (d as f32).sqrt().recip();
            let pairs = dscores[..rows * end].chunks_exact_mut(end).zip(probabilities.chunks_exact(end));
            for (dscores, probabilities) in pairs {
                let mean = dot(dscores, probabilities);
                for (d, p) in dscores.iter_mut().zip(probabilities) {
                    *d = p * (*d - mean) * scale;
                }
            }
            let dscores = Matrix::new(&dscores, rows, end);
            let keys = Matrix::strided(view.keys, end, d, view.turned);
            let queries = Matrix::strided(&view.queries[start * view.turned..], rows, d, view.turned);
            let block = MatrixMut::new(&mut dq[start * d..end * d], rows, d);
            multiply(block, Before::Replaced, 1.0, dscores, keys, Threads::One);
            let block = MatrixMut::new(&mut dk[..end * d], end, d);
            multiply(block, Before::Kept, 1.0, dscores.transposed(), queries, Threads::One);
        }
        gradients
    }

    /// Runs `work` for every sequence and head; results are in that order, heads fastest.
    fn for_each_head(&self, work: impl Fn(usize, usize) -> Vec<f32> + Sync) -> Vec<Vec<f32>> {
        (0..self.batch * self.heads).into_par_iter().map(|task| work(task / self.heads, task % self.heads)).collect()
    }

    fn backward(&self, qkv: &[f32], dout: &[f32]) -> Vec<f32> {
        let d = self.head_dim;
        let turned = self.turned(qkv);
        let heads = self.for_each_head(|sequence, head| {
            let dout = &dout[sequence * self.length * self.heads * d + head * d..];
            self.head_backward(&self.view(qkv, &turned, sequence, head), dout)
        });
        let part = self.length * d;
        let mut dqkv = vec![0.0; qkv.len()];
        dqkv.par_chunks_mut(self.width()).enumerate().for_each(|(token, row)| {
            let (sequence, position) = (token / self.length, token % self.length);
            let (dq, rest) = row.split_at_mut(self.heads * d);
            let (dk, dv) = rest.split_at_mut(self.kv_heads * d);
            for head in 0..self.heads {
                let gradients = &heads[sequence * self.heads + head];
                let at = |part: usize| &gradients[part + position * d..part + (position + 1) * d];
                let kv = (head / self.sharing()) * d;
                dq[head * d..(head + 1) * d].copy_from_slice(at(0));
                dk[kv..kv + d].iter_mut().zip(at(part)).for_each(|(sum, g)| *sum += g);
                dv[kv..kv + d].iter_mut().zip(at(2 * part)).for_each(|(sum, g)| *sum += g);
            }
            dq.chunks_exact_mut(d).chain(dk.chunks_exact_mut(d)).for_each(|head| self.rope.turn_back(position, head));
        });
        dqkv
    }
}

impl CustomOp1 for CausalAttention {
    fn name(&self) -> &'static str {
        "causal-attention"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let qkv = values(storage, layout)?;
        let (d, width) = (self.head_dim, self.heads * self.head_dim);
        let turned = self.turned(qkv);
        let heads = self.for_each_head(|sequence, head| self.head_forward(&self.view(qkv, &turned, sequence, head)));
        let tokens = self.batch * self.length;
        let mut out = vec![0.0; tokens * width];
        out.par_chunks_mut(width).enumerate().for_each(|(token, row)| {
            let (sequence, position) = (token / self.length, token % self.length);
            for (head, to) in row.chunks_exact_mut(d).enumerate() {
                to.copy_from_slice(&heads[sequence * self.heads + head][position * d..(position + 1) * d]);
            }
        });
        Ok((CpuStorage::F32(out), (tokens, width).into()))
    }

    fn bwd(&self, qkv: &Tensor, _out: &Tensor, dout: &Tensor) -> Result<Option<Tensor>> {
        let dqkv = with_values(qkv, |qkv| with_values(dout, |dout| Ok(self.backward(qkv, dout))))?;
        Ok(Some(tensor(dqkv, qkv.shape())?))
    }
}
