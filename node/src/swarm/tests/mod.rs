//! Swarms on loopback sockets: what both ends do together, and what they do with a hostile other end.
#![allow(clippy::unwrap_used)]

mod discovery;
mod floods;
mod hostile_owner;
mod hostile_worker;
mod products;
mod starting;

use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use actors::transport::{Admitted, Answer, PeerName, ProductRequest, TileStream, Transport, WorkerService};
use async_trait::async_trait;
use protocol::he::{ParameterSet, Planes, Precision, ProductTile};
use protocol::ids::{Direction, Group, LinearId, ModelDigest};
use protocol::wire::messages::*;
use tokio::sync::mpsc;

use super::handle::peer_name;
use super::*;

const TCP: &str = "/ip4/127.0.0.1/tcp/0";
const QUIC: &str = "/ip4/127.0.0.1/udp/0/quic-v1";
const DIGEST: ModelDigest = ModelDigest([0xd1; 32]);

/// No test waits longer than this for something that should happen.
const PATIENCE: Duration = Duration::from_secs(60);

/// A service whose answers follow from the request by a simple rule.
struct FakeService {
    offer: WorkerOffer,
    inner: usize,
    outer: usize,
    tile_columns: usize,
    /// Waits so long before the first tile.
    delay: Duration,
    /// Whether peers must be assigned layers before they are served.
    assigns: bool,
    assigned: Mutex<HashSet<PeerName>>,
}

impl FakeService {
    fn new(inner: usize, outer: usize, tile_columns: usize) -> Self {
        let device = DeviceOffer { name: "fake".into(), memory_bytes: 1, macs_per_second: 1.0 };
        let offer = WorkerOffer { version: PROTOCOL_VERSION, model: DIGEST, layers: 4, room: 4, devices: vec![device] };
        Self { offer, inner, outer, tile_columns, delay: Duration::ZERO, assigns: false, assigned: Mutex::default() }
    }
}

/// The rule: the answer to a body repeats the body, the answer to a mask counts, both shifted by the limb.
fn fake_tile(request: &ProductRequest, first_column: usize, columns: usize) -> ProductTile {
    let (limbs, rows) = (request.header.answer_limbs(), request.header.rows());
    let value = |row: usize, column: usize| match &request.body {
        Some(body) => body.bytes()[row * body.columns() + column % body.columns()],
        None => (row + column) as u8,
    };
    let mut bytes = Vec::with_capacity(limbs * rows * columns);
    for limb in 0..limbs {
        for row in 0..rows {
            bytes.extend((first_column..first_column + columns).map(|j| value(row, j).wrapping_add(limb as u8)));
        }
    }
    ProductTile { first_column, rows: Planes::from_bytes(limbs, rows, columns, bytes).unwrap() }
}

#[async_trait]
impl WorkerService for FakeService {
    async fn control(&self, owner: &PeerName, request: ControlRequest) -> ControlReply {
        match request {
            ControlRequest::Offer { .. } => ControlReply::Offer(self.offer.clone()),
            ControlRequest::Assign { model, .. } if model != self.offer.model => {
                ControlReply::Refused(Refusal::Model(self.offer.model))
            }
            ControlRequest::Assign { .. } => {
                self.assigned.lock().unwrap().insert(owner.clone());
                ControlReply::Assigned
            }
            // An answer that no frame holds.
            ControlRequest::Health => ControlReply::Refused(Refusal::Failed("x".repeat(1 << 20))),
            ControlRequest::Release => ControlReply::Released,
        }
    }

    async fn admit(&self, owner: &PeerName, header: &ProductHeader) -> Result<Box<dyn Admitted>, Refusal> {
        if !self.serves(owner) || header.product.linear.layer >= self.offer.layers {
            return Err(Refusal::Layers(header.product.linear.to_string()));
        }
        let Self { inner, outer, tile_columns, delay, .. } = *self;
        Ok(Box::new(FakeProduct { header: header.clone(), inner, outer, tile_columns, delay }))
    }

    fn serves(&self, peer: &PeerName) -> bool {
        !self.assigns || self.assigned.lock().unwrap().contains(peer)
    }

    async fn left(&self, _: &PeerName) {}
}

struct FakeProduct {
    header: ProductHeader,
    inner: usize,
    outer: usize,
    tile_columns: usize,
    delay: Duration,
}

#[async_trait]
impl Admitted for FakeProduct {
    fn inner(&self) -> usize {
        self.inner
    }

    fn outer(&self) -> usize {
        self.outer
    }

    async fn begin(self: Box<Self>, body: Option<Arc<Planes>>) -> Result<Answer, Refusal> {
        let Self { header, outer, tile_columns, delay, .. } = *self;
        let request = ProductRequest { header, body, outer };
        tokio::time::sleep(delay).await;
        let (sender, tiles) = mpsc::channel(1);
        for first in (0..outer).step_by(tile_columns) {
            let columns = tile_columns.min(outer - first);
            if first == 0 {
                sender.try_send(Ok(fake_tile(&request, first, columns))).unwrap();
                continue;
            }
            let (sender, request) = (sender.clone(), request.clone());
            tokio::spawn(async move {
                // The receiver is gone when the owner is.
                let _ = sender.send(Ok(fake_tile(&request, first, columns))).await;
            });
        }
        Ok(Answer { tiles, time: PATIENCE, place: Box::new(()) })
    }
}

/// A worker on loopback.
struct Worker {
    handle: SwarmHandle,
    _serving: Serving,
}

impl Worker {
    async fn start(listen: &str, service: FakeService, config: ServeConfig) -> Self {
        let handle = node(SwarmRole::Worker, &[listen], vec![]).await;
        let serving = serve(&handle, Arc::new(service), config).await.unwrap();
        Self { handle, _serving: serving }
    }

    fn name(&self) -> PeerName {
        peer_name(self.handle.local_peer())
    }

    fn address(&self) -> Multiaddr {
        self.handle.listening()[0].clone()
    }
}

async fn node(role: SwarmRole, listen: &[&str], dial: Vec<Multiaddr>) -> SwarmHandle {
    let mut config = SwarmConfig::new(Identity::ephemeral(), role);
    config.listen = listen.iter().map(|address| address.parse().unwrap()).collect();
    config.dial = dial;
    SwarmHandle::start(config).await.unwrap()
}

/// An owner that is connected to a peer.
async fn owner_of(worker: &SwarmHandle, config: TransportConfig) -> Libp2pTransport {
    let handle = node(SwarmRole::Owner, &[], vec![worker.listening()[0].clone()]).await;
    connected(&handle, worker.local_peer()).await;
    Libp2pTransport::new(handle, config)
}

async fn connected(handle: &SwarmHandle, peer: PeerId) {
    let wanted = KnownPeer { peer, connected: true };
    tokio::time::timeout(PATIENCE, async {
        while !handle.peers().await.unwrap().contains(&wanted) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .expect("a connection");
}

/// A request with counting bytes as its body.
fn request(call: u64, tokens: u32, inner: usize, outer: usize) -> ProductRequest {
    let header = ProductHeader {
        version: PROTOCOL_VERSION,
        call,
        product: LinearId { layer: 0, group: Group::Down }.along(Direction::Forward),
        precision: Precision { set: ParameterSet::P32, body_bits: 32, mask_limbs: 3, output_bits: 24 },
        operand: Operand::Body { tokens },
    };
    let mut body = Planes::zeros(header.operand_limbs(), tokens as usize, inner);
    body.bytes_mut().iter_mut().zip((0..=250u8).cycle()).for_each(|(byte, value)| *byte = value);
    ProductRequest { header, body: Some(Arc::new(body)), outer }
}

/// The bytes of a request's body.
fn body_bytes(request: &ProductRequest) -> &[u8] {
    request.body.as_ref().unwrap().bytes()
}

/// The same product, of a mask.
fn mask_request(request: &ProductRequest) -> ProductRequest {
    let header = ProductHeader { operand: Operand::Masks { seed: [7; 32] }, ..request.header.clone() };
    ProductRequest { header, body: None, outer: request.outer }
}

/// Receives a whole answer and compares it with the rule.
async fn receive(
    request: &ProductRequest,
    tiles: TileStream<actors::transport::TransportError>,
) -> Result<usize, actors::transport::TransportError> {
    let mut tiles = tiles;
    let mut columns = 0;
    while let Some(tile) = tokio::time::timeout(PATIENCE, tiles.recv()).await.expect("a tile in time") {
        let tile = tile?;
        assert!(tile == fake_tile(request, tile.first_column, tile.rows.columns()));
        columns += tile.rows.columns();
    }
    Ok(columns)
}

/// Asks for a product and checks it: the worker is alive and well.
async fn works(transport: &Libp2pTransport, worker: &PeerName, inner: usize, outer: usize) {
    let request = request(1, 9, inner, outer);
    for request in [mask_request(&request), request] {
        let tiles = transport.product(worker, request.clone()).await.unwrap();
        assert_eq!(receive(&request, tiles).await.unwrap(), outer);
    }
}
