//! The worker as owners meet it: admission, assignment, products, health.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use actix::{Addr, Arbiter, Handler, MailboxError, Message, Supervisor};
use async_trait::async_trait;
use protocol::ids::ModelDigest;
use protocol::ids::{Direction, LinearId};
use protocol::wire::messages::{
    ControlReply, ControlRequest, DeviceOffer, Operand, PROTOCOL_VERSION, ProductHeader, Refusal, WorkerHealth,
    WorkerOffer,
};
use tokio_util::sync::CancellationToken;

use super::aggregator::{CiphertextAggregator, Combine};
use super::executor::{DeviceQueue, Drain, MatmulExecutor, Multiply};
use super::limits::WorkerLimits;
use super::parts::{HeldLinear, HeldPart};
use super::place::{Accounts, Backlog, Place};
use super::product::AdmittedProduct;
use super::shard_store::{
    AskProgress, AskRoom, AssignShard, FindMatrix, OwnerLeft, ReleaseShard, RenewLease, ShardStore, StoreAccess,
    not_allowed,
};
use super::source::ShardSource;
use super::spread::{Site, Split, Spread};
use super::sum::SumShape;
use crate::heavy::on_rayon;
use crate::matmul::{Device, DeviceError, ProductTask, tile_columns};
use crate::transport::{Admitted, PeerName, TileStream, WorkerService};

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

/// Every product may take this long, however small: a machine may be busy with something else for a while.
const LEAST_TIME: Duration = Duration::from_secs(60);
/// Times slower than measured that a device may be: with another program on it, hot, on a laptop's battery.
const SLOWER: f64 = 20.0;
/// Beyond [`LEAST_TIME`], no product may take longer, whatever a device's speed is said to be.
const MOST_TIME: Duration = Duration::from_secs(3600);

/// One device that serves.
struct Serving {
    name: String,
    macs_per_second: f64,
    queue: Arc<DeviceQueue>,
    executor: Addr<MatmulExecutor>,
}

/// A running worker.
pub struct Worker {
    source: Arc<dyn ShardSource>,
    limits: WorkerLimits,
    accounts: Arc<Accounts>,
    devices: Arc<Devices>,
    peak_rss_bytes: fn() -> u64,
    arbiter: Arbiter,
}

/// The actors that products go through.
pub(super) struct Devices {
    store: Addr<ShardStore>,
    devices: Vec<Serving>,
    aggregator: Addr<CiphertextAggregator>,
    backlog: Arc<Backlog>,
    stopping: CancellationToken,
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

        // Products of owners that lost their layers may still stand in the queue beside all that are under way.
        let waiting = 2 * limits.quota().products * limits.owners.max(1);
        let executor = |device: &Arc<dyn Device>| MatmulExecutor::new(Arc::clone(device), waiting);
        let executors = devices.iter().map(executor).collect::<std::io::Result<Vec<_>>>()?;
        let arbiter = Arbiter::new();
        let serve = |(executor, site): (MatmulExecutor, &Site)| {
            let queue = executor.queue();
            let executor = Supervisor::start_in_arbiter(&arbiter.handle(), move |_| executor);
            Serving { name: site.name.clone(), macs_per_second: site.speed, queue, executor }
        };
        let serving = executors.into_iter().zip(&sites).map(serve).collect();
        let shape = |group| source.shape(LinearId { layer: 0, group });
        let memory_for = |device: usize, shape| devices[device].memory_for(shape);
        let spread = Spread::new(split, sites, limits.memory_bytes, shape, memory_for);
        let accounts = Arc::new(Accounts::new(limits.quota()));
        let access =
            StoreAccess { tenancy: limits.tenancy(), allowed: limits.allowed.clone(), accounts: Arc::clone(&accounts) };
        let store = ShardStore::new(Arc::clone(&source), devices, spread, access);
        let store = Supervisor::start_in_arbiter(&arbiter.handle(), move |_| store);
        let aggregator = Supervisor::start_in_arbiter(&arbiter.handle(), |_| CiphertextAggregator::default());
        let (backlog, stopping) = (Arc::default(), CancellationToken::new());
        let devices = Arc::new(Devices { store, devices: serving, aggregator, backlog, stopping });
        Ok(Self { source, limits, accounts, devices, peak_rss_bytes, arbiter })
    }

    /// Takes no more products, computes those that wait, and ends the actors. Answers that are ready can still be read.
    pub async fn stop(&self) {
        self.devices.stopping.cancel();
        // An error means that the actor has ended already.
        for device in &self.devices.devices {
            let _ = device.executor.send(Drain).await;
        }
        let _ = self.devices.aggregator.send(Drain).await;
        self.arbiter.stop();
    }

    async fn offer(&self, owner: &PeerName, version: u32) -> Result<ControlReply, Refusal> {
        if version != PROTOCOL_VERSION {
            return Err(Refusal::Version(PROTOCOL_VERSION));
        }
        if !self.limits.allowed.is_empty() && !self.limits.allowed.contains(owner) {
            return Err(not_allowed(owner));
        }
        let room = ask(&self.devices.store, AskRoom).await?;
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
            devices: self.devices.devices.iter().zip(room.memory_bytes).map(offer).collect(),
        }))
    }

    async fn assign(&self, owner: &PeerName, model: ModelDigest, layers: Range<u16>) -> Result<ControlReply, Refusal> {
        ask(&self.devices.store, AssignShard { owner: owner.clone(), model, layers }).await??;
        Ok(ControlReply::Assigned)
    }

    async fn health(&self, owner: &PeerName) -> Result<ControlReply, Refusal> {
        let progress = ask(&self.devices.store, AskProgress(owner.clone())).await?;
        // Who has no layers learns nothing of what others have done here.
        let account = self.accounts.of(owner);
        let work = account.as_ref().map(|account| account.work()).unwrap_or_default();
        Ok(ControlReply::Health(WorkerHealth {
            layers: progress.layers,
            loaded: progress.loaded,
            failure: progress.failure,
            calls: work.calls,
            busy_seconds: work.busy_seconds,
            peak_rss_bytes: account.map_or(0, |_| (self.peak_rss_bytes)()),
        }))
    }

    async fn release(&self, owner: &PeerName) -> Result<ControlReply, Refusal> {
        ask(&self.devices.store, ReleaseShard(owner.clone())).await?;
        Ok(ControlReply::Released)
    }

    /// A matrix for one of an owner's products: the one that it last had, if that is still there and its own.
    async fn matrix(&self, owner: &PeerName, linear: LinearId) -> Result<Arc<HeldLinear>, Refusal> {
        let account = self.accounts.of(owner).ok_or_else(no_layers)?;
        let assigned = match account.matrix(linear) {
            Ok(matrix) => return Ok(matrix),
            Err(assigned) => assigned,
        };
        let found = ask(&self.devices.store, FindMatrix { owner: owner.clone(), linear }).await??;
        account.remember(assigned, linear, &found);
        Ok(found)
    }

    /// Everything about a header that can be refused without knowing its body; the served matrix, and the product's bytes.
    async fn checked(&self, owner: &PeerName, header: &ProductHeader) -> Result<(Arc<HeldLinear>, u64), Refusal> {
        if header.version != PROTOCOL_VERSION {
            return Err(Refusal::Version(PROTOCOL_VERSION));
        }
        if !header.precision.is_valid() {
            return Err(Refusal::Malformed(format!("{}: the set has no such bits", header.precision)));
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
        Ok((weights, bytes))
    }
}

impl Devices {
    /// Takes a product in: its owner's lease begins anew, and what it asks for counts from now on. Returns the time that
    /// it takes the devices at most.
    pub(super) fn take_in(
        &self,
        owner: &PeerName,
        place: &Place,
        weights: &HeldLinear,
        operations: u64,
    ) -> Result<Duration, Refusal> {
        if self.stopping.is_cancelled() {
            return Err(Refusal::Capacity("it is shutting down".into()));
        }
        if place.is_lost() {
            return Err(no_layers());
        }
        if !self.store.connected() {
            return Err(Refusal::Capacity("it is shutting down".into()));
        }
        // Nobody waits for that: who has lost its layers in this moment has lost its place. Nor is it refused where the store's
        // mailbox is full: there are no more of these at a time than products have places.
        self.store.do_send(RenewLease(owner.clone()));
        let speed = |part: &HeldPart| self.devices[part.device].macs_per_second;
        let slowest = weights.parts().iter().map(speed).fold(f64::INFINITY, f64::min);
        Ok(time_of(place.begin(operations), slowest))
    }

    /// Has the devices that hold a matrix compute their parts of a product, and puts these together: side by side
    /// forward, added up backward. Each stream comes with the first output column of its tiles.
    pub(super) async fn multiply(
        &self,
        weights: Arc<HeldLinear>,
        task: ProductTask,
        place: &Arc<Place>,
    ) -> Result<Vec<(usize, TileStream<Refusal>)>, Refusal> {
        let ProductTask { direction, limbs, output_bits, .. } = task;
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
            let (weights, place) = (Arc::clone(&part.matrix), Arc::clone(place));
            let multiply = Multiply { weights, task, counts: number == 0, place };
            // Where a device refuses, the streams of the others are dropped, which breaks their parts off.
            let tiles = self.devices[part.device].queue.enqueue(multiply)?;
            parts.push((part.columns.start, tiles));
        }
        if direction == Direction::Forward || parts.len() == 1 {
            return Ok(parts);
        }
        let cell_columns = tile_columns(outer);
        let shape = SumShape { parts: parts.len(), limbs, output_bits, rows, outer, cell_columns };
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

/// Bytes of a product: the body that comes in or the mask that is expanded, and the answer; where the matrix is cut, also
/// what its parts are given and give. A body that comes packed is there twice, as it came and in whole bytes.
fn product_bytes(header: &ProductHeader, weights: &HeldLinear) -> u64 {
    let (inner, outer) = weights.shape().along(header.product.direction);
    let rows = header.rows() as u64;
    let bytes = |limbs: usize, columns: usize| rows.saturating_mul(limbs as u64).saturating_mul(columns as u64);
    let operand = bytes(header.operand_limbs(), inner);
    let spread = if header.operand_bits().is_multiple_of(8) { 0 } else { operand };
    let whole = operand.saturating_add(spread).saturating_add(bytes(header.answer_limbs(), outer));
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

/// Time that so many multiply-accumulates take at most at this speed, which was measured on an idle machine.
fn time_of(operations: u64, macs_per_second: f64) -> Duration {
    let seconds = SLOWER * operations as f64 / macs_per_second;
    LEAST_TIME + Duration::try_from_secs_f64(seconds).unwrap_or(MOST_TIME).min(MOST_TIME)
}

/// What an owner is told whose layers were given up.
fn no_layers() -> Refusal {
    Refusal::Layers("this owner any more".into())
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
            ControlRequest::Offer { version } => self.offer(owner, version).await,
            ControlRequest::Assign { model, layers } => self.assign(owner, model, layers).await,
            ControlRequest::Health => self.health(owner).await,
            ControlRequest::Release => self.release(owner).await,
        };
        reply.unwrap_or_else(ControlReply::Refused)
    }

    async fn admit(&self, owner: &PeerName, header: &ProductHeader) -> Result<Box<dyn Admitted>, Refusal> {
        let (weights, bytes) = self.checked(owner, header).await?;
        let account = self.accounts.of(owner);
        let account = account.ok_or_else(no_layers)?;
        let place = account.place(bytes, &self.devices.backlog).await?;
        let (devices, owner) = (Arc::clone(&self.devices), owner.clone());
        Ok(Box::new(AdmittedProduct::new(devices, owner, header.clone(), weights, place)))
    }

    fn serves(&self, peer: &PeerName) -> bool {
        self.accounts.of(peer).is_some()
    }

    async fn left(&self, peer: &PeerName) {
        // An actor that is gone keeps no place.
        let _ = self.devices.store.send(OwnerLeft(peer.clone())).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_products_time_follows_from_its_work_and_has_bounds() {
        assert_eq!(time_of(3_000_000_000, 1e9), Duration::from_secs(120));
        assert_eq!(time_of(0, 1e9), LEAST_TIME);
        for speed in [0.0, -1.0, f64::NAN, 1e-300] {
            assert_eq!(time_of(u64::MAX, speed), LEAST_TIME + MOST_TIME, "{speed}");
        }
    }
}
