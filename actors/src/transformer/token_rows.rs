//! Trained rows of the embeddings in a pass: where the text is embedded and, if the head is the embeddings, at the head.
//!
//! The published head gives logits of the trained tokens, too. They are replaced, whoever multiplied by it; on the way back its
//! rows of these tokens get no weight, and the trained ones get it instead.

use std::ops::Range;

use protocol::model::{LlamaConfig, Model, ModelError};
use rayon::prelude::*;

use super::LlamaError;
use super::ops::{HeadBatch, HeadRows};
use super::vector::{add_scaled, dot};
use crate::data::IGNORED;
use crate::lora::{LoraAdapters, TokenRows, Values};

/// The trained rows of an adapter, locked against change.
pub(super) struct Rows<'a> {
    of: &'a TokenRows,
    values: Values<'a>,
    features: usize,
    /// What embeddings are multiplied by.
    scale: f32,
    /// Whether they are rows of the head, too.
    tied: bool,
}

/// What the head made of a pass: what the rows' part of its gradient follows from.
pub(super) struct AtHead<'a> {
    /// Its input, `tokens × features`.
    pub(super) states: &'a [f32],
    pub(super) targets: &'a [u32],
    /// Logarithms of the sums of all exponentials, of tokens with a target.
    pub(super) log_sums: &'a [f32],
    /// What the loss of a token counts for.
    pub(super) weight: &'a (dyn Fn(usize) -> f32 + Sync),
    /// The bound that logits approach.
    pub(super) cap: Option<f32>,
}

impl<'a> Rows<'a> {
    /// Those of an adapter, if it has any.
    pub(super) fn of(adapters: &'a LoraAdapters, config: &LlamaConfig) -> Result<Option<Self>, LlamaError> {
        let Some(of) = adapters.token_rows() else { return Ok(None) };
        Ok(Some(Self {
            values: Values::of(&of.rows)?,
            of,
            features: config.hidden_size,
            scale: config.traits.embedding_scale.map_or(1.0, |scale| scale as f32),
            tied: config.tie_word_embeddings,
        }))
    }

    /// The same, if they are rows of the head.
    pub(super) fn of_head(adapters: &'a LoraAdapters, config: &LlamaConfig) -> Result<Option<Self>, LlamaError> {
        Ok(Self::of(adapters, config)?.filter(|rows| rows.tied))
    }

    fn row(&self, place: usize) -> &[f32] {
        &self.values[place * self.features..][..self.features]
    }

    /// Replaces the embeddings of trained tokens, `tokens × features`.
    pub(super) fn embed(&self, tokens: &[u32], embedded: &mut [f32]) {
        for (&token, embedded) in tokens.iter().zip(embedded.chunks_exact_mut(self.features)) {
            if let Some(place) = self.of.place(token) {
                embedded.iter_mut().zip(self.row(place)).for_each(|(to, value)| *to = value * self.scale);
            }
        }
    }

    /// Replaces the logits of trained tokens: rows of logits, of which each begins with those of `entries`.
    pub(super) fn replace_logits(&self, states: &[f32], entries: Range<usize>, logits: &mut [f32]) {
        let width = logits.len() / (states.len() / self.features).max(1);
        for (token, place) in self.of.among(entries.start, entries.len()) {
            for (logits, state) in logits.chunks_exact_mut(width).zip(states.chunks_exact(self.features)) {
                logits[token - entries.start] = dot(state, self.row(place));
            }
        }
    }

    /// Takes the weights of trained tokens out of those that the published head's rows are summed up by.
    pub(super) fn take(
        &self,
        batch: &HeadBatch<'_>,
        entries: Range<usize>,
        weights: &mut [f32],
    ) -> Vec<(usize, Vec<f32>)> {
        let width = weights.len() / batch.rows;
        let mut taken = Vec::new();
        for (token, place) in self.of.among(entries.start, entries.len()) {
            let weight = |row: &mut [f32]| std::mem::take(&mut row[token - entries.start]);
            taken.push((place, weights.chunks_exact_mut(width).map(weight).collect()));
        }
        taken
    }

    /// Adds the trained rows by the weights that were taken out.
    pub(super) fn add(&self, taken: &[(usize, Vec<f32>)], summed: &mut [f32]) {
        for (place, weights) in taken {
            for (summed, &weight) in summed.chunks_exact_mut(self.features).zip(weights) {
                add_scaled(summed, weight, self.row(*place));
            }
        }
    }

    /// The gradient of the rows, from that of the embedded text and from the head.
    pub(super) fn gradient(&self, tokens: &[u32], embedded: Option<&[f32]>, head: &AtHead<'_>) -> Vec<f32> {
        let mut gradient = vec![0.0; self.values.len()];
        let of_text = embedded.into_iter().flat_map(|rows| rows.chunks_exact(self.features));
        for (&token, row) in tokens.iter().zip(of_text) {
            if let Some(place) = self.of.place(token) {
                add_scaled(&mut gradient[place * self.features..][..self.features], self.scale, row);
            }
        }
        if self.tied {
            let rows = gradient.par_chunks_exact_mut(self.features).zip(&self.of.tokens).enumerate();
            rows.for_each(|(place, (gradient, &token))| self.of_logit(token, self.row(place), head, gradient));
        }
        gradient
    }

    /// Adds what the logits of one token give: at each place its probability, less 1 where it is the target.
    fn of_logit(&self, token: u32, row: &[f32], head: &AtHead<'_>, gradient: &mut [f32]) {
        for (at, state) in head.states.chunks_exact(self.features).enumerate() {
            let target = head.targets[at];
            if target == IGNORED {
                continue;
            }
            let (mut logit, mut slope) = (dot(state, row), 1.0);
            if let Some(cap) = head.cap {
                logit = cap * (logit / cap).tanh();
                slope = 1.0 - (logit / cap).powi(2);
            }
            let off = (logit - head.log_sums[at]).exp() - if target == token { 1.0 } else { 0.0 };
            add_scaled(gradient, (head.weight)(at) * slope * off, state);
        }
    }
}

/// The head with trained rows in place of the published ones, where it has any.
pub(super) struct TrainedHead<'a> {
    pub(super) model: &'a Model,
    pub(super) rows: Option<&'a Rows<'a>>,
}

impl HeadRows for TrainedHead<'_> {
    fn vocabulary(&self) -> usize {
        self.model.config().vocabulary
    }

    fn read(&self, first: usize, out: &mut [f32]) -> Result<(), ModelError> {
        self.model.head_rows(first, out)?;
        if let Some(rows) = self.rows {
            for (token, place) in rows.of.among(first, out.len() / rows.features) {
                out[(token - first) * rows.features..][..rows.features].copy_from_slice(rows.row(place));
            }
        }
        Ok(())
    }
}
