//! Training data: from JSON lines to micro-batches of tokens.
//!
//! 1. `lines` understands a line: plain text, a prompt with its completion, or a conversation;
//! 2. `example` turns it into tokens, and says which of them the model is to learn;
//! 3. `dataset` loads a file of them and sets some aside for evaluation;
//!    `pairs` loads one of answers to choose from;
//! 4. `batches` deals them out in a seeded order that a resumed run takes up where it was left.

mod batch;
mod batches;
mod dataset;
mod example;
mod lines;
mod pairs;
#[cfg(test)]
mod tests;

use std::path::PathBuf;

use protocol::model::ModelError;
use serde::{Deserialize, Serialize};

pub use batch::{IGNORED, MicroBatch};
pub use batches::{BatchSource, Batches, Position, fresh_seed};
pub use dataset::Dataset;
pub use example::Example;

/// How a file's lines become examples.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DataOptions {
    /// What the fields of a line are called.
    pub fields: FieldNames,
    /// How a prompt and its completion are written; by default as a chat if the model has a chat template.
    pub format: Option<PromptFormat>,
    /// Longer examples are cut to this many tokens.
    pub max_tokens: usize,
    /// The tokens of a micro-batch's texts together are made up to a multiple of this, so that whoever sees their number
    /// learns the lengths of texts no finer than that; 1 adds none.
    pub pad_to: usize,
    /// What is set aside for evaluation.
    pub held_out: HeldOut,
}

impl Default for DataOptions {
    fn default() -> Self {
        Self {
            fields: FieldNames::default(),
            format: None,
            max_tokens: 256,
            pad_to: 64,
            held_out: HeldOut::Fraction(0.1),
        }
    }
}

/// Names of a line's fields.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FieldNames {
    /// A text that is learnt as a whole.
    pub text: String,
    /// What the completion answers.
    pub prompt: String,
    /// What is learnt.
    pub completion: String,
    /// A list of `{"role", "content"}`.
    pub messages: String,
}

impl Default for FieldNames {
    fn default() -> Self {
        let [text, prompt, completion, messages] = ["text", "prompt", "completion", "messages"].map(str::to_owned);
        Self { text, prompt, completion, messages }
    }
}

/// How a prompt and its completion are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PromptFormat {
    /// As the user's and the assistant's turn of a conversation.
    Chat,
    /// One after the other, and the token that ends a text.
    Plain,
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

/// Why data cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// The file cannot be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A line is not what is expected.
    #[error("{} line {line}: {what}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong and what was expected.
        what: String,
    },
    /// No line of the file gives anything to learn.
    #[error("{}: {what}", path.display())]
    Nothing {
        /// The file.
        path: PathBuf,
        /// Why.
        what: String,
    },
    /// An option or a split that cannot be.
    #[error("{0}")]
    Options(String),
    /// The tokenizer failed.
    #[error(transparent)]
    Model(#[from] ModelError),
}
