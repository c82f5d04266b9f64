//! Texts that are gone on with: keys and values of what was computed are kept, and only new tokens go through the layers.
//!
//! It is the forward pass of training, with attention that looks back into what was kept; several texts of different lengths
//! go through the layers together, each with its own adapters or none.

use protocol::buffer::Buffer;
use protocol::model::{LlamaConfig, Rope, RopeScaling};

use super::attends::{Continued, Turns};
use super::ops::{KeptLayer, KeptSequences, PAGE, Piece};
use super::pass::Pass;
use super::{Llama, LlamaError};
use crate::lora::LoraAdapters;

/// Keys and values of a text's tokens, of every layer. It is as private as the text; its memory is wiped as that of other rows
/// is.
pub struct KvCache {
    layers: Vec<KeptLayer>,
    length: usize,
    turns: Turns,
}

impl KvCache {
    /// Tokens whose memory is taken together.
    pub const PAGE: usize = PAGE;

    /// Of no token yet.
    pub fn new(config: &LlamaConfig) -> Self {
        Self {
            layers: (0..config.layers).map(|_| KeptLayer::default()).collect(),
            length: 0,
            turns: Turns::of(config, 1),
        }
    }

    /// Tokens that it holds.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Bytes that it takes.
    pub fn held_bytes(&self) -> u64 {
        self.layers.iter().map(KeptLayer::bytes).sum()
    }

    /// Forgets all tokens behind the first `length`.
    pub fn truncate(&mut self, length: usize) {
        self.length = self.length.min(length);
        let length = self.length;
        self.layers.iter_mut().for_each(|layer| layer.truncate(length));
    }

    /// Has the tokens that follow turn as those of a text of so many. Where the earlier ones would have to turn differently too,
    /// they are forgotten: models with long and short frequencies (LongRoPE) read a text anew when it outgrows the short ones.
    pub fn turn_for(&mut self, config: &LlamaConfig, length: usize) {
        if stretched(config).next().is_none() {
            return;
        }
        let turns = Turns::of(config, length);
        if turns != self.turns {
            let anew = |rope: &Rope| matches!(rope.scaling, Some(RopeScaling::LongRope(_)));
            if stretched(config).any(anew) {
                self.truncate(0);
            }
            self.turns = turns;
        }
    }

    /// The longest text whose tokens turn as those of a text of so many, as far as that is known.
    pub fn turns_alike_up_to(config: &LlamaConfig, length: usize) -> usize {
        let alike = |rope: &Rope| match (rope.one_for_up_to()?, &rope.scaling) {
            (up_to, _) if up_to >= length => Some(up_to),
            // Each length has frequencies of its own.
            (_, Some(RopeScaling::Dynamic { .. })) => Some(length),
            _ => None,
        };
        stretched(config).filter_map(alike).min().unwrap_or(usize::MAX)
    }

    /// Bytes of keys and values of a text of so many tokens.
    pub fn bytes(config: &LlamaConfig, tokens: usize) -> u64 {
        let page = PAGE * config.kv_heads * config.head_dim * size_of::<f32>();
        (tokens.div_ceil(PAGE) as u64).saturating_mul((2 * config.layers * page) as u64)
    }
}

impl std::fmt::Debug for KvCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The values are private, and many.
        write!(f, "KvCache({} tokens)", self.length)
    }
}

/// Rotary positions that depend on a text's length.
fn stretched(config: &LlamaConfig) -> impl Iterator<Item = &Rope> {
    let all = std::iter::once(&config.rope).chain(&config.traits.local_rope);
    all.filter(|rope| rope.one_for_up_to().is_some())
}

/// New tokens of one text.
pub struct Continuation<'a> {
    /// What is kept of those before, and then of these too.
    pub cache: &'a mut KvCache,
    /// At least one.
    pub tokens: &'a [u32],
    /// The adapters beside the base model.
    pub adapters: Option<&'a LoraAdapters>,
    /// How many of the new tokens, the last ones, go through the head afterwards.
    pub wanted: usize,
}

impl Llama {
    /// Whether texts with these adapters can be gone on with in one call. Norms that are trained belong to all rows of a call.
    pub fn together(one: Option<&LoraAdapters>, other: Option<&LoraAdapters>) -> bool {
        let plain = |adapters: Option<&LoraAdapters>| adapters.is_none_or(|adapters| adapters.norms().next().is_none());
        match (one, other) {
            (Some(one), Some(other)) if std::ptr::eq(one, other) => true,
            _ => plain(one) && plain(other),
        }
    }

    /// Goes on with texts by their new tokens, which go through the layers together, and keeps these tokens' keys and values.
    /// Rows of no text make their number up to a multiple of `multiple ≥ 1`. Returns the wanted tokens' hidden states, behind
    /// the final norm: `wanted tokens of all texts × hidden_size`, text after text.
    ///
    /// # Errors
    /// When texts do not fit the model or each other, or a base product fails. Nothing more is kept then than before.
    pub fn extend(&self, texts: &mut [Continuation<'_>], multiple: usize) -> Result<Buffer, LlamaError> {
        let (config, hidden) = (self.config(), self.config().hidden_size);
        self.check_texts(texts)?;
        let mut tokens: Vec<u32> = texts.iter().flat_map(|text| text.tokens).copied().collect();
        // Whatever makes them up is seen by nobody.
        let padding = tokens.last().copied().unwrap_or_default();
        tokens.resize(tokens.len().next_multiple_of(multiple.max(1)), padding);
        let (mut pieces, mut beside, mut kept, mut first) = (Vec::new(), Vec::new(), Vec::new(), 0);
        for text in texts.iter_mut() {
            let rows = text.tokens.len();
            pieces.push((Piece { first, rows, past: text.cache.length }, text.cache.turns.clone()));
            beside.extend(text.adapters.map(|adapters| (first..first + rows, adapters)));
            kept.push(&mut text.cache.layers[..]);
            first += rows;
        }
        let attention = Continued::new(config, pieces, KeptSequences::new(kept));
        let pass = Pass::of_rows(self, tokens.len(), attention, beside)?;
        let embedded = pass.embed(&tokens)?;
        let normed = pass.forward(embedded, 0..config.layers, usize::MAX, &mut Vec::new())?.normed;
        drop(pass);

        let mut states = Buffer::scratch(texts.iter().map(|text| text.wanted).sum::<usize>() * hidden);
        let (mut end, mut rest) = (0, &mut states[..]);
        for text in texts {
            end += text.tokens.len();
            text.cache.length += text.tokens.len();
            let (to, others) = rest.split_at_mut(text.wanted * hidden);
            to.copy_from_slice(&normed[(end - text.wanted) * hidden..end * hidden]);
            rest = others;
        }
        Ok(states)
    }

    fn check_texts(&self, texts: &[Continuation<'_>]) -> Result<(), LlamaError> {
        let fail = |why: String| Err(LlamaError::Batch(why));
        let vocabulary = self.config().vocabulary;
        for Continuation { cache, tokens, wanted, .. } in texts {
            if tokens.is_empty() || *wanted > tokens.len() {
                return fail(format!("{} tokens go on with a text, of which {wanted} are wanted", tokens.len()));
            }
            if cache.layers.len() != self.config().layers {
                return fail(format!("what is kept is of {} layers", cache.layers.len()));
            }
            if let Some(token) = tokens.iter().find(|&&token| token as usize >= vocabulary) {
                return fail(format!("token {token} is outside the vocabulary of {vocabulary}"));
            }
        }
        let mut others = texts.iter().skip(1);
        if others.any(|text| !Self::together(texts[0].adapters, text.adapters)) {
            return fail("adapters with norms of their own go through the model apart from others".to_owned());
        }
        if texts.is_empty() {
            return fail("there is no text to go on with".to_owned());
        }
        Ok(())
    }
}
