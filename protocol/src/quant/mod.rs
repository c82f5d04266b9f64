//! From floating point to the integers that are encrypted and multiplied, and back.
//!
//! Both ends of a product live here, because they only make sense together. The worker's end is [`int8`]: a
//! matrix rotated on both sides ([`rotation`]) and rounded to int8 per output channel. The owner's end is
//! [`codec`]: rows rotated, scaled and given an integer step that cannot wrap, or a finer one that rarely does
//! ([`encoding`]), and the way back from decrypted values to outputs. Between them [`planner`] predicts what a parameter set
//! does to the result and picks the cheapest one that is good enough.

pub mod codec;
pub mod encoding;
mod error;
pub mod int8;
pub mod planner;
pub mod rotation;

pub use codec::{Prepared, Preparing, ProductCodec, RowScales};
pub use encoding::{Step, encoding_steps};
pub use error::QuantError;
pub use int8::{Int8Matrix, LinearMeta, serve};
pub use planner::{PrecisionTarget, plain_w8a8_error, plan, plan_for, predicted_relative_error};
pub use rotation::Rotation;

/// The bits of `|value|`. Their order as integers is that of magnitudes, with infinity above all numbers and NaN
/// above that.
#[inline(always)]
fn magnitude_bits(value: f32) -> u32 {
    value.to_bits() & (u32::MAX >> 1)
}

/// Largest magnitude; NaN if there is one.
#[inline(always)]
fn largest_magnitude(values: &[f32]) -> f32 {
    f32::from_bits(values.iter().map(|&value| magnitude_bits(value)).fold(0, u32::max))
}
