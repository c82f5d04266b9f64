//! A worker in this process that gives wrong answers once it is told to.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use actors::matmul::{CpuDevice, best_kernel};
use actors::transport::{Admitted, Answer, PeerName, TileStream, WorkerService};
use actors::worker::{ModelSource, Split, Worker, WorkerLimits};
use async_trait::async_trait;
use node::swarm::{Identity, ServeConfig, Serving, SwarmConfig, SwarmHandle, SwarmRole, serve};
use protocol::he::Planes;
use protocol::wire::messages::{ControlReply, ControlRequest, ProductHeader, Refusal};
use tokio::sync::mpsc;

/// Memory for its layers.
const MEMORY: u64 = 1 << 30;

/// Whether it lies, and how often it did.
#[derive(Default)]
pub(crate) struct Lies {
    on: AtomicBool,
    told: AtomicU64,
}

impl Lies {
    pub(crate) fn begin(&self) {
        self.on.store(true, Ordering::Relaxed);
    }

    pub(crate) fn told(&self) -> u64 {
        self.told.load(Ordering::Relaxed)
    }
}

/// The worker; it leaves with the value.
pub(crate) struct Liar {
    /// Its name on the network.
    pub(crate) peer: String,
    pub(crate) lies: Arc<Lies>,
    swarm: SwarmHandle,
    _serving: Serving,
}

impl Liar {
    /// Starts an honest one, which dials an owner at a port of this machine; call it inside an actix system.
    pub(crate) async fn start(source: ModelSource, owner: u16) -> anyhow::Result<Self> {
        let limits = WorkerLimits { memory_bytes: MEMORY, ..WorkerLimits::default() };
        let device = Arc::new(CpuDevice::new(best_kernel()));
        let worker = Worker::start(Arc::new(source), vec![device], Split::Layers, limits, || 0).await?;
        let identity = Identity::ephemeral();
        let peer = identity.peer_id().to_base58();
        let mut config = SwarmConfig::new(identity, SwarmRole::Worker);
        config.dial = vec![format!("/ip4/127.0.0.1/tcp/{owner}").parse()?];
        let swarm = SwarmHandle::start(config).await?;
        let lies = Arc::new(Lies::default());
        let service = Service { worker, lies: Arc::clone(&lies) };
        let serving = serve(&swarm, Arc::new(service), ServeConfig::default()).await?;
        Ok(Self { peer, lies, swarm, _serving: serving })
    }
}

impl Drop for Liar {
    fn drop(&mut self) {
        self.swarm.shut_down();
    }
}

struct Service {
    worker: Worker,
    lies: Arc<Lies>,
}

#[async_trait]
impl WorkerService for Service {
    async fn control(&self, owner: &PeerName, request: ControlRequest) -> ControlReply {
        self.worker.control(owner, request).await
    }

    async fn admit(&self, owner: &PeerName, header: &ProductHeader) -> Result<Box<dyn Admitted>, Refusal> {
        let honest = self.worker.admit(owner, header).await?;
        Ok(Box::new(Product { honest, lies: Arc::clone(&self.lies) }))
    }

    fn serves(&self, peer: &PeerName) -> bool {
        self.worker.serves(peer)
    }

    async fn left(&self, peer: &PeerName) {
        self.worker.left(peer).await;
    }
}

struct Product {
    honest: Box<dyn Admitted>,
    lies: Arc<Lies>,
}

#[async_trait]
impl Admitted for Product {
    fn inner(&self) -> usize {
        self.honest.inner()
    }

    fn outer(&self) -> usize {
        self.honest.outer()
    }

    async fn begin(self: Box<Self>, body: Option<Arc<Planes>>) -> Result<Answer, Refusal> {
        let mut answer = self.honest.begin(body).await?;
        if self.lies.on.load(Ordering::Relaxed) {
            self.lies.told.fetch_add(1, Ordering::Relaxed);
            answer.tiles = altered(answer.tiles);
        }
        Ok(answer)
    }
}

/// The same tiles with a bit of each turned, in the middle.
fn altered(mut honest: TileStream<Refusal>) -> TileStream<Refusal> {
    let (sender, tiles) = mpsc::channel(1);
    tokio::spawn(async move {
        while let Some(mut tile) = honest.recv().await {
            if let Ok(tile) = &mut tile {
                let bytes = tile.rows.bytes_mut();
                bytes[bytes.len() / 2] ^= 1;
            }
            if sender.send(tile).await.is_err() {
                break;
            }
        }
    });
    tiles
}
