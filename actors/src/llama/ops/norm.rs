//! RMS norm by frozen weights.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::storage::{tensor, values, with_values};
use crate::llama::vector::dot;

/// `y = x / √(mean(x²) + eps) ∘ weight` of each row of `features` values.
pub(crate) struct RmsNorm {
    /// One factor a feature.
    pub(crate) weight: Arc<[f32]>,
    /// Added to the mean square.
    pub(crate) eps: f32,
}

impl RmsNorm {
    fn inverse_root(&self, row: &[f32]) -> f32 {
        (dot(row, row) / row.len() as f32 + self.eps).sqrt().recip()
    }
}

impl CustomOp1 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = values(storage, layout)?;
        let mut y = vec![0.0; x.len()];
        let features = self.weight.len();
        y.par_chunks_mut(features).zip(x.par_chunks(features)).for_each(|(y, x)| {
            let inverse = self.inverse_root(x);
            for ((y, x), w) in y.iter_mut().zip(x).zip(self.weight.iter()) {
                *y = x * inverse * w;
            }
        });
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let features = self.weight.len();
        let dx = with_values(x, |x| {
            with_values(dy, |dy| {
                let mut dx = vec![0.0; x.len()];
                let rows = x.par_chunks(features).zip(dy.par_chunks(features));
                dx.par_chunks_mut(features).zip(rows).for_each(|(dx, (x, dy))| {
                    let inverse = self.inverse_root(x);
                    let terms = x.iter().zip(dy).zip(self.weight.iter());
                    let along: f32 = terms.map(|((x, dy), w)| x * dy * w).sum();
                    let shrink = inverse * inverse * inverse * along / features as f32;
                    for (((dx, x), dy), w) in dx.iter_mut().zip(x).zip(dy).zip(self.weight.iter()) {
                        *dx = dy * w * inverse - x * shrink;
                    }
                });
                Ok(dx)
            })
        })?;
        Ok(Some(tensor(dx, x.shape())?))
    }
}
