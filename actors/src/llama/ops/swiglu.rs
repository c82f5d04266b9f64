//! The gate of the feed-forward block.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::storage::{tensor, values, with_values};
use crate::llama::vector::exp;

/// `tokens × 2·features` (gates, then what they let through) to `tokens × features`: `silu(gate) ∘ up`.
pub(crate) struct SwiGlu {
    /// Features that come out.
    pub(crate) features: usize,
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

impl CustomOp1 for SwiGlu {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (tokens, _) = layout.shape().dims2()?;
        let both = values(storage, layout)?;
        let mut out = vec![0.0; tokens * self.features];
        out.par_chunks_mut(self.features).zip(both.par_chunks(2 * self.features)).for_each(|(out, both)| {
            let (gate, up) = both.split_at(self.features);
            for ((out, &gate), up) in out.iter_mut().zip(gate).zip(up) {
                *out = gate * sigmoid(gate) * up;
            }
        });
        Ok((CpuStorage::F32(out), (tokens, self.features).into()))
    }

    fn bwd(&self, both: &Tensor, _out: &Tensor, dout: &Tensor) -> Result<Option<Tensor>> {
        let features = self.features;
        let dboth = with_values(both, |both| {
            with_values(dout, |dout| {
                let mut dboth = vec![0.0; both.len()];
                let rows = both.par_chunks(2 * features).zip(dout.par_chunks(features));
                dboth.par_chunks_mut(2 * features).zip(rows).for_each(|(dboth, (both, dout))| {
                    let (gate, up) = both.split_at(features);
                    let (dgate, dup) = dboth.split_at_mut(features);
                    for i in 0..features {
                        let s = sigmoid(gate[i]);
                        dgate[i] = dout[i] * up[i] * s * (1.0 + gate[i] * (1.0 - s));
                        dup[i] = dout[i] * gate[i] * s;
                    }
                });
                Ok(dboth)
            })
        })?;
        Ok(Some(tensor(dboth, both.shape())?))
    }
}
