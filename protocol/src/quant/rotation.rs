//! The public rotation that spreads outliers over all features.
//!
//! A few features of a Llama's activations are a hundred times larger than the rest, and an integer step that
//! fits them wastes most of its range on the others. Multiplying by an orthogonal matrix without structure of its
//! own makes every feature a sum of many, so that rows look Gaussian and both int8 weights and the non-wrapping
//! bound of [`encoding`](super::encoding) lose almost nothing; the served matrix carries the inverse rotation,
//! so the product does not change.
//!
//! `Q = diag(σ) · blockdiag(H/√b, …, H/√b)`: random signs σ, then the Walsh–Hadamard matrix `H` on each block of
//! `b` consecutive features, `b` the largest power of two that divides the dimension. It costs `log2 b`
//! additions a value. Owner and worker must agree on it to the last bit of the int8 matrix: the signs come from
//! ChaCha20 under a fixed key, and the transforms are plain IEEE additions in an order that no machine changes.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use chacha20::ChaCha20;
use chacha20::cipher::{KeyIvInit, StreamCipher};
use rayon::prelude::*;

use crate::he::vectorised;

/// ChaCha20 key of the signs. It is public, and part of what a model's digest stands for: change it and every
/// served matrix changes.
pub const ROTATION_KEY: [u8; 32] = *b"velum block-hadamard rotation v1";

/// Values that are worth a task of their own.
const VALUES_PER_TASK: usize = 1 << 15;

/// Block sizes are doubled from here on; the first three stages are done in registers.
const BASE: usize = 8;

/// An orthogonal matrix `Q`, `dimension × dimension`, applied by a fast transform.
#[derive(Clone, Debug, PartialEq)]
pub struct Rotation {
    block: usize,
    /// `σ_i/√b`.
    factors: Vec<f32>,
}

impl Rotation {
    /// The rotation of `dimension` features. Sign `i` is bit `i mod 8` of byte `i div 8` of the ChaCha20 keystream
    /// under [`ROTATION_KEY`], nonce the dimension as u64 LE and four zero bytes; a set bit is −1.
    pub fn for_dimension(dimension: usize) -> Self {
        let block = if dimension == 0 { 1 } else { 1 << dimension.trailing_zeros() };
        let mut nonce = [0_u8; 12];
        nonce[..8].copy_from_slice(&(dimension as u64).to_le_bytes());
        let mut bits = vec![0_u8; dimension.div_ceil(8)];
        ChaCha20::new(&ROTATION_KEY.into(), &nonce.into()).apply_keystream(&mut bits);
        let factor = (1.0 / (block as f64).sqrt()) as f32;
        let factors = (0..dimension).map(|i| if bits[i / 8] >> (i % 8) & 1 == 1 { -factor } else { factor }).collect();
        Self { block, factors }
    }

    /// [`Self::for_dimension`], computed once per dimension and process.
    pub fn cached(dimension: usize) -> Arc<Self> {
        static CACHE: LazyLock<Mutex<HashMap<usize, Arc<Rotation>>>> = LazyLock::new(Mutex::default);
        let mut cache = CACHE.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(cache.entry(dimension).or_insert_with(|| Arc::new(Self::for_dimension(dimension))))
    }

    /// Features that it rotates.
    pub fn dimension(&self) -> usize {
        self.factors.len()
    }

    /// Size of a Hadamard block, a power of two.
    pub fn block(&self) -> usize {
        self.block
    }

    /// `x ← x·Q` for each row of `rows`, `any × dimension` row-major.
    ///
    /// # Panics
    /// If the length is no multiple of the dimension.
    pub fn apply(&self, rows: &mut [f32]) {
        self.for_each_row(rows, |row| rotate_wide(self, row));
    }

    /// `x ← x·Qᵀ` for each row of `rows`, `any × dimension` row-major: the inverse of [`Self::apply`].
    ///
    /// # Panics
    /// If the length is no multiple of the dimension.
    pub fn apply_transpose(&self, rows: &mut [f32]) {
        self.for_each_row(rows, |row| rotate_back_wide(self, row));
    }

    /// `M ← Qᵀ·M` for a row-major matrix `dimension × width`: each column times `Q`. In place, and along the rows,
    /// so that it runs at the speed of memory.
    ///
    /// # Panics
    /// If the length is not `dimension·width`.
    pub fn apply_to_columns(&self, matrix: &mut [f32], width: usize) {
        assert_eq!(matrix.len(), self.dimension() * width, "a matrix of one row per feature");
        if matrix.is_empty() {
            return;
        }
        let rows_per_task = (VALUES_PER_TASK / width).max(1);
        matrix.par_chunks_mut(width).zip(self.factors.par_iter()).with_min_len(rows_per_task).for_each(|(row, &f)| {
            row.iter_mut().for_each(|value| *value *= f);
        });
        matrix.par_chunks_mut(self.block * width).for_each(|rows| hadamard_of_rows(rows, width));
    }

    /// `x ← x·Q` for one row.
    #[inline(always)]
    pub(super) fn rotate(&self, row: &mut [f32]) {
        row.iter_mut().zip(&self.factors).for_each(|(value, factor)| *value *= factor);
        self.transform(row);
    }

    /// `x ← x·Qᵀ` for one row.
    #[inline(always)]
    pub(super) fn rotate_back(&self, row: &mut [f32]) {
        self.transform(row);
        row.iter_mut().zip(&self.factors).for_each(|(value, factor)| *value *= factor);
    }

    /// The transform of each block of a row: in a loop, since what is handed to an iterator may be compiled without the vector
    /// instructions that the caller may use.
    #[inline(always)]
    fn transform(&self, row: &mut [f32]) {
        for block in row.chunks_exact_mut(self.block) {
            hadamard(block);
        }
    }

    fn for_each_row(&self, rows: &mut [f32], act: impl Fn(&mut [f32]) + Sync + Send) {
        let dimension = self.dimension();
        if rows.is_empty() {
            return;
        }
        assert!(dimension > 0 && rows.len().is_multiple_of(dimension), "whole rows of {dimension} features");
        rows.par_chunks_mut(dimension).with_min_len((VALUES_PER_TASK / dimension).max(1)).for_each(act);
    }
}

/// `(a, b) ← (a + b, a − b)`, value by value.
#[inline(always)]
fn butterfly(a: &mut [f32], b: &mut [f32]) {
    for (a, b) in a.iter_mut().zip(b) {
        (*a, *b) = (*a + *b, *a - *b);
    }
}

vectorised! {
    fn rotate_wide<>(rotation: &Rotation, row: &mut [f32]) = Rotation::rotate
}

vectorised! {
    fn rotate_back_wide<>(rotation: &Rotation, row: &mut [f32]) = Rotation::rotate_back
}

/// Unnormalised Walsh–Hadamard transform of a slice whose length is a power of two, shortest stride first.
#[inline(always)]
fn hadamard(values: &mut [f32]) {
    let mut half = 1;
    if values.len() >= BASE {
        for eight in values.as_chunks_mut::<BASE>().0 {
            hadamard_of_eight(eight);
        }
        half = BASE;
    }
    // Two stages at a time read and write everything half as often; the sums are the same.
    while 4 * half <= values.len() {
        for four in values.chunks_exact_mut(4 * half) {
            let (ab, cd) = four.split_at_mut(2 * half);
            let ((a, b), (c, d)) = (ab.split_at_mut(half), cd.split_at_mut(half));
            for (((a, b), c), d) in a.iter_mut().zip(b).zip(c).zip(d) {
                let (ab, a_b, cd, c_d) = (*a + *b, *a - *b, *c + *d, *c - *d);
                (*a, *b, *c, *d) = (ab + cd, a_b + c_d, ab - cd, a_b - c_d);
            }
        }
        half *= 4;
    }
    while half < values.len() {
        for pair in values.chunks_exact_mut(2 * half) {
            let (a, b) = pair.split_at_mut(half);
            butterfly(a, b);
        }
        half *= 2;
    }
}

#[inline(always)]
fn hadamard_of_eight(v: &mut [f32; BASE]) {
    let [a, b, c, d, e, f, g, h] = *v;
    let (a, b, c, d, e, f, g, h) = (a + b, a - b, c + d, c - d, e + f, e - f, g + h, g - h);
    let (a, b, c, d, e, f, g, h) = (a + c, b + d, a - c, b - d, e + g, f + h, e - g, f - h);
    *v = [a + e, b + f, c + g, d + h, a - e, b - f, c - g, d - h];
}

/// The same transform of all columns of a row-major matrix of `width` columns, longest stride first: halves
/// that fit a cache are finished there.
fn hadamard_of_rows(matrix: &mut [f32], width: usize) {
    if matrix.len() <= width {
        return;
    }
    let (a, b) = matrix.split_at_mut(matrix.len() / 2);
    if a.len() <= VALUES_PER_TASK {
        butterfly(a, b);
        hadamard_of_rows(a, width);
        hadamard_of_rows(b, width);
    } else {
        let tasks = a.par_chunks_mut(VALUES_PER_TASK).zip(b.par_chunks_mut(VALUES_PER_TASK));
        tasks.for_each(|(a, b)| butterfly(a, b));
        rayon::join(|| hadamard_of_rows(a, width), || hadamard_of_rows(b, width));
    }
}

#[cfg(test)]
mod tests;
