//! The owner's half of the model: everything but the base products, differentiable, in f32 on the CPU.
//!
//! Embeddings, norms, rotary positions, attention, gates, adapters and the loss are computed here; the four base
//! products of a layer are asked of a [`LinearBackend`], forward and backward, and those of the head if it serves it. The way back is written out, not left
//! to automatic differentiation: a graph would keep each operation's result, and a model of a billion parameters has
//! a gigabyte of them that follow from others.

mod attends;
mod backward;
mod below;
mod beside;
mod continuation;
mod gemm;
mod layer;
mod logits;
mod noise;
mod ops;
mod pass;
mod products;
mod served_head;
mod tape;
#[cfg(test)]
mod tests;
mod token_rows;
mod vector;

use std::sync::Arc;
use std::time::Duration;

use protocol::buffer::Buffer;
use protocol::model::{LlamaConfig, Model, ModelError, Norm};

use self::backward::{Backward, Found};
use self::layer::LayerParts;
use self::ops::{HeadLoss, LocalHead, Losses};
use self::pass::{Hidden, Pass};
use self::served_head::ServedHead;
use self::tape::LayerTape;
use self::token_rows::{AtHead, Rows, TrainedHead};
use self::vector::scale;
use crate::backend::{BackendError, LinearBackend};
use crate::data::{IGNORED, MicroBatch};
use crate::lora::{Draw, LoraAdapters, SavedNorm};
use crate::prefix::PrefixCache;
use crate::trace::WORK;
use crate::transport::Traffic;

pub use self::below::Prefix;
pub use self::continuation::{Continuation, KvCache};
pub(crate) use self::gemm::{Before, Matrix, MatrixMut, Threads, multiply};
pub use self::logits::Logits;
pub use self::ops::KnownPart;
pub(crate) use self::vector::{add_rows, exp_row, maximum};

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
    /// A base product failed.
    #[error(transparent)]
    Product(#[from] BackendError),
    /// The adapters' parameters cannot be read.
    #[error(transparent)]
    Parameters(#[from] candle_core::Error),
}

/// The losses of a micro-batch's tokens, added up for each sequence.
fn by_sequence(batch: &MicroBatch, losses: &[f64]) -> Vec<f64> {
    batch.sequences().map(|rows| losses[rows].iter().sum()).collect()
}

/// A model, of Llama or another family, whose base products are somewhere else.
#[derive(Clone)]
pub struct Llama {
    model: Arc<Model>,
    layers: Arc<[LayerParts]>,
    final_norm: Arc<[f32]>,
    backend: Arc<dyn LinearBackend>,
    prefix: Option<Prefix>,
}

impl Llama {
    /// Reads norms and biases; embeddings and the head stay in the model's files, and no layer's matrix is read.
    ///
    /// # Errors
    /// When the model's files cannot be read.
    pub fn new(model: Arc<Model>, backend: Arc<dyn LinearBackend>) -> Result<Self, LlamaError> {
        Ok(Self {
            layers: LayerParts::of_all(&model)?.into(),
            final_norm: model.norm(Norm::Final)?.unwrap_or_default().into(),
            backend,
            model,
            prefix: None,
        })
    }

    /// The residual stream as it enters the first layer.
    fn embed(&self, tokens: &[u32]) -> Result<Buffer, ModelError> {
        let mut stream = Buffer::from(self.model.embed(tokens)?);
        if let Some(factor) = self.config().traits.embedding_scale {
            scale(&mut stream, factor as f32);
        }
        Ok(stream)
    }

    /// The same, which keeps what enters the lowest adapted layer.
    pub fn with_prefix(self, prefix: Prefix) -> Self {
        Self { prefix: Some(prefix), ..self }
    }

    /// Ways through the model for micro-batches of up to so many rows each, in their order, which will go side by side: see
    /// [`LinearBackend::side_by_side`].
    pub(crate) fn side_by_side(&self, rows: &[usize]) -> Vec<Self> {
        match self.backend.side_by_side(rows) {
            Some(doors) => doors.into_iter().map(|backend| Self { backend, ..self.clone() }).collect(),
            None => vec![self.clone(); rows.len()],
        }
    }

    /// The model.
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// The model's dimensions.
    pub fn config(&self) -> &LlamaConfig {
        self.model.config()
    }

    /// Bytes exchanged with workers so far.
    pub fn traffic(&self) -> Traffic {
        self.backend.traffic()
    }

    /// Whether base products are asked of workers.
    pub fn asks_workers(&self) -> bool {
        self.backend.asks_workers()
    }

    /// Says that passes of few rows will come: see [`LinearBackend::expect_few_rows`].
    pub fn expect_few_rows(&self) {
        self.backend.expect_few_rows();
    }

    /// How far the workers are on average, there and back, if that is known.
    pub fn round_trip(&self) -> Option<Duration> {
        self.backend.round_trip()
    }

    /// Sum of the cross entropies of a micro-batch's targets in nats, without gradients or dropout.
    ///
    /// # Errors
    /// When the batch does not fit the model or a base product fails.
    pub fn evaluate(&self, batch: &MicroBatch, adapters: Option<&LoraAdapters>) -> Result<f64, LlamaError> {
        Ok(self.costs(batch, adapters, true)?.into_iter().sum())
    }

    /// The same for each sequence, in their order. `kept` says whether what leaves the layers below the adapters may be
    /// stored for another time.
    pub(crate) fn costs(
        &self,
        batch: &MicroBatch,
        adapters: Option<&LoraAdapters>,
        kept: bool,
    ) -> Result<Vec<f64>, LlamaError> {
        self.check(batch)?;
        let pass = Pass::new(self, batch, adapters, None)?;
        // Nothing is kept: each layer's values are dropped as soon as they were used.
        let prefix = Prefix::of(&self.prefix, adapters).map(|prefix| (&*prefix.cache, kept || prefix.training));
        let Hidden { normed, .. } = self.forward(&pass, None, batch, prefix, usize::MAX, &mut Vec::new())?;
        Ok(by_sequence(batch, &self.loss(batch, adapters, false, &normed)?.of_tokens))
    }

    /// Sum of the cross entropies of a micro-batch's targets in nats, and its gradient for every parameter of the
    /// adapters, in their order. The adapters' inputs are dropped at random from `draw`.
    #[cfg(test)]
    pub(crate) fn gradient(
        &self,
        batch: &MicroBatch,
        adapters: &LoraAdapters,
        draw: Draw,
    ) -> Result<(f64, Vec<Vec<f32>>), LlamaError> {
        let (costs, gradients) = self.weighted_gradient(batch, adapters, draw, 0.0, |_| None)?;
        Ok((costs.iter().sum(), gradients))
    }

    /// The cross entropies of each sequence's targets in nats, and the gradient of their sum, each times its weight, for
    /// every parameter of the adapters, in their order. `weigh` makes the weights of the cross entropies; `None` is 1 for
    /// each. The adapters' inputs are dropped at random from `draw`, and the embeddings are blurred by noise of the size
    /// that `noise` gives (see [`noise`]).
    pub(crate) fn weighted_gradient(
        &self,
        batch: &MicroBatch,
        adapters: &LoraAdapters,
        draw: Draw,
        noise: f32,
        weigh: impl FnOnce(&[f64]) -> Option<Vec<f64>>,
    ) -> Result<(Vec<f64>, Vec<Vec<f32>>), LlamaError> {
        self.check(batch)?;
        let Some(depth) = adapters.depth() else {
            return Ok((self.costs(batch, None, true)?, Vec::new()));
        };
        let pass = Pass::new(self, batch, Some(adapters), Some(draw))?;
        let mut tape = Vec::new();
        // What was blurred is another text each time.
        let prefix = Prefix::of(&self.prefix, Some(adapters)).filter(|_| noise == 0.0);
        let prefix = prefix.map(|prefix| (&*prefix.cache, prefix.training));
        let blur = (noise > 0.0).then_some((noise, draw));
        let Hidden { stream, normed } = self.forward(&pass, blur, batch, prefix, depth.layer, &mut tape)?;
        let Losses { of_tokens, log_sums, gradient } = self.loss(batch, Some(adapters), true, &normed)?;
        let rows = Rows::of(adapters, self.config())?;
        // The rows' part of the gradient follows from what the head read; nothing else does.
        let normed = rows.is_some().then_some(normed);
        let costs = by_sequence(batch, &of_tokens);
        let weights = weigh(&costs);
        let mut found = match gradient {
            Some(mut gradient) => {
                for (rows, weight) in batch.sequences().zip(weights.iter().flatten()) {
                    let features = self.config().hidden_size;
                    scale(&mut gradient[rows.start * features..rows.end * features], *weight as f32);
                }
                let _span = tracing::debug_span!(target: WORK, "backward").entered();
                Backward::new(&pass, depth).run(&stream, gradient, tape)?
            }
            None => Found::default(),
        };
        let mut gradients = Vec::new();
        for (linear, group) in adapters.groups() {
            let (a, b) = match found.adapters.remove(&linear) {
                Some(gradient) => (gradient.a, gradient.b),
                None => (vec![0.0; group.a.elem_count()], vec![0.0; group.b.elem_count()]),
            };
            gradients.extend([a, b]);
        }
        for SavedNorm { norm, factors, .. } in adapters.norms() {
            gradients.push(found.norms.remove(norm).unwrap_or_else(|| vec![0.0; factors.elem_count()]));
        }
        if let (Some(rows), Some(normed)) = (rows, normed) {
            let sequences: Vec<_> = batch.sequences().collect();
            let of_token = |token| sequences.iter().position(|rows| rows.contains(&token));
            let weight = |token| match &weights {
                Some(weights) => of_token(token).map_or(0.0, |sequence| weights[sequence] as f32),
                None => 1.0,
            };
            let cap = self.config().traits.logit_cap.map(|cap| cap as f32);
            let head = AtHead { states: &normed, targets: &batch.targets, log_sums: &log_sums, weight: &weight, cap };
            gradients.push(rows.gradient(&batch.tokens, found.embedded.as_deref(), &head));
        }
        Ok((costs, gradients))
    }

    /// The embeddings of a micro-batch's tokens, with noise of this size from this draw if they are to be blurred.
    fn embedded(&self, pass: &Pass<'_>, batch: &MicroBatch, blur: Option<(f32, Draw)>) -> Result<Buffer, LlamaError> {
        let mut embedded = pass.embed(&batch.tokens)?;
        if let Some((noise, draw)) = blur {
            noise::add(noise, draw, batch, self.config().hidden_size, &mut embedded);
        }
        Ok(embedded)
    }

    /// From the embeddings through the layers, the lowest of them by way of a cache if there is one, in which what is
    /// computed is stored or not; see [`Pass::forward`].
    fn forward(
        &self,
        pass: &Pass<'_>,
        blur: Option<(f32, Draw)>,
        batch: &MicroBatch,
        prefix: Option<(&PrefixCache, bool)>,
        keep_from: usize,
        tape: &mut Vec<LayerTape>,
    ) -> Result<Hidden, LlamaError> {
        let _span = tracing::debug_span!(target: WORK, "forward").entered();
        let (stream, first) = match prefix {
            Some((cache, store)) => (self.entering(batch, cache, store)?, cache.layer()),
            None => (self.embedded(pass, batch, blur)?, 0),
        };
        pass.forward(stream, first..self.config().layers, keep_from, tape)
    }

    /// Head and cross entropy; see [`HeadLoss::compute`].
    fn loss(
        &self,
        batch: &MicroBatch,
        adapters: Option<&LoraAdapters>,
        differentiable: bool,
        normed: &Buffer,
    ) -> Result<Losses, LlamaError> {
        let _span = tracing::debug_span!(target: WORK, "loss").entered();
        let rows = adapters.map(|adapters| Rows::of_head(adapters, self.config())).transpose()?.flatten();
        let head = &TrainedHead { model: &self.model, rows: rows.as_ref() };
        let (features, targets) = (self.config().hidden_size, &batch.targets[..]);
        let cap = self.config().traits.logit_cap.map(|cap| cap as f32);
        if self.backend.serves_head() {
            let slices = ServedHead { config: self.config(), backend: self.backend.as_ref(), rows: rows.as_ref() };
            return HeadLoss { head, slices, features, targets, cap, differentiable }.compute(normed);
        }
        Ok(HeadLoss { head, slices: LocalHead::new(head), features, targets, cap, differentiable }.compute(normed)?)
    }

    fn check(&self, batch: &MicroBatch) -> Result<(), LlamaError> {
        let fail = |why: String| Err(LlamaError::Batch(why));
        let MicroBatch { lengths, tokens, targets, .. } = batch;
        let used = lengths.iter().try_fold(0usize, |sum, &length| sum.checked_add(length));
        let fits = used.is_some_and(|used| used <= tokens.len()) && !lengths.contains(&0);
        if tokens.is_empty() || tokens.len() != targets.len() || !fits {
            let (tokens, targets) = (tokens.len(), targets.len());
            return fail(format!("it has {tokens} tokens and {targets} targets for sequences of {lengths:?}"));
        }
        let vocabulary = self.config().vocabulary;
        let targets = batch.targets.iter().filter(|&&target| target != IGNORED);
        match batch.tokens.iter().chain(targets).find(|&&token| token as usize >= vocabulary) {
            Some(token) => fail(format!("token {token} is outside the vocabulary of {vocabulary}")),
            None => Ok(()),
        }
    }
}
