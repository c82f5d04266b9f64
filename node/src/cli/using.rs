//! The arguments that say which model is used, and where its products are computed.

use std::path::PathBuf;

use anyhow::{Context as _, ensure};
use clap::Args;

use crate::config::{BackendChoice, Config, HeadChoice};
use crate::roles::Used;

/// A model and where its products are computed.
#[derive(Args, Clone, Debug)]
pub struct UsedModel {
    /// Model: a Hugging Face folder (config.json, safetensors, tokenizer.json) or a .gguf file
    #[arg(long, value_name = "PATH")]
    pub model: Option<PathBuf>,

    /// Configuration file of an owner, for network, encryption and data; flags win over it
    #[arg(long, value_name = "TOML")]
    pub config: Option<PathBuf>,

    /// Where base products are computed: by workers on ciphertexts (the default), or here with f32 weights
    #[arg(long, value_enum, help_heading = "Workers")]
    pub backend: Option<BackendChoice>,

    /// Where the head's products are computed, if the others are encrypted
    #[arg(long, value_enum, help_heading = "Workers")]
    pub head: Option<HeadChoice>,

    /// Start so many workers on this machine, which end with this process
    #[arg(long, value_name = "N", conflicts_with_all = ["peer", "worker", "listen", "identity"], value_parser = clap::value_parser!(u16).range(1..=64), help_heading = "Workers")]
    pub workers: Option<u16>,

    /// Address of a worker to dial, as it prints it (may be repeated); it waits for as many workers
    #[arg(long, value_name = "MULTIADDR", help_heading = "Workers")]
    pub peer: Vec<String>,

    /// Only this worker may serve, and those named beside it, by their peer ids (may be repeated)
    #[arg(long, value_name = "PEERID", help_heading = "Workers")]
    pub worker: Vec<String>,

    /// Address to listen on for peers (may be repeated)
    #[arg(long, value_name = "MULTIADDR", help_heading = "Workers")]
    pub listen: Vec<String>,

    /// Do not look for workers on the local network by mDNS
    #[arg(long, help_heading = "Workers")]
    pub no_mdns: bool,

    /// Key file of this peer's identity, where workers serve only owners that they know; else it is a new peer each time
    #[arg(long, value_name = "FILE", help_heading = "Workers")]
    pub identity: Option<PathBuf>,
}

impl UsedModel {
    /// The configuration with these flags laid over it, and whether its workers are to be started here.
    ///
    /// # Errors
    /// When the file cannot be read, no model is named, and when something in it cannot be.
    pub(crate) fn into_used(self) -> anyhow::Result<Used> {
        let Self { model, config, backend, head, workers, peer, worker, listen, no_mdns, identity } = self;
        let mut config = config.as_deref().map(Config::read).transpose()?.unwrap_or_default();
        config.model = model.or(config.model);
        config.model.as_ref().context("no model: give --model")?;
        config.owner.head = head.unwrap_or(config.owner.head);
        config.owner.backend = backend.unwrap_or(config.owner.backend);
        if let Some(workers) = workers {
            ensure!(
                backend != Some(BackendChoice::Plain),
                "--workers starts workers, and --backend plain asks none: give one of them"
            );
            config.owner.backend = BackendChoice::Encrypted;
            config.owner.workers = workers.into();
            (config.network.peers, config.owner.allowed) = (Vec::new(), Vec::new());
            config.network.identity = None;
        } else {
            config.owner.workers = config.owner.workers.max(peer.len());
            config.network.peers.extend(peer);
            config.owner.allowed.extend(worker);
            config.network.mdns &= !no_mdns;
            config.network.identity = identity.or(config.network.identity);
            if !listen.is_empty() {
                config.network.listen = listen;
            }
        }
        config.validate()?;
        Ok(Used { config, local: workers.is_some() })
    }
}
