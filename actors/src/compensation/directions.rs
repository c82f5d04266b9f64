//! The directions in which rows have most of their energy: the first right singular vectors, by subspace iteration.

use protocol::buffer::Buffer;

use crate::transformer::{Before, Matrix, MatrixMut, Threads, multiply};

/// Iterations. Each separates two directions by the square of the ratio of their singular values; that some are still mixed
/// with their neighbours costs nothing, since only the space of all of them matters.
const ITERATIONS: usize = 8;

/// A direction of which less is left than this, once the earlier ones are taken out, is none.
const NOTHING: f64 = 1e-6;

/// An orthonormal basis, `[rank][features]`, of the space of `rank` dimensions that holds most of the sum of squares of
/// `rows`, `any × features`; rows of zeros where they fill fewer.
pub(super) fn first_directions(rows: &[f32], features: usize, rank: usize) -> Vec<f32> {
    let count = rows.len() / features;
    let rows = Matrix::new(rows, count, features);
    // Random signs: whatever the rows are, their sums have a part in each of the directions.
    let mut low: Buffer = (0..count * rank).map(sign).collect::<Vec<f32>>().into();
    let mut basis = vec![0.0; rank * features];
    for _ in 0..ITERATIONS {
        let to = MatrixMut::new(&mut basis, rank, features);
        multiply(to, Before::Replaced, 1.0, Matrix::new(&low, count, rank).transposed(), rows, Threads::All);
        make_orthonormal(&mut basis, features);
        let to = MatrixMut::new(&mut low, count, rank);
        multiply(to, Before::Replaced, 1.0, rows, Matrix::new(&basis, rank, features).transposed(), Threads::All);
    }
    basis
}

/// ±1 by the number's hash (Fibonacci hashing, then its high bits folded in).
fn sign(number: usize) -> f32 {
    let mixed = (number as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mixed = (mixed ^ (mixed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    if mixed >> 63 == 1 { -1.0 } else { 1.0 }
}

/// Gram–Schmidt, row by row, each row twice: the second time takes out what the first left of earlier rows by rounding.
fn make_orthonormal(basis: &mut [f32], features: usize) {
    for row in 0..basis.len() / features {
        let (earlier, rest) = basis.split_at_mut(row * features);
        let row = &mut rest[..features];
        let before = dot(row, row).sqrt();
        for _ in 0..2 {
            for other in earlier.chunks_exact(features) {
                let part = dot(row, other) as f32;
                row.iter_mut().zip(other).for_each(|(value, other)| *value -= part * other);
            }
        }
        let left = dot(row, row).sqrt();
        let factor = if left > NOTHING * before { (1.0 / left) as f32 } else { 0.0 };
        row.iter_mut().for_each(|value| *value *= factor);
    }
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}
