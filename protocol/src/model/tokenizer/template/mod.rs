//! Chat templates: the Jinja program in a model's files that writes a conversation as the model was trained on it.
//!
//! Templates are written for transformers, which runs them in Python. Here minijinja runs them, with transformers' context
//! and filters: `source` rewrites the two constructs that minijinja has not, `python` writes values as Python does,
//! `methods` has the methods of texts, `date` the day.

mod date;
mod message;
mod methods;
mod python;
mod source;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::OnceLock;

use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, Value};
use serde_json::{Map, Value as Json};

pub use self::date::{NoDay, TemplateDay};
pub use self::message::{Chat, ChatMessage};
use crate::model::error::ModelError;

/// What the template is called in its own messages.
const NAME: &str = "chat_template";
/// The function that says the time, and the context's name of the day that it says.
const STRFTIME: &str = "strftime_now";
const DAY: &str = "_day";
/// What every template is given.
const GIVEN: [&str; 4] = ["messages", "tools", "documents", "add_generation_prompt"];
/// The context's names of the marks around what the model writes.
const MARKS: [&str; 2] = ["_generation_begins", "_generation_ends"];

/// A model's chat template.
///
/// Templates that ask for the time are told midnight of a day that is said ([`Chat::day`]), and not today, as transformers has it:
/// what a model is trained on, and so a run that goes on, must not depend on the day.
pub struct ChatTemplate {
    /// Or why the template is broken, which matters once it is asked for something.
    environment: Result<Environment<'static>, String>,
    source: String,
    /// Special tokens as the template names them, `bos_token` and so on.
    special: Map<String, Json>,
    has_generation: bool,
    takes_parts: OnceLock<bool>,
    /// Names that it looks up and does not set itself.
    read: BTreeSet<String>,
}

/// The variables that a template reads, without functions.
fn read(environment: &Environment<'static>) -> BTreeSet<String> {
    let names = environment.get_template(NAME).map(|template| template.undeclared_variables(false));
    let functions: BTreeSet<&str> = environment.globals().map(|(name, _)| name).collect();
    let mut names: BTreeSet<String> = names.unwrap_or_default().into_iter().collect();
    names.retain(|name| !functions.contains(name.as_str()));
    names
}

/// A conversation as a template writes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendered {
    /// The text.
    pub text: String,
    /// What the template says that the model itself writes (`{% generation %}`), as bytes of the text.
    pub generated: Vec<Range<usize>>,
}

impl ChatTemplate {
    pub(super) fn new(source: String, special: Map<String, Json>) -> Self {
        let (adapted, has_generation) = source::adapt(&source);
        let mut environment = environment();
        let environment = match environment.add_template_owned(NAME, adapted) {
            Ok(()) => Ok(environment),
            Err(error) => Err(error.to_string()),
        };
        let read = environment.as_ref().map_or_else(|_| BTreeSet::new(), read);
        Self { environment, source, special, has_generation, takes_parts: OnceLock::new(), read }
    }

    /// The template as its author wrote it.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Whether the template says itself what the model writes, by `{% generation %}`.
    pub fn has_generation(&self) -> bool {
        self.has_generation
    }

    /// Whether the template's source has this word anywhere: a name that it has not is of no effect.
    pub fn mentions(&self, name: &str) -> bool {
        self.source.contains(name)
    }

    /// Whether what the template makes of a conversation depends on the day.
    pub fn asks_for_day(&self, chat: &Chat<'_>) -> bool {
        let on = |day| self.write(&Chat { day, ..*chat }, false).ok();
        self.mentions(STRFTIME) && on(chat.day) != on(chat.day.other())
    }

    /// Whether the template reads a variable.
    pub fn reads(&self, name: &str) -> bool {
        self.mentions(name) && self.read.contains(name)
    }

    /// The variables that it reads, beside what every template is given.
    pub fn variables(&self) -> Vec<&str> {
        let given = |name: &str| GIVEN.contains(&name) || self.special.contains_key(name);
        self.read.iter().map(String::as_str).filter(|name| !given(name)).collect()
    }

    /// The same in words.
    pub fn told_variables(&self) -> String {
        match self.variables().as_slice() {
            [] => "it reads none beside the conversation".to_owned(),
            names => format!("it reads {}", names.join(", ")),
        }
    }

    /// Whether contents that are lists of parts come out as text. Templates for plain text write such a list as it is, or
    /// fail.
    pub fn takes_parts(&self) -> bool {
        *self.takes_parts.get_or_init(|| {
            let said = "\u{e000}said\u{e001}";
            let part = serde_json::json!([{"type": "text", "text": said, "spare": "\u{e000}spare\u{e001}"}]);
            let message = |role: &str| {
                let fields = [("role".to_owned(), Json::from(role)), ("content".to_owned(), part.clone())];
                ChatMessage::from(Map::from_iter(fields))
            };
            let messages = [message("user"), message("assistant")];
            let shown = self.write(&Chat::new(&messages), false);
            shown.is_ok_and(|shown| shown.text.contains(said) && !shown.text.contains("spare\u{e001}"))
        })
    }

    /// The text of a conversation. With `open`, the head of an assistant's turn follows, for the model to go on.
    ///
    /// # Errors
    /// [`ModelError::Template`] when the template is broken or refuses these messages.
    pub fn render(&self, messages: &[ChatMessage], open: bool) -> Result<String, ModelError> {
        Ok(self.write(&Chat::new(messages), open)?.text)
    }

    /// Like [`render`](Self::render), of a conversation with all that belongs to it, and with what the model itself writes.
    ///
    /// # Errors
    /// As [`render`](Self::render).
    pub fn write(&self, chat: &Chat<'_>, open: bool) -> Result<Rendered, ModelError> {
        let failed = |what: String| ModelError::Template { what };
        let environment = self.environment.as_ref().map_err(|what| failed(what.clone()))?;
        let messages: Vec<Map<String, Json>> = chat.messages.iter().map(ChatMessage::for_template).collect();
        let mut context = self.special.clone();
        context.extend(chat.values.into_iter().flatten().map(|(name, value)| (name.clone(), value.clone())));
        let mut context: Vec<(String, Value)> =
            context.iter().map(|(name, value)| (name.clone(), Value::from_serialize(value))).collect();
        let mut set = |name: &str, value: Value| context.push((name.to_owned(), value));
        let marks = if self.has_generation { absent_from(&messages) } else { ['\0'; 2] };
        MARKS.into_iter().zip(marks).for_each(|(name, mark)| set(name, Value::from(mark.to_string())));
        set("messages", Value::from_serialize(&messages));
        // transformers always passes both, as None where there are none.
        set("tools", chat.tools.map_or(Value::from(()), Value::from_serialize));
        set("documents", chat.documents.map_or(Value::from(()), Value::from_serialize));
        set("add_generation_prompt", Value::from(open));
        set(DAY, Value::from(chat.day.to_string()));
        let template = environment.get_template(NAME).map_err(|error| failed(error.to_string()))?;
        let text = template.render(Value::from_iter(context)).map_err(|error| failed(described(&error)))?;
        if !self.has_generation {
            return Ok(Rendered { text, generated: Vec::new() });
        }
        Ok(without_marks(&text, marks))
    }
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate").field("source", &self.source).finish_non_exhaustive()
    }
}

/// An error in one line, the template's own words first.
fn described(error: &Error) -> String {
    let what = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    match error.line() {
        Some(line) => format!("{what} (line {line} of the template)"),
        None => what,
    }
}

/// What transformers' environment has.
fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    minijinja_contrib::add_to_environment(&mut environment);
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_unknown_method_callback(methods::call);
    environment.set_formatter(|out, state, value| match value.kind() {
        ValueKind::Seq | ValueKind::Map | ValueKind::Iterable => {
            out.write_str(&python::repr(value)?).map_err(Error::from)
        }
        ValueKind::Number if !value.is_integer() => out.write_str(&python::repr(value)?).map_err(Error::from),
        _ => minijinja::escape_formatter(out, state, value),
    });
    environment.add_function("raise_exception", |message: Value| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message.to_string()))
    });
    environment.add_function(STRFTIME, |state: &State<'_, '_>, format: &str| {
        let day = state.lookup(DAY).and_then(|day| day.as_str()?.parse::<TemplateDay>().ok());
        day.unwrap_or_default().strftime(format)
    });
    environment.add_filter("tojson", |value: Value, options: Kwargs| python::to_json(&value, &options));
    environment.add_filter("string", |value: Value| python::text(&value).map(Value::from));
    environment.add_filter("join", join);
    environment.add_filter("length", length);
    environment.add_filter("count", length);
    environment.add_filter(source::PERCENT, |state: &State<'_, '_>, left: Value, right: Rest<Value>| {
        python::percent(state, &left, &right)
    });
    environment.add_filter(source::GENERATION, |state: &State<'_, '_>, body: Value| {
        let mark = |name: &str| state.lookup(name).map(|mark| mark.to_string()).unwrap_or_default();
        Value::from_safe_string([mark(MARKS[0]), body.to_string(), mark(MARKS[1])].concat())
    });
    // In Python a text is a sequence of its characters, a dictionary has a length and items, and True is a number.
    let listed = |value: Value| {
        matches!(value.kind(), ValueKind::String | ValueKind::Seq | ValueKind::Iterable | ValueKind::Map)
    };
    environment.add_test("sequence", listed);
    environment.add_test("iterable", listed);
    environment.add_test("number", |value: Value| matches!(value.kind(), ValueKind::Number | ValueKind::Bool));
    environment
}

/// Jinja's `join`, which writes members as Python does.
fn join(value: Value, between: Option<Value>, options: Kwargs) -> Result<String, Error> {
    let attribute: Option<String> = options.get("attribute")?;
    let named: Option<Value> = options.get("d")?;
    options.assert_all_used()?;
    let between = between.or(named).map(|between| python::text(&between)).transpose()?.unwrap_or_default();
    let items = match value.kind() {
        ValueKind::Undefined => Vec::new(),
        _ => value.try_iter()?.collect(),
    };
    let written = items.iter().map(|item| match &attribute {
        Some(name) => python::text(&item.get_attr(name)?),
        None => python::text(item),
    });
    Ok(written.collect::<Result<Vec<_>, _>>()?.join(&between))
}

/// Jinja's `length`: what is not defined has none.
fn length(value: Value) -> Result<usize, Error> {
    if value.is_undefined() {
        return Ok(0);
    }
    let none = || Error::new(ErrorKind::InvalidOperation, format!("a value that is {} has no length", value.kind()));
    value.len().ok_or_else(none)
}

/// Two characters of private use that occur nowhere in the messages.
fn absent_from(messages: &[Map<String, Json>]) -> [char; 2] {
    let said = serde_json::to_string(messages).unwrap_or_default();
    let mut unused = ('\u{f0000}'..='\u{ffffd}').filter(|&c| !said.contains(c));
    // A text that has all sixty-five thousand of them has no use for two more.
    std::array::from_fn(|_| unused.next().unwrap_or('\u{f0000}'))
}

/// The text without its marks, and what was between them.
fn without_marks(marked: &str, [begins, ends]: [char; 2]) -> Rendered {
    let mut rendered = Rendered { text: String::with_capacity(marked.len()), generated: Vec::new() };
    let mut open: Vec<usize> = Vec::new();
    for c in marked.chars() {
        if c == begins {
            open.push(rendered.text.len());
        } else if c == ends {
            if let Some(start) = open.pop() {
                rendered.generated.push(start..rendered.text.len());
            }
        } else {
            rendered.text.push(c);
        }
    }
    rendered
}
