//! The worker as owners meet it: admission, assignment, products, health.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use actix::{Addr, Arbiter, Handler, MailboxError, Message, Supervisor};
use async_trait::async_trait;
use protocol::he::{MaskDomain, MaskSeed};
use protocol::model::LinearId;
use protocol::wire::messages::{
    ControlReply, ControlRequest, DeviceOffer, ModelDigest, Operand, PROTOCOL_VERSION, ProductHeader, Refusal,
    WorkerHealth, WorkerOffer,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use super::executor::{AskWork, Drain, MatmulExecutor, Multiplicand, Multiply};
use super::shard_store::{AskFreeMemory, AskProgress, AssignShard, FindMatrix, ReleaseShard, ShardStore, StoreLimits};
use super::source::ShardSource;
use crate::matmul::{Kernel, PackedLinear, measure_speed};
use crate::transport::{PeerName, ProductRequest, TileStream, WorkerService};

/// Tiles that wait for a slow reader beside those that the executor holds for it.
const READY_TILES: usize = 2;

/// What a worker allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkerLimits {
    /// Memory for packed matrices, bytes.
    pub memory_bytes: u64,
    /// Owners served at a time.
    pub owners: usize,
    /// How long an idle owner keeps its layers when another one asks for its place.
    pub lease: Duration,
    /// Most rows of a body.
    pub tokens: u32,
    /// Most bytes of one product: what is multiplied and the answer.
    pub product_bytes: u64,
    /// Products that are computed, wait to be, or whose answer is still being read.
    pub products: usize,
}

impl Default for WorkerLimits {
    fn default() -> Self {
        Self {
            // The packed blocks of a model of about four billion parameters; who has less says so.
            memory_bytes: 8 << 30,
            // One owner keeps all cores busy; a second would only make both slower.
            owners: 1,
            // Longer than an owner's pauses (an evaluation, a checkpoint), short enough that a crashed one blocks nobody.
            lease: Duration::from_secs(120),
            // Sixteen sequences of 4,096 tokens.
            tokens: 1 << 16,
            // 4,096 tokens of the widest product of an 8-billion-parameter Llama at P32, with room to spare.
            product_bytes: 1 << 30,
            // Enough for the micro-batches that an owner has in flight.
            products: 16,
        }
    }
}

/// Why a worker could not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// No thread for a device.
    #[error("no thread for the device could be started: {0}")]
    Thread(#[from] std::io::Error),
    /// The speed measurement did not end.
    #[error("the measurement of the device's speed panicked; this is a bug")]
    Measurement,
}

/// One device.
struct Device {
    name: String,
    macs_per_second: f64,
    executor: Addr<MatmulExecutor>,
}

/// A running worker.
pub struct Worker {
    source: Arc<dyn ShardSource>,
    limits: WorkerLimits,
    store: Addr<ShardStore>,
    device: Device,
    products: Arc<Semaphore>,
    peak_rss_bytes: fn() -> u64,
    arbiter: Arbiter,
}

impl Worker {
    /// Measures the kernel's speed and starts the actors on a thread of their own; call it inside an actix system.
    /// `peak_rss_bytes` says how much memory the process has used at most.
    ///
    /// # Errors
    /// When the operating system gives no thread.
    pub async fn start(
        source: Arc<dyn ShardSource>,
        kernel: Arc<dyn Kernel>,
        limits: WorkerLimits,
        peak_rss_bytes: fn() -> u64,
    ) -> Result<Self, StartError> {
        let measured = Arc::clone(&kernel);
        let macs_per_second = tokio::task::spawn_blocking(move || measure_speed(measured.as_ref()))
            .await
            .map_err(|_| StartError::Measurement)?;
        let name = format!("cpu ({})", kernel.name());
        tracing::info!(device = name, macs_per_second, "ready to multiply");

        let executor = MatmulExecutor::new(kernel, limits.products)?;
        let store_limits =
            StoreLimits { memory_bytes: limits.memory_bytes, owners: limits.owners, lease: limits.lease };
        let of_store = Arc::clone(&source);
        let arbiter = Arbiter::new();
        let store = Supervisor::start_in_arbiter(&arbiter.handle(), move |_| ShardStore::new(of_store, store_limits));
        let executor = Supervisor::start_in_arbiter(&arbiter.handle(), move |_| executor);
        Ok(Self {
            source,
            limits,
            store,
            device: Device { name, macs_per_second, executor },
            products: Arc::new(Semaphore::new(limits.products)),
            peak_rss_bytes,
            arbiter,
        })
    }

    /// Takes no more products, computes those that wait, and ends the actors. Answers that are ready can still be read.
    pub async fn stop(&self) {
        self.products.close();
        // An error means that the executor has ended already.
        let _ = self.device.executor.send(Drain).await;
        self.arbiter.stop();
    }

    async fn offer(&self, version: u32) -> Result<ControlReply, Refusal> {
        if version != PROTOCOL_VERSION {
            return Err(Refusal::Version(PROTOCOL_VERSION));
        }
        let device = DeviceOffer {
            name: self.device.name.clone(),
            memory_bytes: ask(&self.store, AskFreeMemory).await?,
            macs_per_second: self.device.macs_per_second,
        };
        Ok(ControlReply::Offer(WorkerOffer {
            version: PROTOCOL_VERSION,
            model: self.source.digest(),
            layers: self.source.layers(),
            devices: vec![device],
        }))
    }

    async fn assign(&self, owner: &PeerName, model: ModelDigest, layers: Range<u16>) -> Result<ControlReply, Refusal> {
        ask(&self.store, AssignShard { owner: owner.clone(), model, layers }).await??;
        Ok(ControlReply::Assigned)
    }

    async fn health(&self, owner: &PeerName) -> Result<ControlReply, Refusal> {
        let progress = ask(&self.store, AskProgress(owner.clone())).await?;
        let work = ask(&self.device.executor, AskWork).await?;
        Ok(ControlReply::Health(WorkerHealth {
            layers: progress.layers,
            loaded: progress.loaded,
            failure: progress.failure,
            calls: work.calls,
            busy_seconds: work.busy_seconds,
            peak_rss_bytes: (self.peak_rss_bytes)(),
        }))
    }

    async fn release(&self, owner: &PeerName) -> Result<ControlReply, Refusal> {
        ask(&self.store, ReleaseShard(owner.clone())).await?;
        Ok(ControlReply::Released)
    }

    async fn matrix(&self, owner: &PeerName, linear: LinearId) -> Result<Arc<PackedLinear>, Refusal> {
        ask(&self.store, FindMatrix { owner: owner.clone(), linear }).await?
    }

    /// Everything about a header that can be refused without knowing its body.
    async fn admitted(&self, owner: &PeerName, header: &ProductHeader) -> Result<Arc<PackedLinear>, Refusal> {
        if header.version != PROTOCOL_VERSION {
            return Err(Refusal::Version(PROTOCOL_VERSION));
        }
        if !header.precision.is_valid() {
            return Err(Refusal::Malformed(format!("{}: the set has no such bytes", header.precision)));
        }
        if let Operand::Body { tokens } = header.operand
            && (tokens == 0 || tokens > self.limits.tokens)
        {
            let limit = self.limits.tokens;
            return Err(Refusal::Malformed(format!("{tokens} rows, where 1 to {limit} are allowed")));
        }
        let weights = self.matrix(owner, header.linear).await?;
        let matrix = weights.along(header.direction);
        let (bytes, limit) = (product_bytes(header, matrix.inner(), matrix.outer()), self.limits.product_bytes);
        if bytes > limit {
            return Err(Refusal::Capacity(format!("a product of {bytes} bytes, where {limit} are allowed")));
        }
        Ok(weights)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // Without an arbiter the actors end, and with the executor its device's thread.
        self.arbiter.stop();
    }
}

/// Bytes of a product: the body that comes in or the mask that is expanded, and the answer.
fn product_bytes(header: &ProductHeader, inner: usize, outer: usize) -> u64 {
    let rows = header.rows() as u64;
    let bytes = |limbs: usize, columns: usize| rows.saturating_mul(limbs as u64).saturating_mul(columns as u64);
    bytes(header.operand_limbs(), inner).saturating_add(bytes(header.answer_limbs(), outer))
}

/// Asks an actor; one that is gone or overwhelmed is a refusal, not a panic.
async fn ask<A, M>(actor: &Addr<A>, message: M) -> Result<M::Result, Refusal>
where
    A: Handler<M>,
    A::Context: actix::dev::ToEnvelope<A, M>,
    M: Message + Send + 'static,
    M::Result: Send,
{
    actor.send(message).await.map_err(|error| match error {
        MailboxError::Closed => Refusal::Capacity("it is shutting down".into()),
        MailboxError::Timeout => Refusal::Capacity("it is overloaded".into()),
    })
}

/// Hands tiles on to the reader at the reader's pace, and keeps the product's place until the last one is taken.
async fn forward(
    mut tiles: TileStream<Refusal>,
    reader: mpsc::Sender<Result<protocol::he::ProductTile, Refusal>>,
    place: OwnedSemaphorePermit,
) {
    loop {
        let tile = tokio::select! {
            // Dropping `tiles` breaks the product off.
            () = reader.closed() => break,
            tile = tiles.recv() => tile,
        };
        let Some(tile) = tile else { break };
        if reader.send(tile).await.is_err() {
            break;
        }
    }
    drop(place);
}

#[async_trait]
impl WorkerService for Worker {
    async fn control(&self, owner: &PeerName, request: ControlRequest) -> ControlReply {
        let reply = match request {
            ControlRequest::Offer { version } => self.offer(version).await,
            ControlRequest::Assign { model, layers } => self.assign(owner, model, layers).await,
            ControlRequest::Health => self.health(owner).await,
            ControlRequest::Release => self.release(owner).await,
        };
        reply.unwrap_or_else(ControlReply::Refused)
    }

    async fn admit(&self, owner: &PeerName, header: &ProductHeader) -> Result<(usize, usize), Refusal> {
        let weights = self.admitted(owner, header).await?;
        Ok(weights.shape().along(header.direction))
    }

    async fn product(&self, owner: &PeerName, request: ProductRequest) -> Result<TileStream<Refusal>, Refusal> {
        let weights = self.admitted(owner, &request.header).await?;
        let (inner, _) = weights.shape().along(request.header.direction);
        if !request.is_consistent(inner) {
            return Err(Refusal::Malformed("the body is not what its header says".into()));
        }
        let ProductRequest { header, body, .. } = request;
        let ProductHeader { linear, direction, precision, .. } = header;
        let rows = match (header.operand, body) {
            (Operand::Body { .. }, Some(body)) => Multiplicand::Body(body),
            (Operand::Masks { seed }, _) => Multiplicand::Masks {
                seed: MaskSeed::from_bytes(seed),
                domain: MaskDomain { set: precision.set, linear, direction },
            },
            (Operand::Body { .. }, None) => return Err(Refusal::Malformed("a body product without a body".into())),
        };
        let place = Arc::clone(&self.products).try_acquire_owned().map_err(|error| {
            let why = match error {
                tokio::sync::TryAcquireError::Closed => "it is shutting down".into(),
                tokio::sync::TryAcquireError::NoPermits => format!("{} products at a time", self.limits.products),
            };
            Refusal::Capacity(why)
        })?;
        let multiply = Multiply { precision, direction, weights, rows };
        let tiles = ask(&self.device.executor, multiply).await??;
        let (sender, stream) = mpsc::channel(READY_TILES);
        tokio::spawn(forward(tiles, sender, place));
        Ok(stream)
    }
}
