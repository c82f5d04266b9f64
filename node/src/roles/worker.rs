//! A worker: loads what it is assigned and serves products until it is told to stop.

use std::sync::Arc;
use std::time::Duration;

use actors::matmul::devices::{self, GpuRequest};
use actors::matmul::{CpuDevice, Device, best_kernel};
use actors::transport::PeerName;
use actors::worker::{ModelSource, ShardSource as _, Worker, WorkerLimits};
use anyhow::Context as _;
use protocol::model::Model;
use tokio::sync::oneshot;

use super::stop::StopSignals;
use crate::config::Config;
use crate::folders;
use crate::output;
use crate::report;
use crate::swarm::{Identity, IdentityLock, PeerId, Regulars, ServeConfig, SwarmConfig, SwarmHandle, SwarmRole, serve};

/// What a worker prints before each address at which it can be dialed.
pub const LISTENING: &str = "listening on ";

/// Time that products under way have to end when the worker is told to stop.
const GRACE: Duration = Duration::from_secs(10);

/// Runs a worker until Ctrl-C, SIGTERM, or, if asked for, the end of its standard input.
///
/// # Errors
/// When the model cannot be read, a device cannot be used, or an address cannot be listened on.
pub async fn run(config: Config, until_stdin_closes: bool) -> anyhow::Result<()> {
    let mut stop = StopSignals::listen()?;
    let requested = config.gpus()?;
    let devices = tokio::task::spawn_blocking(move || devices(&requested)).await.context("opening the devices")??;
    let path = config.model()?.to_path_buf();
    let source = tokio::task::spawn_blocking(move || ModelSource::new(Arc::new(Model::open(&path)?)))
        .await
        .context("reading the model")??;
    let digest = source.digest();
    let limits = limits(&config)?;
    // The port is taken before anything slow is done with it: a mistake shows at once.
    let (swarm, _lock) = start_swarm(&config).await?;
    let split = config.worker.split;
    let worker = Worker::start(Arc::new(source), devices, split, limits, report::peak_rss_bytes).await?;
    let worker = Arc::new(worker);
    let serving = serve(&swarm, Arc::clone(&worker) as _, ServeConfig::default()).await?;
    swarm.provide(digest).await?;
    announce(&swarm, &digest.to_string());
    tokio::select! {
        () = stop.next() => {}
        () = stdin_closed(), if until_stdin_closes => {}
    }
    tracing::info!("stopping");
    serving.shut_down(GRACE).await;
    worker.stop().await;
    swarm.shut_down();
    Ok(())
}

/// What the worker multiplies with: the GPUs asked for, or the processor where none is. Blocks, for seconds where kernels
/// have to be compiled.
fn devices(requested: &GpuRequest) -> anyhow::Result<Vec<Arc<dyn Device>>> {
    let cache = folders::kernels().ok();
    let gpus = devices::open(requested, cache.as_deref())?;
    if gpus.is_empty() { Ok(vec![Arc::new(CpuDevice::new(best_kernel()))]) } else { Ok(gpus) }
}

/// What the worker allows, as configured.
fn limits(config: &Config) -> anyhow::Result<WorkerLimits> {
    let product_memory_bytes = config.worker.product_memory_mib.saturating_mul(1 << 20);
    let memory_bytes = match config.worker.memory_mib {
        0 => report::available_memory_bytes()
            .context("this system does not say how much memory is free: set worker.memory_mib")?
            .saturating_sub(product_memory_bytes),
        mib => mib.saturating_mul(1 << 20),
    };
    Ok(WorkerLimits {
        memory_bytes,
        owners: config.worker.max_owners,
        allowed: config.worker.owners()?.iter().map(|peer| PeerName::from(peer.to_base58().as_str())).collect(),
        product_memory_bytes,
        tokens: config.worker.max_tokens,
        ..WorkerLimits::default()
    })
}

/// The swarm, and the lock of its identity.
async fn start_swarm(config: &Config) -> anyhow::Result<(SwarmHandle, IdentityLock)> {
    let path = match &config.network.identity {
        Some(path) => path.clone(),
        None => folders::configuration()?.join("worker.key"),
    };
    let lock = IdentityLock::take(&path)?;
    let (listen, dial) = config.network.addresses()?;
    let mut swarm = SwarmConfig::new(Identity::load_or_create(&path)?, SwarmRole::Worker);
    swarm.listen = listen;
    swarm.dial = dial;
    swarm.mdns = config.network.mdns;
    swarm.kademlia = true;
    swarm.regulars = Arc::new(Regulars::new(config.worker.owners()?));
    Ok((SwarmHandle::start(swarm).await?, lock))
}

/// Prints who this worker is, what it serves, and where it can be dialed.
fn announce(swarm: &SwarmHandle, model: &str) {
    let peer: PeerId = swarm.local_peer();
    output::print(format_args!("worker {peer}"));
    output::print(format_args!("serving model {model}"));
    for address in swarm.listening() {
        output::print(format_args!("{LISTENING}{address}"));
    }
}

/// Waits for the end of standard input.
async fn stdin_closed() {
    let (closed, end) = oneshot::channel();
    // A thread of its own, which nobody waits for: a runtime would not end before its blocking read does.
    std::thread::spawn(move || {
        // What a parent writes there means nothing; only the end does. A broken input has ended, too.
        let _ = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
        let _ = closed.send(());
    });
    // The sender is dropped only after it has sent.
    let _ = end.await;
}
