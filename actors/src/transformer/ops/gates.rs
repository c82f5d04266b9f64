//! The gate of the feed-forward block: `act(gate) ∘ up`, where `act(x) = x · sigmoid(s(x))`. SiLU has `s(x) = x`; GELU, by
//! its approximation with a hyperbolic tangent, `s(x) = 2·√(2/π)·(x + 0.044715·x³)`.

use protocol::model::Activation;

use crate::transformer::vector::{exp, vectorised};

/// `2·√(2/π)`.
const GELU: f32 = 1.595_769_2;
const CUBE: f32 = 0.044_715;

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

#[inline(always)]
fn gelu_argument(x: f32) -> f32 {
    GELU * (x + CUBE * x * x * x)
}

/// Rows of `2·features` (gates, then what they let through) to rows of `features`.
pub(crate) fn forward(activation: Activation, features: usize, both: &[f32], out: &mut [f32]) {
    let gated = match activation {
        Activation::Silu => gated,
        Activation::GeluTanh => gated_by_gelu,
    };
    for (both, out) in both.chunks_exact(2 * features).zip(out.chunks_exact_mut(features)) {
        let (gate, up) = both.split_at(features);
        gated(gate, up, out);
    }
}

/// Replaces rows of gates and what they let through by their gradients. `dout` holds the gradients of the rows that
/// came out, and gets those rows, computed again, in their place.
pub(crate) fn backward(activation: Activation, features: usize, both: &mut [f32], dout: &mut [f32]) {
    let gradients = match activation {
        Activation::Silu => gradients,
        Activation::GeluTanh => gradients_of_gelu,
    };
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

    fn gated_by_gelu(gate: &[f32], up: &[f32], out: &mut [f32]) {
        for ((out, &gate), up) in out.iter_mut().zip(gate).zip(up) {
            *out = gate * sigmoid(gelu_argument(gate)) * up;
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

    fn gradients_of_gelu(gate: &mut [f32], up: &mut [f32], dout: &mut [f32]) {
        for ((gate, up), dout) in gate.iter_mut().zip(up).zip(dout) {
            let (g, u, d) = (*gate, *up, *dout);
            let s = sigmoid(gelu_argument(g));
            let slope = GELU * (1.0 + 3.0 * CUBE * g * g);
            *gate = d * u * s * (1.0 + g * (1.0 - s) * slope);
            *up = d * g * s;
            *dout = g * s * u;
        }
    }
}
