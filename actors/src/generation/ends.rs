//! Tokens that end a text or a turn, wherever a model's files speak of them.

use std::fs;
use std::path::Path;

use protocol::model::{ChatMessage, Model, TextTokenizer};
use serde_json::Value;

use super::error::GenerationError;

/// The file beside a Hugging Face model that says how it generates.
const FILE: &str = "generation_config.json";

/// All of a model's: those of its configuration, of its tokenizer and of its generation settings, and the special token with
/// which its template ends an answer.
///
/// # Errors
/// When the generation settings cannot be read.
pub(super) fn of(model: &Model, tokenizer: &TextTokenizer) -> Result<Vec<u32>, GenerationError> {
    let mut ends = model.config().eos.clone();
    ends.extend(tokenizer.eos());
    ends.extend(of_settings(model.path())?);
    ends.extend(of_template(tokenizer));
    ends.retain(|&token| (token as usize) < model.config().vocabulary);
    ends.sort_unstable();
    ends.dedup();
    Ok(ends)
}

/// Those of the generation settings in a model's folder, if it has some.
fn of_settings(folder: &Path) -> Result<Vec<u32>, GenerationError> {
    let path = folder.join(FILE);
    if !path.is_file() {
        return Ok(Vec::new());
    }
    let failed = |what: String| GenerationError::Setting(format!("{}: {what}", path.display()));
    let text = fs::read(&path).map_err(|error| failed(error.to_string()))?;
    let settings: Value = serde_json::from_slice(&text).map_err(|error| failed(error.to_string()))?;
    let number = |value: &Value| {
        let token = value.as_u64().and_then(|token| u32::try_from(token).ok());
        token.ok_or_else(|| failed(format!("eos_token_id has {value}, which is no token")))
    };
    match settings.get("eos_token_id") {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(tokens)) => tokens.iter().map(number).collect(),
        Some(token) => Ok(vec![number(token)?]),
    }
}

/// The special token that directly follows an answer in the model's template.
fn of_template(tokenizer: &TextTokenizer) -> Option<u32> {
    let answer = "fourteen";
    let messages = [ChatMessage::new("user", "Seven and seven?"), ChatMessage::new("assistant", answer)];
    // A template that refuses this has other demands, and says nothing about ends.
    let text = tokenizer.chat_template()?.render(&messages, false).ok()?;
    let behind = text[text.rfind(answer)? + answer.len()..].trim_start();
    let first = tokenizer.first_added(behind).filter(|place| place.start == 0)?;
    match tokenizer.encode(&behind[first], false).ok()?[..] {
        [token] => Some(token),
        _ => None,
    }
}
