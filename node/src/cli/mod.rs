//! The command line: what can be said, and how it lies over the configuration file.

mod bench;
mod data;
mod eval;
mod export;
mod generate;
mod serve;
mod using;

use std::path::{Path, PathBuf};

use actors::worker::Split;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};
use protocol::model::synthetic::KnownModel;

use crate::config::{BackendChoice, Config, HeadChoice};
use crate::roles::Start;
use crate::synth::SynthOptions;
pub use bench::{
    AccountArguments, Bench, ExactnessArguments, GpuArguments, LinearArguments, StepArguments, TokenArguments,
};
pub use data::{Data, ShowArguments};
pub use eval::EvalArguments;
pub use export::{Export, ExportArguments, GgufArguments, OllamaArguments, existing};
pub use generate::{ChatArguments, GenerateArguments, ModelArguments, SamplingArguments};
pub use serve::ServeArguments;
pub use using::UsedModel;

const ABOUT: &str = "Private LoRA fine-tuning of Llama models on computers that belong to strangers";

const LONG_ABOUT: &str = "\
Private LoRA fine-tuning of Llama models on computers that belong to strangers.

An OWNER keeps the text, the LoRA adapters, the loss and the optimiser. WORKERS, found on the network, compute every \
linear layer of the base model, forward and backward, on encrypted rows, and learn nothing of them.";

const EXAMPLES: &str = "\
Examples:
  See it work on this machine, with a small real model and three workers:
      node --role demo

  Serve a model (prints the address that an owner dials):
      node --role worker --model models/SmolLM2-135M-Instruct.Q4_1.gguf

  Serve it to one owner only, by the peer id that it has from its key file (--identity):
      node --role worker --model models/SmolLM2-135M-Instruct.Q4_1.gguf --owner 12D3KooW...

  Fine-tune on your own data with workers found on the local network, or at known addresses:
      node --role owner --model models/SmolLM2-135M-Instruct.Q4_1.gguf --data my.jsonl --out run1
      node --role owner --config configs/owner.toml --peer /ip4/192.0.2.7/tcp/4001

  Go on where a run was interrupted (Ctrl-C, a crash, a closed terminal), with what it was begun with:
      node --role owner --model models/SmolLM2-135M-Instruct.Q4_1.gguf --data my.jsonl --out run1 --resume

  See where a step's time goes (open the files in ui.perfetto.dev):
      node --role demo --steps 2 --trace step.json

  See how records become examples, and what is learnt of them:
      node data show --model models/SmolLM2-135M-Instruct.Q4_1.gguf --data my.jsonl

  Ask what was trained, with the products of strangers, and talk to it:
      node generate --model models/SmolLM2-135M-Instruct.Q4_1.gguf --adapter run1/adapter --prompt 'Who may sign?'
      node chat --model models/SmolLM2-135M-Instruct.Q4_1.gguf --adapter run1/adapter --workers 2

  Use what was trained, from any program that knows OpenAI's API, and in a browser, over workers or here alone:
      node serve --model models/SmolLM2-135M-Instruct.Q4_1.gguf --adapter tuned=run1/adapter --workers 2
      node serve --model models/SmolLM2-135M-Instruct.Q4_1.gguf --adapter tuned=run1/adapter --backend plain

  See what the adapter is worth on other data:
      node eval --model models/SmolLM2-135M-Instruct.Q4_1.gguf --adapter run1/adapter --data test.jsonl --backend plain --generate

  Use what was trained in other tools, merged into the model or as an adapter for llama.cpp:
      node export merged --model models/Llama-3.2-1B --adapter run1/adapter --out merged
      node export gguf --model models/Llama-3.2-1B --adapter run1/adapter --type q8_0 --out run1.gguf
      node export gguf-adapter --model models/SmolLM2-135M-Instruct.Q4_1.gguf --adapter run1/adapter --out lora.gguf
      node export ollama --model models/SmolLM2-135M-Instruct.Q4_1.gguf --adapter run1/adapter --out ollama

  Measure this machine, on a real model's shape if its weights cannot be had:
      node synth --config llama-3.2-1b --out models/llama-3.2-1b-random
      node bench step --model models/llama-3.2-1b-random --workers 2
      node bench generate --model models/llama-3.2-1b-random --workers 2 --tokens 32
      node bench linear --d-in 2048 --d-out 2048 --tokens 1024
      node bench exactness --device cuda:0 --seconds 60
      node bench gpu --device cuda:0 --model-shape llama-3.2-1b --tokens 2048,4096

Settings come from the file given by --config (configs/*.toml show every key with its default); flags win over it.
Set RUST_LOG=debug for more log output on stderr.";

/// What this process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Role {
    /// Trains: holds data, adapters and keys, and sends ciphertexts to workers.
    Owner,
    /// Serves layers of a model to owners.
    Worker,
    /// Starts three workers and an owner on this machine and trains on an example.
    Demo,
}

/// The arguments of `node`.
#[derive(Debug, Parser)]
#[command(name = "node", version, about = ABOUT, long_about = LONG_ABOUT, after_long_help = EXAMPLES)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Arguments {
    /// A tool beside the roles.
    #[command(subcommand)]
    pub tool: Option<Tool>,

    /// What this process is
    #[arg(long, value_enum, required = true)]
    pub role: Option<Role>,

    /// Configuration file; flags win over it
    #[arg(long, value_name = "TOML")]
    pub config: Option<PathBuf>,

    /// Model: a Hugging Face folder (config.json, safetensors, tokenizer.json) or a .gguf file
    #[arg(long, value_name = "PATH")]
    pub model: Option<PathBuf>,

    /// Write a trace of every step here, in Chrome's format; the demo's processes each write one beside it
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,

    /// Address to listen on, e.g. /ip4/0.0.0.0/tcp/4001 (may be repeated)
    #[arg(long, value_name = "MULTIADDR", help_heading = "Network")]
    pub listen: Vec<String>,

    /// Address of a peer to dial, as a worker prints it (may be repeated)
    #[arg(long, value_name = "MULTIADDR", help_heading = "Network")]
    pub peer: Vec<String>,

    /// Do not look for peers on the local network by mDNS
    #[arg(long, help_heading = "Network")]
    pub no_mdns: bool,

    /// Key file of this peer's identity; created (mode 0600) if it is not there
    #[arg(long, value_name = "FILE", help_heading = "Network")]
    pub identity: Option<PathBuf>,

    /// Worker: GPUs to serve with: none, all, or indices like 0,1
    #[arg(long, value_name = "LIST", help_heading = "Worker")]
    pub gpus: Option<String>,

    /// Worker: with several GPUs, give each whole layers (most throughput), or cut every matrix by columns over all of
    /// them (a single product is done sooner)
    #[arg(long, value_name = "HOW", value_parser = split(), help_heading = "Worker")]
    pub split: Option<Split>,

    /// Worker: serve only this owner, as its peer id says (may be repeated); without one, whoever asks first is served
    #[arg(long, value_name = "PEERID", help_heading = "Worker")]
    pub owner: Vec<String>,

    /// Worker: stop when standard input closes, for a parent process that must leave no worker behind
    #[arg(long, help_heading = "Worker")]
    pub until_stdin_closes: bool,

    /// Training data, a file or a folder: records of {"text"}, {"prompt","completion"}, {"messages"} and others
    #[arg(long, value_name = "PATH", help_heading = "Owner and demo")]
    pub data: Option<PathBuf>,

    /// Owner: begin with this adapter in PEFT's format (adapter_config.json, adapter_model.safetensors), in place of a new one
    #[arg(long, value_name = "DIR", help_heading = "Owner and demo")]
    pub adapter: Option<PathBuf>,

    /// Folder for the results: adapter/, report.json, loss.svg, checkpoints/
    #[arg(long, value_name = "DIR", help_heading = "Owner and demo")]
    pub out: Option<PathBuf>,

    /// Optimiser steps
    #[arg(long, value_name = "N", help_heading = "Owner and demo")]
    pub steps: Option<usize>,

    /// Passes over the data, in place of steps
    #[arg(long, value_name = "N", conflicts_with = "steps", help_heading = "Owner and demo")]
    pub epochs: Option<f64>,

    /// Where base products are computed: by workers on ciphertexts, or here with f32 weights (the reference)
    #[arg(long, value_enum, help_heading = "Owner and demo")]
    pub backend: Option<BackendChoice>,

    /// Where the head's products are computed, of an owner whose other products are encrypted
    #[arg(long, value_enum, help_heading = "Owner and demo")]
    pub head: Option<HeadChoice>,

    /// Workers to wait for (owner), or to start (demo)
    #[arg(long, value_name = "N", help_heading = "Owner and demo")]
    pub workers: Option<usize>,

    /// Owner: only this worker may serve, and those named beside it, by their peer ids (may be repeated)
    #[arg(long, value_name = "PEERID", help_heading = "Owner and demo")]
    pub worker: Vec<String>,
    /// Seed of adapters, dropout, held-out examples and the order of the data, which is else another in every run
    #[arg(long, value_name = "N", help_heading = "Owner and demo")]
    pub seed: Option<u64>,

    /// Go on with the run in --out from its newest checkpoint, or from the one at PATH; a run that has none yet begins
    #[arg(long, value_name = "PATH", num_args = 0..=1, conflicts_with = "overwrite", help_heading = "Owner and demo")]
    pub resume: Option<Option<PathBuf>>,

    /// Replace an earlier run in --out
    #[arg(long, help_heading = "Owner and demo")]
    pub overwrite: bool,
}

/// What `node` can do besides its roles.
#[derive(Debug, Subcommand)]
pub enum Tool {
    /// Measure this machine
    Bench {
        /// What is measured.
        #[command(subcommand)]
        what: Bench,
    },
    /// Write texts with a model and an adapter: products come from workers, and what is written stays here
    #[command(after_help = generate::EXAMPLES)]
    Generate(GenerateArguments),
    /// Talk to a model and an adapter in the terminal
    #[command(after_help = generate::CHAT_EXAMPLES)]
    Chat(ChatArguments),
    /// Write a model of a published configuration with random weights, in bf16
    Synth(SynthArguments),
    /// Serve a model and its adapters over HTTP, to programs as OpenAI's API and to people as a page
    Serve(ServeArguments),
    /// Measure a model, with and without an adapter, on a file of examples
    Eval(EvalArguments),
    /// Write a trained adapter in the format of another tool
    Export {
        /// Which format.
        #[command(subcommand)]
        what: Export,
    },
    /// See what becomes of training data
    Data {
        /// What is to be seen.
        #[command(subcommand)]
        what: Data,
    },
}

/// The arguments of `node synth`.
#[derive(Args, Debug)]
pub struct SynthArguments {
    /// Whose configuration
    #[arg(long, value_name = "NAME", value_parser = known_model())]
    pub config: KnownModel,

    /// Folder to write, which must be empty if it exists
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,

    /// Seed of the weights
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,

    /// Another number of layers than the configuration's
    #[arg(long, value_name = "N", value_parser = count())]
    pub layers: Option<usize>,
}

impl From<SynthArguments> for SynthOptions {
    fn from(arguments: SynthArguments) -> Self {
        let SynthArguments { config, out, seed, layers } = arguments;
        Self { model: config, out, seed, layers }
    }
}

/// The names of the known models.
fn known_model() -> impl TypedValueParser<Value = KnownModel> {
    PossibleValuesParser::new(KnownModel::ALL.map(KnownModel::name)).try_map(|name| name.parse::<KnownModel>())
}

/// The ways to split.
fn split() -> impl TypedValueParser<Value = Split> {
    PossibleValuesParser::new(Split::ALL.map(Split::name)).try_map(|name| name.parse::<Split>())
}

/// A number from 1 to a million.
fn count() -> impl TypedValueParser<Value = usize> {
    clap::value_parser!(u32).range(1..=1_000_000).map(|number| number as usize)
}

impl Arguments {
    /// The trace that this process itself writes, and what the process is called in it.
    pub fn trace(&self) -> Option<(&Path, &'static str)> {
        let process = match self.role? {
            Role::Owner => "owner",
            Role::Worker => "worker",
            Role::Demo => return None,
        };
        Some((self.trace.as_deref()?, process))
    }

    /// Lays the flags over a configuration.
    pub fn apply(&self, config: &mut Config) {
        fn set<T: Clone>(slot: &mut T, flag: &Option<T>) {
            if let Some(value) = flag {
                slot.clone_from(value);
            }
        }
        fn set_some<T: Clone>(slot: &mut Option<T>, flag: &Option<T>) {
            if flag.is_some() {
                slot.clone_from(flag);
            }
        }
        set_some(&mut config.model, &self.model);
        if !self.listen.is_empty() {
            config.network.listen.clone_from(&self.listen);
        }
        config.network.peers.extend(self.peer.iter().cloned());
        config.network.mdns &= !self.no_mdns;
        set_some(&mut config.network.identity, &self.identity);
        set(&mut config.worker.gpus, &self.gpus);
        set(&mut config.worker.split, &self.split);
        config.worker.owners.extend(self.owner.iter().cloned());
        if self.data.is_some() {
            config.data.files.clear();
        }
        set_some(&mut config.owner.data, &self.data);
        set_some(&mut config.owner.adapter, &self.adapter);
        set(&mut config.owner.out, &self.out);
        set(&mut config.owner.backend, &self.backend);
        set(&mut config.owner.head, &self.head);
        set(&mut config.owner.workers, &self.workers);
        config.owner.allowed.extend(self.worker.iter().cloned());
        if let Some(steps) = self.steps {
            (config.training.steps, config.training.epochs) = (Some(steps), None);
            // A run made shorter by the flag warms up no longer than it lasts.
            config.training.warmup_steps = config.training.warmup_steps.map(|warmup| warmup.min(steps));
        }
        if self.epochs.is_some() {
            (config.training.steps, config.training.epochs) = (None, self.epochs);
        }
        set(&mut config.training.seed, &self.seed);
        set_some(&mut config.training.data_seed, &self.seed);
    }

    /// How an owner's run begins.
    pub fn start(&self) -> Start {
        match &self.resume {
            Some(path) => Start::Resume(path.clone()),
            None if self.overwrite => Start::Overwrite,
            None => Start::Fresh,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use clap::CommandFactory as _;

    use super::*;

    fn assert_documented(command: &clap::Command) {
        for argument in command.get_arguments() {
            assert!(argument.get_help().is_some(), "{}: {} has no help", command.get_name(), argument.get_id());
        }
        for tool in command.get_subcommands() {
            assert!(tool.get_about().is_some(), "{} has no help", tool.get_name());
            assert_documented(tool);
        }
    }

    #[test]
    fn the_flag_table_is_consistent_and_documented() {
        let command = Arguments::command();
        command.clone().debug_assert();
        assert_documented(&command);
    }

    fn parsed(line: &str) -> Result<Arguments, clap::Error> {
        Arguments::try_parse_from(line.split_whitespace())
    }

    #[test]
    fn a_role_or_a_tool_is_needed_and_they_do_not_mix() {
        assert_eq!(parsed("node --role worker").unwrap().role, Some(Role::Worker));
        assert!(parsed("node").unwrap_err().to_string().contains("--role"));
        assert!(parsed("node --model x").unwrap_err().to_string().contains("--role"));
        assert!(parsed("node --role demo synth --config tiny --out x").is_err());
        let tool = parsed("node synth --config llama-3.2-1b --out x --layers 2").unwrap().tool;
        let Some(Tool::Synth(arguments)) = tool else { panic!("{tool:?}") };
        assert_eq!((arguments.config, arguments.layers), (KnownModel::Llama32_1b, Some(2)));
        let error = parsed("node synth --config llama-4 --out x").unwrap_err().to_string();
        assert!(KnownModel::ALL.iter().all(|known| error.contains(known.name())), "{error}");
        assert!(parsed("node synth --config tiny --out x --layers 0").is_err());
        assert!(parsed("node bench step").unwrap_err().to_string().contains("--model"));
        assert!(parsed("node bench step --model m --gpus one").unwrap_err().to_string().contains("names no GPUs"));
        let tool = parsed("node bench gpu --tokens 16,4096").unwrap().tool;
        let Some(Tool::Bench { what: Bench::Gpu(arguments) }) = tool else { panic!("{tool:?}") };
        assert_eq!((arguments.tokens, arguments.model_shape), (vec![16, 4096], KnownModel::Llama32_1b));
    }

    #[test]
    fn a_trace_is_written_by_the_process_that_works() {
        let trace =
            |line: &str| parsed(line).unwrap().trace().map(|(path, process)| format!("{} {process}", path.display()));
        assert_eq!(trace("node --role owner --trace t.json").unwrap(), "t.json owner");
        assert_eq!(trace("node --role worker --trace t.json").unwrap(), "t.json worker");
        assert_eq!(trace("node --role demo --trace t.json"), None);
        assert_eq!(trace("node --role owner"), None);
    }

    #[test]
    fn a_worker_is_told_how_to_use_several_gpus() {
        let mut config = Config::default();
        parsed("node --role worker --gpus 0,1 --split columns").unwrap().apply(&mut config);
        assert_eq!((config.worker.gpus.as_str(), config.worker.split), ("0,1", Split::Columns));
        let error = parsed("node --role worker --split rows").unwrap_err().to_string();
        assert!(error.contains("layers") && error.contains("columns"), "{error}");
    }

    #[test]
    fn a_worker_is_told_whom_to_serve() {
        let mut config = Config::default();
        let (one, other) = (libp2p::PeerId::random(), libp2p::PeerId::random());
        config.worker.owners = vec![one.to_string()];
        parsed(&format!("node --role worker --owner {other}")).unwrap().apply(&mut config);
        assert_eq!(config.worker.owners().unwrap(), [one, other]);
    }

    #[test]
    fn a_run_begins_in_one_of_three_ways() {
        let start = |more: &str| parsed(&format!("node --role owner{more}")).map(|arguments| arguments.start());
        assert_eq!(start("").unwrap(), Start::Fresh);
        assert_eq!(start(" --overwrite").unwrap(), Start::Overwrite);
        assert_eq!(start(" --resume --out x").unwrap(), Start::Resume(None));
        assert_eq!(start(" --resume run1").unwrap(), Start::Resume(Some("run1".into())));
        assert!(start(" --resume --overwrite").is_err());
        let mut config = Config::default();
        parsed("node --role owner --seed 5").unwrap().apply(&mut config);
        assert_eq!((config.training.seed, config.training.data_seed), (5, Some(5)), "the whole run can be repeated");
    }

    #[test]
    fn flags_win_over_the_file() {
        let line = [
            "node",
            "--role",
            "owner",
            "--steps",
            "7",
            "--workers",
            "2",
            "--no-mdns",
            "--peer",
            "/ip4/127.0.0.1/tcp/1",
        ];
        let mut config = Config::default();
        (config.training.epochs, config.training.warmup_steps) = (Some(99.0), Some(20));
        Arguments::try_parse_from(line).unwrap().apply(&mut config);
        assert_eq!((config.training.steps, config.training.warmup_steps()), (Some(7), 7));
        config.validate().unwrap();
        parsed("node --role owner --epochs 1.5").unwrap().apply(&mut config);
        assert_eq!((config.training.steps, config.training.epochs), (None, Some(1.5)));
        config.validate().unwrap();
        assert!(parsed("node --role owner --epochs 1.5 --steps 3").is_err());
        assert_eq!(config.owner.workers, 2);
        assert!(!config.network.mdns);
        assert_eq!(config.network.peers, ["/ip4/127.0.0.1/tcp/1"]);
    }
}
