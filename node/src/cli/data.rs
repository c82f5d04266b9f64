//! The arguments of `node data`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use crate::data::ShowOptions;

/// What is to be seen of data.
#[derive(Debug, Subcommand)]
pub enum Data {
    /// Show examples as the model sees them, with what is learnt of them marked
    Show(ShowArguments),
}

/// The arguments of `node data show`.
#[derive(Args, Debug)]
pub struct ShowArguments {
    /// Hugging Face folder or .gguf file
    #[arg(long, value_name = "PATH")]
    pub model: Option<PathBuf>,

    /// The data
    #[arg(long, value_name = "FILE")]
    pub data: Option<PathBuf>,

    /// Settings, of which those of the data matter
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// Examples to show
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub count: usize,

    /// Show each token on a line of its own, too
    #[arg(long)]
    pub tokens: bool,

    /// The data are pairs of a chosen and a rejected answer
    #[arg(long)]
    pub preferences: bool,
}

impl From<ShowArguments> for ShowOptions {
    fn from(arguments: ShowArguments) -> Self {
        let ShowArguments { model, data, config, count, tokens, preferences } = arguments;
        Self { model, data, config, count, tokens, preferences }
    }
}
