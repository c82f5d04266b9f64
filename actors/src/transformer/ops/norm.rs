//! RMS norm by frozen weights: `y = x / √(mean(x²) + eps) ∘ weight` of each row.

use crate::transformer::vector::{add, dot, dot3, vectorised};

/// One norm of a model.
#[derive(Clone, Copy)]
pub(crate) struct RmsNorm<'a> {
    /// One factor a feature.
    pub(crate) weight: &'a [f32],
    /// Added to the mean square.
    pub(crate) eps: f32,
}

impl RmsNorm<'_> {
    fn inverse_root(&self, row: &[f32]) -> f32 {
        (dot(row, row) / row.len() as f32 + self.eps).sqrt().recip()
    }

    /// Rows of `x` to rows of `y`.
    pub(crate) fn forward(&self, x: &[f32], y: &mut [f32]) {
        let features = self.weight.len();
        for (x, y) in x.chunks_exact(features).zip(y.chunks_exact_mut(features)) {
            normalise(x, self.weight, self.inverse_root(x), y);
        }
    }

    /// Replaces the gradients of rows of `y` by those of the rows of `x` that they came from, and adds the gradient
    /// that goes past the norm, if one does.
    pub(crate) fn backward(&self, x: &[f32], past: Option<&[f32]>, gradient: &mut [f32]) {
        let features = self.weight.len();
        for (x, gradient) in x.chunks_exact(features).zip(gradient.chunks_exact_mut(features)) {
            let inverse = self.inverse_root(x);
            let along = dot3(x, gradient, self.weight);
            let shrink = inverse * inverse * inverse * along / features as f32;
            gradient_of_row(x, self.weight, inverse, shrink, gradient);
        }
        if let Some(past) = past {
            add(gradient, past);
        }
    }
}

vectorised! {
    fn normalise(x: &[f32], weight: &[f32], inverse: f32, y: &mut [f32]) {
        for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
            *y = x * inverse * w;
        }
    }

    fn gradient_of_row(x: &[f32], weight: &[f32], inverse: f32, shrink: f32, gradient: &mut [f32]) {
        for ((g, x), w) in gradient.iter_mut().zip(x).zip(weight) {
            *g = *g * w * inverse - x * shrink;
        }
    }
}
