//! The arguments of `node generate` and `node chat`.

use std::path::PathBuf;

use actors::generation::{Drafts, EngineConfig, Sampling, Stops};
use anyhow::Context as _;
use clap::{ArgGroup, Args};

use crate::config::{BackendChoice, Config, HeadChoice};
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

/// Which model writes, with whose products.
#[derive(Args, Clone, Debug)]
pub struct ModelArguments {
    /// Model: a Hugging Face folder (config.json, safetensors, tokenizer.json) or a .gguf file
    #[arg(long, value_name = "PATH")]
    pub model: Option<PathBuf>,

    /// Adapter in PEFT's format, such as run1/adapter; without one, the model writes as it is
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,

    /// Configuration file of an owner, for network and encryption; flags win over it
    #[arg(long, value_name = "TOML")]
    pub config: Option<PathBuf>,

    /// Where base products are computed: by workers on ciphertexts (the default), or here with f32 weights
    #[arg(long, value_enum, help_heading = "Workers")]
    pub backend: Option<BackendChoice>,

    /// Where the head's products are computed, if the others are encrypted
    #[arg(long, value_enum, help_heading = "Workers")]
    pub head: Option<HeadChoice>,

    /// Start so many workers on this machine, which end with this process
    #[arg(long, value_name = "N", conflicts_with_all = ["peer", "worker", "identity"], value_parser = clap::value_parser!(u16).range(1..=64), help_heading = "Workers")]
    pub workers: Option<u16>,

    /// Address of a worker to dial, as it prints it (may be repeated); it waits for as many workers
    #[arg(long, value_name = "MULTIADDR", help_heading = "Workers")]
    pub peer: Vec<String>,

    /// Only this worker may serve, and those named beside it, by their peer ids (may be repeated)
    #[arg(long, value_name = "PEERID", help_heading = "Workers")]
    pub worker: Vec<String>,

    /// Do not look for workers on the local network by mDNS
    #[arg(long, help_heading = "Workers")]
    pub no_mdns: bool,

    /// Key file of this peer's identity, where workers serve only owners that they know; else it is a new peer each time
    #[arg(long, value_name = "FILE", help_heading = "Workers")]
    pub identity: Option<PathBuf>,

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
    pub fn setup(&self) -> anyhow::Result<GenerationSetup> {
        let mut config = self.config.as_deref().map(Config::read).transpose()?.unwrap_or_default();
        if self.model.is_some() {
            config.model.clone_from(&self.model);
        }
        config.model.as_ref().context("no model: give --model")?;
        // That of a configuration is what a run begins with.
        config.owner.adapter.clone_from(&self.adapter);
        config.owner.backend = self.backend.unwrap_or(config.owner.backend);
        config.owner.head = self.head.unwrap_or(config.owner.head);
        if let Some(workers) = self.workers {
            anyhow::ensure!(
                self.backend != Some(BackendChoice::Plain),
                "--workers starts workers, and --backend plain asks none: give one of them"
            );
            config.owner.backend = BackendChoice::Encrypted;
            config.owner.workers = workers.into();
            (config.network.peers, config.owner.allowed) = (Vec::new(), Vec::new());
            config.network.identity = None;
        } else {
            config.network.peers.extend(self.peer.iter().cloned());
            config.owner.allowed.extend(self.worker.iter().cloned());
            config.network.mdns &= !self.no_mdns;
            config.owner.workers = config.owner.workers.max(self.peer.len());
            if self.identity.is_some() {
                config.network.identity.clone_from(&self.identity);
            }
        }
        config.validate()?;
        let drafts = self.drafts.map_or(Drafts::Auto, |most| Drafts::UpTo(most.into()));
        let (sequences, memory) = (self.batch.into(), self.cache_mib << 20);
        let engine = EngineConfig { sequences, drafts, memory, ..EngineConfig::default() };
        Ok(GenerationSetup { config, local: self.workers.is_some(), engine })
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
        assert_eq!(options.setup.config.owner.backend, BackendChoice::Plain);
        let Writing { sampling, max_tokens, stops } = options.writing;
        assert_eq!((sampling.temperature, sampling.top_k, sampling.seed, max_tokens), (0.5, 9, Some(3), 256));
        assert_eq!((stops.texts, options.json, options.setup.local), (vec!["x".to_owned(), "yy".into()], false, false));
        let options = generate("--prompts p.jsonl --workers 2 --drafts 0 --batch 3").unwrap();
        assert_eq!((options.setup.local, options.setup.config.owner.workers, options.json), (true, 2, true));
        assert_eq!((options.setup.engine.drafts, options.setup.engine.sequences), (Drafts::UpTo(0), 3));
        let peers = "--peer /ip4/127.0.0.1/tcp/1 --peer /ip4/127.0.0.1/tcp/2 --no-mdns --prompt x";
        let config = generate(peers).unwrap().setup.config;
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
