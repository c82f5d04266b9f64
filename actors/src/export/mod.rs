//! A trained adapter in the formats of other tools: merged into the model's own weights, or as llama.cpp reads adapters.
//!
//! A folder or file is done when it was read again and found to be what it should be: what another tool makes of it later is
//! too late to find out that nothing was merged.

mod delta;
mod gguf_adapter;
mod merged;
#[cfg(test)]
mod tests;

use std::path::PathBuf;

use protocol::model::ModelError;

use crate::adapter::AdapterError;
use crate::files::FileError;

pub use self::gguf_adapter::write as write_gguf_adapter;
pub use self::merged::{Merged, write as write_merged};

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
    /// What was written is not what should have been.
    #[error("{}: {what}", path.display())]
    Wrong {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
}
