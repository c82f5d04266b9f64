//! The owner's half of the model: everything but the base products, differentiable, in f32 on the CPU.
//!
//! Embeddings, norms, rotary positions, attention, gates, adapters and the loss are computed here; the four base
//! products of a layer are asked of a [`LinearBackend`], forward and backward. Gradients are candle's: it walks
//! back from the loss to the adapters, so a product below the lowest adapted layer is never asked backward.

mod gemm;
mod ops;
#[cfg(test)]
mod tests;
mod vector;

use std::sync::Arc;

use candle_core::{Device, Tensor};
use protocol::model::{Group, LinearId, LlamaConfig, Model, ModelError, Norm};

use self::ops::{AdaptedProduct, Adapter, BaseProduct, CausalAttention, HeadLoss, RmsNorm, RopeTable, SwiGlu};
use crate::backend::LinearBackend;
use crate::data::{IGNORED, MicroBatch};
use crate::lora::{Draw, Dropout, LoraAdapters};
use crate::transport::Traffic;

pub(crate) use self::gemm::{Before, Matrix, MatrixMut, Threads, multiply};

/// Why a pass through the model failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LlamaError {
    /// The micro-batch does not fit the model.
    #[error("a micro-batch cannot go through the model: {0}")]
    Batch(String),
    /// The model's own weights cannot be read.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A base product failed, or an operation did.
    #[error("{}", innermost(.0))]
    Compute(#[from] candle_core::Error),
}

/// The message of the error inside candle's wrappers, without their back traces.
fn innermost(error: &candle_core::Error) -> String {
    match error {
        candle_core::Error::WithBacktrace { inner, .. } => innermost(inner),
        candle_core::Error::WithPath { inner, .. } => innermost(inner),
        other => other.to_string(),
    }
}

/// How a pass is made.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Pass {
    /// Gradients follow; the adapters' inputs are dropped at random from this place.
    Train(Draw),
    /// No gradients, no dropout.
    Evaluate,
}

struct LayerNorms {
    attention: Arc<[f32]>,
    feed_forward: Arc<[f32]>,
}

/// A Llama whose base products are somewhere else.
pub struct Llama {
    model: Arc<Model>,
    norms: Vec<LayerNorms>,
    final_norm: Arc<[f32]>,
    /// `vocabulary × hidden_size`.
    head: Arc<[f32]>,
    frequencies: Vec<f32>,
    backend: Arc<dyn LinearBackend>,
}

impl Llama {
    /// Reads the norms and the head; embeddings stay in the model's files, and no layer's matrix is read.
    ///
    /// # Errors
    /// When the model's files cannot be read.
    pub fn new(model: Arc<Model>, backend: Arc<dyn LinearBackend>) -> Result<Self, LlamaError> {
        let norms = (0..model.config().layers).map(|layer| {
            Ok(LayerNorms {
                attention: model.norm(Norm::Input(layer))?.into(),
                feed_forward: model.norm(Norm::PostAttention(layer))?.into(),
            })
        });
        Ok(Self {
            norms: norms.collect::<Result<_, ModelError>>()?,
            final_norm: model.norm(Norm::Final)?.into(),
            head: model.head()?.into(),
            frequencies: model.config().inverse_frequencies(),
            backend,
            model,
        })
    }

    /// The model's dimensions.
    pub fn config(&self) -> &LlamaConfig {
        self.model.config()
    }

    /// Bytes exchanged with workers so far.
    pub fn traffic(&self) -> Traffic {
        self.backend.traffic()
    }

    /// Sum of the cross entropies of a micro-batch's targets in nats, without gradients or dropout.
    ///
    /// # Errors
    /// When the batch does not fit the model or a base product fails.
    pub fn evaluate(&self, batch: &MicroBatch, adapters: Option<&LoraAdapters>) -> Result<f64, LlamaError> {
        let loss = self.loss(batch, adapters, Pass::Evaluate)?;
        Ok(f64::from(loss.to_scalar::<f32>()?))
    }

    /// Sum of the cross entropies of a micro-batch's targets, a scalar that can be differentiated when training.
    pub(crate) fn loss(
        &self,
        batch: &MicroBatch,
        adapters: Option<&LoraAdapters>,
        pass: Pass,
    ) -> Result<Tensor, LlamaError> {
        let hidden = self.hidden(batch, adapters, pass)?;
        let targets = batch.targets.clone();
        let loss = HeadLoss::new(self.head.clone(), self.config().hidden_size, targets, hidden.track_op());
        Ok(hidden.apply_op1(loss)?)
    }

    /// Hidden states after the final norm, `batch·length × hidden_size`.
    fn hidden(&self, batch: &MicroBatch, adapters: Option<&LoraAdapters>, pass: Pass) -> Result<Tensor, LlamaError> {
        self.check(batch)?;
        let config = self.config();
        let rope = Arc::new(RopeTable::new(&self.frequencies, batch.length));
        let embedded = self.model.embed(&batch.tokens)?;
        let mut x = Tensor::from_vec(embedded, (batch.tokens.len(), config.hidden_size), &Device::Cpu)?;
        for (layer, norms) in (0u16..).zip(&self.norms) {
            let product = |x: &Tensor, group| self.product(x, LinearId { layer, group }, adapters, pass);
            let attention = CausalAttention {
                batch: batch.batch,
                length: batch.length,
                heads: config.heads,
                kv_heads: config.kv_heads,
                head_dim: config.head_dim,
                rope: rope.clone(),
            };
            let qkv = product(&self.norm(&x, &norms.attention)?, Group::Qkv)?;
            x = (x + product(&qkv.apply_op1(attention)?, Group::O)?)?;
            let both = product(&self.norm(&x, &norms.feed_forward)?, Group::GateUp)?;
            let gated = both.apply_op1(SwiGlu { features: config.intermediate_size })?;
            x = (x + product(&gated, Group::Down)?)?;
        }
        Ok(self.norm(&x, &self.final_norm)?)
    }

    fn norm(&self, x: &Tensor, weight: &Arc<[f32]>) -> candle_core::Result<Tensor> {
        x.apply_op1(RmsNorm { weight: weight.clone(), eps: self.config().rms_norm_eps as f32 })
    }

    fn product(
        &self,
        x: &Tensor,
        linear: LinearId,
        adapters: Option<&LoraAdapters>,
        pass: Pass,
    ) -> candle_core::Result<Tensor> {
        let base = BaseProduct { backend: self.backend.clone(), linear, shape: self.config().shape(linear.group) };
        let Some((adapters, group)) = adapters.and_then(|adapters| Some((adapters, adapters.group(linear)?))) else {
            return x.apply_op1(base);
        };
        let config = adapters.config();
        let dropout = match pass {
            Pass::Train(draw) if config.dropout > 0.0 => {
                let slots = group.slots.iter();
                let of_slot = slots.map(|slot| Dropout::new(config.dropout, draw, linear.layer, slot.projection as u8));
                Some(of_slot.collect())
            }
            _ => None,
        };
        let adapter = Adapter { slots: group.slots.clone(), rank: config.rank, scaling: config.scaling(), dropout };
        let product = AdaptedProduct { base, adapter, input_gradient: x.track_op() };
        match pass {
            Pass::Train(_) => x.apply_op3(&group.a, &group.b, product),
            // Detached parameters leave no graph, so every intermediate is freed as soon as it was used.
            Pass::Evaluate => x.apply_op3(&group.a.detach(), &group.b.detach(), product),
        }
    }

    fn check(&self, batch: &MicroBatch) -> Result<(), LlamaError> {
        let fail = |why: String| Err(LlamaError::Batch(why));
        let tokens = batch.batch.checked_mul(batch.length);
        if tokens != Some(batch.tokens.len()) || tokens != Some(batch.targets.len()) || tokens == Some(0) {
            return fail(format!(
                "it has {} tokens and {} targets for {} × {}",
                batch.tokens.len(),
                batch.targets.len(),
                batch.batch,
                batch.length
            ));
        }
        let vocabulary = self.config().vocabulary;
        let targets = batch.targets.iter().filter(|&&target| target != IGNORED);
        match batch.tokens.iter().chain(targets).find(|&&token| token as usize >= vocabulary) {
            Some(token) => fail(format!("token {token} is outside the vocabulary of {vocabulary}")),
            None => Ok(()),
        }
    }
}
