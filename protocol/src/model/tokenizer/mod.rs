//! Text to tokens and back, with what the model's author says about special tokens and chat.

mod folder;
mod gguf;
mod template;

use std::ops::Range;
use std::path::PathBuf;

use tokenizers::Tokenizer;

pub(crate) use self::gguf::from_gguf;
pub use self::template::{ChatMessage, ChatTemplate};
use super::config::LlamaConfig;
use super::error::ModelError;

/// A model's tokenizer.
pub struct TextTokenizer {
    path: PathBuf,
    inner: Tokenizer,
    vocabulary: usize,
    bos: Option<u32>,
    eos: Option<u32>,
    template: Option<ChatTemplate>,
}

/// What a file says beside the tokenizer itself.
struct Surroundings {
    path: PathBuf,
    bos: Option<String>,
    eos: Option<String>,
    template: Option<String>,
}

impl TextTokenizer {
    fn assemble(mut inner: Tokenizer, config: &LlamaConfig, around: Surroundings) -> Result<Self, ModelError> {
        // A file may bring its author's truncation and padding along; sequences are cut and padded elsewhere.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|error| ModelError::tokenizer(&around.path, error))?;
        let id = |token: &Option<String>| token.as_deref().and_then(|token| inner.token_to_id(token));
        let bos = id(&around.bos).or(config.bos);
        let eos = id(&around.eos).or(config.eos.first().copied());
        let text = |id: Option<u32>| id.and_then(|id| inner.id_to_token(id)).unwrap_or_default();
        let template = around.template.map(|source| ChatTemplate::new(source, text(bos), text(eos)));
        Ok(Self { path: around.path, inner, vocabulary: config.vocabulary, bos, eos, template })
    }

    /// Tokens of a text. `special` adds what the model wants around a text of its own (for most Llamas a token
    /// that begins it); a rendered chat brings these itself. Special tokens that are spelled out in the text count.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`], also when a token is outside the model's vocabulary.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>, ModelError> {
        let encoding = self.inner.encode_fast(text, special).map_err(|error| self.error(error))?;
        let ids = encoding.get_ids();
        self.check(ids)?;
        Ok(ids.to_vec())
    }

    /// Like [`encode`](Self::encode), each token with the bytes of `text` that it stands for.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_spans(&self, text: &str, special: bool) -> Result<Vec<(u32, Range<usize>)>, ModelError> {
        let encoding = self.inner.encode(text, special).map_err(|error| self.error(error))?;
        self.check(encoding.get_ids())?;
        let spans = encoding.get_offsets().iter().map(|&(start, end)| start..end);
        Ok(encoding.get_ids().iter().copied().zip(spans).collect())
    }

    /// Text of tokens, special ones spelled out.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`].
    pub fn decode(&self, tokens: &[u32]) -> Result<String, ModelError> {
        self.inner.decode(tokens, false).map_err(|error| self.error(error))
    }

    /// The token that begins a text.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The token that ends a text, or a turn of a model that was trained to chat.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// Number of tokens that the model knows.
    pub fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    /// How the model writes a conversation, if it was trained to chat.
    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        self.template.as_ref()
    }

    /// Spellings of the special tokens.
    pub fn special_tokens(&self) -> Vec<String> {
        let added = self.inner.get_added_tokens_decoder();
        added.into_values().filter(|token| token.special).map(|token| token.content).collect()
    }

    fn check(&self, ids: &[u32]) -> Result<(), ModelError> {
        match ids.iter().find(|&&id| id as usize >= self.vocabulary) {
            None => Ok(()),
            Some(id) => Err(self.error(format!("token {id} is outside the model's vocabulary of {}", self.vocabulary))),
        }
    }

    fn error(&self, what: impl std::fmt::Display) -> ModelError {
        ModelError::tokenizer(&self.path, what)
    }
}
