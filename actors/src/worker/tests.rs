//! A worker over synthetic weights, asked through the in-memory network.

mod devices;
mod strangers;

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar};
use std::time::Duration;

use protocol::he::{MaskDomain, MaskSeed, ParameterSet, Planes, Precision, ProductTile, reference};
use protocol::ids::ModelDigest;
use protocol::ids::{Direction, Group, LinearId, LinearShape};
use protocol::model::Model;
use protocol::model::synthetic::{StoredAs, SyntheticLlama};
use protocol::quant::{Int8Matrix, LinearMeta, serve};
use protocol::wire::messages::{
    ControlReply, ControlRequest, Operand, PROTOCOL_VERSION, ProductHeader, Refusal, WorkerHealth,
};
use rand::{Rng as _, RngCore as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::matmul::{CpuDevice, Device, PackedLinear, best_kernel};
use crate::transport::{
    Answer, Faults, MemoryTransport, PeerName, ProductRequest, TileStream, Transport, TransportError, WorkerService,
};

const LAYERS: u16 = 4;
/// What has not happened by then on any machine does not happen.
const NEVER: Duration = Duration::from_secs(120);
const DIGEST: ModelDigest = ModelDigest([7; 32]);

fn shape(group: Group) -> LinearShape {
    let (d_in, d_out) = match group {
        Group::Qkv => (40, 72),
        Group::O => (40, 40),
        Group::GateUp => (40, 300),
        Group::Down => (100, 40),
        Group::Head => (40, 120),
    };
    LinearShape { d_in, d_out }
}

/// Random weights; a gate that tests can close in each load, and a layer that is damaged.
#[derive(Default)]
struct Synthetic {
    closed: Mutex<bool>,
    opened: Condvar,
    begun: AtomicUsize,
    damaged: Option<u16>,
    repaired: AtomicBool,
}

impl Synthetic {
    fn matrix(linear: LinearId) -> (Int8Matrix, LinearMeta) {
        let shape = shape(linear.group);
        let mut rng = ChaCha8Rng::seed_from_u64(u64::from(linear.layer) * 10 + linear.group as u64);
        let weights = (0..shape.d_in * shape.d_out).map(|_| rng.random_range(-1.0..1.0)).collect();
        serve(weights, shape).unwrap()
    }

    fn close(&self, closed: bool) {
        *self.closed.lock().unwrap() = closed;
        self.opened.notify_all();
    }
}

impl ShardSource for Synthetic {
    fn digest(&self) -> ModelDigest {
        DIGEST
    }

    fn layers(&self) -> u16 {
        LAYERS
    }

    fn groups(&self, layer: u16) -> &'static [Group] {
        if layer < LAYERS { &Group::ALL } else { &[] }
    }

    fn shape(&self, linear: LinearId) -> LinearShape {
        shape(linear.group)
    }

    fn load(&self, linear: LinearId) -> Result<(Int8Matrix, LinearMeta), SourceError> {
        let damaged = self.damaged == Some(linear.layer) && !self.repaired.load(Ordering::SeqCst);
        self.begun.fetch_add(1, Ordering::SeqCst);
        drop(self.opened.wait_while(self.closed.lock().unwrap(), |closed| *closed).unwrap());
        if damaged {
            return Err(SourceError { linear, why: "a hole in the file".into() });
        }
        Ok(Self::matrix(linear))
    }
}

fn layer_bytes() -> u64 {
    Group::ALL.into_iter().map(|group| PackedLinear::memory_for(shape(group))).sum()
}

fn limits() -> WorkerLimits {
    WorkerLimits { memory_bytes: 3 * layer_bytes(), tokens: 64, ..WorkerLimits::default() }
}

struct Net {
    network: MemoryTransport,
    worker: Arc<Worker>,
    name: PeerName,
}

async fn start(source: Arc<Synthetic>, limits: WorkerLimits) -> Net {
    start_on(source, vec![Arc::new(CpuDevice::new(best_kernel()))], Split::Layers, limits).await
}

/// A worker with these devices.
async fn start_on(
    source: Arc<dyn ShardSource>,
    devices: Vec<Arc<dyn Device>>,
    split: Split,
    limits: WorkerLimits,
) -> Net {
    let worker = Worker::start(source, devices, split, limits, || 4242).await.unwrap();
    let net =
        Net { network: MemoryTransport::new("owner".into()), worker: Arc::new(worker), name: PeerName::from("worker") };
    net.network.connect(net.name.clone(), Arc::clone(&net.worker) as _);
    net
}

/// What happens on any machine, however busy.
///
/// # Panics
/// If it does not.
async fn in_time<T>(happens: impl Future<Output = T>) -> T {
    tokio::time::timeout(NEVER, happens).await.expect("what is waited for never happens")
}

impl Net {
    async fn control(&self, request: ControlRequest) -> Result<ControlReply, TransportError> {
        self.network.control(&self.name, request).await
    }

    async fn assign(&self, layers: std::ops::Range<u16>) -> Result<ControlReply, TransportError> {
        self.control(ControlRequest::Assign { model: DIGEST, layers }).await
    }

    async fn health(&self) -> WorkerHealth {
        match self.control(ControlRequest::Health).await.unwrap() {
            ControlReply::Health(health) => health,
            other => panic!("{other:?}"),
        }
    }

    /// Waits until `done` says so of the worker's health.
    async fn until(&self, done: impl Fn(&WorkerHealth) -> bool) -> WorkerHealth {
        in_time(async {
            loop {
                let health = self.health().await;
                if done(&health) {
                    break health;
                }
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        })
        .await
    }

    async fn loaded(&self, layers: std::ops::Range<u16>) {
        self.assign(layers.clone()).await.unwrap();
        self.until(|health| usize::from(health.loaded) == layers.len()).await;
    }

    async fn product(&self, request: ProductRequest) -> Result<TileStream<TransportError>, TransportError> {
        self.network.product(&self.name, request).await
    }

    async fn refusal(&self, header: ProductHeader) -> Refusal {
        self.worker.admit(&"owner".into(), &header).await.err().unwrap()
    }
}

fn refusal<T: std::fmt::Debug>(result: Result<T, TransportError>) -> Refusal {
    match result.unwrap_err() {
        TransportError::Refused { refusal, .. } => refusal,
        other => panic!("{other}"),
    }
}

fn request(linear: LinearId, direction: Direction, precision: Precision, tokens: u32) -> ProductRequest {
    let (inner, outer) = shape(linear.group).along(direction);
    let mut rng = ChaCha8Rng::seed_from_u64(99);
    let mut body = Planes::zeros_of_bits(precision.body_bits.into(), tokens as usize, inner);
    rng.fill_bytes(body.bytes_mut());
    let operand = Operand::Body { tokens };
    let header =
        ProductHeader { version: PROTOCOL_VERSION, call: 5, product: linear.along(direction), precision, operand };
    ProductRequest { header, body: Some(Arc::new(body)), outer }
}

/// The product of a mask by the same matrix.
fn of_mask(request: &ProductRequest) -> ProductRequest {
    let header = ProductHeader { operand: Operand::Masks { seed: [3; 32] }, ..request.header.clone() };
    ProductRequest { header, body: None, outer: request.outer }
}

fn simple_request() -> ProductRequest {
    let linear = LinearId { layer: 1, group: Group::O };
    request(linear, Direction::Forward, Precision::standard(ParameterSet::P24), 3)
}

/// The whole answer, computed value by value.
fn expected(request: &ProductRequest) -> ProductTile {
    let header = &request.header;
    let (matrix, _) = Synthetic::matrix(header.product.linear);
    match (&request.body, header.operand) {
        (Some(body), _) => {
            reference::reference_answer(header.precision, header.product.direction, body, &matrix.values, matrix.shape)
        }
        (None, Operand::Masks { seed }) => {
            let domain = MaskDomain { set: header.precision.set, product: header.product };
            let seed = MaskSeed::from_bytes(seed);
            reference::reference_masks(header.precision, &seed, &domain, &matrix.values, matrix.shape)
        }
        (None, Operand::Body { .. }) => panic!("a body product without a body"),
    }
}

async fn collect(mut stream: TileStream<TransportError>) -> Vec<ProductTile> {
    let mut tiles = Vec::new();
    while let Some(tile) = stream.recv().await {
        tiles.push(tile.unwrap());
    }
    tiles
}

fn assert_covers(tiles: Vec<ProductTile>, whole: &ProductTile) {
    let by_column: HashMap<usize, ProductTile> = tiles.into_iter().map(|tile| (tile.first_column, tile)).collect();
    let mut next = 0;
    let whole = &whole.rows;
    while next < whole.columns() {
        let part = &by_column[&next].rows;
        assert_eq!((part.bits(), part.rows()), (whole.bits(), whole.rows()));
        for (row, column) in (0..part.rows()).flat_map(|row| (0..part.columns()).map(move |column| (row, column))) {
            assert_eq!(part.value(row, column), whole.value(row, next + column));
        }
        next += part.columns();
    }
    assert_eq!(next, whole.columns());
}

#[actix::test]
async fn answers_are_the_reference_answers() {
    let net = start(Arc::default(), limits()).await;
    net.loaded(1..3).await;
    let (mut calls, mut up) = (0, 0);
    let packed = Precision { set: ParameterSet::P24, body_bits: 22, mask_limbs: 2, output_bits: 10 };
    for precision in ParameterSet::ALL.map(Precision::standard).into_iter().chain([packed]) {
        for direction in [Direction::Forward, Direction::Backward] {
            for (group, tokens) in [(Group::GateUp, 33), (Group::Down, 1)] {
                let linear = LinearId { layer: 2, group };
                let request = request(linear, direction, precision, tokens);
                up += request.body.as_ref().unwrap().bytes().len() as u64;
                for request in [of_mask(&request), request] {
                    let whole = expected(&request);
                    assert_covers(collect(net.product(request).await.unwrap()).await, &whole);
                    calls += 1;
                }
            }
        }
    }
    let health = net.until(|health| health.calls == calls).await;
    assert!(health.busy_seconds > 0.0);
    assert_eq!((health.layers, health.loaded, health.peak_rss_bytes), (1..3, 2, 4242));
    assert_eq!(net.network.traffic().up, up);
    net.worker.stop().await;
}

#[actix::test]
async fn an_offer_says_what_is_free() {
    let net = start(Arc::default(), limits()).await;
    let offer = |version| net.control(ControlRequest::Offer { version });
    let ControlReply::Offer(first) = offer(PROTOCOL_VERSION).await.unwrap() else { panic!("no offer") };
    assert_eq!((first.model, first.layers, first.devices.len()), (DIGEST, LAYERS, 1));
    assert_eq!((first.devices[0].memory_bytes, first.room), (3 * layer_bytes(), 3));
    assert!(first.devices[0].macs_per_second > 1e6);
    net.assign(0..2).await.unwrap();
    let ControlReply::Offer(second) = offer(PROTOCOL_VERSION).await.unwrap() else { panic!("no offer") };
    assert_eq!((second.devices[0].memory_bytes, second.room), (layer_bytes(), 1));
    assert_eq!(refusal(offer(PROTOCOL_VERSION + 1).await), Refusal::Version(PROTOCOL_VERSION));
}

#[actix::test]
async fn impossible_assignments_are_refused() {
    let net = start(Arc::default(), limits()).await;
    let other = ControlRequest::Assign { model: ModelDigest([8; 32]), layers: 0..1 };
    assert_eq!(refusal(net.control(other).await), Refusal::Model(DIGEST));
    assert!(matches!(refusal(net.assign(2..2).await), Refusal::Malformed(_)));
    assert!(matches!(refusal(net.assign(std::ops::Range { start: 3, end: 1 }).await), Refusal::Malformed(_)));
    assert!(matches!(refusal(net.assign(2..LAYERS + 1).await), Refusal::Layers(_)));
    assert!(matches!(refusal(net.assign(0..u16::MAX).await), Refusal::Layers(_)));
    assert!(matches!(refusal(net.assign(0..4).await), Refusal::Capacity(_)), "three layers fit");
    assert_eq!(net.health().await.layers, 0..0, "a refused assignment changes nothing");
}

#[actix::test]
async fn headers_are_checked_before_bodies() {
    let source = Arc::new(Synthetic::default());
    let net = start(Arc::clone(&source), WorkerLimits { product_bytes: 1 << 20, ..limits() }).await;
    let header = simple_request().header;
    assert!(matches!(net.refusal(header.clone()).await, Refusal::Layers(_)), "nothing is assigned yet");
    source.close(true);
    net.assign(0..2).await.unwrap();
    let loading = net.refusal(header.clone()).await;
    assert!(loading.to_string().contains("loading"), "{loading}");
    source.close(false);
    net.until(|health| health.loaded == 2).await;
    let admitted = net.worker.admit(&"owner".into(), &header).await.ok().unwrap();
    assert_eq!((admitted.inner(), admitted.outer()), (40, 40));
    assert_eq!(admitted.begin(None).await.err(), Some(Refusal::Malformed("a body product without a body".into())));

    let bad = ProductHeader { version: 9, ..header.clone() };
    assert_eq!(net.refusal(bad).await, Refusal::Version(PROTOCOL_VERSION));
    for output_bits in [0, 15, 26, 255] {
        let precision = Precision { output_bits, ..header.precision };
        assert!(matches!(net.refusal(ProductHeader { precision, ..header.clone() }).await, Refusal::Malformed(_)));
    }
    for tokens in [0, 65, u32::MAX] {
        let operand = Operand::Body { tokens };
        assert!(matches!(net.refusal(ProductHeader { operand, ..header.clone() }).await, Refusal::Malformed(_)));
    }
    for layer in [2, LAYERS, u16::MAX] {
        let product = LinearId { layer, group: Group::O }.along(header.product.direction);
        assert!(matches!(net.refusal(ProductHeader { product, ..header.clone() }).await, Refusal::Layers(_)));
    }
    let large = request(LinearId { layer: 1, group: Group::GateUp }, Direction::Forward, header.precision, 64);
    assert!(net.worker.admit(&"owner".into(), &large.header).await.is_ok());
    let precision = Precision::exact(ParameterSet::P48);
    let wide = ProductHeader { precision, operand: Operand::Masks { seed: [0; 32] }, ..large.header };
    assert!(matches!(net.refusal(wide).await, Refusal::Capacity(_)), "over a megabyte");

    let stranger = net.worker.admit(&"stranger".into(), &header).await;
    assert!(matches!(stranger, Err(Refusal::Layers(_))), "layers are an owner's own");
    let mut lie = simple_request();
    lie.header.operand = Operand::Body { tokens: 4 };
    assert!(matches!(refusal(net.product(lie).await), Refusal::Malformed(_)));
    let bodiless = ProductRequest { body: None, ..simple_request() };
    assert!(matches!(refusal(net.product(bodiless).await), Refusal::Malformed(_)));
}

#[actix::test]
async fn a_matrix_that_cannot_be_loaded_is_reported_and_tried_again() {
    let source = Arc::new(Synthetic { damaged: Some(1), ..Synthetic::default() });
    let net = start(Arc::clone(&source), limits()).await;
    net.assign(0..3).await.unwrap();
    let health = net.until(|health| health.loaded == 2).await;
    assert!(health.failure.unwrap().contains("a hole in the file"));
    assert!(matches!(net.refusal(simple_request().header).await, Refusal::Failed(_)));
    source.repaired.store(true, Ordering::SeqCst);
    net.loaded(0..3).await;
    assert_eq!(net.health().await.failure, None);
}

#[actix::test]
async fn a_load_that_fails_after_its_layer_was_asked_for_anew_is_tried_again() {
    let source = Arc::new(Synthetic { damaged: Some(1), ..Synthetic::default() });
    let net = start(Arc::clone(&source), limits()).await;
    source.close(true);
    net.assign(1..2).await.unwrap();
    net.until(|_| source.begun.load(Ordering::SeqCst) == 1).await;
    source.repaired.store(true, Ordering::SeqCst);
    net.assign(1..2).await.unwrap();
    source.close(false);
    let health = net.until(|health| health.loaded == 1 || health.failure.is_some()).await;
    assert_eq!(health.failure, None);
}

#[actix::test]
async fn a_stopped_worker_finishes_what_it_began_and_refuses_the_rest() {
    let net = start(Arc::default(), limits()).await;
    net.loaded(1..2).await;
    let request = simple_request();
    let stream = net.product(request.clone()).await.unwrap();
    net.worker.stop().await;
    assert_covers(collect(stream).await, &expected(&request));
    assert!(matches!(refusal(net.product(request).await), Refusal::Capacity(_)));
    assert!(matches!(refusal(net.assign(0..1).await), Refusal::Capacity(_)));
}

#[actix::test]
async fn the_network_fails_as_it_is_told() {
    let net = start(Arc::default(), limits()).await;
    net.loaded(1..2).await;
    let request = simple_request();
    let inject = |faults| net.network.inject(&net.name, faults);

    inject(Faults { products: Some(1), unreachable: true, ..Faults::default() });
    assert!(matches!(net.product(request.clone()).await, Err(TransportError::Unreachable { .. })));
    assert_covers(collect(net.product(request.clone()).await.unwrap()).await, &expected(&request));

    inject(Faults { refuse: Some(Refusal::Failed("tired".into())), ..Faults::default() });
    assert_eq!(refusal(net.product(request.clone()).await), Refusal::Failed("tired".into()));

    inject(Faults { break_after: Some(0), ..Faults::default() });
    let mut stream = net.product(request.clone()).await.unwrap();
    assert!(matches!(stream.recv().await, Some(Err(TransportError::Unreachable { .. }))));
    assert!(stream.recv().await.is_none());

    inject(Faults { delay: Duration::from_secs(3600), ..Faults::default() });
    let late = tokio::time::timeout(Duration::from_millis(20), net.product(request.clone())).await;
    assert!(late.is_err(), "the product is delayed");

    net.network.disconnect(&net.name);
    assert!(matches!(net.product(request).await, Err(TransportError::Unreachable { .. })));
}

#[test]
fn a_model_on_disk_is_served_rotated_and_rounded() {
    let folder = tempfile::tempdir().unwrap();
    SyntheticLlama::tiny(5).write_folder(folder.path(), StoredAs::F32).unwrap();
    let model = Arc::new(Model::open(folder.path()).unwrap());
    let source = ModelSource::new(Arc::clone(&model)).unwrap();
    assert_eq!((source.digest(), source.layers()), (model.digest().unwrap(), 3), "two layers and the head");
    let layer = Group::ALL.map(|group| LinearId { layer: 1, group });
    for linear in layer.into_iter().chain([model.config().head_linear(0)]) {
        let (matrix, _) = source.load(linear).unwrap();
        let (expected, _) = serve(model.linear(linear).unwrap(), model.config().shape(linear.group)).unwrap();
        assert_eq!((matrix.shape, &matrix), (source.shape(linear), &expected));
    }
    let beyond = LinearId { layer: 2, group: Group::O };
    assert_eq!(source.load(beyond).unwrap_err().linear, beyond);
}
