//! Training data: from JSON lines to micro-batches of tokens.

mod batch;

pub use batch::{IGNORED, MicroBatch};
