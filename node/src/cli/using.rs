//! The arguments that say which model is used, and where its products are computed.

use std::path::PathBuf;

use clap::Args;

use crate::config::{BackendChoice, Config, HeadChoice};

/// A model and where its products are computed.
#[derive(Args, Debug)]
pub struct UsedModel {
    /// Configuration file; flags win over it
    #[arg(long, value_name = "TOML")]
    pub config: Option<PathBuf>,

    /// Model: a Hugging Face folder (config.json, safetensors, tokenizer.json) or a .gguf file
    #[arg(long, value_name = "PATH")]
    pub model: Option<PathBuf>,

    /// Where base products are computed: by workers on ciphertexts, or here with f32 weights
    #[arg(long, value_enum, help_heading = "Workers")]
    pub backend: Option<BackendChoice>,

    /// Where the head's products are computed, if the others are encrypted
    #[arg(long, value_enum, help_heading = "Workers")]
    pub head: Option<HeadChoice>,

    /// Workers to wait for
    #[arg(long, value_name = "N", help_heading = "Workers")]
    pub workers: Option<usize>,

    /// Only this worker may serve, and those named beside it, by their peer ids (may be repeated)
    #[arg(long, value_name = "PEERID", help_heading = "Workers")]
    pub worker: Vec<String>,

    /// Address of a worker to dial, as it prints it (may be repeated)
    #[arg(long, value_name = "MULTIADDR", help_heading = "Workers")]
    pub peer: Vec<String>,

    /// Address to listen on for peers (may be repeated)
    #[arg(long, value_name = "MULTIADDR", help_heading = "Workers")]
    pub listen: Vec<String>,

    /// Do not look for workers on the local network by mDNS
    #[arg(long, help_heading = "Workers")]
    pub no_mdns: bool,

    /// Key file by which workers know this owner; created (mode 0600) if it is not there
    #[arg(long, value_name = "FILE", help_heading = "Workers")]
    pub identity: Option<PathBuf>,
}

impl UsedModel {
    /// The configuration with these flags laid over it.
    ///
    /// # Errors
    /// When the file cannot be read, and when something in it cannot be.
    pub(crate) fn into_config(self) -> anyhow::Result<Config> {
        let mut config = self.config.as_deref().map(Config::read).transpose()?.unwrap_or_default();
        let Self { config: _, model, backend, head, workers, worker, peer, listen, no_mdns, identity } = self;
        config.model = model.or(config.model);
        config.network.identity = identity.or(config.network.identity);
        config.owner.backend = backend.unwrap_or(config.owner.backend);
        config.owner.head = head.unwrap_or(config.owner.head);
        config.owner.workers = workers.unwrap_or(config.owner.workers);
        config.owner.allowed.extend(worker);
        config.network.peers.extend(peer);
        if !listen.is_empty() {
            config.network.listen = listen;
        }
        config.network.mdns &= !no_mdns;
        config.validate()?;
        Ok(config)
    }
}
