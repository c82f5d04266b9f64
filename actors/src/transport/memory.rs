//! A network without sockets: an owner's calls go straight to the workers' services. Tests and single-process runs use
//! it; a test can have it fail.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use protocol::he::{Planes, ProductTile};
use protocol::wire::messages::{ControlReply, ControlRequest, Refusal};
use tokio::sync::mpsc;

use super::{Answer, PeerName, ProductRequest, TileStream, Traffic, Transport, TransportError, WorkerService};

/// Tiles on their way: a network holds little more.
const TILES_IN_FLIGHT: usize = 2;

/// What goes wrong with products sent to a worker.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// Products that are affected before all is well again; `None`: all of them.
    pub products: Option<u32>,
    /// Wait so long before anything else happens.
    pub delay: Duration,
    /// The worker cannot be reached.
    pub unreachable: bool,
    /// The worker answers with this.
    pub refuse: Option<Refusal>,
    /// The connection breaks after so many tiles.
    pub break_after: Option<usize>,
}

/// See the module's documentation.
pub struct MemoryTransport {
    owner: PeerName,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    workers: HashMap<PeerName, Worker>,
    traffic: Traffic,
}

struct Worker {
    service: Arc<dyn WorkerService>,
    faults: Faults,
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl MemoryTransport {
    /// A network on which this side is called `owner`, with nobody else on it.
    pub fn new(owner: PeerName) -> Self {
        Self { owner, state: Arc::default() }
    }

    /// Adds a worker, in place of one of the same name.
    pub fn connect(&self, name: PeerName, service: Arc<dyn WorkerService>) {
        lock(&self.state).workers.insert(name, Worker { service, faults: Faults::default() });
    }

    /// Takes a worker off the network. Products that it is computing run on.
    pub fn disconnect(&self, name: &PeerName) {
        lock(&self.state).workers.remove(name);
    }

    /// From now on, products sent to `name` suffer these faults instead of earlier ones. No effect on a worker that is
    /// not connected.
    pub fn inject(&self, name: &PeerName, faults: Faults) {
        if let Some(worker) = lock(&self.state).workers.get_mut(name) {
            worker.faults = faults;
        }
    }

    fn service(&self, name: &PeerName) -> Result<Arc<dyn WorkerService>, TransportError> {
        let state = lock(&self.state);
        let worker = state.workers.get(name).ok_or_else(|| unreachable(name, "nobody of this name is connected"))?;
        Ok(Arc::clone(&worker.service))
    }

    /// The faults of the next product, which uses them up.
    fn faults(&self, name: &PeerName) -> Faults {
        let mut state = lock(&self.state);
        let Some(worker) = state.workers.get_mut(name) else { return Faults::default() };
        match &mut worker.faults.products {
            Some(0) => Faults::default(),
            Some(left) => {
                *left -= 1;
                worker.faults.clone()
            }
            None => worker.faults.clone(),
        }
    }
}

fn unreachable(peer: &PeerName, what: &str) -> TransportError {
    TransportError::Unreachable { peer: peer.clone(), what: what.into() }
}

fn refused(peer: &PeerName, refusal: Refusal) -> TransportError {
    TransportError::Refused { peer: peer.clone(), refusal }
}

fn bytes(planes: &Planes) -> u64 {
    planes.bytes().len() as u64
}

#[async_trait]
impl Transport for MemoryTransport {
    async fn control(&self, worker: &PeerName, request: ControlRequest) -> Result<ControlReply, TransportError> {
        match self.service(worker)?.control(&self.owner, request).await {
            ControlReply::Refused(refusal) => Err(refused(worker, refusal)),
            reply => Ok(reply),
        }
    }

    async fn product(
        &self,
        worker: &PeerName,
        request: ProductRequest,
    ) -> Result<TileStream<TransportError>, TransportError> {
        let service = self.service(worker)?;
        let faults = self.faults(worker);
        tokio::time::sleep(faults.delay).await;
        if faults.unreachable {
            return Err(unreachable(worker, "the test says so"));
        }
        if let Some(refusal) = faults.refuse {
            return Err(refused(worker, refusal));
        }

        let admitted = service.admit(&self.owner, &request.header).await.map_err(|refusal| refused(worker, refusal))?;
        let (inner, outer) = (admitted.inner(), admitted.outer());
        if request.body.as_ref().is_some_and(|body| body.columns() != inner) || request.outer != outer {
            let what = format!("its matrix is {inner} × {outer}, the request's is not");
            return Err(TransportError::Protocol { peer: worker.clone(), what });
        }
        lock(&self.state).traffic.up += request.body.as_deref().map_or(0, bytes);
        let answer = admitted.begin(request.body).await.map_err(|refusal| refused(worker, refusal))?;
        let (sender, receiver) = mpsc::channel(TILES_IN_FLIGHT);
        tokio::spawn(carry(answer, sender, worker.clone(), faults.break_after, Arc::clone(&self.state)));
        Ok(receiver)
    }

    fn traffic(&self) -> Traffic {
        lock(&self.state).traffic
    }
}

/// Carries tiles to the owner, until one side ends or the connection breaks.
async fn carry(
    answer: Answer,
    sender: mpsc::Sender<Result<ProductTile, TransportError>>,
    worker: PeerName,
    break_after: Option<usize>,
    state: Arc<Mutex<State>>,
) {
    let Answer { mut tiles, time: _, place: _place } = answer;
    let mut carried = 0;
    loop {
        if break_after == Some(carried) {
            // The owner may be gone.
            let _ = sender.send(Err(unreachable(&worker, "the connection broke"))).await;
            return;
        }
        let tile = tokio::select! {
            () = sender.closed() => return,
            tile = tiles.recv() => tile,
        };
        let Some(tile) = tile else { return };
        if let Ok(tile) = &tile {
            lock(&state).traffic.down += bytes(&tile.rows);
        }
        if sender.send(tile.map_err(|refusal| refused(&worker, refusal))).await.is_err() {
            return;
        }
        carried += 1;
    }
}
