//! The arguments of `node export`.

use std::path::PathBuf;

use actors::export::Existing;
use clap::{Args, Subcommand};
use protocol::model::GgufNumbers;

use crate::export::ExportOptions;

/// The formats of other tools.
#[derive(Debug, Subcommand)]
pub enum Export {
    /// A Hugging Face folder with the adapter merged into the weights, in the number format of the base
    Merged(ExportArguments),
    /// A GGUF file with the adapter merged into the weights, for llama.cpp and what is built on it
    Gguf(GgufArguments),
    /// An adapter as llama.cpp reads it (llama-cli --lora, Ollama's ADAPTER)
    GgufAdapter(ExportArguments),
    /// A folder that Ollama makes a model of: a Modelfile, and the adapter beside it
    Ollama(OllamaArguments),
}

/// The arguments of most.
#[derive(Args, Debug)]
pub struct ExportArguments {
    /// The model that the adapter was trained on: a Hugging Face folder, or a .gguf file where a GGUF file is written
    #[arg(long, value_name = "PATH")]
    pub model: PathBuf,

    /// The adapter in PEFT's format (adapter_config.json, adapter_model.safetensors)
    #[arg(long, value_name = "DIR")]
    pub adapter: PathBuf,

    /// What to write: a folder (merged) or a file
    #[arg(long, value_name = "PATH")]
    pub out: PathBuf,

    /// Replace what is there already, once the new one is whole
    #[arg(long)]
    pub force: bool,
}

/// The arguments of `gguf`.
#[derive(Args, Debug)]
pub struct GgufArguments {
    /// Which model with which adapter, and where to.
    #[command(flatten)]
    pub export: ExportArguments,

    /// How matrices are stored: f32, f16, bf16 or q8_0
    #[arg(long = "type", value_name = "TYPE", default_value = "f16")]
    pub numbers: GgufNumbers,
}

/// The arguments of `ollama`.
#[derive(Args, Debug)]
pub struct OllamaArguments {
    /// The model that the adapter was trained on, or one that has it in its weights
    #[arg(long, value_name = "PATH")]
    pub model: PathBuf,

    /// The adapter in PEFT's format; leave it out where the model has it in its weights (export gguf, export merged)
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,

    /// The folder to write
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,

    /// Replace an earlier one, once the new one is whole
    #[arg(long)]
    pub force: bool,
}

/// What `--force` says.
pub fn existing(force: bool) -> Existing {
    if force { Existing::Replace } else { Existing::Keep }
}

impl From<ExportArguments> for ExportOptions {
    fn from(arguments: ExportArguments) -> Self {
        let ExportArguments { model, adapter, out, force } = arguments;
        Self { model, adapter, out, existing: existing(force) }
    }
}
