//! A trained adapter in the formats of other tools: merged into the model's own weights, or as llama.cpp reads adapters.
//!
//! A folder or file gets its name when it was read again and found to be what it should be: what another tool makes of it
//! later is too late to find out that nothing was merged.

mod changes;
mod gguf;
mod gguf_adapter;
mod merged;
mod numbers;
mod ollama;
mod output;
mod tally;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

use protocol::model::ModelError;

use crate::adapter::AdapterError;
use crate::files::FileError;

pub use self::gguf::write as write_gguf;
pub use self::gguf_adapter::write as write_gguf_adapter;
pub use self::merged::write as write_merged;
pub use self::ollama::{Modelfile, write as write_ollama};
pub use self::output::Existing;
pub use self::tally::Merged;

/// Why an adapter cannot be exported.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExportError {
    /// The model cannot be read.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The adapter cannot be read.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    /// The file system refused.
    #[error(transparent)]
    File(#[from] FileError),
    /// The tensors cannot be made or read.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
    /// This model or adapter has no such form.
    #[error("{0}")]
    Unsupported(String),
    /// What was merged is not what should have been.
    #[error("the merge is not right: {0}")]
    Merge(String),
    /// What was written is not what should have been.
    #[error("{}: {what}", path.display())]
    Wrong {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
}

fn wrong(path: &Path, what: String) -> ExportError {
    ExportError::Wrong { path: path.to_owned(), what }
}
