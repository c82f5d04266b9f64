//! One line of a data file: which kind it is, and its texts.

use protocol::model::ChatMessage;
use serde_json::{Map, Value};

use super::FieldNames;

/// What a line says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Line {
    /// A text, learnt as a whole.
    Text(String),
    /// Only the completion is learnt.
    Pair { prompt: String, completion: String },
    /// Only the assistant's turns are learnt.
    Chat(Vec<ChatMessage>),
}

impl Line {
    /// Understands a line.
    ///
    /// # Errors
    /// What is wrong and what was expected, in words.
    pub(super) fn parse(bytes: &[u8], fields: &FieldNames) -> Result<Self, String> {
        let text = std::str::from_utf8(bytes).map_err(|_| "it is not UTF-8".to_owned())?;
        let object: Map<String, Value> = serde_json::from_str(text)
            .map_err(|error| format!("it is not a JSON object ({error}); expected {}", expected(fields)))?;
        let string = |name: &str| match object.get(name) {
            Some(Value::String(text)) => Ok(text.clone()),
            Some(other) => Err(format!("`{name}` is {}, where a text is expected", kind(other))),
            None => Err(format!("`{name}` is missing")),
        };
        if let Some(messages) = object.get(&fields.messages) {
            return chat(messages, &fields.messages).map(Self::Chat);
        }
        if object.contains_key(&fields.prompt) || object.contains_key(&fields.completion) {
            return Ok(Self::Pair { prompt: string(&fields.prompt)?, completion: string(&fields.completion)? });
        }
        if object.contains_key(&fields.text) {
            return string(&fields.text).map(Self::Text);
        }
        let found: Vec<&str> = object.keys().take(8).map(String::as_str).collect();
        Err(format!("it has the fields [{}]; expected {}", found.join(", "), expected(fields)))
    }
}

fn chat(messages: &Value, name: &str) -> Result<Vec<ChatMessage>, String> {
    let expected =
        format!("`{name}` must be a list of {{\"role\", \"content\"}} with at least one turn of the assistant");
    let messages: Vec<ChatMessage> =
        serde_json::from_value(messages.clone()).map_err(|error| format!("{expected} ({error})"))?;
    if messages.iter().all(|message| message.role != "assistant") {
        return Err(expected);
    }
    Ok(messages)
}

fn expected(fields: &FieldNames) -> String {
    let FieldNames { text, prompt, completion, messages } = fields;
    format!("{{\"{text}\"}}, {{\"{prompt}\", \"{completion}\"}} or {{\"{messages}\"}}")
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
