//! The head and the cross entropy together, without the logits.
//!
//! A step's logits would be `tokens × vocabulary`: more than all activations of a layer together. They are made
//! for a chunk of tokens at a time, and since a sum of losses is wanted, the gradient with respect to a chunk's
//! hidden states is known as soon as its logits are: it is accumulated on the way forward and the logits are
//! forgotten. Positions without a target are left out of both products.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp1, Error, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::storage::{tensor, values, with_values};
use crate::data::IGNORED;
use crate::llama::gemm::{Before, Matrix, MatrixMut, Threads, multiply};
use crate::llama::vector::exp_row;

/// Logits that exist at once: 32 MiB of them.
const CHUNK_VALUES: usize = 8 << 20;

/// From `tokens × features` hidden states to the sum of the cross entropies at positions with a target, a scalar.
pub(crate) struct HeadLoss {
    head: Arc<[f32]>,
    features: usize,
    targets: Vec<u32>,
    chunk: usize,
    /// Whether the gradient will be asked for.
    differentiable: bool,
    /// The gradient with respect to the hidden states, from the forward pass until it is taken.
    gradient: Mutex<Option<Vec<f32>>>,
}

impl HeadLoss {
    /// `head` is `vocabulary × features`; every target is below `vocabulary` or [`IGNORED`].
    pub(crate) fn new(head: Arc<[f32]>, features: usize, targets: Vec<u32>, differentiable: bool) -> Self {
        let chunk = (CHUNK_VALUES / (head.len() / features).max(1)).clamp(16, 512);
        Self { head, features, targets, chunk, differentiable, gradient: Mutex::new(None) }
    }

    /// The same with chunks of another number of tokens.
    #[cfg(test)]
    pub(super) fn with_chunk(mut self, chunk: usize) -> Self {
        self.chunk = chunk;
        self
    }

    fn forward(&self, hidden: &[f32]) -> f32 {
        let features = self.features;
        let vocabulary = self.head.len() / features;
        let head = Matrix::new(&self.head, vocabulary, features);
        let lossy: Vec<usize> = (0..self.targets.len()).filter(|&token| self.targets[token] != IGNORED).collect();
        let mut gradient = if self.differentiable { vec![0.0; hidden.len()] } else { Vec::new() };
        let rows = self.chunk.min(lossy.len());
        let mut gathered = vec![0.0; rows * features];
        let mut logits = vec![0.0; rows * vocabulary];
        let mut loss = 0.0f64;
        for chunk in lossy.chunks(self.chunk) {
            let rows = chunk.len();
            let gathered = &mut gathered[..rows * features];
            for (to, &token) in gathered.chunks_exact_mut(features).zip(chunk) {
                to.copy_from_slice(&hidden[token * features..(token + 1) * features]);
            }
            let logits = &mut logits[..rows * vocabulary];
            let states = Matrix::new(gathered, rows, features);
            let out = MatrixMut::new(logits, rows, vocabulary);
            multiply(out, Before::Replaced, 1.0, states, head.transposed(), Threads::All);
            let normalised: Vec<(f32, f32)> = logits
                .par_chunks_mut(vocabulary)
                .zip(chunk)
                .map(|(row, &token)| {
                    let at_target = row[self.targets[token] as usize];
                    let (max, sum) = exp_row(row);
                    (max - at_target + sum.ln(), sum)
                })
                .collect();
            loss += normalised.iter().map(|&(loss, _)| f64::from(loss)).sum::<f64>();
            if self.differentiable {
                // Of probabilities × head minus the target's row: the sum that makes exponentials probabilities
                // divides the product, which is smaller than they are.
                let exponentials = Matrix::new(logits, rows, vocabulary);
                let out = MatrixMut::new(gathered, rows, features);
                multiply(out, Before::Replaced, 1.0, exponentials, head, Threads::All);
                for ((mean, &token), (_, sum)) in gathered.chunks_exact(features).zip(chunk).zip(&normalised) {
                    let target = self.targets[token] as usize * features;
                    let target = &self.head[target..target + features];
                    let to = &mut gradient[token * features..(token + 1) * features];
                    for ((to, mean), target) in to.iter_mut().zip(mean).zip(target) {
                        *to = mean / sum - target;
                    }
                }
            }
        }
        if self.differentiable {
            *self.gradient.lock().unwrap_or_else(PoisonError::into_inner) = Some(gradient);
        }
        loss as f32
    }
}

impl CustomOp1 for HeadLoss {
    fn name(&self) -> &'static str {
        "head-loss"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let loss = self.forward(values(storage, layout)?);
        Ok((CpuStorage::F32(vec![loss]), Shape::from(())))
    }

    fn bwd(&self, hidden: &Tensor, _loss: &Tensor, dloss: &Tensor) -> Result<Option<Tensor>> {
        let gradient = self.gradient.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(mut gradient) = gradient else {
            return Err(Error::Msg("the gradient of a loss can be taken once".into()).bt());
        };
        let scale = with_values(dloss, |values| Ok(values[0]))?;
        if scale != 1.0 {
            gradient.iter_mut().for_each(|g| *g *= scale);
        }
        Ok(Some(tensor(gradient, hidden.shape())?))
    }
}
