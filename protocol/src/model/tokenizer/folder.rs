//! The tokenizer of a Hugging Face folder: `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`.

use std::path::Path;

use serde::Deserialize;
use tokenizers::Tokenizer;

use super::{Surroundings, TextTokenizer};
use crate::model::config::LlamaConfig;
use crate::model::error::ModelError;

#[derive(Default, Deserialize)]
struct TokenizerConfig {
    bos_token: Option<Token>,
    eos_token: Option<Token>,
    chat_template: Option<Templates>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Token {
    Text(String),
    Described { content: String },
}

impl Token {
    fn text(self) -> String {
        match self {
            Self::Text(text) | Self::Described { content: text } => text,
        }
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Templates {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

impl Templates {
    fn default_one(self) -> Option<String> {
        match self {
            Self::One(template) => Some(template),
            Self::Named(templates) => templates.into_iter().find(|t| t.name == "default").map(|t| t.template),
        }
    }
}

impl TextTokenizer {
    /// Reads the tokenizer files of a Hugging Face folder.
    ///
    /// # Errors
    /// [`ModelError::Missing`] without a `tokenizer.json`, [`ModelError::Tokenizer`] when a file cannot be understood.
    pub fn from_folder(folder: &Path, config: &LlamaConfig) -> Result<Self, ModelError> {
        let path = folder.join("tokenizer.json");
        let bytes = std::fs::read(&path).map_err(|source| ModelError::io(&path, source))?;
        let inner = Tokenizer::from_bytes(bytes).map_err(|error| ModelError::tokenizer(&path, error))?;
        let settings_path = folder.join("tokenizer_config.json");
        let settings = match optional(&settings_path)? {
            None => TokenizerConfig::default(),
            Some(text) => serde_json::from_str(&text).map_err(|error| ModelError::tokenizer(&settings_path, error))?,
        };
        let template = match optional(&folder.join("chat_template.jinja"))? {
            Some(template) => Some(template),
            None => settings.chat_template.and_then(Templates::default_one),
        };
        let bos = settings.bos_token.map(Token::text);
        let eos = settings.eos_token.map(Token::text);
        Self::assemble(inner, config, Surroundings { path, bos, eos, template })
    }
}

fn optional(path: &Path) -> Result<Option<String>, ModelError> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(ModelError::io(path, source)),
    }
}
