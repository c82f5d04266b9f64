//! The owner's actors against workers that compute with the scheme's reference semantics.

mod convoy;
mod faults;
mod pads;
mod workers;

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Mutex;
use std::time::Duration;

use async_trait::async_trait;
use protocol::buffer::Buffer;
use protocol::he::{MaskDomain, MaskSeed, Planes, ProductTile, reference};
use protocol::ids::ModelDigest;
use protocol::ids::{Direction, Group, LinearId, LinearShape};
use protocol::quant::{LinearMeta, PrecisionTarget, Step, serve};
use protocol::wire::messages::{
    ControlReply, ControlRequest, DeviceOffer, Operand, PROTOCOL_VERSION, Refusal, WorkerHealth, WorkerOffer,
};
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use tokio::sync::mpsc;

use super::fleet::{FleetSettings, Presence};
use super::mask_file::{MaskDisk, MaskFile, MaskRoom};
use super::mask_store::MaskStore;
use super::scheduler::{AskHealth, AssignLayers, Candidate, Notice, ReleaseLayers};
use super::*;
use crate::backend::{BackendFailure, LinearBackend as _};
use crate::transport::{PeerName, ProductRequest, TileStream, Traffic, TransportError};

const SHAPE: LinearShape = LinearShape { d_in: 48, d_out: 40 };
const LAYERS: u16 = 3;

/// How a product fails.
enum Fault {
    /// Nobody is there.
    Unreachable,
    /// The worker says at once that it is busy.
    Busy,
    /// It says so where a tile is expected.
    BusyLater,
}

/// Workers in memory: every worker has every matrix, but serves only the layers that it was assigned.
#[derive(Default)]
struct Workers {
    matrices: HashMap<LinearId, Vec<i8>>,
    assigned: Mutex<HashMap<PeerName, std::ops::Range<u16>>>,
    sent: Mutex<Vec<ProductRequest>>,
    /// To whom, in the same order.
    sent_to: Mutex<Vec<PeerName>>,
    /// How the next products fail, if they do.
    faults: Mutex<VecDeque<Option<Fault>>>,
    /// Columns of a tile.
    tile: usize,
    /// Streams of answers that never come.
    hanging: Mutex<Vec<mpsc::Sender<Result<ProductTile, TransportError>>>>,
    /// What is wrong with a worker, until it is well again.
    moods: Mutex<HashMap<PeerName, Mood>>,
}

/// What is wrong with a worker.
#[derive(Clone, Copy, PartialEq)]
enum Mood {
    /// Nobody is there.
    Down,
    /// It takes products and never answers; it says that it does well.
    Hangs,
    /// Its answers lack columns.
    Short,
    /// A value of each of its answers is off by much.
    Lies,
    /// It says for ever that it loads its layers.
    Loads,
}

fn columns_of(planes: &Planes, columns: std::ops::Range<usize>) -> Planes {
    let mut part = Planes::zeros_of_bits(planes.bits(), planes.rows(), columns.len());
    for row in 0..planes.rows() {
        for (to, from) in columns.clone().enumerate() {
            part.set_value(row, to, planes.value(row, from));
        }
    }
    part
}

fn name(number: usize) -> PeerName {
    PeerName::from(format!("worker {number}").as_str())
}

fn offer(speed: f64) -> WorkerOffer {
    WorkerOffer {
        version: PROTOCOL_VERSION,
        model: ModelDigest([0; 32]),
        layers: LAYERS,
        room: LAYERS,
        devices: vec![DeviceOffer { name: "cpu".into(), memory_bytes: 1 << 30, macs_per_second: speed }],
    }
}

impl Workers {
    fn mood(&self, worker: &PeerName) -> Option<Mood> {
        self.moods.lock().unwrap().get(worker).copied()
    }

    fn feel(&self, number: usize, mood: Option<Mood>) {
        let mut moods = self.moods.lock().unwrap();
        match mood {
            Some(mood) => moods.insert(name(number), mood),
            None => moods.remove(&name(number)),
        };
    }

    /// Bodies that were sent to a worker.
    fn bodies_at(&self, number: usize) -> usize {
        let peers = self.sent_to.lock().unwrap();
        let sent = self.sent.lock().unwrap();
        peers.iter().zip(sent.iter()).filter(|(peer, sent)| **peer == name(number) && sent.body.is_some()).count()
    }

    /// What was sent, in order.
    fn asked(&self) -> Vec<&'static str> {
        let kind = |request: &ProductRequest| if request.body.is_some() { "body" } else { "mask" };
        self.sent.lock().unwrap().iter().map(kind).collect()
    }
}

#[async_trait]
impl Transport for Workers {
    async fn control(&self, worker: &PeerName, request: ControlRequest) -> Result<ControlReply, TransportError> {
        if self.mood(worker) == Some(Mood::Down) {
            return Err(TransportError::Unreachable { peer: worker.clone(), what: "it is down".into() });
        }
        let mut assigned = self.assigned.lock().unwrap();
        Ok(match request {
            ControlRequest::Assign { layers, .. } => {
                assigned.insert(worker.clone(), layers);
                ControlReply::Assigned
            }
            ControlRequest::Health => {
                let layers = assigned.get(worker).cloned().unwrap_or_default();
                let loads = self.moods.lock().unwrap().get(worker) == Some(&Mood::Loads);
                let loaded = if loads { 0 } else { layers.len() as u16 };
                ControlReply::Health(WorkerHealth {
                    layers,
                    loaded,
                    failure: None,
                    calls: 1,
                    busy_seconds: 0.5,
                    peak_rss_bytes: 7,
                })
            }
            ControlRequest::Release => {
                assigned.remove(worker);
                ControlReply::Released
            }
            ControlRequest::Offer { .. } => {
                let held = assigned.get(worker).map_or(0, |layers| layers.len() as u16);
                ControlReply::Offer(WorkerOffer { room: LAYERS - held, ..offer(1.0) })
            }
        })
    }

    async fn product(
        &self,
        worker: &PeerName,
        request: ProductRequest,
    ) -> Result<TileStream<TransportError>, TransportError> {
        {
            // Both at once, so that they stay in the same order.
            let mut peers = self.sent_to.lock().unwrap();
            self.sent.lock().unwrap().push(request.clone());
            peers.push(worker.clone());
        }
        let header = request.header;
        let peer = worker.clone();
        let mood = self.mood(worker);
        match mood {
            Some(Mood::Down) => return Err(TransportError::Unreachable { peer, what: "it is down".into() }),
            Some(Mood::Hangs) => {
                let (sender, receiver) = mpsc::channel(1);
                self.hanging.lock().unwrap().push(sender);
                return Ok(receiver);
            }
            _ => {}
        }
        let fault = self.faults.lock().unwrap().pop_front().flatten();
        let busy = || TransportError::Refused { peer: peer.clone(), refusal: Refusal::Busy("a test".into()) };
        match fault {
            Some(Fault::Unreachable) => {
                return Err(TransportError::Unreachable { peer, what: "a test's fault".into() });
            }
            Some(Fault::Busy) => return Err(busy()),
            Some(Fault::BusyLater) => {
                let (sender, receiver) = mpsc::channel(1);
                sender.try_send(Err(busy())).unwrap();
                return Ok(receiver);
            }
            None => {}
        }
        let serves =
            self.assigned.lock().unwrap().get(worker).is_some_and(|range| range.contains(&header.product.linear.layer));
        if !serves {
            return Err(TransportError::Refused { peer, refusal: Refusal::Layers(header.product.linear.to_string()) });
        }
        let weights = &self.matrices[&header.product.linear];
        let answer = match (header.operand, &request.body) {
            (Operand::Masks { seed }, None) => {
                let set = header.precision.set;
                let domain = MaskDomain { set, product: header.product };
                reference::reference_masks(header.precision, &MaskSeed::from_bytes(seed), &domain, weights, SHAPE)
            }
            (Operand::Body { .. }, Some(body)) => {
                reference::reference_answer(header.precision, header.product.direction, body, weights, SHAPE)
            }
            _ => panic!("a body with a mask's header, or none with a body's"),
        };
        let mut answer = answer;
        if mood == Some(Mood::Lies) {
            let bits = answer.rows.bits();
            answer.rows.set_value(0, 3, answer.rows.value(0, 3) ^ 1 << (bits - 2));
        }
        let (sender, receiver) = mpsc::channel(64);
        let outer = answer.rows.columns();
        let missing = if mood == Some(Mood::Short) { self.tile } else { 0 };
        for first_column in (missing..outer).step_by(self.tile).rev() {
            let rows = columns_of(&answer.rows, first_column..outer.min(first_column + self.tile));
            sender.try_send(Ok(ProductTile { first_column, rows })).unwrap();
        }
        Ok(receiver)
    }

    fn traffic(&self) -> Traffic {
        Traffic { up: self.sent.lock().unwrap().len() as u64, down: 0 }
    }
}

struct Cluster {
    workers: Arc<Workers>,
    weights: HashMap<LinearId, Vec<f32>>,
    actors: OwnerActors,
    backend: EncryptedBackend,
}

fn random(count: usize, seed: u64) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..count).map(|_| rng.random_range(-1.0..1.0)).collect()
}

fn linears() -> impl Iterator<Item = LinearId> {
    (0..LAYERS).map(|layer| LinearId { layer, group: Group::O })
}

/// Starts the owner's actors over workers of these speeds and assigns the layers.
async fn cluster(speeds: &[f64]) -> (Cluster, Vec<scheduler::Assignment>) {
    cluster_keeping(speeds, MaskRoom::memory(usize::MAX)).await
}

/// The same with so much room for the products of masks.
async fn cluster_keeping(speeds: &[f64], room: MaskRoom) -> (Cluster, Vec<scheduler::Assignment>) {
    let (cluster, assignments, _) = cluster_with(speeds, room, FleetSettings::default()).await;
    (cluster, assignments)
}

/// The same with such a fleet; and what is said.
async fn cluster_with(
    speeds: &[f64],
    room: MaskRoom,
    settings: FleetSettings,
) -> (Cluster, Vec<scheduler::Assignment>, mpsc::Receiver<Notice>) {
    let (cluster, said) = unassigned(room);
    let assignments = cluster.actors.scheduler.send(assign(speeds, settings)).await.unwrap().unwrap();
    (cluster, assignments, said)
}

/// Asks for all layers at workers of these speeds.
fn assign(speeds: &[f64], settings: FleetSettings) -> AssignLayers {
    let candidate = |(number, &speed): (usize, &f64)| Candidate { peer: name(number), offer: offer(speed) };
    let candidates = speeds.iter().enumerate().map(candidate).collect();
    AssignLayers { model: ModelDigest([0; 32]), layers: LAYERS, candidates, settings }
}

/// The owner's actors before any layer is assigned; and what will be said.
fn unassigned(room: MaskRoom) -> (Cluster, mpsc::Receiver<Notice>) {
    let mut workers = Workers { tile: 16, ..Workers::default() };
    let mut weights = HashMap::new();
    let mut matrices = Vec::new();
    for linear in linears() {
        let matrix = random(SHAPE.d_in * SHAPE.d_out, u64::from(linear.layer));
        let (integers, meta) = serve(matrix.clone(), SHAPE).unwrap();
        workers.matrices.insert(linear, integers.values.clone());
        weights.insert(linear, matrix);
        matrices.push((linear, integers, meta));
    }
    let workers = Arc::new(workers);
    let table = LayerTable::new(matrices, &PrecisionTarget::default()).unwrap();
    let transport: Arc<dyn Transport> = Arc::clone(&workers) as _;
    let (notices, said) = mpsc::channel(256);
    let actors =
        OwnerActors::start(Arc::new(table), Arc::clone(&transport), room, PadRoom::OfModel, Some(notices)).unwrap();
    let backend = EncryptedBackend::new(actors.scheduler.clone(), transport, false);
    (Cluster { workers, weights, actors, backend }, said)
}

/// The backend blocks, so that it is called from a thread as the trainer does.
async fn apply(
    cluster: Cluster,
    linear: LinearId,
    direction: Direction,
    rows: Vec<f32>,
    tokens: usize,
) -> (Cluster, Result<Buffer, crate::backend::BackendError>) {
    let call = tokio::task::spawn_blocking(move || {
        let result = cluster.backend.apply(linear.along(direction), Arc::new(rows.into()), tokens);
        let result = result.map(crate::backend::Product::into_rows);
        (cluster, result)
    });
    call.await.unwrap()
}

fn plain_product(rows: &[f32], weights: &[f32], direction: Direction) -> Vec<f32> {
    let (inner, outer) = SHAPE.along(direction);
    let weight = |i: usize, j: usize| match direction {
        Direction::Forward => weights[i * SHAPE.d_out + j],
        Direction::Backward => weights[j * SHAPE.d_out + i],
    };
    rows.chunks(inner)
        .flat_map(|row| {
            let column = move |j| row.iter().enumerate().map(|(i, x)| x * weight(i, j)).sum();
            (0..outer).map(column).collect::<Vec<f32>>()
        })
        .collect()
}

fn relative_error(found: &[f32], expected: &[f32]) -> f32 {
    let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|value| value * value).sum::<f32>().sqrt();
    norm(&mut found.iter().zip(expected).map(|(a, b)| a - b)) / norm(&mut expected.iter().copied())
}

#[test]
fn products_come_back_both_ways_through_the_worker_that_has_the_layer() {
    actix::System::new().block_on(async {
        let (mut cluster, assignments) = cluster(&[2.0, 1.0]).await;
        let ranges: Vec<_> = assignments.iter().map(|assignment| assignment.layers.clone()).collect();
        assert_eq!(ranges, [0..2, 2..3]);
        let tokens = 5;
        for (number, linear) in linears().enumerate() {
            for direction in [Direction::Forward, Direction::Backward] {
                let (inner, _) = SHAPE.along(direction);
                let mut rows = random(tokens * inner, 100 + number as u64);
                rows[inner..2 * inner].fill(0.0);
                let expected = plain_product(&rows, &cluster.weights[&linear], direction);
                let (back, result) = apply(cluster, linear, direction, rows, tokens).await;
                cluster = back;
                let found = result.unwrap();
                let error = relative_error(&found, &expected);
                assert!(error < 0.02, "{linear} {direction:?}: relative error {error}");
                let outer = expected.len() / tokens;
                assert!(found[outer..2 * outer].iter().all(|&value| value == 0.0), "a zero row gives exact zeros");
            }
        }
        let times = cluster.actors.clock.read();
        assert_eq!((times.products, times.mask_products), (6, 6));
        assert!(times.encrypt_seconds > 0.0 && times.decrypt_seconds > 0.0);
        let health = cluster.actors.scheduler.send(AskHealth).await.unwrap();
        assert!(health.iter().all(|record| record.health.as_ref().is_some_and(|health| health.busy_seconds == 0.5)));
        cluster.actors.scheduler.send(ReleaseLayers).await.unwrap();
        assert!(cluster.workers.assigned.lock().unwrap().is_empty());
        cluster.actors.stop();
    });
}

#[test]
fn a_retry_is_encrypted_anew_and_the_owners_own_mistake_is_not_retried() {
    actix::System::new().block_on(async {
        let (cluster, _) = cluster(&[1.0]).await;
        let linear = LinearId { layer: 0, group: Group::O };
        let rows = random(2 * SHAPE.d_in, 7);
        cluster.workers.faults.lock().unwrap().push_back(Some(Fault::Unreachable));
        let (cluster, result) = apply(cluster, linear, Direction::Forward, rows.clone(), 2).await;
        assert!(result.is_ok(), "{result:?}");
        assert_eq!(cluster.workers.asked(), ["mask", "mask", "body"]);
        cluster.workers.faults.lock().unwrap().push_back(Some(Fault::Unreachable));
        let (cluster, result) = apply(cluster, linear, Direction::Forward, rows.clone(), 2).await;
        assert!(result.is_ok(), "{result:?}");
        assert_eq!(cluster.workers.asked(), ["mask", "mask", "body", "body", "body"]);
        {
            let sent = cluster.workers.sent.lock().unwrap();
            let [first, second, third] = &sent[2..] else { panic!("one product, another, and its retry") };
            for (one, other) in [(first, second), (second, third), (first, third)] {
                assert_ne!(one.header.call, other.header.call);
                assert_ne!(one.body, other.body, "no byte of a ciphertext is used twice");
            }
        }
        // A worker that lost its layers, such as one that was started anew, is given them again.
        cluster.workers.assigned.lock().unwrap().clear();
        let (cluster, result) = apply(cluster, linear, Direction::Forward, rows.clone(), 2).await;
        assert!(result.is_ok(), "{result:?}");
        assert_eq!(cluster.workers.sent.lock().unwrap().len(), 7);
        let unknown = LinearId { layer: 9, group: Group::O };
        let (cluster, result) = apply(cluster, unknown, Direction::Forward, rows.clone(), 2).await;
        assert!(result.unwrap_err().to_string().contains("no worker serves layer 9 o"));
        let mut bad = rows;
        bad[0] = f32::NAN;
        let (cluster, result) = apply(cluster, linear, Direction::Forward, bad, 2).await;
        let error = result.unwrap_err();
        assert!(matches!(&error.why, BackendFailure::Rows(why) if why.contains("row 0")), "{error}");
        cluster.actors.stop();
    });
}

#[test]
fn what_a_busy_worker_refuses_is_sent_anew() {
    actix::System::new().block_on(async {
        let (cluster, _) = cluster(&[1.0]).await;
        let linear = LinearId { layer: 0, group: Group::O };
        *cluster.workers.faults.lock().unwrap() =
            [Some(Fault::Busy), None, Some(Fault::BusyLater), Some(Fault::Busy)].into();
        let (cluster, result) = apply(cluster, linear, Direction::Forward, random(2 * SHAPE.d_in, 7), 2).await;
        assert!(result.is_ok(), "{result:?}");
        assert_eq!(cluster.workers.asked(), ["mask", "mask", "body", "body", "body"]);
        let calls: HashSet<_> = cluster.workers.sent.lock().unwrap()[2..].iter().map(|sent| sent.header.call).collect();
        assert_eq!(calls.len(), 3, "each is encrypted anew");
        cluster.actors.stop();
    });
}

#[test]
fn the_product_of_a_mask_is_asked_for_once_if_there_is_room_for_it() {
    actix::System::new().block_on(async {
        let linear = LinearId { layer: 1, group: Group::O };
        let rows = random(2 * SHAPE.d_out, 7);
        let folder = tempfile::tempdir().unwrap();
        let on_disk = |limit| {
            let file = MaskFile::create(folder.path(), limit).unwrap();
            MaskRoom { memory_bytes: 0, disk: Some(MaskDisk::Run(file)) }
        };
        // Every run of these has the same weights.
        let kept_as = |model, memory_bytes, limit| {
            let store = MaskStore::open(folder.path(), model, limit, 1).unwrap();
            MaskRoom { memory_bytes, disk: Some(MaskDisk::Kept(store)) }
        };
        let kept = |memory_bytes, limit| kept_as("model", memory_bytes, limit);
        let unreadable = std::fs::File::create(folder.path().join("write-only")).unwrap();
        for (room, expected) in [
            (MaskRoom::memory(usize::MAX), 1),
            (MaskRoom::memory(0), 2),
            (on_disk(1 << 30), 1),
            (on_disk(1000), 2),
            (MaskRoom { memory_bytes: 0, disk: Some(MaskDisk::Run(MaskFile::of(unreadable, 1 << 30))) }, 2),
            (kept(0, 1 << 30), 1),
            (kept(0, 1 << 30), 0),
            (kept(usize::MAX, 1 << 30), 0),
            // There is no room for it, nor for what an earlier run kept in another model's name.
            (kept_as("other", usize::MAX, 1000), 1),
            (kept_as("other", 0, 1000), 2),
        ] {
            let (mut cluster, _) = cluster_keeping(&[1.0], room).await;
            let plain = plain_product(&rows, &cluster.weights[&linear], Direction::Backward);
            for _ in 0..2 {
                let (back, result) = apply(cluster, linear, Direction::Backward, rows.clone(), 2).await;
                let error = relative_error(&result.unwrap(), &plain);
                assert!(error < 0.02, "relative error {error}");
                cluster = back;
            }
            // What cannot be read is asked for when the body is on its way, so that either may be first.
            let asked = cluster.workers.asked();
            let of_masks = asked.iter().filter(|&&what| what == "mask").count();
            assert_eq!((of_masks, asked.len()), (expected, expected + 2), "{asked:?}");
            cluster.actors.stop();
        }
    });
}

#[test]
fn an_answer_that_lacks_columns_is_an_error_and_the_ticket_is_gone() {
    actix::System::new().block_on(async {
        let (matrix, meta) = serve(random(SHAPE.d_in * SHAPE.d_out, 1), SHAPE).unwrap();
        let linear = LinearId { layer: 0, group: Group::O };
        let table = Arc::new(LayerTable::new([(linear, matrix.clone(), meta)], &PrecisionTarget::default()).unwrap());
        let seed = MaskSeed::from_bytes([1; 32]);
        let (clock, calls) = (Arc::new(PhaseClock::default()), CallNumbers::default());
        let workers = Workers { tile: 16, matrices: HashMap::from([(linear, matrix.values)]), ..Workers::default() };
        let peer = PeerName::from("worker");
        workers.assigned.lock().unwrap().insert(peer.clone(), 0..1);
        let cache =
            MaskCache::new(seed, Arc::clone(&table), calls.clone(), Arc::clone(&clock), MaskRoom::memory(usize::MAX));
        let masks = cache.product(&workers, &peer, linear.along(Direction::Forward)).await.unwrap();
        let keys = actix::Actor::start(KeyManager::new(seed, table, calls, clock));
        let rows = Arc::new(Buffer::from(random(SHAPE.d_in, 2)));
        let encrypt =
            keys::Encrypt { product: linear.along(Direction::Forward), rows, tokens: 1, step: Step::Sketched };
        let call = keys.send(encrypt).await.unwrap().unwrap().header.call;
        let decrypt = || {
            let (_, tiles) = mpsc::channel(1);
            keys::Decrypt { call, masks: Arc::clone(&masks), tiles, sent: std::time::Instant::now() }
        };
        assert!(matches!(keys.send(decrypt()).await.unwrap(), Err(keys::KeyError::Decrypt(_))));
        assert!(matches!(keys.send(decrypt()).await.unwrap(), Err(keys::KeyError::NoTicket(_))));
    });
}
