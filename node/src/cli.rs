//! The command line: what can be said, and how it lies over the configuration file.

use std::path::PathBuf;

use clap::{Parser, ValueEnum};

use crate::config::{BackendChoice, Config};

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

  Fine-tune on your own data with workers found on the local network, or at known addresses:
      node --role owner --model models/SmolLM2-135M-Instruct.Q4_1.gguf --data my.jsonl --out run1
      node --role owner --config configs/owner.toml --peer /ip4/192.0.2.7/tcp/4001

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
pub struct Arguments {
    /// What this process is
    #[arg(long, value_enum)]
    pub role: Role,

    /// Configuration file; flags win over it
    #[arg(long, value_name = "TOML")]
    pub config: Option<PathBuf>,

    /// Model: a Hugging Face folder (config.json, safetensors, tokenizer.json) or a .gguf file
    #[arg(long, value_name = "PATH")]
    pub model: Option<PathBuf>,

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

    /// Worker: stop when standard input closes, for a parent process that must leave no worker behind
    #[arg(long, help_heading = "Worker")]
    pub until_stdin_closes: bool,

    /// Training data, JSONL: {"text"}, {"prompt","completion"} or {"messages"} on each line
    #[arg(long, value_name = "JSONL", help_heading = "Owner and demo")]
    pub data: Option<PathBuf>,

    /// Folder for the results: adapter/, report.json, loss.svg
    #[arg(long, value_name = "DIR", help_heading = "Owner and demo")]
    pub out: Option<PathBuf>,

    /// Optimiser steps
    #[arg(long, value_name = "N", help_heading = "Owner and demo")]
    pub steps: Option<usize>,

    /// Where base products are computed: by workers on ciphertexts, or here with f32 weights (the reference)
    #[arg(long, value_enum, help_heading = "Owner and demo")]
    pub backend: Option<BackendChoice>,

    /// Workers to wait for (owner), or to start (demo)
    #[arg(long, value_name = "N", help_heading = "Owner and demo")]
    pub workers: Option<usize>,

    /// Seed of adapters, data order and dropout
    #[arg(long, value_name = "N", help_heading = "Owner and demo")]
    pub seed: Option<u64>,
}

impl Arguments {
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
        set_some(&mut config.owner.data, &self.data);
        set(&mut config.owner.out, &self.out);
        set(&mut config.owner.backend, &self.backend);
        set(&mut config.owner.workers, &self.workers);
        if let Some(steps) = self.steps {
            config.training.steps = steps;
            // A run made shorter by the flag warms up no longer than it lasts.
            config.training.warmup_steps = config.training.warmup_steps.min(steps);
        }
        set(&mut config.training.seed, &self.seed);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_flag_table_is_consistent_and_documented() {
        let command = Arguments::command();
        command.clone().debug_assert();
        for argument in command.get_arguments() {
            assert!(argument.get_help().is_some(), "{} has no help", argument.get_id());
        }
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
        config.training.steps = 99;
        config.training.warmup_steps = 20;
        Arguments::try_parse_from(line).unwrap().apply(&mut config);
        assert_eq!(config.training.steps, 7);
        config.validate().unwrap();
        assert_eq!(config.owner.workers, 2);
        assert!(!config.network.mdns);
        assert_eq!(config.network.peers, ["/ip4/127.0.0.1/tcp/1"]);
    }
}
