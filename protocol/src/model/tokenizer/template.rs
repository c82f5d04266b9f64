//! Chat templates: the Jinja program in a model's files that writes a conversation as the model was trained on it.

use minijinja::{Environment, Error, ErrorKind, Value, context};
use serde::{Deserialize, Serialize};

use crate::model::error::ModelError;

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChatMessage {
    /// Who speaks: `system`, `user`, `assistant`, or what else the template knows.
    pub role: String,
    /// What is said.
    pub content: String,
}

impl ChatMessage {
    /// A turn.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// A model's chat template.
///
/// Templates that print today's date are given the 26th of July 2024, midnight, the day that Llama 3's own template
/// falls back to: what a model is trained on must not depend on the day.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    bos: String,
    eos: String,
}

impl ChatTemplate {
    pub(super) fn new(source: String, bos: String, eos: String) -> Self {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", |format: &str| fixed_date(format));
        environment.add_filter("tojson", to_json);
        Self { environment, source, bos, eos }
    }

    /// The text of a conversation. With `open`, the head of an assistant's turn follows, for the model to go on.
    ///
    /// # Errors
    /// [`ModelError::Template`] when the template is broken or refuses these messages.
    pub fn render(&self, messages: &[ChatMessage], open: bool) -> Result<String, ModelError> {
        let context = context! {
            messages => messages,
            add_generation_prompt => open,
            bos_token => self.bos,
            eos_token => self.eos,
        };
        let rendered = self.environment.render_named_str("chat_template", &self.source, context);
        rendered.map_err(|error| ModelError::Template { what: error.to_string() })
    }
}

/// Python's `strftime` on the fixed date, for the directives that templates use.
fn fixed_date(format: &str) -> String {
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        match chars.next() {
            Some('d') => out.push_str("26"),
            Some('m') => out.push_str("07"),
            Some('b') => out.push_str("Jul"),
            Some('B') => out.push_str("July"),
            Some('y') => out.push_str("24"),
            Some('Y') => out.push_str("2024"),
            Some('a') => out.push_str("Fri"),
            Some('A') => out.push_str("Friday"),
            Some('j') => out.push_str("208"),
            Some('H' | 'M' | 'S') => out.push_str("00"),
            Some('I') => out.push_str("12"),
            Some('p') => out.push_str("AM"),
            Some('F') => out.push_str("2024-07-26"),
            Some('T') => out.push_str("00:00:00"),
            Some('%') => out.push('%'),
            Some(other) => out.extend(['%', other]),
            None => out.push('%'),
        }
    }
    out
}

/// JSON as Python's `json.dumps` writes it without ASCII escapes; minijinja's own filter escapes for HTML.
fn to_json(value: Value, options: minijinja::value::Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let mut out = Vec::new();
    let written = match indent {
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, Spaced)),
        Some(width) => {
            let indent = vec![b' '; width.min(16)];
            let formatter = serde_json::ser::PrettyFormatter::with_indent(&indent);
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, formatter))
        }
    };
    written.map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))?;
    Ok(Value::from_safe_string(String::from_utf8_lossy(&out).into_owned()))
}

/// Python's separators: `", "` and `": "`.
struct Spaced;

impl serde_json::ser::Formatter for Spaced {
    fn begin_array_value<W: std::io::Write + ?Sized>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: std::io::Write + ?Sized>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: std::io::Write + ?Sized>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}
