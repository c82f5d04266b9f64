//! What a record says, in any of the shapes that data sets have.
//!
//! A shape is told by the fields that are there: a pair to choose from (`chosen`, `rejected`), a conversation (`messages`,
//! ShareGPT's `conversations`), a prompt and its completion (also Alpaca's `instruction` and `output`), a text. Fields that no
//! shape uses are handed back by name, so that nothing is left out in silence.

mod messages;

use protocol::model::ChatMessage;
use serde_json::{Map, Value};

use self::messages::turns;
use super::FieldNames;

/// What is to be written and learnt.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Record {
    /// A text, learnt as a whole.
    Text(String),
    /// Only the completion is learnt.
    Pair { prompt: String, completion: String },
    /// Only some turns are learnt.
    Chat(Box<Conversation>),
}

/// A conversation with what belongs to it.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Conversation {
    pub(super) turns: Vec<Turn>,
    pub(super) tools: Option<Value>,
    pub(super) documents: Option<Value>,
    /// Variables of the template that the record brings.
    pub(super) values: Map<String, Value>,
}

/// A turn of a conversation.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Turn {
    pub(super) message: ChatMessage,
    pub(super) learnt: bool,
}

/// A record that was understood.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Parsed {
    One(Record),
    /// Two ways to go on, of which one is better.
    Preference {
        chosen: Record,
        rejected: Record,
    },
}

impl Parsed {
    /// Understands a record; the names of fields that are of no use come with it.
    ///
    /// # Errors
    /// What is wrong and what was expected, in words.
    pub(super) fn new(object: Map<String, Value>, names: &FieldNames) -> Result<(Self, Vec<String>), String> {
        let mut fields = Fields::new(object);
        let parsed = if fields.has(&names.chosen) || fields.has(&names.rejected) {
            preference(&mut fields, names)?
        } else if fields.has(&names.messages) || fields.has(&names.conversations) {
            Self::One(chat(&mut fields, names)?)
        } else if [&names.prompt, &names.completion, &names.instruction, &names.output]
            .map(|n| fields.has(n))
            .contains(&true)
        {
            Self::One(pair(&mut fields, names)?)
        } else if fields.has(&names.text) {
            Self::One(Record::Text(fields.text(&names.text)?))
        } else {
            let found: Vec<&str> = fields.left.keys().take(8).map(String::as_str).collect();
            return Err(format!("it has the fields [{}]; expected {}", found.join(", "), expected(names)));
        };
        Ok((parsed, fields.left.into_iter().map(|(name, _)| name).collect()))
    }
}

/// What a record may look like.
pub(super) fn expected(names: &FieldNames) -> String {
    let FieldNames { text, prompt, completion, messages, conversations, instruction, output, .. } = names;
    format!(
        "{{\"{text}\"}}, {{\"{prompt}\", \"{completion}\"}}, {{\"{messages}\"}}, {{\"{conversations}\"}} or \
         {{\"{instruction}\", \"{output}\"}} ([data.fields] renames them)"
    )
}

/// The fields of a record that were not used yet. Null is the same as absent.
struct Fields {
    left: Map<String, Value>,
}

impl Fields {
    fn new(mut left: Map<String, Value>) -> Self {
        left.retain(|_, value| !value.is_null());
        Self { left }
    }

    fn has(&self, name: &str) -> bool {
        self.left.contains_key(name)
    }

    fn take(&mut self, name: &str) -> Option<Value> {
        self.left.shift_remove(name)
    }

    fn needed(&mut self, name: &str) -> Result<Value, String> {
        self.take(name).ok_or_else(|| format!("`{name}` is missing"))
    }

    fn text(&mut self, name: &str) -> Result<String, String> {
        text_of(name, self.needed(name)?)
    }

    /// A text that need not be there; an empty one is the same.
    fn optional_text(&mut self, name: &str) -> Result<Option<String>, String> {
        let text = self.take(name).map(|value| text_of(name, value)).transpose()?;
        Ok(text.filter(|text| !text.trim().is_empty()))
    }

    /// Something structured, or JSON of it in a text, as tables have it.
    fn structured(&mut self, name: &str) -> Result<Option<Value>, String> {
        self.take(name).map(|value| structured(name, value)).transpose()
    }

    /// The first of these names that is there.
    fn first<'n>(&self, these: [&'n String; 2]) -> &'n str {
        if self.has(these[0]) || !self.has(these[1]) { these[0] } else { these[1] }
    }
}

fn structured(name: &str, value: Value) -> Result<Value, String> {
    match value {
        Value::String(text) => serde_json::from_str(&text)
            .map_err(|_| format!("`{name}` is a text that is not JSON, where a list is expected")),
        value => Ok(value),
    }
}

fn text_of(name: &str, value: Value) -> Result<String, String> {
    match value {
        Value::String(text) => Ok(text),
        other => Err(format!("`{name}` is {}, where a text is expected", kind(&other))),
    }
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

/// What goes with a conversation, whatever its shape.
fn surroundings(fields: &mut Fields, names: &FieldNames) -> Result<Conversation, String> {
    let values = match fields.take("chat_template_kwargs") {
        None => Map::new(),
        Some(Value::Object(values)) => values,
        Some(other) => return Err(format!("`chat_template_kwargs` is {}, where an object is expected", kind(&other))),
    };
    let tools = fields.structured(&names.tools)?;
    if let Some(other) = tools.as_ref().filter(|tools| !tools.is_array()) {
        return Err(format!("`{}` is {}, where a list is expected", names.tools, kind(other)));
    }
    // An empty list offers nothing.
    let tools = tools.filter(|tools| tools.as_array().is_some_and(|tools| !tools.is_empty()));
    Ok(Conversation { turns: Vec::new(), tools, documents: fields.structured(&names.documents)?, values })
}

fn chat(fields: &mut Fields, names: &FieldNames) -> Result<Record, String> {
    let mut conversation = surroundings(fields, names)?;
    let name = fields.first([&names.messages, &names.conversations]).to_owned();
    let said = turns(&name, fields.needed(&name)?, names)?;
    conversation.turns = with_system(fields, names, said)?;
    if conversation.turns.iter().all(|turn| turn.message.role() != "assistant" && !turn.learnt) {
        return Err(format!("`{name}` has no turn of the assistant"));
    }
    if conversation.turns.iter().all(|turn| !turn.learnt) {
        return Err(format!("no turn of `{name}` is to be learnt, by their `{}` and `{}`", names.weight, names.train));
    }
    Ok(Record::Chat(Box::new(conversation)))
}

/// Puts what `system` says before a conversation.
fn with_system(fields: &mut Fields, names: &FieldNames, mut turns: Vec<Turn>) -> Result<Vec<Turn>, String> {
    if let Some(system) = fields.optional_text(&names.system)? {
        if turns.first().is_some_and(|turn| turn.message.role() == "system") {
            return Err(format!("there is a `{}`, and the conversation begins with another", names.system));
        }
        turns.insert(0, Turn { message: ChatMessage::new("system", system), learnt: false });
    }
    Ok(turns)
}

/// A prompt and its completion, as texts, as lists of messages, or as Alpaca has them.
fn pair(fields: &mut Fields, names: &FieldNames) -> Result<Record, String> {
    let name = fields.first([&names.completion, &names.output]).to_owned();
    // Which of the two names is missing follows from the prompt's.
    let name = match fields.has(&name) || !fields.has(&names.instruction) || fields.has(&names.prompt) {
        true => name,
        false => names.output.clone(),
    };
    if fields.left.get("label").is_some_and(Value::is_boolean) {
        return Err(
            "it has a `label`: a completion that is good or bad by itself (KTO), which no objective takes; keep the \
                    good ones, without their label"
                .to_owned(),
        );
    }
    let prompt = prompt(fields, names)?;
    let completion = fields.needed(&name)?;
    prompt.completed(&name, completion, names)
}

/// What a completion answers.
#[derive(Clone)]
enum Prompt {
    Text(String),
    Chat(Box<Conversation>),
}

fn prompt(fields: &mut Fields, names: &FieldNames) -> Result<Prompt, String> {
    let name = fields.first([&names.prompt, &names.instruction]).to_owned();
    if fields.left.get(&name).is_some_and(Value::is_array) {
        let mut conversation = surroundings(fields, names)?;
        let turns = turns(&name, fields.needed(&name)?, names)?;
        conversation.turns = with_system(fields, names, turns)?;
        conversation.turns.iter_mut().for_each(|turn| turn.learnt = false);
        return Ok(Prompt::Chat(Box::new(conversation)));
    }
    let asked = fields.text(&name)?;
    let about = fields.optional_text(&names.input)?;
    let asked = match about {
        Some(about) if asked.trim().is_empty() => about,
        Some(about) => format!("{asked}\n\n{about}"),
        None => asked,
    };
    let mut earlier = Vec::new();
    for (number, pair) in fields.structured(&names.history)?.into_iter().flat_map(members).enumerate() {
        let two = pair.as_array().and_then(|pair| Some([pair.first()?.as_str()?, pair.get(1)?.as_str()?]));
        let Some([asked, answered]) = two else {
            return Err(format!("member {} of `{}` is not a pair of texts", number + 1, names.history));
        };
        earlier.push(Turn { message: ChatMessage::new("user", asked), learnt: false });
        earlier.push(Turn { message: ChatMessage::new("assistant", answered), learnt: true });
    }
    let mut conversation = surroundings(fields, names)?;
    let earlier = with_system(fields, names, earlier)?;
    if earlier.is_empty() && conversation == Conversation::default() {
        return Ok(Prompt::Text(asked));
    }
    conversation.turns = earlier;
    conversation.turns.push(Turn { message: ChatMessage::new("user", asked), learnt: false });
    Ok(Prompt::Chat(Box::new(conversation)))
}

fn members(list: Value) -> Vec<Value> {
    match list {
        Value::Array(members) => members,
        other => vec![other],
    }
}

impl Prompt {
    fn completed(self, name: &str, completion: Value, names: &FieldNames) -> Result<Record, String> {
        let completion = match (completion, &self) {
            (Value::String(completion), Self::Text(_)) => return Ok(self.with_text(completion)),
            (Value::String(completion), Self::Chat(_)) => {
                vec![Turn { message: ChatMessage::new("assistant", completion), learnt: true }]
            }
            (list @ Value::Array(_), _) => turns(name, list, names)?,
            (Value::Object(message), _) => turns(name, Value::Array(vec![Value::Object(message)]), names)?,
            (other, _) => return Err(format!("`{name}` is {}, where a text is expected", kind(&other))),
        };
        if completion.iter().all(|turn| !turn.learnt) {
            return Err(format!("`{name}` has no turn of the assistant to learn"));
        }
        let mut conversation = match self {
            Self::Chat(conversation) => *conversation,
            Self::Text(asked) => Conversation {
                turns: vec![Turn { message: ChatMessage::new("user", asked), learnt: false }],
                ..Conversation::default()
            },
        };
        conversation.turns.extend(completion);
        Ok(Record::Chat(Box::new(conversation)))
    }

    fn with_text(self, completion: String) -> Record {
        match self {
            Self::Text(prompt) => Record::Pair { prompt, completion },
            Self::Chat(mut conversation) => {
                conversation.turns.push(Turn { message: ChatMessage::new("assistant", completion), learnt: true });
                Record::Chat(conversation)
            }
        }
    }
}

/// Two completions of one prompt. Where there is no prompt of its own, it is what both lists of messages begin with.
fn preference(fields: &mut Fields, names: &FieldNames) -> Result<Parsed, String> {
    let (chosen, rejected) = (fields.needed(&names.chosen)?, fields.needed(&names.rejected)?);
    let (mut chosen, mut rejected) = (structured_list(chosen), structured_list(rejected));
    let asked = if fields.has(&names.messages) || fields.has(&names.conversations) {
        let mut conversation = surroundings(fields, names)?;
        let name = fields.first([&names.messages, &names.conversations]).to_owned();
        let said = turns(&name, fields.needed(&name)?, names)?;
        conversation.turns = with_system(fields, names, said)?;
        Prompt::Chat(Box::new(conversation))
    } else if fields.has(&names.prompt) || fields.has(&names.instruction) {
        prompt(fields, names)?
    } else {
        let (Value::Array(better), Value::Array(worse)) = (&mut chosen, &mut rejected) else {
            return Err(format!("`{}` is missing", names.prompt));
        };
        let common = better.iter().zip(worse.iter()).take_while(|(a, b)| a == b).count();
        if common == 0 || common == better.len() || common == worse.len() {
            return Err(format!(
                "without `{}`, `{}` and `{}` must begin with the same messages and end with others",
                names.prompt, names.chosen, names.rejected
            ));
        }
        worse.drain(..common);
        let mut conversation = surroundings(fields, names)?;
        let asked = turns(&names.chosen, Value::Array(better.drain(..common).collect()), names)?;
        conversation.turns = with_system(fields, names, asked)?;
        Prompt::Chat(Box::new(conversation))
    };
    let asked = match asked {
        Prompt::Chat(mut conversation) => {
            conversation.turns.iter_mut().for_each(|turn| turn.learnt = false);
            // Some data sets repeat the prompt in both.
            for list in [&mut chosen, &mut rejected] {
                drop_prompt(list, &conversation, names);
            }
            Prompt::Chat(conversation)
        }
        Prompt::Text(asked) => {
            let alone = Conversation {
                turns: vec![Turn { message: ChatMessage::new("user", asked.as_str()), learnt: false }],
                ..Conversation::default()
            };
            for list in [&mut chosen, &mut rejected] {
                drop_prompt(list, &alone, names);
            }
            Prompt::Text(asked)
        }
    };
    Ok(Parsed::Preference {
        chosen: asked.clone().completed(&names.chosen, chosen, names)?,
        rejected: asked.completed(&names.rejected, rejected, names)?,
    })
}

/// A list of messages that is written as JSON in a text is one; another text is a completion.
fn structured_list(value: Value) -> Value {
    match value {
        Value::String(text) if text.trim_start().starts_with("[{") => {
            serde_json::from_str(&text).unwrap_or(Value::String(text))
        }
        value => value,
    }
}

/// Takes the prompt's messages from the beginning of a list that repeats them.
fn drop_prompt(list: &mut Value, prompt: &Conversation, names: &FieldNames) {
    let Value::Array(messages) = list else { return };
    let begins = |turn: &Turn, message: &Value| {
        turns("", Value::Array(vec![message.clone()]), names).is_ok_and(|parsed| parsed[0].message == turn.message)
    };
    let repeats = messages.len() > prompt.turns.len()
        && prompt.turns.iter().zip(messages.iter()).all(|(turn, message)| begins(turn, message));
    if repeats {
        messages.drain(..prompt.turns.len());
    }
}
