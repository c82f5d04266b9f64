//! What a user sets about data.

use std::path::PathBuf;

use protocol::model::{ChatTemplate, TemplateDay, TextTokenizer};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::DataError;

/// A file or folder of records, and how often its examples are taken.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataFile {
    /// Where it is.
    pub path: PathBuf,
    /// How often each of its examples is taken in a pass over the data; a fraction takes so large a part of them once more, in
    /// each pass another one.
    #[serde(default = "once")]
    pub weight: f64,
}

fn is_usual(day: &TemplateDay) -> bool {
    *day == TemplateDay::default()
}

/// Most that a weight may be.
pub(super) const MAX_WEIGHT: f64 = 1000.0;

fn once() -> f64 {
    1.0
}

impl DataFile {
    /// One whose examples are taken once in a pass.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), weight: once() }
    }
}

/// How a file's lines become examples.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DataOptions {
    /// What is trained on, where that is more than one file.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<DataFile>,
    /// What the fields of a line are called.
    pub fields: FieldNames,
    /// How prompts and messages are written.
    pub format: PromptFormat,
    /// A chat template other than the model's default one: the name of another of its templates, or a file.
    pub chat_template: Option<String>,
    /// Variables that the chat template asks for besides the conversation, `enable_thinking` for instance.
    pub template_values: Map<String, Value>,
    /// What is said to a chat template that asks for the day. Checkpoints of runs with the usual one have no such field.
    #[serde(skip_serializing_if = "is_usual")]
    pub template_date: TemplateDay,
    /// Of which turns of the assistant the end is learnt.
    pub train_on_end: TrainOnEnd,
    /// Which turns of the assistant are learnt.
    pub turns: Turns,
    /// Longer examples are cut to this many tokens.
    pub max_tokens: usize,
    /// The tokens of a micro-batch's texts together are made up to a multiple of this, so that whoever sees their number
    /// learns the lengths of texts no finer than that; 1 adds none.
    pub pad_to: usize,
    /// What is set aside for evaluation.
    pub held_out: HeldOut,
}

impl DataOptions {
    /// The chat template that is named in place of the model's default one: another of the model's, or that of a file. Blocks.
    ///
    /// # Errors
    /// When there is neither.
    pub fn named_template(&self, tokenizer: &TextTokenizer) -> Result<Option<ChatTemplate>, DataError> {
        let Some(name) = &self.chat_template else { return Ok(None) };
        let source = match tokenizer.named_template(name) {
            Some(known) => known.source().to_owned(),
            None => std::fs::read_to_string(name).map_err(|error| {
                let known = tokenizer.template_names().join(", ");
                let known = if known.is_empty() { "it has none".to_owned() } else { format!("it has {known}") };
                DataError::Options(format!(
                    "data.chat_template is `{name}`: the model has no template of this name ({known}), and there is no such \
                     file ({error})"
                ))
            })?,
        };
        Ok(Some(tokenizer.template(source)))
    }
}

impl Default for DataOptions {
    fn default() -> Self {
        Self {
            files: Vec::new(),
            fields: FieldNames::default(),
            format: PromptFormat::Chat,
            chat_template: None,
            template_values: Map::new(),
            template_date: TemplateDay::default(),
            train_on_end: TrainOnEnd::Turn,
            turns: Turns::All,
            max_tokens: 256,
            pad_to: 64,
            held_out: HeldOut::Fraction(0.1),
        }
    }
}

/// Defines the names of fields, each with the one that it has by default.
macro_rules! field_names {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Names of a line's fields, and of those of a message.
        #[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(deny_unknown_fields, default)]
        pub struct FieldNames {
            $($(#[$doc])* pub $name: String,)*
        }

        impl Default for FieldNames {
            fn default() -> Self {
                Self { $($name: stringify!($name).to_owned(),)* }
            }
        }
    };
}

field_names! {
    /// A text that is learnt as a whole.
    text,
    /// What the completion answers.
    prompt,
    /// What is learnt.
    completion,
    /// A list of `{"role", "content"}`.
    messages,
    /// The same as ShareGPT calls it: a list of `{"from", "value"}`.
    conversations,
    /// Who speaks in a message.
    role,
    /// What is said.
    content,
    /// Who speaks, in ShareGPT's words.
    from,
    /// What is said, in ShareGPT's words.
    value,
    /// A message that is not learnt has 0 here.
    weight,
    /// Whether a message is learnt.
    train,
    /// What Alpaca calls a prompt.
    instruction,
    /// What an instruction is about.
    input,
    /// What Alpaca calls a completion.
    output,
    /// What is said before a conversation begins.
    system,
    /// Turns before an instruction: a list of `[prompt, completion]`.
    history,
    /// Descriptions of what the assistant may call.
    tools,
    /// Texts to answer from.
    documents,
    /// The better of two completions.
    chosen,
    /// The worse one.
    rejected,
}

/// How a prompt and its completion are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PromptFormat {
    /// As the user's and the assistant's turn of a conversation, in the chat template.
    Chat,
    /// One after the other, and the token that ends a text.
    Plain,
}

/// Of which turns the end is learnt, so that the model learns to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TrainOnEnd {
    /// Of each that is learnt.
    Turn,
    /// Of the last one of an example alone.
    Last,
    /// Of none.
    None,
}

/// Which turns of the assistant are learnt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Turns {
    /// All of them, in one example.
    All,
    /// The last one alone.
    Last,
    /// Each in an example of its own that ends with it: templates that leave a model's earlier thinking out show that of the
    /// last turn.
    Each,
}

/// How much of a data set is set aside.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum HeldOut {
    /// So many examples.
    Count(usize),
    /// So large a part of them, at least one unless it is zero.
    Fraction(f64),
}
