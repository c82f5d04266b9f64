//! The worker as owners meet it: admission, assignment, products, health.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use actix::{Addr, Arbiter, Handler, MailboxError, Message, Supervisor};
use async_trait::async_trait;
use protocol::he::{MaskDomain, MaskSeed};
use protocol::ids::ModelDigest;
use protocol::ids::{Direction, LinearId};
use protocol::wire::messages::{
    ControlReply, ControlRequest, DeviceOffer, Operand, PROTOCOL_VERSION, ProductHeader, Refusal, WorkerHealth,
    WorkerOffer,
};
use tokio::sync::{Semaphore, TryAcquireError, mpsc};

use super::aggregator::{CiphertextAggregator, Combine};
use super::executor::{AskWork, Drain, MatmulExecutor, Multiply, Work};
use super::parts::HeldLinear;
use super::shard_store::{AskProgress, AskRoom, AssignShard, FindMatrix, ReleaseShard, ShardStore, StoreLimits};
use super::source::ShardSource;
use super::spread::{Site, Split, Spread};
use super::streams::forward;
use super::sum::SumShape;
use crate::heavy::on_rayon;
use crate::matmul::{Device, DeviceError, Multiplicand, ProductTask, tile_columns};
use crate::transport::{PeerName, ProductRequest, TileStream, WorkerService};

/// Tiles that wait for a slow reader beside those that the executor holds for it.
const READY_TILES: usize = 2;

/// What a worker allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkerLimits {
    /// Memory of this process for matrices, bytes: those of all devices that have no memory of their own.
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
    /// Nothing to multiply with.
    #[error("a worker needs at least one device")]
    NoDevice,
    /// No thread for a device.
    #[error("no thread for the device could be started: {0}")]
    Thread(#[from] std::io::Error),
    /// A device that does not work.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The speed measurement did not end.
    #[error("the measurement of the device's speed panicked; this is a bug")]
    Measurement,
}

/// One device that serves.
struct Serving {
    name: String,
    macs_per_second: f64,
    executor: Addr<MatmulExecutor>,
}

/// A running worker.
pub struct Worker {
    source: Arc<dyn ShardSource>,
    limits: WorkerLimits,
    store: Addr<ShardStore>,
    devices: Vec<Serving>,
    aggregator: Addr<CiphertextAggregator>,
    products: Arc<Semaphore>,
    peak_rss_bytes: fn() -> u64,
    arbiter: Arbiter,
}

impl Worker {
    /// Measures the devices' speed, one after another, and starts the actors on a thread of their own; call it inside an
    /// actix system. `split` says how matrices are spread over the devices, `peak_rss_bytes` how much memory the process
    /// has used at most.
    ///
    /// # Errors
    /// When there is no device, one does not work, or the operating system gives no thread.
    pub async fn start(
        source: Arc<dyn ShardSource>,
        devices: Vec<Arc<dyn Device>>,
        split: Split,
        limits: WorkerLimits,
        peak_rss_bytes: fn() -> u64,
    ) -> Result<Self, StartError> {
        if devices.is_empty() {
            return Err(StartError::NoDevice);
        }
        let devices: Arc<[Arc<dyn Device>]> = devices.into();
        let measured = Arc::clone(&devices);
        let measure = move || measured.iter().map(|device| site(device.as_ref())).collect::<Result<Vec<Site>, _>>();
        let sites = tokio::task::spawn_blocking(measure).await.map_err(|_| StartError::Measurement)??;

        let executor = |device: &Arc<dyn Device>| MatmulExecutor::new(Arc::clone(device), limits.products);
        let executors = devices.iter().map(executor).collect::<std::io::Result<Vec<_>>>()?;
        let arbiter = Arbiter::new();
        let serve = |(executor, site): (MatmulExecutor, &Site)| {
            let executor = Supervisor::start_in_arbiter(&arbiter.handle(), move |_| executor);
            Serving { name: site.name.clone(), macs_per_second: site.speed, executor }
        };
        let serving = executors.into_iter().zip(&sites).map(serve).collect();
        let shape = |group| source.shape(LinearId { layer: 0, group });
        let memory_for = |device: usize, shape| devices[device].memory_for(shape);
        let spread = Spread::new(split, sites, limits.memory_bytes, shape, memory_for);
        let store = ShardStore::new(
            Arc::clone(&source),
            devices,
            spread,
            StoreLimits { owners: limits.owners, lease: limits.lease },
        );
        let store = Supervisor::start_in_arbiter(&arbiter.handle(), move |_| store);
        let aggregator = Supervisor::start_in_arbiter(&arbiter.handle(), |_| CiphertextAggregator::default());
        Ok(Self {
            source,
            limits,
            store,
            devices: serving,
            aggregator,
            products: Arc::new(Semaphore::new(limits.products)),
            peak_rss_bytes,
            arbiter,
        })
    }

    /// Takes no more products, computes those that wait, and ends the actors. Answers that are ready can still be read.
    pub async fn stop(&self) {
        self.products.close();
        // An error means that the actor has ended already.
        for device in &self.devices {
            let _ = device.executor.send(Drain).await;
        }
        let _ = self.aggregator.send(Drain).await;
        self.arbiter.stop();
    }

    async fn offer(&self, version: u32) -> Result<ControlReply, Refusal> {
        if version != PROTOCOL_VERSION {
            return Err(Refusal::Version(PROTOCOL_VERSION));
        }
        let room = ask(&self.store, AskRoom).await?;
        let offer = |(device, memory_bytes): (&Serving, u64)| DeviceOffer {
            name: device.name.clone(),
            memory_bytes,
            macs_per_second: device.macs_per_second,
        };
        Ok(ControlReply::Offer(WorkerOffer {
            version: PROTOCOL_VERSION,
            model: self.source.digest(),
            layers: self.source.layers(),
            room: room.layers,
            devices: self.devices.iter().zip(room.memory_bytes).map(offer).collect(),
        }))
    }

    async fn assign(&self, owner: &PeerName, model: ModelDigest, layers: Range<u16>) -> Result<ControlReply, Refusal> {
        ask(&self.store, AssignShard { owner: owner.clone(), model, layers }).await??;
        Ok(ControlReply::Assigned)
    }

    async fn health(&self, owner: &PeerName) -> Result<ControlReply, Refusal> {
        let progress = ask(&self.store, AskProgress(owner.clone())).await?;
        let mut work = Work::default();
        for device in &self.devices {
            let Work { calls, busy_seconds } = ask(&device.executor, AskWork).await?;
            work.calls += calls;
            work.busy_seconds += busy_seconds;
        }
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

    async fn matrix(&self, owner: &PeerName, linear: LinearId) -> Result<Arc<HeldLinear>, Refusal> {
        ask(&self.store, FindMatrix { owner: owner.clone(), linear }).await?
    }

    /// Everything about a header that can be refused without knowing its body.
    async fn admitted(&self, owner: &PeerName, header: &ProductHeader) -> Result<Arc<HeldLinear>, Refusal> {
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
        let weights = self.matrix(owner, header.product.linear).await?;
        let (bytes, limit) = (product_bytes(header, &weights), self.limits.product_bytes);
        if bytes > limit {
            return Err(Refusal::Capacity(format!("a product of {bytes} bytes, where {limit} are allowed")));
        }
        Ok(weights)
    }

    /// Has the devices that hold a matrix compute their parts of a product, and puts these together: side by side
    /// forward, added up backward. Each stream comes with the first output column of its tiles.
    async fn multiply(
        &self,
        weights: Arc<HeldLinear>,
        task: ProductTask,
    ) -> Result<Vec<(usize, TileStream<Refusal>)>, Refusal> {
        let ProductTask { direction, limbs, output_limbs, .. } = task;
        let (rows, (_, outer)) = (task.rows.count(), weights.shape().along(direction));
        let tasks = if direction == Direction::Backward && weights.parts().len() > 1 {
            // The columns of a body are copied.
            let cut = Arc::clone(&weights);
            on_rayon(move || cut.tasks(task)).await.map_err(|error| Refusal::Failed(error.to_string()))?
        } else {
            weights.tasks(task)
        };
        let mut parts = Vec::with_capacity(tasks.len());
        for (number, (part, task)) in weights.parts().iter().zip(tasks).enumerate() {
            let multiply = Multiply { weights: Arc::clone(&part.matrix), task, counts: number == 0 };
            // Where a device refuses, the streams of the others are dropped, which breaks their parts off.
            let tiles = ask(&self.devices[part.device].executor, multiply).await??;
            parts.push((part.columns.start, tiles));
        }
        if direction == Direction::Forward || parts.len() == 1 {
            return Ok(parts);
        }
        let cell_columns = tile_columns(outer);
        let shape = SumShape { parts: parts.len(), limbs, output_limbs, rows, outer, cell_columns };
        let parts = parts.into_iter().map(|(_, tiles)| tiles).collect();
        Ok(vec![(0, ask(&self.aggregator, Combine { parts, shape }).await??)])
    }
}

/// A device, with its speed measured. Blocks.
fn site(device: &dyn Device) -> Result<Site, DeviceError> {
    let site = Site { name: device.name(), speed: device.measure_speed()?, own_memory: device.own_memory() };
    tracing::info!(device = site.name, macs_per_second = site.speed, own_memory = site.own_memory, "ready to multiply");
    Ok(site)
}

impl Drop for Worker {
    fn drop(&mut self) {
        // Without an arbiter the actors end, and with the executor its device's thread.
        self.arbiter.stop();
    }
}

/// Bytes of a product: the body that comes in or the mask that is expanded, and the answer; where the matrix is cut,
/// also what its parts are given and give.
fn product_bytes(header: &ProductHeader, weights: &HeldLinear) -> u64 {
    let (inner, outer) = weights.shape().along(header.product.direction);
    let rows = header.rows() as u64;
    let bytes = |limbs: usize, columns: usize| rows.saturating_mul(limbs as u64).saturating_mul(columns as u64);
    let operand = bytes(header.operand_limbs(), inner);
    let whole = operand.saturating_add(bytes(header.answer_limbs(), outer));
    let parts = weights.parts().len() as u64;
    if parts == 1 {
        return whole;
    }
    let summands = bytes(header.operand_limbs(), outer).saturating_mul(parts);
    let of_parts = match (header.product.direction, header.operand) {
        // Each expands the whole mask; a body is shared.
        (Direction::Forward, Operand::Masks { .. }) => operand.saturating_mul(parts - 1),
        (Direction::Forward, Operand::Body { .. }) => 0,
        // Each expands its features of the mask, or has a copy of its columns of the body.
        (Direction::Backward, Operand::Masks { .. }) => summands,
        (Direction::Backward, Operand::Body { .. }) => summands.saturating_add(operand),
    };
    whole.saturating_add(of_parts)
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
        MailboxError::Timeout => Refusal::Busy("it is overloaded".into()),
    })
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
        Ok(weights.shape().along(header.product.direction))
    }

    async fn product(&self, owner: &PeerName, request: ProductRequest) -> Result<TileStream<Refusal>, Refusal> {
        let weights = self.admitted(owner, &request.header).await?;
        let (inner, _) = weights.shape().along(request.header.product.direction);
        if !request.is_consistent(inner) {
            return Err(Refusal::Malformed("the body is not what its header says".into()));
        }
        let ProductRequest { header, body, .. } = request;
        let (limbs, output_limbs) = (header.operand_limbs(), header.answer_limbs());
        let ProductHeader { product, precision, .. } = header;
        let rows = match (header.operand, body) {
            (Operand::Body { .. }, Some(body)) => Multiplicand::Body(body),
            (Operand::Masks { seed }, _) => Multiplicand::Masks {
                seed: MaskSeed::from_bytes(seed),
                domain: MaskDomain { set: precision.set, product },
                first_feature: 0,
            },
            (Operand::Body { .. }, None) => return Err(Refusal::Malformed("a body product without a body".into())),
        };
        let place = Arc::clone(&self.products).try_acquire_owned().map_err(|error| {
            let limit = self.limits.products;
            match error {
                TryAcquireError::Closed => Refusal::Capacity("it is shutting down".into()),
                TryAcquireError::NoPermits => Refusal::Busy(format!("it takes {limit} products at a time")),
            }
        })?;
        let parts =
            self.multiply(weights, ProductTask { direction: product.direction, limbs, output_limbs, rows }).await?;
        let (sender, stream) = mpsc::channel(READY_TILES);
        tokio::spawn(forward(parts, sender, place));
        Ok(stream)
    }
}
