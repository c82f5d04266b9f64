//! Why data cannot be used.

use std::path::PathBuf;

use protocol::model::ModelError;

/// Why data cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// The file cannot be read.
    #[error("{}", path.display())]
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
