//! A model that is ready to be used: its files read, and its products computed here, by workers that were found, or by some
//! that were started for it.
//!
//! It has no run and no folder for results, so that it is a new peer each time unless it was given a key: what it and its workers
//! write is in a folder that is gone with it.

use std::path::PathBuf;
use std::sync::Arc;

use actors::adapter;
use actors::backend::{LinearBackend, PlainBackend};
use actors::lora::LoraAdapters;
use actors::transformer::Llama;
use anyhow::Context as _;
use protocol::model::Model;
use tempfile::TempDir;

use super::cluster::Cluster;
use super::model_name;
use super::progress::Progress;
use super::start::Start;
use crate::config::{BackendChoice, Config};
use crate::link::{Route, Transport};
use crate::local::LocalWorkers;

/// Which model is used, and where its products are computed.
#[derive(Clone, Debug)]
pub struct Used {
    /// Model, backend and workers, as an owner that trains has them.
    pub config: Config,
    /// Start the workers on this machine, as many as the configuration waits for.
    pub local: bool,
}

/// A model with whatever computes its products. [`Self::stop`] releases the workers.
pub(crate) struct Ready {
    pub(crate) model: Arc<Model>,
    pub(crate) llama: Arc<Llama>,
    /// The adapters that were asked for, in their order.
    pub(crate) adapters: Vec<Arc<LoraAdapters>>,
    cluster: Option<Cluster>,
    workers: LocalWorkers,
    _folder: TempDir,
}

impl Ready {
    /// Reads the model of a configuration and adapters of it in PEFT's format, and gathers workers where they are to compute.
    ///
    /// # Errors
    /// When the model or an adapter cannot be read, or not enough workers are found or start.
    pub(crate) async fn prepare(used: &Used, adapters: Vec<PathBuf>, progress: &Progress) -> anyhow::Result<Self> {
        let folder = tempfile::Builder::new().prefix("velum-").tempdir().context("no folder for temporary files")?;
        let mut config = used.config.clone();
        config.owner.out = folder.path().to_owned();
        let path = config.model()?.to_owned();
        progress.status("reading the model");
        // What is wrong with an adapter shows before anybody is asked for anything.
        let (model, adapters) = blocking({
            let path = path.clone();
            move || {
                let model = Model::open(&path)?;
                model.notes().iter().for_each(|note| tracing::warn!("{note}"));
                let read = |folder: &PathBuf| {
                    let read = adapter::load(folder, model.config());
                    read.with_context(|| format!("the adapter {}", folder.display())).map(Arc::new)
                };
                let adapters = adapters.iter().map(read).collect::<anyhow::Result<Vec<_>>>()?;
                Ok((Arc::new(model), adapters))
            }
        })
        .await?;
        let (mut workers, mut cluster) = (LocalWorkers::default(), None);
        if config.owner.backend == BackendChoice::Encrypted {
            if used.local {
                config.network.mdns = false;
                config.network.listen = vec![Transport::default().listen().into()];
                let say = |line: String| progress.note(&line);
                workers = match LocalWorkers::start(&config, &path, folder.path(), Route::default(), None, say).await {
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
        let llama = blocking({
            let model = Arc::clone(&model);
            move || {
                let backend: Arc<dyn LinearBackend> = match encrypted {
                    Some(backend) => backend,
                    None => Arc::new(PlainBackend::new(&model)?),
                };
                Ok(Arc::new(Llama::new(model, backend)?))
            }
        })
        .await?;
        Ok(Self { model, llama, adapters, cluster, workers, _folder: folder })
    }

    /// What the model of a configuration is called.
    ///
    /// # Errors
    /// When there is none.
    pub(crate) fn name(config: &Config) -> anyhow::Result<String> {
        Ok(model_name::of(config.model()?))
    }

    /// Releases the workers.
    pub(crate) async fn stop(self) {
        let Self { cluster, workers, _folder, .. } = self;
        if let Some(cluster) = cluster {
            cluster.stop().await;
        }
        workers.stop().await;
    }
}

/// Runs what blocks on a thread of its own.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
) -> anyhow::Result<T> {
    tokio::task::spawn_blocking(work).await.context("preparing the model")?
}
