//! An owner that generates: a model that is ready, an engine, and an adapter to write with.

use std::path::PathBuf;
use std::sync::Arc;

use actors::generation::{Engine, EngineConfig};
use actors::lora::LoraAdapters;
use anyhow::anyhow;

use super::chat_style::ChatStyle;
use super::progress::Progress;
use super::ready::{Ready, Used, blocking};
use super::stop::StopSignals;
use crate::protect;

/// How an owner generates.
#[derive(Clone, Debug)]
pub struct GenerationSetup {
    /// The model, and where its products are computed.
    pub used: Used,
    /// Folder of the adapter to write with.
    pub adapter: Option<PathBuf>,
    /// How texts are written.
    pub engine: EngineConfig,
}

/// An engine that is ready, with what has to live as long.
pub(crate) struct Generation {
    /// Writes texts.
    pub(crate) engine: Engine,
    /// How conversations are written.
    pub(crate) style: ChatStyle,
    /// The adapter that was asked for.
    pub(crate) adapter: Option<Arc<LoraAdapters>>,
    ready: Ready,
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
        let GenerationSetup { used, adapter, engine } = setup;
        let ready = Ready::prepare(&used, adapter.into_iter().collect(), progress).await?;
        let llama = Arc::clone(&ready.llama);
        let begin = move || {
            let engine = Engine::start(llama, engine)?;
            let style = ChatStyle::of(&used.config.data, engine.tokenizer())?;
            Ok((engine, style))
        };
        match blocking(begin).await {
            Ok((engine, style)) => Ok(Self { engine, style, adapter: ready.adapters.first().cloned(), ready }),
            Err(error) => {
                ready.stop().await;
                Err(error)
            }
        }
    }

    /// Ends the engine, and lets go of the workers.
    pub(crate) async fn stop(self) {
        let Self { engine, ready, .. } = self;
        drop(engine);
        ready.stop().await;
    }
}
