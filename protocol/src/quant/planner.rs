//! The precision planner: what a parameter set and its bits do to a product, and which are the cheapest that are good enough.
//!
//! All errors here are relative: root mean square of the error over that of the exact product, for rows that
//! look Gaussian, as rotated rows do. Two things spoil a product, and they are independent:
//!
//! - int8 weights, whose error was measured when the matrix was made ([`LinearMeta::weight_error`]);
//! - the ciphertext. An output gathers `v` from encoding, encryption and the rounding of the body for each unit of `‖w‖²`, and
//!   a variance `V` from the rounding of the products ([`noise`]).
//!
//! **At the sketched step** outputs of a row have a root mean square of `room/B`, whatever the row, so that forward
//!
//! ```text
//! error = B·√(v·C² + V) / room
//! ```
//!
//! with `C²` the mean of `‖w_j‖²`, weighted by the scales squared, which the owner multiplies outputs by; backward, `R²` of the
//! matrix's rows takes its place. It depends on nothing but the weights.
//!
//! **At the provable step** a message has norm `‖m‖ = (q/2 − margin)/M`, `M` the largest norm of the int8 vectors. Forward, output `j` has power `‖m‖²·‖w_j‖²/d_in` and noise `v·‖w_j‖² + V`, and the owner multiplies it by its scale.
//! Summed over outputs with weights `scale²`, whose weighted mean of `‖w_j‖²` is `C²`:
//!
//! ```text
//! error² = (v·C² + V)·d_in / (‖m‖²·C²)
//! ```
//!
//! Backward, the scales are in the rows, so that message feature `j` has a power in proportion to its scale squared
//! and the outputs have `‖m‖²·C²/d_in` on average, while the noise meets the rows of the matrix, of mean square `R²`:
//!
//! ```text
//! error² = (v·R² + V)·d_in / (‖m‖²·C²)
//! ```

use serde::{Deserialize, Serialize};

use super::LinearMeta;
use super::encoding::{SKETCHED_BOUND, Step, message_room, sketched_room};
use crate::he::{ParameterSet, Precision, noise};
use crate::ids::{Direction, Group};

/// A precision that misses the target is still preferred to a dearer one whose error is less than this much smaller.
const WORTHWHILE: f64 = 1.05;

/// Errors of the products that weigh more, over those of all others: with int8 weights, half a hundredth or less is left for the
/// ciphertext. (At 0.78, 11 KiB a token more, the losses of SmolLM2 were no nearer to those of plain training.)
const FINER: f64 = 0.85;

/// How good a product has to be, and what may be used for it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PrecisionTarget {
    /// Largest relative error, as a multiple of that of plain 8-bit activations and weights.
    pub factor: f64,
    /// How much larger the error of a gradient may be: a multiple of `factor` in backward products. That of a batch is far
    /// off the one of all data, whatever its last digits are.
    pub backward: f64,
    /// Use this set, whatever its error; only the bits of its values are planned then.
    pub set: Option<ParameterSet>,
}

impl Default for PrecisionTarget {
    fn default() -> Self {
        Self { factor: 1.0, backward: 1.5, set: None }
    }
}

impl PrecisionTarget {
    /// Largest relative error in a direction, as a multiple of that of plain 8-bit activations and weights.
    fn along(&self, direction: Direction) -> f64 {
        match direction {
            Direction::Forward => self.factor,
            Direction::Backward => self.factor * self.backward,
        }
    }
}

/// Relative error of an encrypted product at a step, int8 weights included; infinite where the noise alone fills the modulus.
pub fn predicted_relative_error(precision: Precision, meta: &LinearMeta, direction: Direction, step: Step) -> f64 {
    meta.weight_error.hypot(ciphertext_error(precision, meta, direction, step))
}

/// Relative error of a product due to encryption, rounding of the message and modulus switching. The sketched step is the
/// provable one where that is finer. Infinite also where the provable step has no room, which rows may need that wrapped.
fn ciphertext_error(planned: Precision, meta: &LinearMeta, direction: Direction, step: Step) -> f64 {
    let (inner, _) = meta.shape.along(direction);
    let max_norm = meta.max_norm(direction).max(1.0);
    let room = |step: Step| message_room(step.precision(planned), inner, max_norm);
    if !planned.is_valid() || room(Step::Provable) <= 0.0 {
        return f64::INFINITY;
    }
    if meta.rms_column_norm == 0.0 {
        return 0.0;
    }
    let precision = step.precision(planned);
    let provable = room(step) / max_norm * meta.rms_column_norm / (meta.shape.d_in as f64).sqrt();
    let output = match step {
        Step::Provable => provable,
        Step::Sketched => provable.max(sketched_room(precision, max_norm) / SKETCHED_BOUND),
    };
    if output <= 0.0 {
        return f64::INFINITY;
    }
    let met = match direction {
        Direction::Forward => meta.rms_column_norm,
        Direction::Backward => meta.rms_row_norm,
    };
    noise::product_variance(precision, met * met).sqrt() / output
}

/// Relative error of the same product in plain int8: the rows quantised symmetrically to ±127 per token, the weights
/// as they are served, no encryption. It is what inference in 8 bits is content with, and so the default target.
pub fn plain_w8a8_error(meta: &LinearMeta, direction: Direction) -> f64 {
    let (inner, _) = meta.shape.along(direction);
    let step = expected_gaussian_maximum(inner) / 127.0;
    meta.weight_error.hypot(step / 12.0_f64.sqrt())
}

/// Expected largest magnitude of `count` standard normal numbers: that of `2·count` of them without the magnitude, by
/// the extreme-value limit.
fn expected_gaussian_maximum(count: usize) -> f64 {
    const EULER_GAMMA: f64 = 0.577_215_664_901_532_9;
    let log = (2.0 * count.max(2) as f64).ln();
    let root = (2.0 * log).sqrt();
    root - (log.ln() + (4.0 * std::f64::consts::PI).ln()) / (2.0 * root) + EULER_GAMMA / root
}

/// The cheapest precision whose predicted error is within the target: least work for the worker in each call first,
/// which is one integer product per byte of a body value, then least work for the owner (the set), then fewest bytes of the
/// mask product, which the owner keeps for a run, then fewest bits up and down in each call.
///
/// Products are asked for with the sketched step; what has to be asked for anew with the provable one is a row in many.
///
/// It depends on nothing but weights and configuration, which are public.
///
/// Where none is within the target, the cheapest whose error is within 5 % of the smallest one to be had.
pub fn plan(meta: &LinearMeta, direction: Direction, target: &PrecisionTarget) -> Precision {
    let mut candidates: Vec<(Precision, f64)> = ParameterSet::ALL
        .into_iter()
        .filter(|set| target.set.is_none_or(|forced| forced == *set))
        .flat_map(Precision::all)
        .map(|precision| (precision, predicted_relative_error(precision, meta, direction, Step::Sketched)))
        .collect();
    candidates.sort_by_key(|(precision, _)| cost(*precision, meta.shape.along(direction)));
    let smallest = candidates.iter().map(|(_, error)| *error).fold(f64::INFINITY, f64::min);
    let allowed = (target.along(direction) * plain_w8a8_error(meta, direction)).max(0.0);
    let limit = if smallest <= allowed { allowed } else { smallest * WORTHWHILE };
    candidates
        .into_iter()
        .find_map(|(precision, error)| (error <= limit).then_some(precision))
        .unwrap_or(Precision::standard(target.set.unwrap_or(ParameterSet::P48)))
}

/// [`plan`] for a matrix of a group, where `target` is that of most.
///
/// Of all that errors of forward products do to a loss, those of the down projection and of queries, keys and values do by far
/// the most (SmolLM2; `benches/int8.py`): the former go into the residual stream as they are, the latter through a softmax. Logits
/// are exponentiated. The bits that make these finer are few, in the set that the usual target takes: where that cannot reach the
/// finer one, it is as fine as it goes.
///
/// Gradients are as coarse as any, but for what comes back from the head: it is one only after the target's own row has been
/// subtracted, which leaves less of it than of its error, and all others follow from it.
pub fn plan_for(group: Group, meta: &LinearMeta, direction: Direction, target: &PrecisionTarget) -> Precision {
    let finer = |target: &PrecisionTarget| {
        let set = Some(plan(meta, direction, target).set);
        plan(meta, direction, &PrecisionTarget { factor: FINER * target.factor, set, ..*target })
    };
    match (group, direction) {
        (Group::Qkv | Group::Down | Group::Head, Direction::Forward) => finer(target),
        (Group::Head, Direction::Backward) => finer(&PrecisionTarget { backward: 1.0, ..*target }),
        _ => plan(meta, direction, target),
    }
}

/// What [`plan`] compares for a product of these inner and outer dimensions, the most important first.
fn cost(precision: Precision, (inner, outer): (usize, usize)) -> (u8, ParameterSet, u8, usize) {
    let Precision { set, body_bits, mask_limbs, output_bits } = precision;
    let traffic = usize::from(body_bits) * inner + usize::from(output_bits) * outer;
    (body_bits.div_ceil(8), set, mask_limbs, traffic)
}

#[cfg(test)]
mod tests;
