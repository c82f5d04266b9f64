//! An owner that generates: its model over workers or over its own weights, an engine, and an adapter to write with.
//!
//! It has no run and no folder for results, so that it is a new peer each time: its key, and the keys and logs of workers that
//! it starts itself, are in a folder that is gone with it.

use std::sync::Arc;

use actors::adapter;
use actors::backend::{LinearBackend, PlainBackend};
use actors::generation::{Engine, EngineConfig};
use actors::lora::LoraAdapters;
use actors::transformer::Llama;
use anyhow::{Context as _, anyhow};
use protocol::model::Model;
use tempfile::TempDir;

use super::cluster::Cluster;
use super::progress::Progress;
use super::start::Start;
use super::stop::StopSignals;
use crate::config::{BackendChoice, Config};
use crate::local::LocalWorkers;
use crate::protect;

/// How an owner generates.
#[derive(Clone, Debug)]
pub struct GenerationSetup {
    /// Model, adapter, backend and workers, as an owner that trains has them.
    pub config: Config,
    /// Start the workers on this machine, as many as the configuration waits for.
    pub local: bool,
    /// How texts are written.
    pub engine: EngineConfig,
}

/// An engine that is ready, with what has to live as long.
pub(crate) struct Generation {
    /// Writes texts.
    pub(crate) engine: Engine,
    /// The adapter that was asked for.
    pub(crate) adapter: Option<Arc<LoraAdapters>>,
    cluster: Option<Cluster>,
    workers: LocalWorkers,
    _folder: TempDir,
}

impl Generation {
    /// Reads the model, gathers workers where products are encrypted, and starts the engine.
    ///
    /// # Errors
    /// Whatever is wrong with the model, the adapter or the workers, and a signal to stop meanwhile.
    pub(crate) async fn start(setup: GenerationSetup, stop: &mut StopSignals) -> anyhow::Result<Self> {
        protect::shut_memory();
        let progress = Progress::new();
        let started = tokio::select! {
            started = Self::prepare(setup, &progress) => started,
            () = stop.next() => Err(anyhow!("stopped before anything was written")),
        };
        progress.finish();
        started
    }

    async fn prepare(setup: GenerationSetup, progress: &Progress) -> anyhow::Result<Self> {
        let GenerationSetup { mut config, local, engine } = setup;
        progress.status("reading the model");
        let folder = tempfile::Builder::new().prefix("velum-generation-").tempdir().context("no temporary folder")?;
        config.owner.out = folder.path().to_path_buf();
        let path = config.model()?.to_path_buf();
        let (model, adapter) = {
            let (path, adapter) = (path.clone(), config.owner.adapter.clone());
            blocking(move || {
                let model = Model::open(&path)?;
                model.notes().iter().for_each(|note| tracing::warn!("{note}"));
                let read = |folder: std::path::PathBuf| {
                    let read = adapter::load(&folder, model.config());
                    read.with_context(|| format!("the adapter {}", folder.display())).map(Arc::new)
                };
                let adapter = adapter.map(read).transpose()?;
                Ok((Arc::new(model), adapter))
            })
            .await?
        };
        let (mut workers, mut cluster) = (LocalWorkers::default(), None);
        if config.owner.backend == BackendChoice::Encrypted {
            if local {
                config.network.mdns = false;
                config.network.listen = vec!["/ip4/127.0.0.1/tcp/0".into()];
                let say = |line: String| progress.note(&line);
                let started = LocalWorkers::start(&config, &path, folder.path(), None, None, say).await;
                workers = match started {
                    Ok(workers) => workers,
                    Err(error) => {
                        // The error names a log in it.
                        drop(folder.keep());
                        return Err(error);
                    }
                };
                config.network.peers.extend(workers.addresses.iter().cloned());
            }
            let of = Arc::clone(&model);
            let digest = blocking(move || Ok(of.digest()?)).await?;
            cluster = Some(Cluster::build(&config, &Start::Fresh, &model, digest, progress).await?);
        }
        progress.status("preparing the model");
        let encrypted = cluster.as_ref().map(Cluster::backend);
        let engine = blocking(move || {
            let backend: Arc<dyn LinearBackend> = match encrypted {
                Some(backend) => backend,
                None => Arc::new(PlainBackend::new(&model)?),
            };
            Ok(Engine::start(Arc::new(Llama::new(model, backend)?), engine)?)
        })
        .await?;
        Ok(Self { engine, adapter, cluster, workers, _folder: folder })
    }

    /// Ends the engine, and lets go of the workers.
    pub(crate) async fn stop(self) {
        let Self { engine, cluster, workers, _folder, .. } = self;
        drop(engine);
        if let Some(cluster) = cluster {
            cluster.stop().await;
        }
        workers.stop().await;
    }
}

/// Runs what blocks on a thread of its own.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> anyhow::Result<T> + Send + 'static) -> anyhow::Result<T> {
    tokio::task::spawn_blocking(work).await.context("reading the model")?
}
