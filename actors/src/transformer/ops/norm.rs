//! RMS norm: `y = x / √(mean(x²) + eps) ∘ weight` of each row.

use protocol::parts::Part;
use rayon::prelude::*;

use super::rows::ROWS;
use crate::transformer::vector::{add, dot, dot3, vectorised};

/// One norm of a model.
#[derive(Clone, Copy)]
pub(crate) struct RmsNorm<'a> {
    /// One factor a feature.
    pub(crate) weight: &'a [f32],
    /// Added to the mean square.
    pub(crate) eps: f32,
}

/// Rows of `x` to rows of `y`: through a norm, or as they are where there is none.
pub(crate) fn through(norm: Option<RmsNorm<'_>>, x: &[f32], y: &mut [f32]) {
    match norm {
        Some(norm) => norm.forward(x, y),
        None => y.copy_from_slice(x),
    }
}

/// As [`RmsNorm::backward`], also where there is no norm.
pub(crate) fn back_through(norm: Option<RmsNorm<'_>>, x: &[f32], past: Option<&[f32]>, gradient: &mut [f32]) {
    match (norm, past) {
        (Some(norm), past) => norm.backward(x, past, gradient),
        (None, Some(past)) => add(gradient, past),
        (None, None) => {}
    }
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

    /// Replaces rows by what comes out.
    pub(crate) fn replace(&self, rows: &mut [f32]) {
        for row in rows.chunks_exact_mut(self.weight.len()) {
            let inverse = self.inverse_root(row);
            normalise_here(row, self.weight, inverse);
        }
    }

    /// The gradient of the weights, from rows of `x` and the gradients of those of `y`: `Σ dy ∘ x / √(mean(x²) + eps)`.
    pub(crate) fn gradient_of_weight(&self, x: &[f32], dy: &[f32]) -> Vec<f32> {
        let features = self.weight.len();
        let of_block = |(x, dy): (&[f32], &[f32])| {
            let _part = Part::Own.mark();
            let mut gradient = vec![0.0; features];
            for (x, dy) in x.chunks_exact(features).zip(dy.chunks_exact(features)) {
                let inverse = self.inverse_root(x);
                gradient.iter_mut().zip(x).zip(dy).for_each(|((sum, x), dy)| *sum += x * inverse * dy);
            }
            gradient
        };
        let blocks = x.par_chunks(ROWS * features).zip(dy.par_chunks(ROWS * features));
        // Collected before they are added, so that the order does not depend on the threads.
        let blocks: Vec<Vec<f32>> = blocks.map(of_block).collect();
        let mut sum = vec![0.0; features];
        blocks.iter().for_each(|block| add(&mut sum, block));
        sum
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

    fn normalise_here(row: &mut [f32], weight: &[f32], inverse: f32) {
        for (x, w) in row.iter_mut().zip(weight) {
            *x = *x * inverse * w;
        }
    }

    fn gradient_of_row(x: &[f32], weight: &[f32], inverse: f32, shrink: f32, gradient: &mut [f32]) {
        for ((g, x), w) in gradient.iter_mut().zip(x).zip(weight) {
            *g = *g * w * inverse - x * shrink;
        }
    }
}
