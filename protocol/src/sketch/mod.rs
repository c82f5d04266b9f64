//! The sketch: what an owner knows in advance of a product that it asks a stranger for.
//!
//! For each served matrix and direction the owner draws secret random columns and multiplies the matrix by them once,
//! from its own copy ([`Checks`]). Sixteen of them, `R` with entries of ±1 … ±8, give `V = W·R`, and three uses of it:
//!
//! - **the check of a body product** ([`Sketch::verify`]): what `u` a row `x` was decrypted to must agree with `x·V`
//!   in `u·R`, up to the noise of an honest product;
//! - **the notice of a wrap**: an output that exceeded ±q/2 shows as `±q` times one row of `R`, which names the output,
//!   and the owner takes `q` off it;
//! - **the sketched step**: `x·V` tells how large the outputs will be before they are asked for
//!   ([`Sketch::output_rms`]), so that a row's step need not provide for the worst case.
//!
//! Forty-eight others, `r` with entries of 0 and ±1, give `v = W·r` for the **check of a mask product**
//! ([`MaskCheck::verify`]), which is exact: `A'·r = A·v mod q`.
//!
//! # Why the check of a body product is over the integers
//!
//! Modulo a power of two no column of any kind catches more than half of the errors of `q/2`, so that 2^-40 would take
//! forty columns. Over the integers an error is not forgiven its size. With `ρ_c = Σ_j u_j·R_jc − κ·x·V_c`, an honest
//! `ρ_c` is noise of a variance `σ_c²` that is known ([`crate::he::noise::sketch_variance`]); a row is refused where any
//! `|ρ_c| > 9σ_c`, and a call of at least 64 rows also where the mean of `(ρ_c/σ_c)²` is above
//! `1.25 + 12·√(2/rows)`.
//!
//! **An honest row is never refused**: every part of its noise (a centred binomial, roundings, ternary secrets) has no
//! more than the tails of a Gaussian of its variance, so that 9σ is exceeded with a probability below 2^-57.
//!
//! **A forged row is**: since the mask product was verified, what a worker alters adds an integer vector `δ` to `u` that
//! does not depend on the secret of the encryption, nor on `R`, of which the worker has never seen anything. Let one entry
//! `|δ_j| > 9σ_c`. Whatever the others are, the values of `R_jc` that let column `c` pass are those for which `δ_j·R_jc`
//! falls into a window of width `18σ_c`: at most two of sixteen, for they are at least 1 apart. Sixteen independent columns
//! pass with at most (1/8)^16 = 2^-48; with `|δ_j| > 18σ_c` one value is left, and 2^-64. Errors on many entries pass a
//! column only if a sum of theirs with random signs and sizes falls into that window; `σ_c` is about five times the 2-norm of
//! a row's honest noise, and so is that sum of the 2-norm of `δ`.
//!
//! **What passes is bounded by its size**, whatever the matrix and in every shape that was tried: an error with `‖δ‖₂ ≥ 12σ_c`, which is
//! sixty times the honest noise of a row, passes with at most 2^-40 (one entry: 2^-48; two equal ones, the worst: 2^-40.6;
//! others computed in the tests lie between). Below that the probability rises: an error of ten times the honest noise, spread
//! over a row, passes once in some 1,600 rows, of six times once in eleven. Where many rows are off, the energy of the call
//! ends it at a quarter above the honest one. What passes costs accuracy, not secrets: whether it does depends on nothing that
//! was encrypted.
//!
//! No entry can be off by more than `q/2`, while `σ_c` grows with the norm of the whole matrix and with what is rounded off.
//! At the sketched step `q/2` is ten times the root mean square of a row's outputs. So where a product's noise is 0.7 % of it,
//! as the planner lets it be, an entry that is off by `q/2` is refused with 2^-48 in a row of up to 1,000 outputs, with 2^-32 in
//! one of 3,000, and with no more than 2^-13 in one of 16,000: there it is among the small errors, 8 % of the row's norm. A
//! wrap is off by twice as much, and noticed the more surely; but where noise comes near `q/2` it is not always known which
//! output it was, and the row is asked for anew.
//!
//! Rows that wrapped more than once are asked for anew at the provable step, at which no row wraps, and there one that did is
//! refused. How many may, is another question. Wrapping is what an honest product does where `R` makes a row's outputs look smaller than
//! they are; it is the same `R` for a whole run, and the rows of a layer are often much alike (they share the part that all have of the
//! sequence's first token), so that where it is unlucky, it is so for many of them at once. Where all sixteen sums of a row that is
//! wrong in some other way are near multiples of `q` less than once in sixteen times, rows that wrapped are nobody's fault,
//! however many they are: a worker that tries to pass for unlucky is found out nearly each time. That is so of products of few hundred
//! outputs. Of more, `9σ_c` comes near `q/2`, everything is near a multiple of `q`, and more than an eighth of a call's rows are refused.
//!
//! # What must stay secret
//!
//! `R`, `V`, `r` and `v`, from workers, for as long as they are used: they are drawn from the operating system's
//! randomness, wiped, and neither printed nor serialised. A worker learns of them what acceptance and refusal tell; after
//! a refusal it is banned, or the second one bans it, and those of the matrices that it served are drawn anew.

mod body;
mod kernel;
mod masks;
mod project;
#[cfg(test)]
mod tests;
mod wrap;

use crate::he::SecretRng;
use crate::ids::{Direction, LinearShape};

pub use body::{Checked, Expected, Refuted, Sketch, Verified};
pub use masks::{ForgedMasks, MaskCheck};

/// Columns of a body product's sketch.
pub const COLUMNS: usize = 16;

/// Columns of a mask product's check.
pub const MASK_COLUMNS: usize = 48;

/// Standard deviations of honest noise at which a row is refused.
const WINDOW: f64 = 9.0;

/// What one served matrix is checked with in one direction. Secret.
pub struct Checks {
    /// Of products of bodies.
    pub sketch: Sketch,
    /// Of products of masks.
    pub masks: MaskCheck,
}

impl Checks {
    /// Fresh checks of the products of an int8 matrix, `d_in × d_out` row-major, forward and backward: 4·10^2 operations
    /// for each of its values, on the rayon pool.
    ///
    /// # Errors
    /// When the operating system gives no random bytes.
    ///
    /// # Panics
    /// If `values` are not those of `shape`, or more than 2^17 are summed over: `v` is exact up to there.
    pub fn draw(values: &[i8], shape: LinearShape) -> Result<[Self; 2], getrandom::Error> {
        assert_eq!(values.len(), shape.d_in * shape.d_out, "a matrix of its shape");
        let mut rng = SecretRng::from_os()?;
        let mut along = |direction| {
            let (_, outer) = shape.along(direction);
            assert!(outer <= 1 << 17, "sums of {outer} values are not exact");
            let weights = project::Weights { values, shape, direction };
            Self { sketch: Sketch::draw(&weights, &mut rng), masks: MaskCheck::draw(&weights, &mut rng) }
        };
        Ok([along(Direction::Forward), along(Direction::Backward)])
    }

    /// Bytes of memory that these checks take.
    pub fn memory_bytes(&self) -> usize {
        self.sketch.memory_bytes() + self.masks.memory_bytes()
    }
}
