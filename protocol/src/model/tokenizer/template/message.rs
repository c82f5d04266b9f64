//! Conversations as templates are given them.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::TemplateDay;

/// Names that a model's reasoning goes by; the first is the one that templates read.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// One turn of a conversation: a role, mostly a content, and whatever else templates know.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ChatMessage {
    fields: Map<String, Value>,
}

impl ChatMessage {
    /// A turn that says `content`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        let fields = [("role", Value::String(role.into())), ("content", Value::String(content.into()))];
        Self { fields: fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect() }
    }

    /// Who speaks: `system`, `user`, `assistant`, `tool`, or what else the template knows.
    pub fn role(&self) -> &str {
        self.fields.get("role").and_then(Value::as_str).unwrap_or_default()
    }

    /// What is said, where that is a text.
    pub fn content(&self) -> Option<&str> {
        self.fields.get("content").and_then(Value::as_str)
    }

    /// What a model thought before it spoke, under whichever of its names.
    pub fn reasoning(&self) -> Option<(&'static str, &Value)> {
        let given = |name: &'static str| Some((name, self.fields.get(name).filter(|value| !value.is_null())?));
        REASONING.into_iter().find_map(given)
    }

    /// All fields.
    pub fn fields(&self) -> &Map<String, Value> {
        &self.fields
    }

    /// The same turn with another value of a field.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.fields.insert(name.to_owned(), value.into());
        self
    }

    /// The same turn without a field.
    #[must_use]
    pub fn without(mut self, name: &str) -> Self {
        self.fields.shift_remove(name);
        self
    }

    /// As transformers hands it to a template: without fields that are null, and with reasoning under each name that templates
    /// read.
    pub(super) fn for_template(&self) -> Map<String, Value> {
        let given = self.fields.iter().filter(|(_, value)| !value.is_null());
        let mut given: Map<String, Value> = given.map(|(name, value)| (name.clone(), value.clone())).collect();
        if let Some((_, reasoning)) = self.reasoning() {
            if !given.contains_key("thinking") {
                let first = std::iter::once(("thinking".to_owned(), reasoning.clone()));
                given = first.chain(given).collect();
            }
            given.insert(REASONING[0].to_owned(), reasoning.clone());
        }
        given
    }
}

impl From<Map<String, Value>> for ChatMessage {
    fn from(fields: Map<String, Value>) -> Self {
        Self { fields }
    }
}

/// A conversation with all that belongs to it.
#[derive(Clone, Copy, Debug)]
pub struct Chat<'a> {
    /// Its turns.
    pub messages: &'a [ChatMessage],
    /// Descriptions of what the assistant may call.
    pub tools: Option<&'a Value>,
    /// Texts to answer from.
    pub documents: Option<&'a Value>,
    /// Further variables of the template.
    pub values: Option<&'a Map<String, Value>>,
    /// What is said to a template that asks for the day.
    pub day: TemplateDay,
}

impl<'a> Chat<'a> {
    /// Turns and nothing else.
    pub fn new(messages: &'a [ChatMessage]) -> Self {
        Self { messages, tools: None, documents: None, values: None, day: TemplateDay::default() }
    }

    /// The same with other turns.
    #[must_use]
    pub fn with_messages<'b>(&self, messages: &'b [ChatMessage]) -> Chat<'b>
    where
        'a: 'b,
    {
        Chat { messages, ..*self }
    }
}
