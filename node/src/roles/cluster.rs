//! The owner's side of the network: workers found, layers assigned, actors running.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use actors::backend::LinearBackend;
use actors::owner::mask_file::{MaskFile, MaskRoom};
use actors::owner::scheduler::{AskHealth, AssignLayers, Assignment, Candidate, LoadingProgress, ReleaseLayers};
use actors::owner::{EncryptedBackend, LayerTable, OwnerActors, PhaseClock};
use actors::transport::Transport;
use anyhow::{Context as _, bail};
use protocol::he::ParameterSet;
use protocol::ids::ModelDigest;
use protocol::model::Model;
use protocol::wire::messages::WorkerHealth;
use tokio::sync::mpsc;

use super::progress::Progress;
use crate::config::{Config, OwnerConfig};
use crate::swarm::{
    Discovery, DiscoveryEvent, DiscoveryQuery, Identity, Libp2pTransport, SwarmConfig, SwarmHandle, SwarmRole,
    TransportConfig, discover,
};
use crate::{disk, folders};

/// Loading reports that may wait to be shown.
const LOADING_REPORTS: usize = 64;

/// Workers that hold all layers, and the actors that talk to them.
pub(super) struct Cluster {
    swarm: SwarmHandle,
    transport: Arc<dyn Transport>,
    actors: OwnerActors,
    parameter_sets: Vec<ParameterSet>,
}

impl Cluster {
    /// Finds workers and has them load the model.
    ///
    /// # Errors
    /// When an address cannot be listened on, no worker with this model is found in time, the workers found are too
    /// small, or one of them fails to load its layers.
    pub(super) async fn build(
        config: &Config,
        model: &Arc<Model>,
        digest: ModelDigest,
        progress: &Progress,
    ) -> anyhow::Result<Self> {
        let swarm = start_swarm(config).await?;
        let transport = Libp2pTransport::new(swarm.clone(), TransportConfig::default());
        // The table takes a while where it is not cached: it is computed while workers are being looked for.
        let table = tokio::task::spawn_blocking({
            let (model, target) = (Arc::clone(model), config.encryption);
            let cache = folders::cache().ok().map(|folder| folder.join("tables"));
            move || LayerTable::of_model(&model, digest, &target, cache.as_deref(), |_, _| {})
        });
        let candidates = find_workers(config, &transport, digest, progress).await?;
        progress.status("reading the model's layers");
        let table = table.await.context("reading the model's layers")??;
        let parameter_sets = table.parameter_sets();
        let transport: Arc<dyn Transport> = Arc::new(transport);
        let actors = OwnerActors::start(Arc::new(table), Arc::clone(&transport), mask_room(&config.owner))?;
        let (reports, loading) = mpsc::channel(LOADING_REPORTS);
        let assign = AssignLayers {
            model: digest,
            layers: u16::try_from(model.config().layers).context("a model has fewer than 65,536 layers")?,
            candidates,
            progress: reports,
        };
        let (assigned, ()) = tokio::join!(actors.scheduler.send(assign), show_loading(loading, progress));
        let assignments = assigned.context("the layer scheduler is gone")??;
        for Assignment { peer, layers, device } in &assignments {
            let device = printable(device);
            progress.note(&format!("{peer} serves layers {} to {} on {device}", layers.start, layers.end - 1));
        }
        Ok(Self { swarm, transport, actors, parameter_sets })
    }

    /// Where the trainer gets its products.
    pub(super) fn backend(&self) -> Arc<dyn LinearBackend> {
        Arc::new(EncryptedBackend::new(self.actors.scheduler.clone(), Arc::clone(&self.transport)))
    }

    /// Parameter sets in use.
    pub(super) fn parameter_sets(&self) -> Vec<ParameterSet> {
        self.parameter_sets.clone()
    }

    /// Where the time of products goes.
    pub(super) fn clock(&self) -> Arc<PhaseClock> {
        Arc::clone(&self.actors.clock)
    }

    /// What each worker did so far; a worker that does not answer did nothing that is known.
    pub(super) async fn health(&self) -> anyhow::Result<Vec<(Assignment, WorkerHealth)>> {
        let asked = self.actors.scheduler.send(AskHealth).await.context("the layer scheduler is gone")?;
        let known = asked.into_iter().map(|(assignment, health)| {
            let health = health.unwrap_or_else(|error| {
                tracing::warn!(peer = %assignment.peer, %error, "a worker does not say what it did");
                WorkerHealth {
                    layers: assignment.layers.clone(),
                    loaded: 0,
                    failure: Some(error.to_string()),
                    calls: 0,
                    busy_seconds: 0.0,
                    peak_rss_bytes: 0,
                }
            });
            (assignment, health)
        });
        Ok(known.collect())
    }

    /// Releases the workers and ends actors and swarm.
    pub(super) async fn stop(self) {
        if self.actors.scheduler.send(ReleaseLayers).await.is_err() {
            tracing::debug!("the layer scheduler ended before it released its workers");
        }
        // Waiting for the actors' threads blocks.
        let stopped = tokio::task::spawn_blocking(move || self.actors.stop()).await;
        if stopped.is_err() {
            tracing::warn!("the owner's actors did not end by themselves");
        }
        self.swarm.shut_down();
    }
}

/// Where the products of the masks are kept: without a file where none can be had, since it only saves time.
fn mask_room(config: &OwnerConfig) -> MaskRoom {
    let memory_bytes = usize::try_from(config.mask_cache_mib << 20).unwrap_or(usize::MAX);
    if config.mask_file_mib == 0 {
        return MaskRoom::memory(memory_bytes);
    }
    let file = || {
        let folder = folders::cache()?;
        std::fs::create_dir_all(&folder).with_context(|| format!("{} cannot be made", folder.display()))?;
        let free = disk::free_bytes(&folder).with_context(|| format!("the disk of {}", folder.display()))?;
        let file = MaskFile::create(&folder, (free / 2).min(config.mask_file_mib << 20));
        file.with_context(|| format!("in {}", folder.display()))
    };
    let file = file().inspect_err(|error: &anyhow::Error| {
        tracing::warn!("no file for the products of the masks (owner.mask_file_mib): {error:#}");
    });
    MaskRoom { memory_bytes, file: file.ok() }
}

async fn start_swarm(config: &Config) -> anyhow::Result<SwarmHandle> {
    let identity = match &config.network.identity {
        Some(path) => Identity::load_or_create(path)?,
        None => Identity::ephemeral(),
    };
    let (listen, dial) = config.network.addresses()?;
    let mut swarm = SwarmConfig::new(identity, SwarmRole::Owner);
    swarm.listen = listen;
    swarm.dial = dial;
    swarm.mdns = config.network.mdns;
    swarm.kademlia = true;
    Ok(SwarmHandle::start(swarm).await?)
}

/// Workers with this model: as many as are wanted, or those that were found in time.
async fn find_workers(
    config: &Config,
    transport: &Libp2pTransport,
    model: ModelDigest,
    progress: &Progress,
) -> anyhow::Result<Vec<Candidate>> {
    let (wanted, seconds) = (config.owner.workers, config.owner.discovery_seconds);
    progress.status(format!("looking for {wanted} workers"));
    let query = DiscoveryQuery { model, wanted, time_out: Duration::from_secs(seconds) };
    let found = discover(transport, query, |event| match event {
        DiscoveryEvent::Found(worker) => {
            let devices: Vec<_> = worker.offer.devices.iter().map(|device| printable(&device.name)).collect();
            progress.note(&format!("found {} ({})", worker.peer, devices.join(" and ")));
        }
        DiscoveryEvent::Rejected(peer) => progress.note(&format!("{}: {}", peer.peer, printable(&peer.why))),
    })
    .await?;
    if found.workers.is_empty() {
        bail!(nobody(config, model, &found));
    }
    if found.workers.len() < wanted {
        tracing::warn!("{} of {wanted} workers found within {seconds} s: going on with these", found.workers.len());
    }
    Ok(found.workers.into_iter().map(|worker| Candidate { peer: worker.peer, offer: worker.offer }).collect())
}

/// Why nobody can be trained with, and what to do.
fn nobody(config: &Config, model: ModelDigest, found: &Discovery) -> String {
    let seconds = config.owner.discovery_seconds;
    let mut text = format!("no worker that serves model {model} was found within {seconds} s");
    for rejected in &found.rejected {
        text.push_str(&format!("\n  {}: {}", rejected.peer, printable(&rejected.why)));
    }
    text.push_str("\nStart one with `node --role worker --model PATH` and give the address that it prints as --peer");
    text
}

/// What a peer says of itself, fit for a terminal: no control characters, and not too long.
fn printable(text: &str) -> String {
    const LONGEST: usize = 300;
    text.chars().take(LONGEST).map(|c| if c.is_control() { '?' } else { c }).collect()
}

/// Shows how far the workers are, until all have loaded their layers.
async fn show_loading(mut loading: mpsc::Receiver<LoadingProgress>, progress: &Progress) {
    let mut loaded = HashMap::new();
    while let Some(LoadingProgress { assignment, loaded: layers }) = loading.recv().await {
        loaded.insert(assignment.peer, layers);
        let sum: u32 = loaded.values().map(|&layers| u32::from(layers)).sum();
        progress.status(format!("workers have loaded {sum} layers"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_peer_says_cannot_steer_the_terminal() {
        assert_eq!(printable("cpu (avx2)"), "cpu (avx2)");
        assert_eq!(printable("\u{1b}[2Jcpu\n"), "?[2Jcpu?");
        assert_eq!(printable(&"x".repeat(100_000)).len(), 300);
    }
}
