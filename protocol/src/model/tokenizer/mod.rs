//! Text to tokens and back, with what the model's author says about special tokens and chat.

mod folder;
mod gguf;
mod places;
mod template;
mod to_gguf;

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

use serde_json::{Map, Value};
use tokenizers::Tokenizer;

pub(crate) use self::gguf::from_gguf;
pub use self::places::PlacedToken;
pub use self::template::{Chat, ChatMessage, ChatTemplate, NoDay, Rendered, TemplateDay};
use super::config::LlamaConfig;
use super::error::ModelError;

/// Name of the template that is meant where none is named.
const DEFAULT: &str = "default";

/// A model's tokenizer.
pub struct TextTokenizer {
    path: PathBuf,
    inner: Tokenizer,
    vocabulary: usize,
    bos: Option<u32>,
    eos: Option<u32>,
    special: Map<String, Value>,
    /// Tokens that are found in a text before anything is merged, special or not.
    added: HashMap<u32, String>,
    templates: Vec<(String, ChatTemplate)>,
}

/// What a file says beside the tokenizer itself.
struct Surroundings {
    path: PathBuf,
    /// Special tokens by the names that templates know, `bos_token` and so on.
    special: BTreeMap<String, String>,
    /// Chat templates by name; [`DEFAULT`] is the one that has none.
    templates: Vec<(String, String)>,
}

impl TextTokenizer {
    fn assemble(mut inner: Tokenizer, config: &LlamaConfig, around: Surroundings) -> Result<Self, ModelError> {
        // A file may bring its author's truncation and padding along; sequences are cut and padded elsewhere.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|error| ModelError::tokenizer(&around.path, error))?;
        let id = |name: &str| around.special.get(name).and_then(|token| inner.token_to_id(token));
        let bos = id("bos_token").or(config.bos);
        let eos = id("eos_token").or(config.eos.first().copied());
        let special: Map<String, Value> = around.special.into_iter().map(|(n, token)| (n, token.into())).collect();
        let template = |(name, source)| (name, ChatTemplate::new(source, special.clone()));
        let templates = around.templates.into_iter().map(template).collect();
        let added = inner.get_added_tokens_decoder().into_iter().map(|(id, token)| (id, token.content)).collect();
        Ok(Self { path: around.path, inner, vocabulary: config.vocabulary, bos, eos, special, added, templates })
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

    /// Like [`encode`](Self::encode), each token with the bytes of `text` that it stands for: without gaps but for white
    /// space around added tokens, in order, and whatever the tokenizer does to its own offsets.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_spans(&self, text: &str, special: bool) -> Result<Vec<PlacedToken>, ModelError> {
        let encoding = self.inner.encode(text, special).map_err(|error| self.error(error))?;
        self.check(encoding.get_ids())?;
        Ok(places::places(text, &encoding, &self.added))
    }

    /// Text of tokens, special ones spelled out.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`].
    pub fn decode(&self, tokens: &[u32]) -> Result<String, ModelError> {
        self.inner.decode(tokens, false).map_err(|error| self.error(error))
    }

    /// Text of tokens, without the special ones.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`].
    pub fn decode_plain(&self, tokens: &[u32]) -> Result<String, ModelError> {
        self.inner.decode(tokens, true).map_err(|error| self.error(error))
    }

    /// The number of a token that is spelt like this.
    pub fn number(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
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
        self.named_template(DEFAULT)
    }

    /// The model's template of this name.
    pub fn named_template(&self, name: &str) -> Option<&ChatTemplate> {
        self.templates.iter().find(|(known, _)| known == name).map(|(_, template)| template)
    }

    /// Names of the model's templates.
    pub fn template_names(&self) -> Vec<&str> {
        self.templates.iter().map(|(name, _)| name.as_str()).collect()
    }

    /// A template that does not come with the model, with the model's special tokens.
    pub fn template(&self, source: String) -> ChatTemplate {
        ChatTemplate::new(source, self.special.clone())
    }

    /// Spellings of the special tokens.
    pub fn special_tokens(&self) -> Vec<String> {
        let added = self.inner.get_added_tokens_decoder();
        added.into_values().filter(|token| token.special).map(|token| token.content).collect()
    }

    /// The first token in a text that is one by itself, whatever stands around it, as bytes of the text: a special token,
    /// or another that was added to the vocabulary. White space does not count.
    pub fn first_added(&self, text: &str) -> Option<std::ops::Range<usize>> {
        let found = self.added.values().filter(|token| !token.trim().is_empty());
        let found = found.filter_map(|token| text.find(token.as_str()).map(|at| at..at + token.len()));
        found.min_by_key(|place| (place.start, std::cmp::Reverse(place.end)))
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
