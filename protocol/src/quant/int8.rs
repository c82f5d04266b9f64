//! The matrix that a worker serves: rotated on both sides and rounded to int8, one scale per output channel.
//!
//! `Q_inᵀ·W·Q_out ≈ V·diag(scales)` with `V` int8. The scale belongs to a column of the *rotated* output: on the
//! way forward the owner multiplies by it before un-rotating, on the way back after rotating. Only `V` goes to the
//! kernels; the scales and norms are the owner's ([`LinearMeta`]). Worker and owner compute both from the same file
//! and must get the same bytes, so that every operation here is plain IEEE arithmetic in a fixed order.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::{QuantError, Rotation, largest_magnitude, magnitude_bits};
use crate::ids::{Direction, LinearShape};

/// Version of the quantiser, part of what a model's digest stands for: raise it when a served byte can change.
pub const QUANTISER_VERSION: u32 = 1;

/// A column whose largest rotated weight is below this (2^-100) counts as zero: its scale would leave the range
/// in which f32 can be inverted.
const SMALLEST_COLUMN: f32 = 7.888_609e-31;

/// `1.5·2^23`: adding it rounds a small f32 to the nearest integer, which then is in the low bits of the sum.
const ROUNDER: f32 = 12_582_912.0;

/// Values that are worth a task of their own.
const VALUES_PER_TASK: usize = 1 << 16;

/// An int8 matrix, `d_in × d_out` row-major: what the kernels multiply by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Int8Matrix {
    /// Its dimensions.
    pub shape: LinearShape,
    /// `[d_in][d_out]`, in ±127.
    pub values: Vec<i8>,
}

/// What the owner keeps of a served matrix: scales for its results, norms for its encodings, and how far the int8
/// matrix is from the original.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LinearMeta {
    /// Dimensions of the matrix.
    pub shape: LinearShape,
    /// Scale of each (rotated) output column, `d_out` of them; 0 for a column of zeros.
    pub scales: Vec<f32>,
    /// Largest 2-norm of an int8 column: the bound of the forward encoding.
    pub max_column_norm: f64,
    /// Largest 2-norm of an int8 row: the bound of the backward encoding.
    pub max_row_norm: f64,
    /// Root mean square of the int8 columns' 2-norms, each weighted by its scale squared: how large an output is.
    pub rms_column_norm: f64,
    /// Root mean square of the int8 rows' 2-norms.
    pub rms_row_norm: f64,
    /// `‖V·diag(scales) − W‖/‖W‖` in the Frobenius norm: relative error of any output due to int8 weights.
    pub weight_error: f64,
}

impl LinearMeta {
    /// Largest norm among the vectors that a row meets in `direction`: columns forward, rows backward.
    pub fn max_norm(&self, direction: Direction) -> f64 {
        match direction {
            Direction::Forward => self.max_column_norm,
            Direction::Backward => self.max_row_norm,
        }
    }
}

/// Rotates `weights` (`d_in × d_out` row-major, the transpose of a checkpoint's `[out, in]`) on both sides and
/// rounds them to int8 per output channel, symmetric in ±127.
///
/// The rotation happens in the given buffer; beside it only the int8 matrix is allocated.
///
/// # Errors
/// A length other than `d_in·d_out`, an empty matrix, a weight that is NaN or infinite, or weights so large that their
/// rotation overflows.
pub fn serve(mut weights: Vec<f32>, shape: LinearShape) -> Result<(Int8Matrix, LinearMeta), QuantError> {
    let LinearShape { d_in, d_out } = shape;
    let expected = d_in.saturating_mul(d_out);
    if weights.len() != expected || expected == 0 {
        return Err(QuantError::Length { what: "the weight matrix", found: weights.len(), expected });
    }
    refuse_not_finite(&weights, d_out)?;
    Rotation::cached(d_in).apply_to_columns(&mut weights, d_out);
    Rotation::cached(d_out).apply(&mut weights);

    let scales = column_scales(&weights, d_out)?;
    let (values, rows) = round(&weights, &scales);
    drop(weights);

    let squares = column_squares(&values, d_out);
    let max_row = rows.iter().map(|row| row.square).max().unwrap_or(0);
    let max_column = squares.iter().copied().max().unwrap_or(0);
    let total: u64 = squares.iter().sum();
    let weight = |scale: f32| f64::from(scale) * f64::from(scale);
    let weights_sum: f64 = scales.iter().map(|&scale| weight(scale)).sum();
    let weighted: f64 = scales.iter().zip(&squares).map(|(&scale, &square)| weight(scale) * square as f64).sum();
    let (error, power) = rows.iter().fold((0.0, 0.0), |(e, p), row| (e + row.error, p + row.power));
    let ratio = |a: f64, b: f64| if b > 0.0 { (a / b).sqrt() } else { 0.0 };
    let meta = LinearMeta {
        shape,
        scales,
        max_column_norm: (max_column as f64).sqrt(),
        max_row_norm: (max_row as f64).sqrt(),
        rms_column_norm: ratio(weighted, weights_sum),
        rms_row_norm: (total as f64 / d_in as f64).sqrt(),
        weight_error: ratio(error, power),
    };
    Ok((Int8Matrix { shape, values }, meta))
}

fn rows_per_task(width: usize) -> usize {
    (VALUES_PER_TASK / width).max(1)
}

fn refuse_not_finite(weights: &[f32], width: usize) -> Result<(), QuantError> {
    let per_task = width * rows_per_task(width);
    let found = weights.par_chunks(per_task).enumerate().find_map_first(|(task, part)| {
        if largest_magnitude(part).is_finite() {
            return None;
        }
        part.iter().position(|w| !w.is_finite()).map(|at| (task * per_task + at, part[at]))
    });
    match found {
        Some((at, value)) => Err(QuantError::NotFiniteWeight { input: at / width, output: at % width, value }),
        None => Ok(()),
    }
}

/// Largest magnitude of each column over 127.
fn column_scales(weights: &[f32], width: usize) -> Result<Vec<f32>, QuantError> {
    let largest = weights
        .par_chunks(width * rows_per_task(width))
        .fold(
            || vec![0_u32; width],
            |mut largest, part| {
                for row in part.chunks(width) {
                    largest.iter_mut().zip(row).for_each(|(top, &value)| *top = (*top).max(magnitude_bits(value)));
                }
                largest
            },
        )
        .reduce(
            || vec![0; width],
            |mut a, b| {
                a.iter_mut().zip(b).for_each(|(a, b)| *a = (*a).max(b));
                a
            },
        );
    let scale = |(output, bits): (usize, u32)| match f32::from_bits(bits) {
        top if !top.is_finite() => Err(QuantError::WeightOverflow { output }),
        top if top < SMALLEST_COLUMN => Ok(0.0),
        top => Ok(top / 127.0),
    };
    largest.into_iter().enumerate().map(scale).collect()
}

/// Sums over one row: of squared int8 values, of squared weights, and of squared rounding errors.
struct RowSums {
    square: u64,
    power: f64,
    error: f64,
}

fn round(weights: &[f32], scales: &[f32]) -> (Vec<i8>, Vec<RowSums>) {
    let width = scales.len();
    let inverse: Vec<f32> = scales.iter().map(|&scale| if scale > 0.0 { 1.0 / scale } else { 0.0 }).collect();
    let mut values = vec![0_i8; weights.len()];
    let sums = values
        .par_chunks_mut(width)
        .zip(weights.par_chunks(width))
        .with_min_len(rows_per_task(width))
        .map(|(values, weights)| {
            for ((value, &weight), &inverse) in values.iter_mut().zip(weights).zip(&inverse) {
                // |weight·inverse| ≤ 127·(1 + 2^-22), so that its nearest integer is within ±127.
                *value = (weight * inverse + ROUNDER).to_bits().wrapping_sub(ROUNDER.to_bits()) as i8;
            }
            let square = values.iter().map(|&v| (i32::from(v) * i32::from(v)) as u64).sum();
            let (mut power, mut error) = (0.0, 0.0);
            for ((&value, &weight), &scale) in values.iter().zip(weights).zip(scales) {
                let weight = f64::from(weight);
                let missed = f64::from(value) * f64::from(scale) - weight;
                power += weight * weight;
                error += missed * missed;
            }
            RowSums { square, power, error }
        })
        .collect();
    (values, sums)
}

fn column_squares(values: &[i8], width: usize) -> Vec<u64> {
    values
        .par_chunks(width * rows_per_task(width))
        .fold(
            || vec![0_u64; width],
            |mut squares, part| {
                for row in part.chunks(width) {
                    for (square, &value) in squares.iter_mut().zip(row) {
                        *square += (i32::from(value) * i32::from(value)) as u64;
                    }
                }
                squares
            },
        )
        .reduce(
            || vec![0; width],
            |mut a, b| {
                a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
                a
            },
        )
}

#[cfg(test)]
mod tests;
