//! The model: its configuration, its weights on disk, its tokenizer, and the table of linear layers that
//! workers serve.

pub mod layers;

pub use layers::{Direction, Group, LinearId, LinearShape};
