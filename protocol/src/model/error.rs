//! What can be wrong with a model on disk. Every message names the file and says what to do about it.

use std::path::{Path, PathBuf};

/// Why a model cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// Nothing is there.
    #[error("{}: no such file or folder; give a Hugging Face model folder or a .gguf file", path.display())]
    Missing {
        /// What was looked for.
        path: PathBuf,
    },
    /// Something is there, but no model.
    #[error("{}: {what}; give a Hugging Face model folder (config.json and *.safetensors) or a .gguf file", path.display())]
    NotAModel {
        /// What was given.
        path: PathBuf,
        /// What it lacks.
        what: String,
    },
    /// The system refused to read it.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// Bytes that contradict themselves or end too early.
    #[error("{}: the file is damaged or cut short ({what}); fetch it again", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What contradicts.
        what: String,
    },
    /// A model of another architecture.
    #[error("{}: the model's architecture is `{found}`; those that are known are {known}", path.display())]
    Architecture {
        /// The file.
        path: PathBuf,
        /// The architecture that it names.
        found: String,
        /// Those that are known, in words.
        known: String,
    },
    /// What Git LFS leaves where it did not fetch a file.
    #[error("{}: the file is a pointer of Git LFS, not the file itself; fetch it by `git lfs pull` in its folder", path.display())]
    LfsPointer {
        /// The file.
        path: PathBuf,
    },
    /// A part of a checkpoint is not there.
    #[error("{}: `{tensor}` and others are in {shard}, one of {of} files of weights, which is not beside it; fetch that file too", index.display())]
    MissingShard {
        /// The file that names it.
        index: PathBuf,
        /// Its name.
        shard: String,
        /// How many files there should be.
        of: usize,
        /// A tensor that should be in it.
        tensor: String,
    },
    /// A weight that is no number.
    #[error("{}: the tensor `{name}` holds NaN or infinity in row {row}; the file is damaged, or its training went wrong: fetch it again, or use another release", path.display())]
    NotFinite {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Its first row with such a number, or one of the first.
        row: usize,
    },
    /// A bias that the configuration does not speak of.
    #[error("{}: the tensor `{name}` is there and not zero, but the configuration has no such bias; {remedy}", path.display())]
    Bias {
        /// The file.
        path: PathBuf,
        /// The tensor, by its name in that file.
        name: String,
        /// What to do about it.
        remedy: String,
    },
    /// A configuration that this program cannot serve.
    #[error("{}: {what}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// Which setting, and what was expected of it.
        what: String,
    },
    /// A tensor that the configuration asks for is not there.
    #[error("{}: the tensor `{name}` is missing; the weights do not fit their configuration{}", path.display(), often(name))]
    MissingTensor {
        /// The file or folder.
        path: PathBuf,
        /// The tensor, by its name in that file.
        name: String,
    },
    /// A tensor of another shape than the configuration says.
    #[error("{}: the tensor `{name}` is {found:?}, but the configuration says {expected:?}", path.display())]
    Shape {
        /// The file.
        path: PathBuf,
        /// The tensor, by its name in that file.
        name: String,
        /// Dimensions in the file.
        found: Vec<usize>,
        /// Dimensions that follow from the configuration.
        expected: Vec<usize>,
    },
    /// A tensor in a number format that cannot be read.
    #[error("{}: the tensor `{name}` is stored as {dtype}, which cannot be read; use F64, F32, F16, BF16, FP8 (E4M3 or E5M2) or one of GGUF's Q4_0 to Q8_0 and Q2_K to Q6_K", path.display())]
    Dtype {
        /// The file.
        path: PathBuf,
        /// The tensor, by its name in that file.
        name: String,
        /// The format.
        dtype: String,
    },
    /// A layer, projection or token that the model does not have.
    #[error("the model has no {what}")]
    OutOfRange {
        /// What was asked for, and how many there are.
        what: String,
    },
    /// The tokenizer cannot be built or failed.
    #[error("{}: the tokenizer cannot be used: {what}", path.display())]
    Tokenizer {
        /// Where it comes from.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// The chat template cannot be rendered.
    #[error("the model's chat template failed: {what}")]
    Template {
        /// The template engine's message.
        what: String,
    },
}

/// What is often wrong where a tensor is missing.
fn often(name: &str) -> &'static str {
    match name {
        "lm_head.weight" => ": if the embeddings are the head, set tie_word_embeddings to true in config.json",
        name if name.ends_with(".bias") => {
            ": if the model has no such biases, set attention_bias or mlp_bias to false in config.json, and see that model_type \
             is right"
        }
        _ => "",
    }
}

impl ModelError {
    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        if source.kind() == std::io::ErrorKind::NotFound {
            return Self::Missing { path: path.to_owned() };
        }
        Self::Io { path: path.to_owned(), source }
    }

    pub(crate) fn corrupt(path: &Path, what: impl Into<String>) -> Self {
        Self::Corrupt { path: path.to_owned(), what: what.into() }
    }

    pub(crate) fn config(path: &Path, what: impl Into<String>) -> Self {
        Self::Config { path: path.to_owned(), what: what.into() }
    }

    pub(crate) fn tokenizer(path: &Path, what: impl std::fmt::Display) -> Self {
        Self::Tokenizer { path: path.to_owned(), what: what.to_string() }
    }
}
