//! Predicted error of a decrypted product, in units of the encoded message (squared): what the precision planner
//! chooses by, and what the tests measure.
//!
//! All of it is independent noise of mean zero. Column `j` of a product of an encoded row `m = κx + ρ` (ρ the
//! rounding, uniform on ±1/2) by int8 weights has `w = ‖w_j‖²` times the fresh error, that rounding, and the rounding
//! of the body to the bits that are sent. The worker's rounding of `B'` adds its own, and that of `A'` comes through
//! the secret from each of its `n` values.
//!
//! Rounding a uniform integer to a multiple of `2^d` errs by every integer of an interval of `2^d` alike: variance
//! `(2^2d − 1)/12`. Its mean of half a unit, in products by weights and secrets of mean zero, is nothing beside it.
//! Bodies and masks are uniform mod q, whatever the message, and so are the products of masks.

use super::{ParameterSet, Precision};

/// Variance of a uniform variable on an interval of length 1.
const UNIFORM: f64 = 1.0 / 12.0;

/// Variance of a coefficient of a uniform ternary secret.
const TERNARY: f64 = 2.0 / 3.0;

/// Variance of rounding a uniform multiple of `2^from` to a multiple of `2^to`.
fn rounding_variance(from: u32, to: u32) -> f64 {
    (f64::from(2 * to).exp2() - f64::from(2 * from).exp2()) * UNIFORM
}

/// Variance of the error of a fresh ciphertext: a centred binomial has variance η/2.
pub fn fresh_variance(set: ParameterSet) -> f64 {
    f64::from(set.error_eta()) / 2.0
}

/// Variance that rounding the body to the bits that are sent adds to each of its values.
pub fn body_variance(precision: Precision) -> f64 {
    rounding_variance(0, precision.body_dropped_bits())
}

/// Variance of the encryption error, that of the body's rounding included, after a product by a column of squared norm
/// `column_norm_squared`.
pub fn multiplied_variance(precision: Precision, column_norm_squared: f64) -> f64 {
    (fresh_variance(precision.set) + body_variance(precision)) * column_norm_squared
}

/// Variance that the rounding of `κx` to an integer adds to such a product.
pub fn encoding_variance(column_norm_squared: f64) -> f64 {
    UNIFORM * column_norm_squared
}

/// Variance that the worker's modulus switching of the body product adds, whatever the weights.
pub fn output_variance(precision: Precision) -> f64 {
    rounding_variance(precision.body_dropped_bits(), precision.output_dropped_bits())
}

/// Variance that the worker's modulus switching of the mask product adds, whatever the weights: each of `n` values is
/// met by a coefficient of the secret.
pub fn mask_variance(precision: Precision) -> f64 {
    rounding_variance(0, precision.mask_dropped_bits()) * TERNARY * precision.set.mask_rows() as f64
}

/// Variance that rounding a decrypted value to f32 adds at most: half a unit of the last of 24 bits.
fn float_variance(precision: Precision) -> f64 {
    f64::from(2 * precision.set.modulus_bits()).exp2()
        * f64::from(-2 * (f32::MANTISSA_DIGITS as i32 + 1)).exp2()
        * UNIFORM
}

/// Variance of a sum of the outputs of one row, multiplied by the entries of a column of squared norm `outer_squared`,
/// against the same sum of the exact outputs. `inner_squared` is the squared norm of the matrix times that column: by it go
/// the errors that pass through the matrix, by the column itself those that come after it.
pub fn sketch_variance(precision: Precision, inner_squared: f64, outer_squared: f64) -> f64 {
    multiplied_variance(precision, inner_squared)
        + encoding_variance(inner_squared)
        + (output_variance(precision) + mask_variance(precision) + float_variance(precision)) * outer_squared
}

/// Variance of a decrypted value of a product, against the exact product of the unrounded `κx`.
pub fn product_variance(precision: Precision, column_norm_squared: f64) -> f64 {
    multiplied_variance(precision, column_norm_squared)
        + encoding_variance(column_norm_squared)
        + output_variance(precision)
        + mask_variance(precision)
}
