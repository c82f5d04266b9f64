//! How fine the integers are that rows become: the finest step that cannot wrap, and a finer one that rarely does.
//!
//! A row `x` of `d` features is encrypted as the integers `m = round(κ·x)`, and the product with an int8 column
//! `w` is known mod `q` only, so it must stay within ±q/2 with all the noise it picks up. A finer step κ means a
//! smaller relative error; [`encoding_steps`] returns the finest one for which *no* row, column, error, mask or
//! secret leads to a wrap.
//!
//! # Why no output wraps
//!
//! Let `M ≥ ‖w_j‖₂` for every column `w_j`, and `n = k·N` the mask's rows. Bits are dropped, each time by rounding to
//! nearest: `d_b` of a body value before it is sent, up to `d_o` of a value of the body product, and `d_m` of a value of
//! the mask product. The decrypted value of column `j`, as an integer
//! before reduction mod `q`, is
//!
//! ```text
//! v = Σ_i (m_i + e_i + β_i)·w_ij + ο − Σ_{r<n} μ_r·s_r
//! ```
//!
//! with fresh errors `|e_i| ≤ η` (centred binomial), secrets `s_r ∈ {−1, 0, 1}` and rounding errors
//!
//! - `|β_i| ≤ 2^(d_b−1)` of the body, 0 for `d_b = 0`;
//! - `|ο| ≤ 2^(d_o−1)` of the body product, 0 for `d_o = d_b`: its values are multiples of `2^d_b`;
//! - `|μ_r| ≤ 2^(d_m−1)` of the mask product, 0 for `d_m = 0`.
//!
//! `m_i` differs from `κ·x_i` by at most ½ for the rounding and `2^-53·|κ·x_i| ≤ 2^-6` for the product in f64, together
//! less than `ROUNDING`. By Cauchy–Schwarz, and since `‖w‖₁ ≤ √d·‖w‖₂`,
//!
//! ```text
//! |v| ≤ κ·‖x‖₂·M + (η + ROUNDING + max|β|)·√d·M + max|ο| + n·max|μ|
//! ```
//!
//! With one unit to spare, all but the first term are [`noise_margin`], and
//! `κ = (q/2 − margin)/(‖x‖₂·M)` gives `|v| ≤ q/2 − 1`. The norms are computed in f64 over at most
//! [`MAX_INNER`] terms, each operation exact to `2^-53`; `FLOAT_SLACK` is far larger than what they can lose.
//! Squares of f32 numbers neither overflow nor vanish in f64: from `2^-298` to `2^256`.
//!
//! The same κ bounds the message itself: `M ≥ 1` for a matrix with any non-zero entry, and is taken as 1
//! for one without, so `|m_i| ≤ κ·‖x‖₂ + ROUNDING < q/2`. (A body value is uniform and may wrap as it likes.) It takes f64 to compute `m`: f32 is exact to 24 bits only.

use rayon::prelude::*;

use super::QuantError;
use crate::he::{Precision, noise};

/// How fine the integers are that rows become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// So that no output can wrap.
    Provable,
    /// The finer of that and the one at which, going by the sketch, an output wraps rarely.
    Sketched,
}

impl Step {
    /// How a product that was planned for the sketched step is computed at this one.
    ///
    /// At the provable step in whole bytes: the bits were planned for outputs that fill the modulus to a tenth, and what the
    /// worst case leaves to a message may be a tenth of that, or nothing at all beside the worst rounding of coarse bodies.
    /// It is asked for a row in many, so that its bytes are none that count. The mask product is the same.
    pub const fn precision(self, planned: Precision) -> Precision {
        match self {
            Self::Provable => planned.in_whole_bytes(),
            Self::Sketched => planned,
        }
    }
}

/// Root mean squares of a row's outputs that fit between 0 and q/2 at the sketched step. The largest output of a row of the
/// model measured is 2 to 9 of them, and what the sketch tells of them is right within a factor of 0.35 to 1.8: of 115,000
/// rows 3 wrapped at this bound, and none more than once; at 8, which is 0.3 bits finer, 74 and 24 (`benches/RESULTS.md`).
pub(super) const SKETCHED_BOUND: f64 = 10.0;

/// Standard deviations of an output's noise that are kept free at the sketched step.
const SKETCHED_DEVIATIONS: f64 = 9.0;

/// Largest inner dimension that the proof covers.
pub const MAX_INNER: usize = 1 << 20;

/// Bound of `|round(κ·x) − κ·x|`, the product and the rounding both done in f64.
const ROUNDING: f64 = 0.5625;

/// Relative safety on the norms; a sum of `2^20` squares in f64 is exact to `2^-32`, its root to `2^-33`.
const FLOAT_SLACK: f64 = 1.0 / (1_u64 << 30) as f64;

/// Largest error of rounding multiples of `2^from` to multiples of `2^to`.
fn worst_rounding(from: u32, to: u32) -> f64 {
    if from == to { 0.0 } else { f64::from(to).exp2() / 2.0 }
}

/// What the worst noise of a product can add to an output, in units of the encoded message: errors of encryption and
/// rounding times any column of norm `max_norm` or less, the rounding of both products, and one unit to spare.
pub fn noise_margin(precision: Precision, inner: usize, max_norm: f64) -> f64 {
    let set = precision.set;
    let body = worst_rounding(0, precision.body_dropped_bits());
    let fresh = f64::from(set.error_eta()) + ROUNDING + body;
    let multiplied = fresh * (inner as f64).sqrt() * max_norm.max(1.0) * (1.0 + FLOAT_SLACK);
    let output = worst_rounding(precision.body_dropped_bits(), precision.output_dropped_bits());
    let mask = worst_rounding(0, precision.mask_dropped_bits());
    multiplied + output + mask * set.mask_rows() as f64 + 1.0
}

/// `q/2 − margin`: the largest output that a message may lead to by itself. Not positive if the noise alone can wrap.
pub fn message_room(precision: Precision, inner: usize, max_norm: f64) -> f64 {
    f64::from(precision.set.modulus_bits() - 1).exp2() - noise_margin(precision, inner, max_norm)
}

/// What the noise leaves of `q/2` at the sketched step, where it has to be provided for as it is and not as it could be at
/// worst. Not positive if it may fill the modulus.
pub fn sketched_room(precision: Precision, max_norm: f64) -> f64 {
    let deviation = noise::product_variance(precision, max_norm.max(1.0).powi(2)).sqrt();
    f64::from(precision.set.modulus_bits() - 1).exp2() - SKETCHED_DEVIATIONS * deviation
}

/// The step κ of each row: the message of row `t` is `round(κ_t·x_t)`, computed in f64. A row of zeros has step 0.
///
/// `rows` is `tokens × inner` row-major; `max_norm` is the largest 2-norm of the int8 columns that the rows meet in
/// this direction of the product. The module's head proves that no output wraps.
///
/// # Errors
/// A row with NaN or an infinity, a length that is no multiple of `tokens`, an inner dimension above [`MAX_INNER`],
/// or a precision whose noise leaves no room.
pub fn encoding_steps(
    rows: &[f32],
    tokens: usize,
    max_norm: f64,
    precision: Precision,
) -> Result<Vec<f64>, QuantError> {
    if tokens == 0 || rows.is_empty() || !rows.len().is_multiple_of(tokens) {
        return Err(QuantError::Length { what: "the rows", found: rows.len(), expected: tokens });
    }
    let inner = rows.len() / tokens;
    let room = room_for(precision, inner, max_norm)?;
    rows.par_chunks(inner)
        .enumerate()
        .with_min_len((1 << 15) / inner + 1)
        .map(|(row, x)| step_of(x, max_norm, room).ok_or_else(|| not_finite(row, x)))
        .collect()
}

/// [`message_room`], if there is any, for sizes and norms that the proof covers.
pub(super) fn room_for(precision: Precision, inner: usize, max_norm: f64) -> Result<f64, QuantError> {
    if !(max_norm.is_finite() && max_norm >= 0.0) {
        return Err(QuantError::Metadata("the largest norm is no finite number"));
    }
    let room = message_room(precision, inner, max_norm);
    if precision.is_valid() && inner <= MAX_INNER && room > 0.0 {
        Ok(room)
    } else {
        Err(QuantError::NoRoom { precision, inner })
    }
}

/// κ of one row, 0 for zeros, `None` for NaN and infinities.
#[inline(always)]
pub(super) fn step_of(x: &[f32], max_norm: f64, room: f64) -> Option<f64> {
    let square = sum_of_squares(x);
    if square == 0.0 {
        return Some(0.0);
    }
    square.is_finite().then(|| room * (1.0 - FLOAT_SLACK) / (square.sqrt() * max_norm.max(1.0)))
}

/// The error that names the first value of a row that is not finite.
pub(super) fn not_finite(row: usize, x: &[f32]) -> QuantError {
    let feature = x.iter().position(|value| !value.is_finite()).unwrap_or(0);
    QuantError::NotFiniteRow { row, feature, value: x.get(feature).copied().unwrap_or(f32::NAN) }
}

/// Sum of squares in f64, in eight lanes so that it vectorises.
#[inline(always)]
fn sum_of_squares(x: &[f32]) -> f64 {
    let (chunks, rest) = x.as_chunks::<8>();
    let mut lanes = [0.0_f64; 8];
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(value) * f64::from(value);
        }
    }
    lanes.iter().sum::<f64>() + rest.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>()
}

#[cfg(test)]
mod tests;
