//! The gate of the feed-forward block: `silu(gate) ∘ up`.

use crate::transformer::vector::{exp, vectorised};

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// Rows of `2·features` (gates, then what they let through) to rows of `features`.
pub(crate) fn forward(features: usize, both: &[f32], out: &mut [f32]) {
    for (both, out) in both.chunks_exact(2 * features).zip(out.chunks_exact_mut(features)) {
        let (gate, up) = both.split_at(features);
        gated(gate, up, out);
    }
}

/// Replaces rows of gates and what they let through by their gradients. `dout` holds the gradients of the rows that
/// came out, and gets those rows, computed again, in their place.
pub(crate) fn backward(features: usize, both: &mut [f32], dout: &mut [f32]) {
    for (both, dout) in both.chunks_exact_mut(2 * features).zip(dout.chunks_exact_mut(features)) {
        let (gate, up) = both.split_at_mut(features);
        gradients(gate, up, dout);
    }
}

vectorised! {
    fn gated(gate: &[f32], up: &[f32], out: &mut [f32]) {
        for ((out, &gate), up) in out.iter_mut().zip(gate).zip(up) {
            *out = gate * sigmoid(gate) * up;
        }
    }

    fn gradients(gate: &mut [f32], up: &mut [f32], dout: &mut [f32]) {
        for ((gate, up), dout) in gate.iter_mut().zip(up).zip(dout) {
            let (g, u, d) = (*gate, *up, *dout);
            let s = sigmoid(g);
            *gate = d * u * s * (1.0 + g * (1.0 - s));
            *up = d * g * s;
            *dout = g * s * u;
        }
    }
}
