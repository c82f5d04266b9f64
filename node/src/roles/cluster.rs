//! The owner's side of the network: workers found before the run and during it, layers assigned, actors running.
//!
//! Whatever ends a run, its workers are told that they are no longer needed: [`Cluster::stop`] does it where the run comes
//! to its end, and a guard where it does not, such as at an error or Ctrl-C while workers load their layers.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use actix::Addr;
use actors::backend::LinearBackend;
use actors::compensation::{Compensated, Compensation};
use actors::owner::fleet::FleetSettings;
use actors::owner::scheduler::{
    AskHealth, AssignLayers, Assignment, Candidate, LayerScheduler, Notice, ReleaseLayers, WorkerLost, WorkerOffered,
    WorkerRecord,
};
use actors::owner::{EncryptedBackend, LayerTable, OwnerActors, PhaseClock};
use actors::transport::Transport;
use anyhow::{Context as _, bail};
use protocol::he::ParameterSet;
use protocol::ids::ModelDigest;
use protocol::model::{LlamaConfig, Model};
use protocol::wire::printable;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use super::bans::Bans;
use super::masks;
use super::progress::Progress;
use super::start::Start;
use crate::config::{Config, HeadChoice};
use crate::folders;
use crate::swarm::{
    Admission, Discovery, DiscoveryEvent, DiscoveryQuery, FoundWorker, IdentityLock, Libp2pTransport, SwarmConfig,
    SwarmHandle, SwarmRole, TransportConfig, discover, keep_looking,
};

/// Notices that may wait to be shown: beyond that, the log has them.
const NOTICES: usize = 256;
/// Features of a hidden state from which on it is less work to encrypt a row for the head, decrypt its logits, and the same
/// on the way back, than to multiply by the head: the former is the same for each entry of the vocabulary, whatever the
/// width.
const SERVED_HEAD_FEATURES: usize = 512;

/// Workers that hold all layers, and the actors that talk to them.
pub(crate) struct Cluster {
    transport: Arc<dyn Transport>,
    /// Releases the workers, unless [`Self::stop`] has.
    hold: Hold,
    actors: OwnerActors,
    /// What is added to forward products, if anything is.
    compensation: Option<Arc<Compensation>>,
    parameter_sets: Vec<ParameterSet>,
    /// Whether the workers serve the head.
    head: bool,
    _identity: Option<IdentityLock>,
    /// What goes on beside the run: looking for workers, heeding what the fleet says. Ends with the cluster.
    _beside: JoinSet<()>,
}

impl Cluster {
    /// Finds workers and has them load the model.
    ///
    /// # Errors
    /// When an address cannot be listened on, no worker with this model is found in time, the workers found are too
    /// small, or they do not load their layers as long as the owner's patience lasts.
    pub(crate) async fn build(
        config: &Config,
        start: &Start,
        model: &Arc<Model>,
        digest: ModelDigest,
        progress: &Progress,
    ) -> anyhow::Result<Self> {
        let bans = Bans::of_user();
        let query = query(config, digest, &bans)?;
        let (swarm, identity) = start_swarm(config, start).await?;
        let transport = Libp2pTransport::new(swarm.clone(), TransportConfig::default());
        // The table takes a while: it is computed while workers are being looked for.
        let table = tokio::task::spawn_blocking({
            let (model, target, head) =
                (Arc::clone(model), config.encryption.target(), wants_head(config, model.config()));
            move || LayerTable::of_model(&model, head, &target, |_, _| {})
        });
        let candidates = find_workers(&query, &transport, progress).await?;
        progress.status("reading the model's layers");
        let table = table.await.context("reading the model's layers")??;
        let parameter_sets = table.parameter_sets();
        let head = serves_head(config, model.config(), &candidates);
        // It takes a while too, the first time: workers load their layers meanwhile.
        let (done, mut matrices) = watch::channel((0, 0));
        let compensation = tokio::task::spawn_blocking({
            let (model, rank, kept) = (Arc::clone(model), config.encryption.compensation, config.owner.keep_masks);
            move || compensation(&model, rank, head, kept, done)
        });
        let layers = if head { model.config().served_layers() } else { model.config().layers };
        if wants_head(config, model.config()) && !head {
            progress.note("the workers have no room for the head: its products are computed here");
        }
        let network: Arc<dyn Transport> = Arc::new(transport.clone());
        let (notices, mut said) = mpsc::channel(NOTICES);
        let room = masks::room(&config.owner, digest, progress);
        let pads = config.owner.pads();
        let actors = OwnerActors::start(Arc::new(table), Arc::clone(&network), room, pads, Some(notices))?;
        let hold = Hold { scheduler: actors.scheduler.clone(), swarm, released: false };
        let assign = AssignLayers {
            model: digest,
            layers: u16::try_from(layers).context("a model has fewer than 65,536 layers")?,
            candidates,
            settings: FleetSettings {
                replicas: config.owner.replicas,
                patience: Duration::from_secs(config.owner.patience_seconds),
                banned: query.admission.banned.keys().cloned().collect(),
            },
        };
        let mut beside = JoinSet::new();
        let assigned = tokio::select! {
            // The layers are asked for before anybody else may offer.
            biased;
            assigned = actors.scheduler.send(assign) => assigned,
            () = async {
                beside.spawn(look(transport, query, actors.scheduler.clone()));
                show(&mut said, progress, &bans).await;
            } => bail!("the layer scheduler is gone"),
        };
        let assigned = assigned.context("the layer scheduler is gone")?.map_err(anyhow::Error::from);
        let about = || "a slice of the head counts as a layer; owner.head = \"local\" leaves the head to the owner";
        let assigned = if head { assigned.with_context(about) } else { assigned };
        for Assignment { peer, layers, device } in &assigned? {
            let device = printable(device);
            progress.note(&format!("{peer} serves {} on {device}", model.config().in_words(layers)));
        }
        beside.spawn(heed(said, bans));
        while matrices.changed().await.is_ok() {
            let (done, of) = *matrices.borrow_and_update();
            progress.status(format!("finding out what rows are mostly made of: {done} of {of} matrices"));
        }
        let compensation = compensation.await.context("finding out what rows are mostly made of")??;
        Ok(Self {
            transport: network,
            hold,
            actors,
            compensation: compensation.map(Arc::new),
            parameter_sets,
            head,
            _identity: identity,
            _beside: beside,
        })
    }

    /// Where the trainer gets its products.
    pub(crate) fn backend(&self) -> Arc<dyn LinearBackend> {
        let encrypted = EncryptedBackend::new(self.actors.scheduler.clone(), Arc::clone(&self.transport), self.head);
        match &self.compensation {
            Some(compensation) => Arc::new(Compensated::new(Arc::new(encrypted), Arc::clone(compensation))),
            None => Arc::new(encrypted),
        }
    }

    /// Parameter sets in use.
    pub(super) fn parameter_sets(&self) -> Vec<ParameterSet> {
        self.parameter_sets.clone()
    }

    /// Where the time of products goes.
    pub(crate) fn clock(&self) -> Arc<PhaseClock> {
        Arc::clone(&self.actors.clock)
    }

    /// What each worker that ever served did so far.
    pub(super) async fn health(&self) -> anyhow::Result<Vec<WorkerRecord>> {
        self.actors.scheduler.send(AskHealth).await.context("the layer scheduler is gone")
    }

    /// Releases the workers and ends actors and swarm.
    pub(crate) async fn stop(self) {
        let Self { mut hold, actors, .. } = self;
        hold.release().await;
        // Waiting for the actors' threads blocks.
        let stopped = tokio::task::spawn_blocking(move || actors.stop()).await;
        if stopped.is_err() {
            tracing::warn!("the owner's actors did not end by themselves");
        }
    }
}

/// What the owner knows of forward products in so many directions: from the user's cache folder, or found out and, if what tells
/// of the model may stay there, kept. It ends early when nobody listens to `done` any more.
fn compensation(
    model: &Arc<Model>,
    rank: usize,
    head: bool,
    kept: bool,
    done: watch::Sender<(usize, usize)>,
) -> anyhow::Result<Option<Compensation>> {
    if rank == 0 {
        return Ok(None);
    }
    let folder = kept.then(folders::compensations).and_then(|folder| {
        let missing = |error: &anyhow::Error| {
            tracing::warn!("no folder for what is known of products: it is found out in every run ({error:#})");
        };
        folder.inspect_err(missing).ok()
    });
    let progress = move |matrices, of| done.send((matrices, of)).is_ok();
    Ok(Some(Compensation::of_model(model, rank, head, folder.as_deref(), progress)?))
}

/// The hold that an owner has on workers: letting it go releases them, and ends the swarm.
struct Hold {
    scheduler: Addr<LayerScheduler>,
    swarm: SwarmHandle,
    released: bool,
}

impl Hold {
    async fn release(&mut self) {
        self.released = true;
        if self.scheduler.send(ReleaseLayers).await.is_err() {
            tracing::debug!("the layer scheduler ended before it released its workers");
        }
        self.swarm.shut_down();
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        if !self.released {
            // The process may be about to end, so that this waits; scheduler and swarm have threads of their own, and
            // the scheduler waits for no worker longer than some seconds.
            futures::executor::block_on(self.release());
        }
    }
}

/// Whether the head is to be served, if there is room for it.
fn wants_head(config: &Config, model: &LlamaConfig) -> bool {
    match config.owner.head {
        HeadChoice::Local => false,
        HeadChoice::Remote => true,
        HeadChoice::Auto => model.hidden_size >= SERVED_HEAD_FEATURES,
    }
}

/// Whether these workers are to serve the head.
fn serves_head(config: &Config, model: &LlamaConfig, candidates: &[Candidate]) -> bool {
    let room: usize = candidates.iter().map(|candidate| usize::from(candidate.offer.room)).sum();
    wants_head(config, model) && (config.owner.head == HeadChoice::Remote || room >= model.served_layers())
}

/// Who is looked for.
fn query(config: &Config, model: ModelDigest, bans: &Bans) -> anyhow::Result<DiscoveryQuery> {
    let admission = Admission { allowed: config.owner.allowed()?, banned: bans.read()? };
    let time_out = Duration::from_secs(config.owner.discovery_seconds);
    // No more will come than may.
    let most = admission.allowed.as_ref().map_or(usize::MAX, |allowed| allowed.len());
    Ok(DiscoveryQuery { model, admission, wanted: config.owner.workers.min(most), time_out })
}

/// Looks for workers during the run.
async fn look(transport: Libp2pTransport, query: DiscoveryQuery, scheduler: Addr<LayerScheduler>) {
    let ended = keep_looking(&transport, &query, |event| {
        let told = match event {
            DiscoveryEvent::Found(worker) => scheduler.try_send(WorkerOffered(candidate(worker.clone()))).is_ok(),
            DiscoveryEvent::Lost(peer) => scheduler.try_send(WorkerLost(peer.clone())).is_ok(),
            DiscoveryEvent::Rejected(peer) => {
                tracing::info!("{}: {}", peer.peer, printable(&peer.why));
                true
            }
        };
        if !told {
            tracing::debug!("the layer scheduler has no time to hear of a worker, or is gone");
        }
    })
    .await;
    tracing::debug!(%ended, "nobody looks for workers any more");
}

fn candidate(FoundWorker { peer, offer }: FoundWorker) -> Candidate {
    Candidate { peer, offer }
}

/// Shows what the fleet says before the run, for as long as it says something.
async fn show(said: &mut mpsc::Receiver<Notice>, progress: &Progress, bans: &Bans) {
    let mut loaded_by = HashMap::new();
    while let Some(notice) = said.recv().await {
        match notice {
            Notice::Say(text) => progress.note(&printable(&text)),
            Notice::Loading { peer, loaded, .. } => {
                loaded_by.insert(peer, loaded);
                let sum: u32 = loaded_by.values().map(|&layers| u32::from(layers)).sum();
                progress.status(format!("workers have loaded {sum} layers"));
            }
            banned @ Notice::Banned { .. } => keep(banned, bans),
        }
    }
}

/// Logs what the fleet says during the run, and keeps its bans.
async fn heed(mut said: mpsc::Receiver<Notice>, bans: Bans) {
    while let Some(notice) = said.recv().await {
        match notice {
            Notice::Say(text) => tracing::info!("{}", printable(&text)),
            Notice::Loading { peer, loaded, of } => tracing::debug!(%peer, loaded, of, "a worker loads its layers"),
            banned @ Notice::Banned { .. } => keep(banned, &bans),
        }
    }
}

fn keep(notice: Notice, bans: &Bans) {
    if let Notice::Banned { peer, why } = notice
        && let Err(error) = bans.add(&peer, &printable(&why))
    {
        tracing::error!(%peer, "its ban holds for this run only: {error:#}");
    }
}

/// The swarm, and the lock of its identity.
async fn start_swarm(config: &Config, start: &Start) -> anyhow::Result<(SwarmHandle, Option<IdentityLock>)> {
    let (identity, lock) = start.owner(config)?;
    let (listen, dial) = config.network.addresses()?;
    let mut swarm = SwarmConfig::new(identity, SwarmRole::Owner);
    swarm.listen = listen;
    swarm.dial = dial;
    swarm.mdns = config.network.mdns;
    swarm.kademlia = true;
    Ok((SwarmHandle::start(swarm).await?, lock))
}

/// Workers with this model: as many as are wanted, or those that were found in time.
async fn find_workers(
    query: &DiscoveryQuery,
    transport: &Libp2pTransport,
    progress: &Progress,
) -> anyhow::Result<Vec<Candidate>> {
    let (wanted, time_out) = (query.wanted, query.time_out);
    progress.status(format!("looking for {wanted} workers"));
    let found = discover(transport, query, |event| match event {
        DiscoveryEvent::Found(worker) => {
            let devices: Vec<_> = worker.offer.devices.iter().map(|device| printable(&device.name)).collect();
            progress.note(&format!("found {} ({})", worker.peer, devices.join(" and ")));
        }
        DiscoveryEvent::Rejected(peer) => progress.note(&format!("{}: {}", peer.peer, printable(&peer.why))),
        DiscoveryEvent::Lost(peer) => tracing::debug!(%peer, "a connection was lost while workers are looked for"),
    })
    .await?;
    if found.workers.is_empty() {
        bail!(nobody(query, &found));
    }
    if found.workers.len() < wanted {
        tracing::warn!("{} of {wanted} workers found within {time_out:?}: going on with these", found.workers.len());
    }
    Ok(found.workers.into_iter().map(candidate).collect())
}

/// Why nobody can be trained with, and what to do.
fn nobody(query: &DiscoveryQuery, found: &Discovery) -> String {
    let (model, seconds) = (query.model, query.time_out.as_secs());
    let mut text = format!("no worker that serves model {model} was found within {seconds} s");
    for rejected in &found.rejected {
        text.push_str(&format!("\n  {}: {}", rejected.peer, printable(&rejected.why)));
    }
    text.push_str("\nStart one with `node --role worker --model PATH` and give the address that it prints as --peer");
    text
}
