//! The arguments of `node generate` and `node chat`.

use std::path::PathBuf;

use actors::generation::{Drafts, EngineConfig, Sampling, Stops};
use clap::{ArgGroup, Args};

use super::using::UsedModel;
use crate::generate::{ChatOptions, GenerateOptions, Source, Writing};
use crate::roles::GenerationSetup;

/// Examples of `node generate`.
pub(super) const EXAMPLES: &str = "\
Examples:
  Compare what an adapter has learnt with what the model knew, both in this process, without encryption:
      node generate --model M --backend plain --prompt 'Who may sign an order?'
      node generate --model M --backend plain --adapter run1/adapter --prompt 'Who may sign an order?'

  The same with products from workers on this machine, at an address, or found on the local network:
      node generate --model M --adapter run1/adapter --workers 2 --prompt 'Who may sign an order?'
      node generate --model M --adapter run1/adapter --peer /ip4/192.0.2.7/tcp/4001/p2p/12D3KooW... --prompt '...'
      node generate --model M --adapter run1/adapter --prompt '...'

  Many at once, side by side, a line of JSON for each (lines are {\"prompt\": ...} or {\"messages\": [...]}):
      node generate --model M --prompts questions.jsonl --temperature 0.7 --top-p 0.9 --seed 1 > answers.jsonl

  Go on with a text as it is, without the model's chat template:
      node generate --model M --raw --prompt 'Once upon a time'

At temperature 0, the default, the likeliest token is taken each time.";

/// Examples of `node chat`.
pub(super) const CHAT_EXAMPLES: &str = "\
Examples:
      node chat --model M --adapter run1/adapter --backend plain
      node chat --model M --adapter run1/adapter --workers 2 --system 'Answer in one sentence.'

In the chat: /adapter off and /adapter on answer without and with the adapter, /clear forgets the conversation, /quit ends it. \
Ctrl-C stops an answer, and ends the chat where none is being written.";

/// Which model writes, with whose products, and how many texts at a time.
#[derive(Args, Clone, Debug)]
pub struct ModelArguments {
    #[command(flatten)]
    using: UsedModel,

    /// Adapter in PEFT's format, such as run1/adapter; without one, the model writes as it is
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,

    /// Texts that are written side by side
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=16))]
    pub batch: u16,

    /// Tokens that are guessed ahead from what the text has said before, at most; what is written is the same. By default 7
    /// with workers, where a right guess saves a round trip through all layers, and 0 without
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(0..=15))]
    pub drafts: Option<u16>,

    /// Memory for the keys and values of all texts
    #[arg(long, value_name = "MIB", default_value_t = 2048, value_parser = clap::value_parser!(u64).range(1..=1 << 24))]
    pub cache_mib: u64,
}

impl ModelArguments {
    /// What they ask for.
    ///
    /// # Errors
    /// When the configuration cannot be read, or no model is named.
    fn setup(self) -> anyhow::Result<GenerationSetup> {
        let Self { using, adapter, batch, drafts, cache_mib } = self;
        let drafts = drafts.map_or(Drafts::Auto, |most| Drafts::UpTo(most.into()));
        let (sequences, memory) = (batch.into(), cache_mib << 20);
        let engine = EngineConfig { sequences, drafts, memory, ..EngineConfig::default() };
        Ok(GenerationSetup { used: using.into_used()?, adapter, engine })
    }
}

/// How tokens are chosen, and when a text ends.
#[derive(Args, Clone, Debug)]
pub struct SamplingArguments {
    /// Most tokens of an answer
    #[arg(long, value_name = "N", default_value_t = 256, help_heading = "Sampling")]
    pub max_tokens: usize,

    /// What logits are divided by: the higher, the more surprising; 0 takes the likeliest token each time. By default 0, and
    /// 0.7 in a chat
    #[arg(long, value_name = "T", help_heading = "Sampling")]
    pub temperature: Option<f64>,

    /// Choose among the likeliest tokens that have this probability together
    #[arg(long, value_name = "P", default_value_t = 1.0, help_heading = "Sampling")]
    pub top_p: f64,

    /// Choose among so many of the likeliest tokens; 0 does not limit them
    #[arg(long, value_name = "K", default_value_t = 0, help_heading = "Sampling")]
    pub top_k: usize,

    /// Choose among tokens that have this share of the likeliest one's probability
    #[arg(long, value_name = "P", default_value_t = 0.0, help_heading = "Sampling")]
    pub min_p: f64,

    /// Make tokens less likely that the text has already: 1 does not, 1.1 a little
    #[arg(long, value_name = "R", default_value_t = 1.0, help_heading = "Sampling")]
    pub repetition_penalty: f64,

    /// Seed of the random numbers, by which the same text comes again; else another each time
    #[arg(long, value_name = "N", help_heading = "Sampling")]
    pub seed: Option<u64>,

    /// Text that ends an answer and is no part of it (may be repeated)
    #[arg(long, value_name = "TEXT", help_heading = "Sampling")]
    pub stop: Vec<String>,
}

impl SamplingArguments {
    /// What they ask for, with a temperature where none is given.
    fn writing(&self, temperature: f64) -> anyhow::Result<Writing> {
        let sampling = Sampling {
            temperature: self.temperature.unwrap_or(temperature),
            top_p: self.top_p,
            top_k: self.top_k,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            seed: self.seed,
        };
        sampling.validate()?;
        anyhow::ensure!(self.max_tokens > 0, "--max-tokens is 0: an answer has at least one token");
        anyhow::ensure!(
            self.stop.iter().all(|text| !text.is_empty()),
            "--stop is an empty text, which cannot end an answer"
        );
        let stops = Stops { texts: self.stop.clone(), ..Stops::default() };
        Ok(Writing { sampling, max_tokens: self.max_tokens, stops })
    }
}

/// The arguments of `node generate`.
#[derive(Args, Debug)]
#[command(group = ArgGroup::new("what").args(["prompt", "prompts"]).required(true))]
pub struct GenerateArguments {
    #[command(flatten)]
    model: ModelArguments,

    #[command(flatten)]
    sampling: SamplingArguments,

    /// What to answer; `-` reads it from standard input
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub prompt: Option<String>,

    /// Lines of JSON to answer, each {"prompt": "..."} or {"messages": [...]}, perhaps with an "id"; answers are lines of JSON
    #[arg(long, value_name = "FILE")]
    pub prompts: Option<PathBuf>,

    /// What the system's turn of the conversation says
    #[arg(long, value_name = "TEXT", conflicts_with = "raw")]
    pub system: Option<String>,

    /// Go on with the text as it is, without the model's chat template
    #[arg(long)]
    pub raw: bool,

    /// Print the answer as JSON, with its tokens and what it took
    #[arg(long)]
    pub json: bool,

    /// With JSON: the log-probability of each token, and of so many of the likeliest ones
    #[arg(long, value_name = "N")]
    pub logprobs: Option<usize>,
}

impl GenerateArguments {
    /// What they ask for.
    ///
    /// # Errors
    /// When a setting is impossible or contradicts another.
    pub fn options(self) -> anyhow::Result<GenerateOptions> {
        let Self { model, sampling, prompt, prompts, system, raw, json, logprobs } = self;
        let source = match (prompt, prompts) {
            (Some(prompt), _) => Source::Prompt(prompt),
            (None, Some(file)) => Source::File(file),
            (None, None) => anyhow::bail!("no prompt: give --prompt or --prompts"),
        };
        let json = json || matches!(source, Source::File(_));
        anyhow::ensure!(json || logprobs.is_none(), "--logprobs are a part of the JSON: give --json too");
        let writing = sampling.writing(0.0)?;
        Ok(GenerateOptions { setup: model.setup()?, writing, source, system, raw, json, logprobs })
    }
}

/// The arguments of `node chat`.
#[derive(Args, Debug)]
pub struct ChatArguments {
    #[command(flatten)]
    model: ModelArguments,

    #[command(flatten)]
    sampling: SamplingArguments,

    /// What the system's turn of the conversation says
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
}

impl ChatArguments {
    /// What they ask for.
    ///
    /// # Errors
    /// When a setting is impossible or contradicts another.
    pub fn options(self) -> anyhow::Result<ChatOptions> {
        let Self { model, sampling, system } = self;
        Ok(ChatOptions { setup: model.setup()?, writing: sampling.writing(0.7)?, system })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use clap::Parser as _;

    use super::super::{Arguments, Tool};
    use super::*;
    use crate::config::BackendChoice;

    fn generate(line: &str) -> Result<GenerateOptions, String> {
        let all = ["node", "generate", "--model", "m"].into_iter().chain(line.split_whitespace());
        match Arguments::try_parse_from(all).map_err(|error| error.to_string())?.tool {
            Some(Tool::Generate(arguments)) => arguments.options().map_err(|error| format!("{error:#}")),
            tool => panic!("{tool:?}"),
        }
    }

    #[test]
    fn prompts_backends_and_samplings_are_understood_and_contradictions_refused() {
        let options =
            generate("--prompt hello --backend plain --temperature 0.5 --top-k 9 --seed 3 --stop x --stop yy").unwrap();
        assert_eq!(options.setup.used.config.owner.backend, BackendChoice::Plain);
        let Writing { sampling, max_tokens, stops } = options.writing;
        assert_eq!((sampling.temperature, sampling.top_k, sampling.seed, max_tokens), (0.5, 9, Some(3), 256));
        assert_eq!(
            (stops.texts, options.json, options.setup.used.local),
            (vec!["x".to_owned(), "yy".into()], false, false)
        );
        let options = generate("--prompts p.jsonl --workers 2 --drafts 0 --batch 3").unwrap();
        assert_eq!((options.setup.used.local, options.setup.used.config.owner.workers, options.json), (true, 2, true));
        assert_eq!((options.setup.engine.drafts, options.setup.engine.sequences), (Drafts::UpTo(0), 3));
        let peers = "--peer /ip4/127.0.0.1/tcp/1 --peer /ip4/127.0.0.1/tcp/2 --no-mdns --prompt x";
        let config = generate(peers).unwrap().setup.used.config;
        assert_eq!((config.network.peers.len(), config.owner.workers, config.network.mdns), (2, 2, false));
        for (line, said) in [
            ("", "--prompt"),
            ("--prompt a --prompts b", "cannot be used with"),
            ("--prompt a --workers 2 --backend plain", "--workers starts workers"),
            ("--prompt a --workers 2 --peer x", "cannot be used with"),
            ("--prompt a --raw --system s", "cannot be used with"),
            ("--prompt a --logprobs 3", "give --json too"),
            ("--prompt a --top-p 0", "top_p is 0"),
            ("--prompt a --max-tokens 0", "at least one token"),
            ("--prompt a --batch 17", "17"),
            ("--prompt a --peer nowhere", "not a multiaddress"),
        ] {
            let error = generate(line).unwrap_err();
            assert!(error.contains(said), "{line}: {error}");
        }
    }
}
