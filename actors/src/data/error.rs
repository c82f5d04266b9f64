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
    /// The tokens cannot be kept.
    #[error("tokens cannot be kept in the folder for temporary files, {} (TMPDIR names another): {source}", folder.display())]
    Temporary {
        /// The folder.
        folder: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A record is not what is expected.
    #[error("{} {place}: {what}", path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// Its line or row, in words.
        place: String,
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
