//! Training data: from files of records to micro-batches of tokens.
//!
//! 1. `source` reads a file's records;
//! 2. `record` understands one: a text, a prompt with its completion, a conversation, a pair to choose from, in the shapes
//!    that data sets have;
//! 3. `turns` finds the turns in a conversation as a chat template writes it;
//! 4. `example` turns a record into tokens, and says which of them the model is to learn;
//! 5. `dataset` loads files of examples and sets some aside for evaluation, `preferences` files of pairs; `store` keeps their
//!    tokens;
//! 6. `batches` deals them out in a seeded order (`order`) that a resumed run takes up where it was left;
//! 7. `show` writes an example for people, what is learnt of it marked; `question` is what a model is asked of one.

mod batch;
mod batches;
mod dataset;
mod error;
mod example;
mod load;
mod options;
mod order;
mod preferences;
mod question;
mod record;
mod show;
mod source;
mod store;
#[cfg(test)]
mod tests;
mod turns;

pub use batch::{IGNORED, MicroBatch};
pub use batches::{BatchSource, Batches, Position, fresh_seed};
pub use dataset::Dataset;
pub use error::DataError;
pub use example::Example;
pub use load::Note;
pub use options::{DataFile, DataOptions, FieldNames, HeldOut, PromptFormat, TrainOnEnd, Turns};
pub use question::Question;
pub use show::marked;
