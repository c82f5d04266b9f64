//! The arguments of `node export`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use crate::export::ExportOptions;

/// The formats of other tools.
#[derive(Debug, Subcommand)]
pub enum Export {
    /// A Hugging Face folder with the adapter merged into the weights, in the number format of the base
    Merged(ExportArguments),
    /// An adapter as llama.cpp reads it (llama-cli --lora, Ollama's ADAPTER)
    GgufAdapter(ExportArguments),
}

/// The arguments of either.
#[derive(Args, Debug)]
pub struct ExportArguments {
    /// The model that the adapter was trained on: a Hugging Face folder, or a .gguf file where no weights are written
    #[arg(long, value_name = "PATH")]
    pub model: PathBuf,

    /// The adapter in PEFT's format (adapter_config.json, adapter_model.safetensors)
    #[arg(long, value_name = "DIR")]
    pub adapter: PathBuf,

    /// What to write: a folder that is empty or not there (merged), or a file (gguf-adapter)
    #[arg(long, value_name = "PATH")]
    pub out: PathBuf,
}

impl From<ExportArguments> for ExportOptions {
    fn from(arguments: ExportArguments) -> Self {
        let ExportArguments { model, adapter, out } = arguments;
        Self { model, adapter, out }
    }
}
