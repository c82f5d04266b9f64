//! The arguments of `node eval`.

use std::path::PathBuf;

use clap::Args;

use super::count;
use super::using::UsedModel;
use crate::eval::{EvalOptions, Generation};

/// The arguments of `node eval`.
#[derive(Args, Debug)]
pub struct EvalArguments {
    /// The model.
    #[command(flatten)]
    pub using: UsedModel,

    /// What is evaluated on: records of the same shapes as training data, a file or a folder
    #[arg(long, value_name = "PATH")]
    pub data: PathBuf,

    /// An adapter in PEFT's format, which is evaluated beside the base model
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,

    /// The first so many examples only
    #[arg(long, value_name = "N", value_parser = count())]
    pub limit: Option<usize>,

    /// Have the prompts answered, greedily, and compare the answers with those of the data
    #[arg(long)]
    pub generate: bool,

    /// Tokens of an answer at most
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = count(), requires = "generate")]
    pub max_tokens: usize,

    /// What counts of an answer, cut out of both texts: GSM8K's is '#### (-?[0-9.,]+)'
    #[arg(long, value_name = "REGEX", requires = "generate")]
    pub answer_regex: Option<String>,

    /// Print JSON, with every answer, in place of a table
    #[arg(long)]
    pub json: bool,
}

impl EvalArguments {
    /// What is evaluated, and how.
    ///
    /// # Errors
    /// When the configuration file cannot be read, or something in it cannot be.
    pub(crate) fn into_options(self) -> anyhow::Result<EvalOptions> {
        let Self { using, data, adapter, limit, generate, max_tokens, answer_regex, json } = self;
        let bounded = using.config.is_some();
        let generation = generate.then_some(Generation { max_tokens, answer_regex });
        Ok(EvalOptions { used: using.into_used()?, bounded, data, adapter, limit, generation, json })
    }
}
