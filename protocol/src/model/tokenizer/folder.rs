//! The tokenizer of a Hugging Face folder: `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json` and the chat
//! templates.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value};
use tokenizers::Tokenizer;

use super::{DEFAULT, Surroundings, TextTokenizer};
use crate::model::config::LlamaConfig;
use crate::model::error::ModelError;

/// Special tokens that every tokenizer may have.
const NAMES: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// What transformers' classes have where `tokenizer_config.json` is silent.
fn defaults(class: &str) -> &'static [(&'static str, &'static str)] {
    match class.trim_end_matches("Fast") {
        "LlamaTokenizer" => &[("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>")],
        "Qwen2Tokenizer" => {
            &[("eos_token", "<|endoftext|>"), ("unk_token", "<|endoftext|>"), ("pad_token", "<|endoftext|>")]
        }
        "GPT2Tokenizer" => {
            &[("bos_token", "<|endoftext|>"), ("eos_token", "<|endoftext|>"), ("unk_token", "<|endoftext|>")]
        }
        "GemmaTokenizer" => &[
            ("bos_token", "<bos>"),
            ("eos_token", "<eos>"),
            ("unk_token", "<unk>"),
            ("pad_token", "<pad>"),
            ("mask_token", "<mask>"),
        ],
        _ => &[],
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
        let settings = object(&settings_path)?.unwrap_or_default();
        // Older folders keep the special tokens apart, and mean those.
        let apart = match settings.contains_key("added_tokens_decoder") {
            true => Map::new(),
            false => object(&folder.join("special_tokens_map.json"))?.unwrap_or_default(),
        };
        let special = special_tokens(&settings, &apart, |token| inner.token_to_id(token).is_some());
        let mut templates = templates_of(&settings).map_err(|what| ModelError::tokenizer(&settings_path, what))?;
        add_files(folder, &mut templates)?;
        Self::assemble(inner, config, Surroundings { path, special, templates })
    }
}

fn special_tokens(
    settings: &Map<String, Value>,
    apart: &Map<String, Value>,
    known: impl Fn(&str) -> bool,
) -> BTreeMap<String, String> {
    let mut special = BTreeMap::new();
    let class = settings.get("tokenizer_class").and_then(Value::as_str).unwrap_or_default();
    let silent = |name: &str| !settings.contains_key(name) && !apart.contains_key(name);
    for &(name, token) in defaults(class).iter().filter(|(name, token)| silent(name) && known(token)) {
        special.insert(name.to_owned(), token.to_owned());
    }
    // Models for more than text name further ones: `image_token` and so on.
    let further = ["extra_special_tokens", "model_specific_special_tokens"].into_iter();
    let further = further.filter_map(|key| settings.get(key).and_then(Value::as_object)).flatten();
    let named = NAMES.into_iter().filter_map(|name| Some((name, apart.get(name).or(settings.get(name))?)));
    for (name, token) in further.map(|(name, token)| (name.as_str(), token)).chain(named) {
        if let Some(token) = spelled(token) {
            special.insert(name.to_owned(), token.to_owned());
        }
    }
    special
}

/// A token's text, given as it is or with a description.
fn spelled(token: &Value) -> Option<&str> {
    token.as_str().or_else(|| token.get("content").and_then(Value::as_str))
}

/// The templates of `tokenizer_config.json` by name.
fn templates_of(settings: &Map<String, Value>) -> Result<Vec<(String, String)>, String> {
    let mut found = Vec::new();
    match settings.get("chat_template") {
        None | Some(Value::Null) => {}
        Some(Value::String(template)) => found.push((DEFAULT.to_owned(), template.clone())),
        Some(Value::Array(named)) => {
            for one in named {
                let text = |key: &str| one.get(key).and_then(Value::as_str).map(str::to_owned);
                let both = text("name").zip(text("template"));
                found.push(both.ok_or("a member of `chat_template` has no `name` or no `template`")?);
            }
        }
        Some(Value::Object(named)) => {
            for (name, template) in named {
                let template = template.as_str().ok_or_else(|| format!("`chat_template.{name}` is not a text"))?;
                found.push((name.clone(), template.to_owned()));
            }
        }
        Some(_) => return Err("`chat_template` is neither a text nor a list of named templates".to_owned()),
    }
    Ok(found)
}

/// The templates that are files of their own, which win over the settings.
fn add_files(folder: &Path, templates: &mut Vec<(String, String)>) -> Result<(), ModelError> {
    let mut set = |name: String, template: String| {
        templates.retain(|(known, _)| *known != name);
        templates.push((name, template));
    };
    if let Some(template) = optional(&folder.join("chat_template.jinja"))? {
        set(DEFAULT.to_owned(), template);
    }
    let more = folder.join("additional_chat_templates");
    if !more.is_dir() {
        return Ok(());
    }
    let entries = std::fs::read_dir(&more).and_then(Iterator::collect::<std::io::Result<Vec<_>>>);
    let entries = entries.map_err(|source| ModelError::io(&more, source))?;
    let mut files: Vec<_> = entries.into_iter().map(|entry| entry.path()).collect();
    files.sort();
    for path in files.iter().filter(|path| path.extension().is_some_and(|extension| extension == "jinja")) {
        if let (Some(name), Some(template)) = (path.file_stem(), optional(path)?) {
            set(name.to_string_lossy().into_owned(), template);
        }
    }
    Ok(())
}

fn object(path: &Path) -> Result<Option<Map<String, Value>>, ModelError> {
    let parse = |text: String| serde_json::from_str(&text).map_err(|error| ModelError::tokenizer(path, error));
    optional(path)?.map(parse).transpose()
}

fn optional(path: &Path) -> Result<Option<String>, ModelError> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(ModelError::io(path, source)),
    }
}
