//! Predicted error of a decrypted product, in units of the encoded message (squared): what the precision planner
//! chooses by, and what the tests measure.
//!
//! All of it is independent noise of mean zero. Column `j` of a product of an encoded row `m = κx + ρ` (ρ the
//! rounding, uniform on ±1/2) by int8 weights has `w = ‖w_j‖²` times the fresh error and the rounding; the worker's
//! output switching adds the rounding of `B'` and, through the secret, that of each of the `n` values of `A'`.

use super::{ParameterSet, Precision};

/// Variance of a uniform variable on an interval of length 1.
const UNIFORM: f64 = 1.0 / 12.0;

/// Variance of a coefficient of a uniform ternary secret.
const TERNARY: f64 = 2.0 / 3.0;

/// Variance of the error of a fresh ciphertext: a centred binomial has variance η/2.
pub fn fresh_variance(set: ParameterSet) -> f64 {
    f64::from(set.error_eta()) / 2.0
}

/// Variance of the encryption error after a product by a column of squared norm `column_norm_squared`.
pub fn multiplied_variance(set: ParameterSet, column_norm_squared: f64) -> f64 {
    fresh_variance(set) * column_norm_squared
}

/// Variance that the rounding of `κx` to an integer adds to such a product.
pub fn encoding_variance(column_norm_squared: f64) -> f64 {
    UNIFORM * column_norm_squared
}

/// Variance that output modulus switching adds, whatever the weights.
pub fn switching_variance(precision: Precision) -> f64 {
    let step_squared = f64::from(2 * precision.dropped_bits()).exp2();
    if precision.dropped_bits() == 0 {
        return 0.0;
    }
    // Rounding a uniform integer to a multiple of 2^d: (2^2d − 1)/12.
    (step_squared - 1.0) * UNIFORM * (1.0 + TERNARY * precision.set.mask_rows() as f64)
}

/// Variance of a decrypted value of a product, against the exact product of the unrounded `κx`.
pub fn product_variance(precision: Precision, column_norm_squared: f64) -> f64 {
    multiplied_variance(precision.set, column_norm_squared)
        + encoding_variance(column_norm_squared)
        + switching_variance(precision)
}
