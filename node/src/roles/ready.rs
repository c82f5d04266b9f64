//! A model that is ready to be used: its files read, and its products computed here or by workers that were found.

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

/// A model with whatever computes its products. [`Self::stop`] releases the workers.
pub(crate) struct Ready {
    pub(crate) model: Arc<Model>,
    pub(crate) llama: Arc<Llama>,
    cluster: Option<Cluster>,
    /// Where the owner's identity lies while it lasts: to its workers it is a new owner each time, unless it was given a key.
    _identity: TempDir,
}

impl Ready {
    /// Reads the model of a configuration, and finds workers where they are to compute.
    ///
    /// # Errors
    /// When the model cannot be read, or not enough workers are found.
    pub(crate) async fn prepare(config: &Config, progress: &Progress) -> anyhow::Result<Self> {
        let identity = tempfile::tempdir().context("no folder for temporary files")?;
        let mut config = config.clone();
        config.owner.out = identity.path().to_owned();
        let path = config.model()?.to_owned();
        progress.status("reading the model");
        let opened = tokio::task::spawn_blocking(move || {
            let model = Model::open(&path)?;
            model.notes().iter().for_each(|note| tracing::warn!("{note}"));
            anyhow::Ok(Arc::new(model))
        });
        let model = opened.await.context("reading the model")??;
        let cluster = match config.owner.backend {
            BackendChoice::Plain => None,
            BackendChoice::Encrypted => {
                let digest = tokio::task::spawn_blocking({
                    let model = Arc::clone(&model);
                    move || model.digest()
                });
                let digest = digest.await.context("reading the model")??;
                Some(Cluster::build(&config, &Start::Fresh, &model, digest, progress).await?)
            }
        };
        progress.status("preparing the model");
        let encrypted = cluster.as_ref().map(Cluster::backend);
        let llama = tokio::task::spawn_blocking({
            let model = Arc::clone(&model);
            move || {
                let backend: Arc<dyn LinearBackend> = match encrypted {
                    Some(backend) => backend,
                    None => Arc::new(PlainBackend::new(&model)?),
                };
                anyhow::Ok(Arc::new(Llama::new(model, backend)?))
            }
        });
        let llama = llama.await.context("preparing the model")??;
        Ok(Self { model, llama, cluster, _identity: identity })
    }

    /// Reads an adapter of the model in PEFT's format.
    ///
    /// # Errors
    /// When it cannot be read, or is of another model.
    pub(crate) fn adapter(&self, folder: &std::path::Path) -> anyhow::Result<Arc<LoraAdapters>> {
        let read = adapter::load(folder, self.model.config());
        Ok(Arc::new(read.with_context(|| format!("the adapter {}", folder.display()))?))
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
        if let Some(cluster) = self.cluster {
            cluster.stop().await;
        }
    }
}
