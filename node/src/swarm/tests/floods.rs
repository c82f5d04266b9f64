//! A worker flooded by peers that want nothing but its places, its memory or its time, and an owner that is served
//! nevertheless.

use std::net::{Ipv4Addr, SocketAddr};

use actors::matmul::{CpuDevice, best_kernel};
use actors::transport::TransportError;
use actors::worker::{ShardSource, SourceError, Split, WorkerLimits};
use futures::{AsyncReadExt, AsyncWriteExt};
use libp2p::Stream;
use protocol::ids::LinearShape;
use protocol::quant::{Int8Matrix, LinearMeta, serve as served};
use protocol::wire::encode;
use tokio::net::{TcpSocket, TcpStream};

use super::*;

const INNER: usize = 16;
const OUTER: usize = 8;

/// A service that serves only whom it assigned layers.
fn strict() -> FakeService {
    FakeService { assigns: true, ..FakeService::new(INNER, OUTER, 8) }
}

async fn assigned(worker: &SwarmHandle) -> Libp2pTransport {
    let transport = owner_of(worker, TransportConfig::default()).await;
    assign(&transport, worker).await;
    transport
}

async fn assign(transport: &Libp2pTransport, worker: &SwarmHandle) {
    let assign = ControlRequest::Assign { model: DIGEST, layers: 0..1 };
    let reply = transport.control(&peer_name(worker.local_peer()), assign).await.unwrap();
    assert_eq!(reply, ControlReply::Assigned);
}

async fn open(peer: &SwarmHandle, worker: &SwarmHandle) -> Stream {
    peer.streams().open_stream(worker.local_peer(), PRODUCT_PROTOCOL).await.unwrap()
}

/// Waits until the worker ends a stream; what it sent before.
async fn end_of(mut stream: Stream) -> Vec<u8> {
    let mut answer = Vec::new();
    // An error is an end as well: the stream was reset.
    let _ = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut answer)).await.expect("the worker ends the stream");
    answer
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn idle_streams_of_strangers_take_no_place_of_an_owners() {
    for listen in [TCP, QUIC] {
        let config = ServeConfig { stranger_header: Duration::from_secs(1), ..ServeConfig::default() };
        let worker = Worker::start(listen, strict(), config).await;
        let honest = assigned(&worker.handle).await;
        let mut idle = Vec::new();
        for _ in 0..2 {
            let stranger = owner_of(&worker.handle, TransportConfig::default()).await.handle().clone();
            for _ in 0..40 {
                let mut stream = open(&stranger, &worker.handle).await;
                // A stream is opened by its first byte.
                let _ = stream.write_all(&[4]).await;
                let _ = stream.flush().await;
                idle.push(stream);
            }
            idle.push(open(&stranger, &worker.handle).await);
            works(&honest, &worker.name(), INNER, OUTER).await;
        }
        let name = worker.name();
        let products = (0..16).map(|_| works(&honest, &name, INNER, OUTER));
        futures::future::join_all(products).await;
        for stream in idle {
            assert!(end_of(stream).await.is_empty());
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_opens_stream_after_stream_is_sent_away() {
    let worker = Worker::start(TCP, strict(), ServeConfig::default()).await;
    let honest = assigned(&worker.handle).await;
    let stranger = owner_of(&worker.handle, TransportConfig::default()).await.handle().clone();
    let mut events = stranger.events();
    let flood = tokio::spawn({
        let worker = worker.handle.clone();
        async move {
            loop {
                let mut streams = stranger.streams();
                if let Ok(mut stream) = streams.open_stream(worker.local_peer(), PRODUCT_PROTOCOL).await {
                    let _ = stream.write_all(b"noise").await;
                    let _ = stream.close().await;
                }
            }
        }
    });
    let lost = async { while !matches!(events.recv().await, Ok(NetworkEvent::PeerLost(_))) {} };
    tokio::time::timeout(PATIENCE, lost).await.expect("the worker has had enough of it");
    flood.abort();
    works(&honest, &worker.name(), INNER, OUTER).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_without_layers_is_told_so() {
    let worker = Worker::start(TCP, strict(), ServeConfig::default()).await;
    let stranger = owner_of(&worker.handle, TransportConfig::default()).await;
    let request = request(1, 9, INNER, OUTER);
    let tiles = stranger.product(&worker.name(), request.clone()).await.unwrap();
    let error = receive(&request, tiles).await.unwrap_err();
    assert!(matches!(error, TransportError::Refused { refusal: Refusal::Layers(_), .. }), "{error}");
}

/// A connection from another address of this machine, on which nothing is ever said.
#[cfg(target_os = "linux")]
async fn silent(to: SocketAddr) -> std::io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind((Ipv4Addr::new(127, 0, 0, 2), 0).into())?;
    socket.connect(to).await
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sockets_that_never_shake_hands_keep_nobody_out() {
    let worker = Worker::start(TCP, strict(), ServeConfig::default()).await;
    let port: u16 = worker.address().to_string().split('/').nth(4).unwrap().parse().unwrap();
    let to = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    // As many sockets as there are, each opened anew when the worker has had enough of it.
    let flood: Vec<_> = (0..200)
        .map(|_| {
            tokio::spawn(async move {
                loop {
                    if let Ok(mut socket) = silent(to).await {
                        let _ = tokio::io::AsyncReadExt::read_to_end(&mut socket, &mut Vec::new()).await;
                    }
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(200)).await;
    let honest = assigned(&worker.handle).await;
    works(&honest, &worker.name(), INNER, OUTER).await;
    flood.iter().for_each(tokio::task::JoinHandle::abort);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_do_nothing_make_place_for_those_that_come() {
    let mut config = SwarmConfig::new(Identity::ephemeral(), SwarmRole::Worker);
    config.listen = vec![TCP.parse().unwrap()];
    config.gate = GateLimits { strangers: 3, ..GateLimits::default() };
    let handle = SwarmHandle::start(config).await.unwrap();
    let _serving = serve(&handle, Arc::new(strict()), ServeConfig::default()).await.unwrap();
    let served = assigned(&handle).await;
    let mut idle = Vec::new();
    for _ in 0..6 {
        idle.push(owner_of(&handle, TransportConfig::default()).await);
    }
    let newcomer = assigned(&handle).await;
    for owner in [newcomer, served] {
        works(&owner, &peer_name(handle.local_peer()), INNER, OUTER).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_that_trickles_is_given_up() {
    let config = ServeConfig { slack: Duration::from_secs(1), ..ServeConfig::default() };
    for listen in [TCP, QUIC] {
        let worker = Worker::start(listen, FakeService::new(INNER, OUTER, 8), config).await;
        let hostile = owner_of(&worker.handle, TransportConfig::default()).await;
        let request = request(1, 90, INNER, OUTER);
        let mut stream = open(hostile.handle(), &worker.handle).await;
        stream.write_all(&encode(&request.header).unwrap()).await.unwrap();
        // No byte is late by itself: all of them would take minutes.
        let mut sent = 0;
        for byte in body_bytes(&request) {
            if stream.write_all(&[*byte]).await.is_err() || stream.flush().await.is_err() {
                break;
            }
            sent += 1;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        assert!(sent < body_bytes(&request).len() / 2, "the worker ends the stream");
        works(&hostile, &worker.name(), INNER, OUTER).await;
    }
}

/// Wide matrices of a model of one layer.
struct Wide;

const WIDE: LinearShape = LinearShape { d_in: 64, d_out: 2048 };
const TOKENS: u32 = 512;
/// Of a product: three bytes of each value come, three of each go.
const PRODUCT_BYTES: u64 = 3 * TOKENS as u64 * (64 + 2048);

impl ShardSource for Wide {
    fn digest(&self) -> ModelDigest {
        DIGEST
    }

    fn layers(&self) -> u16 {
        1
    }

    fn groups(&self, layer: u16) -> &'static [Group] {
        if layer == 0 { &Group::ALL } else { &[] }
    }

    fn shape(&self, _: LinearId) -> LinearShape {
        WIDE
    }

    fn load(&self, _: LinearId) -> Result<(Int8Matrix, LinearMeta), SourceError> {
        Ok(served(vec![0.5; WIDE.d_in * WIDE.d_out], WIDE).unwrap())
    }
}

fn wide_request(call: u64) -> ProductRequest {
    let mut request = request(call, TOKENS, WIDE.d_in, WIDE.d_out);
    request.header.precision = Precision::exact(ParameterSet::P24);
    request.body = Some(Arc::new(Planes::zeros(3, TOKENS as usize, WIDE.d_in)));
    request
}

/// A worker for two owners, with memory for four products, and both owners with its layer loaded.
async fn two_owners(config: ServeConfig) -> (SwarmHandle, Arc<actors::worker::Worker>, Serving, [Libp2pTransport; 2]) {
    let limits = WorkerLimits {
        owners: 2,
        memory_bytes: 64 << 20,
        product_memory_bytes: 4 * PRODUCT_BYTES + (8 << 10),
        ..WorkerLimits::default()
    };
    let device = Arc::new(CpuDevice::new(best_kernel()));
    let worker = actors::worker::Worker::start(Arc::new(Wide), vec![device], Split::Layers, limits, || 1).await;
    let worker = Arc::new(worker.unwrap());
    let handle = node(SwarmRole::Worker, &[TCP], vec![]).await;
    let serving = serve(&handle, Arc::clone(&worker) as _, config).await.unwrap();
    let owners = [assigned(&handle).await, assigned(&handle).await];
    for owner in &owners {
        tokio::time::timeout(PATIENCE, async {
            while health(owner, &handle).await.loaded == 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await
        .expect("the layer is loaded");
    }
    (handle, worker, serving, owners)
}

async fn health(owner: &Libp2pTransport, worker: &SwarmHandle) -> WorkerHealth {
    match owner.control(&peer_name(worker.local_peer()), ControlRequest::Health).await.unwrap() {
        ControlReply::Health(health) => health,
        other => panic!("{other:?}"),
    }
}

/// One product, read to its end.
async fn product(owner: &Libp2pTransport, worker: &SwarmHandle, call: u64) -> usize {
    let mut tiles = owner.product(&peer_name(worker.local_peer()), wide_request(call)).await.unwrap();
    let mut columns = 0;
    while let Some(tile) = tokio::time::timeout(PATIENCE, tiles.recv()).await.expect("a tile in time") {
        columns += tile.unwrap().rows.columns();
    }
    columns
}

#[test]
fn an_owner_that_reads_no_answers_holds_its_own_share_and_not_for_long() {
    actix::System::new().block_on(async {
        let (handle, worker, _serving, [hostile, honest]) = two_owners(ServeConfig::default()).await;
        let mut unread = Vec::new();
        for call in 0..20 {
            let request = wide_request(call);
            let mut stream = open(hostile.handle(), &handle).await;
            let bytes = [&encode(&request.header).unwrap(), body_bytes(&request)].concat();
            // What does not fit the sockets waits in a task; nobody reads an answer.
            unread.push(tokio::spawn(async move {
                let _ = stream.write_all(&bytes).await;
                let _ = stream.flush().await;
                std::future::pending::<()>().await;
            }));
        }
        for call in 0..8 {
            assert_eq!(product(&honest, &handle, call).await, WIDE.d_out);
        }
        // A product counts once its last tile is on its way.
        let counted = async {
            while health(&honest, &handle).await.calls < 8 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(PATIENCE, counted).await.expect("all are counted");
        assert!(health(&hostile, &handle).await.calls <= 2, "two products fill its share");
        unread.iter().for_each(tokio::task::JoinHandle::abort);
        worker.stop().await;
    });
}

#[test]
fn an_answer_that_is_read_by_drops_is_given_up_and_its_place_with_it() {
    actix::System::new().block_on(async {
        // The product's own time is a minute at least: what is short here is the stall of a whole chunk.
        let config = ServeConfig { stall: Duration::from_secs(1), ..ServeConfig::default() };
        let (handle, worker, _serving, [slow, _]) = two_owners(config).await;
        let request = wide_request(0);
        let bytes = [&encode(&request.header).unwrap(), body_bytes(&request)].concat();
        let mut streams = Vec::new();
        for _ in 0..2 {
            let mut stream = open(slow.handle(), &handle).await;
            stream.write_all(&bytes).await.unwrap();
            stream.flush().await.unwrap();
            streams.push(stream);
        }
        // Both places are taken; this one waits for one of them, and gets it when the worker has had enough.
        assert_eq!(product(&slow, &handle, 7).await, WIDE.d_out);
        worker.stop().await;
    });
}

#[test]
fn an_owner_that_goes_away_takes_its_products_with_it() {
    actix::System::new().block_on(async {
        let (handle, worker, _serving, [gone, honest]) = two_owners(ServeConfig::default()).await;
        let request = wide_request(0);
        let mut stream = open(gone.handle(), &handle).await;
        stream.write_all(&encode(&request.header).unwrap()).await.unwrap();
        stream.flush().await.unwrap();
        let release = gone.control(&peer_name(handle.local_peer()), ControlRequest::Release).await.unwrap();
        assert_eq!(release, ControlReply::Released);
        assert!(!worker.serves(&peer_name(gone.handle().local_peer())));
        // Its body may still come, and is refused.
        let _ = stream.write_all(body_bytes(&request)).await;
        let _ = stream.flush().await;
        end_of(stream).await;
        assert_eq!(product(&honest, &handle, 1).await, WIDE.d_out);
        worker.stop().await;
    });
}
