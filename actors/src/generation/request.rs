//! What a caller asks for.

use std::sync::Arc;

use super::error::GenerationError;
use crate::lora::LoraAdapters;

/// A text to go on with, or to score.
#[derive(Clone)]
pub struct Request {
    /// Tokens of the text so far, at least one: with all that the model wants around a text, such as a token that begins it.
    pub prompt: Vec<u32>,
    /// Most tokens to write; 0 reads the prompt only, to score it.
    pub max_tokens: usize,
    /// How the next token is chosen.
    pub sampling: Sampling,
    /// What ends the text.
    pub stops: Stops,
    /// The adapter beside the base model. Requests that share one share the same `Arc`.
    pub adapter: Option<Arc<LoraAdapters>>,
    /// Whether each token comes with its log-probability, and how many of the most likely tokens come with theirs.
    pub logprobs: Option<usize>,
    /// The same of the tokens of the prompt.
    pub prompt_logprobs: Option<usize>,
    /// Whether special tokens are spelled out in the text.
    pub special: bool,
}

impl Request {
    /// Most of the likeliest tokens that may be asked for.
    pub const MOST_LOGPROBS: usize = 100;

    /// A text to go on with, greedily, by at most so many tokens.
    pub fn new(prompt: Vec<u32>, max_tokens: usize) -> Self {
        Self {
            prompt,
            max_tokens,
            sampling: Sampling::default(),
            stops: Stops::default(),
            adapter: None,
            logprobs: None,
            prompt_logprobs: None,
            special: false,
        }
    }
}

impl std::fmt::Debug for Request {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Of the text itself, which is private, only the size.
        let Self { prompt, max_tokens, sampling, adapter, .. } = self;
        let (prompt, adapted) = (prompt.len(), adapter.is_some());
        write!(f, "Request({prompt} tokens, {max_tokens} more, {sampling:?}, adapted: {adapted})")
    }
}

/// How the next token is chosen of the model's distribution. The steps are those of Hugging Face's `transformers`, in its
/// order: the penalty, the temperature, `top_k`, `top_p`, `min_p`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// What logits are divided by; at 0 the likeliest token is taken.
    pub temperature: f64,
    /// The likeliest tokens that have this probability together are kept; 1 keeps all.
    pub top_p: f64,
    /// So many of the likeliest tokens are kept; 0 keeps all.
    pub top_k: usize,
    /// Tokens are kept that have this share of the likeliest one's probability; 0 keeps all.
    pub min_p: f64,
    /// What logits of tokens that stand in the text are divided by where they are positive, and multiplied by elsewhere; 1
    /// changes nothing.
    pub repetition_penalty: f64,
    /// Of the random numbers; a fresh one if not given. The same seed gives the same text whatever is computed beside it.
    pub seed: Option<u64>,
}

impl Default for Sampling {
    /// The likeliest token, always.
    fn default() -> Self {
        Self { temperature: 0.0, top_p: 1.0, top_k: 0, min_p: 0.0, repetition_penalty: 1.0, seed: None }
    }
}

impl Sampling {
    /// Checks that the numbers are possible.
    ///
    /// # Errors
    /// Names the one that is not.
    pub fn validate(&self) -> Result<(), GenerationError> {
        let Self { temperature, top_p, min_p, repetition_penalty, .. } = *self;
        let fail = |what: String| Err(GenerationError::Setting(what));
        if !(temperature.is_finite() && temperature >= 0.0) {
            return fail(format!("temperature is {temperature}; it must be 0 or more"));
        }
        if !(top_p > 0.0 && top_p <= 1.0) {
            return fail(format!("top_p is {top_p}; it must be more than 0 and at most 1"));
        }
        if !(0.0..=1.0).contains(&min_p) {
            return fail(format!("min_p is {min_p}; it must be from 0 to 1"));
        }
        if !(repetition_penalty.is_finite() && repetition_penalty > 0.0) {
            return fail(format!("repetition_penalty is {repetition_penalty}; it must be more than 0"));
        }
        Ok(())
    }
}

/// What ends a text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stops {
    /// Texts that end it where they appear, whatever tokens they are of. They do not become part of it.
    pub texts: Vec<String>,
    /// Tokens that end it beside the model's own. They do not become part of it.
    pub tokens: Vec<u32>,
    /// The model's own tokens that end a text or a turn do not end this one.
    pub ignore_ends: bool,
}
