//! The demo: a whole private fine-tuning on one machine, with processes that know nothing of each other but their
//! addresses.
//!
//! 1. fetch a small real model, once;
//! 2. start the workers, each a process and a libp2p peer of its own, and learn their addresses from what they print;
//! 3. start the owner with these addresses and the example data;
//! 4. stop the workers and say what came out.
//!
//! The workers are told the model and nothing else: data and adapters are arguments of the owner alone.

pub mod fetch;
mod summary;
mod workers;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context as _, ensure};
use tokio::process::Command;

use crate::config::{BackendChoice, Config};
use workers::WorkerProcess;

/// The example data: questions and answers from the handbook of a company that does not exist.
const HANDBOOK: &str = include_str!("../../../configs/handbook.jsonl");
/// The demo's settings, the same file that a user can copy.
const SETTINGS: &str = include_str!("../../../configs/demo.toml");

/// Settings of the demo before flags are laid over them.
///
/// # Errors
/// When the built-in file is not valid, which a test excludes.
pub fn default_config() -> anyhow::Result<Config> {
    toml::from_str(SETTINGS).context("configs/demo.toml")
}

/// Runs the demo to its end.
///
/// # Errors
/// When the model cannot be had, a process cannot be started, or the owner fails.
pub async fn run(mut config: Config) -> anyhow::Result<()> {
    let out = config.owner.out.clone();
    fs::create_dir_all(&out).with_context(|| format!("the folder {} cannot be created", out.display()))?;
    let model = match &config.model {
        Some(path) => path.clone(),
        None => tokio::task::spawn_blocking(fetch::smollm2).await??,
    };
    if config.owner.data.is_none() {
        config.owner.data = Some(write(&out, "handbook.jsonl", HANDBOOK)?);
    }
    config.model = Some(model.clone());
    config.network.mdns = false;
    config.network.listen = vec!["/ip4/127.0.0.1/tcp/0".into()];

    let mut workers = Vec::new();
    if config.owner.backend == BackendChoice::Encrypted {
        println!("starting {} workers", config.owner.workers);
        // One after the other: each measures its speed when it starts, and two at a time would measure each other.
        for number in 1..=config.owner.workers {
            let mut worker = WorkerProcess::start(number, &model, &out)?;
            let address = worker.address().await?;
            println!("  worker {number}: {address}");
            config.network.peers.push(address);
            workers.push(worker);
        }
    }
    let settings = write(&out, "owner.toml", &toml::to_string(&config)?)?;
    let status = Command::new(std::env::current_exe().context("the path of this program is not known")?)
        .args(["--role", "owner", "--config"])
        .arg(&settings)
        .stdin(Stdio::null())
        .status()
        .await
        .context("the owner's process cannot be started")?;
    for worker in workers {
        worker.stop().await;
    }
    ensure!(status.success(), "the owner ended with {status}; the workers' logs are in {}", out.display());
    summary::print(&out)
}

fn write(folder: &Path, name: &str, text: &str) -> anyhow::Result<PathBuf> {
    let path = folder.join(name);
    fs::write(&path, text).with_context(|| format!("{} cannot be written", path.display()))?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    #[test]
    fn the_built_in_settings_are_valid() {
        super::default_config().unwrap().validate().unwrap();
    }
}
