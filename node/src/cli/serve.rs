//! The arguments of `node serve`.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Args;

use super::count;
use super::using::UsedModel;
use crate::roles::serve::ServeOptions;

/// The arguments of `node serve`.
#[derive(Args, Debug)]
pub struct ServeArguments {
    /// The model.
    #[command(flatten)]
    pub using: UsedModel,

    /// Address and port to serve on; others than this machine's own need a token
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8080")]
    pub http: SocketAddr,

    /// An adapter in PEFT's format, and the name by which clients ask for it (may be repeated)
    #[arg(long, value_name = "NAME=DIR", value_parser = named)]
    pub adapter: Vec<(String, PathBuf)>,

    /// File with the token that clients must send; VELUM_TOKEN in the environment is the same
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,

    /// A name that this machine goes by, besides localhost and numbers (may be repeated); requests under other names are
    /// refused
    #[arg(long, value_name = "HOST")]
    pub name: Vec<String>,

    /// Answers that are written or waited for at a time; further requests are sent away with 429
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = count())]
    pub most_answers: usize,

    /// Texts that are written side by side
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=16))]
    pub at_once: u16,

    /// Memory for keys and values of texts, in MiB; those of finished ones stay in it while there is room, for conversations
    /// that go on
    #[arg(long, value_name = "MIB", default_value_t = 2048, value_parser = count())]
    pub text_memory: usize,

    /// Longest text, prompt and answer together, in tokens; as long as the model takes if not given
    #[arg(long, value_name = "N", value_parser = count())]
    pub context: Option<usize>,
}

/// A name and a path.
fn named(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((name, path)) if !name.is_empty() && !path.is_empty() => Ok((name.to_owned(), path.into())),
        _ => Err("write it as NAME=DIR".to_owned()),
    }
}

impl ServeArguments {
    /// What is served, and how.
    ///
    /// # Errors
    /// When the configuration file cannot be read, or something in it cannot be.
    pub(crate) fn into_options(self) -> anyhow::Result<ServeOptions> {
        let Self { using, http, adapter, token_file, name, most_answers, at_once, text_memory, context } = self;
        Ok(ServeOptions {
            used: using.into_used()?,
            http,
            adapters: adapter,
            token_file,
            names: name,
            most_answers,
            at_once: at_once.into(),
            text_memory_mib: text_memory as u64,
            context,
        })
    }
}
