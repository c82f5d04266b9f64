//! Products and control requests between honest ends.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use actors::transport::TransportError;
use futures::{AsyncReadExt, AsyncWriteExt, StreamExt};
use libp2p::Stream;
use protocol::wire::encode;

use super::*;
use crate::link::{Line, Link};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn control_and_products_over_both_transports() {
    for listen in [TCP, QUIC] {
        let service = FakeService::new(40, 1000, 96);
        let offer = service.offer.clone();
        let worker = Worker::start(listen, service, ServeConfig::default()).await;
        let transport = owner_of(&worker.handle, TransportConfig::default()).await;
        let name = worker.name();

        let reply = transport.control(&name, ControlRequest::Offer { version: PROTOCOL_VERSION }).await.unwrap();
        assert_eq!(reply, ControlReply::Offer(offer));
        let assign = |digest| ControlRequest::Assign { model: digest, layers: 0..2 };
        assert_eq!(transport.control(&name, assign(DIGEST)).await.unwrap(), ControlReply::Assigned);
        let refused = transport.control(&name, assign(ModelDigest([0; 32]))).await.unwrap_err();
        assert!(matches!(refused, TransportError::Refused { refusal: Refusal::Model(DIGEST), .. }), "{refused}");
        let version = transport.control(&name, ControlRequest::Offer { version: 9 }).await.unwrap_err();
        assert!(matches!(version, TransportError::Refused { refusal: Refusal::Version(PROTOCOL_VERSION), .. }));
        let too_long = transport.control(&name, ControlRequest::Health).await.unwrap_err();
        assert!(matches!(too_long, TransportError::Refused { refusal: Refusal::Failed(_), .. }), "{too_long}");

        let before = transport.traffic();
        works(&transport, &name, 40, 1000).await;
        let traffic = transport.traffic().since(before);
        assert_eq!(traffic.up, (8 + 42) + (8 + 11 + 4 * 9 * 40), "a mask's header; a body's header and the body");
        let planes = 3 * (1280 + 9) * 1000;
        assert!((planes..planes + 22 * 24).contains(&traffic.down), "{traffic:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refusal_comes_whole_even_if_the_body_is_large() {
    for listen in [TCP, QUIC] {
        let worker = Worker::start(listen, FakeService::new(4096, 8, 8), ServeConfig::default()).await;
        let transport = owner_of(&worker.handle, TransportConfig::default()).await;
        let mut request = request(1, 1024, 4096, 8);
        request.header.product.linear.layer = 4;
        let tiles = transport.product(&worker.name(), request.clone()).await.unwrap();
        let error = receive(&request, tiles).await.unwrap_err();
        assert!(matches!(error, TransportError::Refused { refusal: Refusal::Layers(_), .. }), "{error}");
        request.header.product.linear.layer = 0;
        request.header.version = 9;
        let tiles = transport.product(&worker.name(), request.clone()).await.unwrap();
        let error = receive(&request, tiles).await.unwrap_err();
        assert!(
            matches!(error, TransportError::Refused { refusal: Refusal::Version(PROTOCOL_VERSION), .. }),
            "{error}"
        );
    }
}

/// rust-libp2p #5410: streams in both directions over one Yamux connection may lock each other up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_products_in_both_directions_at_once() {
    const EACH_WAY: u64 = 3;
    for listen in [TCP, QUIC] {
        let (inner, outer, tokens) = (8192, 96, 2048);
        let one = Worker::start(listen, FakeService::new(inner, outer, 32), ServeConfig::default()).await;
        let other = Worker::start(listen, FakeService::new(inner, outer, 32), ServeConfig::default()).await;
        other.handle.dial(one.address()).await.unwrap();
        connected(&one.handle, other.handle.local_peer()).await;
        connected(&other.handle, one.handle.local_peer()).await;
        let request = request(0, tokens, inner, outer);
        assert_eq!(body_bytes(&request).len(), 64 << 20);
        let ask = |from: &Worker, to: &Worker, call| {
            let transport = Libp2pTransport::new(from.handle.clone(), TransportConfig::default());
            let (name, mut request) = (to.name(), request.clone());
            request.header.call = call;
            async move {
                let tiles = transport.product(&name, request.clone()).await.unwrap();
                receive(&request, tiles).await.unwrap()
            }
        };
        let there = (0..EACH_WAY).map(|call| ask(&one, &other, call));
        let back = (0..EACH_WAY).map(|call| ask(&other, &one, call));
        let (there, back) = futures::join!(futures::future::join_all(there), futures::future::join_all(back));
        assert!(there.into_iter().chain(back).all(|columns| columns == outer));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_products_at_once_and_a_slow_reader() {
    let worker = Worker::start(TCP, FakeService::new(16, 200, 50), ServeConfig::default()).await;
    let transport = owner_of(&worker.handle, TransportConfig::default()).await;
    let name = worker.name();
    let slow = request(999, 9, 16, 200);
    let slow_tiles = transport.product(&name, slow.clone()).await.unwrap();
    let products = (0..30).map(|_| works(&transport, &name, 16, 200));
    futures::future::join_all(products).await;
    assert_eq!(receive(&slow, slow_tiles).await.unwrap(), 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn products_beyond_the_limit_are_refused_and_the_others_served() {
    let config = ServeConfig { streams_per_owner: 2, ..ServeConfig::default() };
    let mut service = FakeService::new(16, 8, 8);
    service.delay = Duration::from_millis(500);
    let worker = Worker::start(TCP, service, config).await;
    let transport = owner_of(&worker.handle, TransportConfig::default()).await;
    let (name, request) = (worker.name(), request(1, 9, 16, 8));
    let products = (0..6).map(|_| async {
        let tiles = transport.product(&name, request.clone()).await.unwrap();
        receive(&request, tiles).await
    });
    let outcomes = futures::future::join_all(products).await;
    let refused = |outcome: &&Result<usize, TransportError>| {
        matches!(outcome, Err(TransportError::Refused { refusal: Refusal::Busy(_), .. }))
    };
    let served = outcomes.iter().filter(|outcome| matches!(outcome, Ok(8))).count();
    assert_eq!((served, outcomes.iter().filter(refused).count()), (2, 4), "{outcomes:?}");
    works(&transport, &name, 16, 8).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_beyond_the_limit_is_refused_by_its_header() {
    let config = ServeConfig { max_body_bytes: 1 << 20, ..ServeConfig::default() };
    let worker = Worker::start(TCP, FakeService::new(1000, 8, 8), config).await;
    let transport = owner_of(&worker.handle, TransportConfig::default()).await;
    let name = worker.name();
    works(&transport, &name, 1000, 8).await;
    let request = request(1, 300, 1000, 8);
    let tiles = transport.product(&name, request.clone()).await.unwrap();
    let error = receive(&request, tiles).await.unwrap_err();
    assert!(matches!(error, TransportError::Refused { refusal: Refusal::Malformed(_), .. }), "{error}");
}

/// A service that never sends a tile and says when nobody waits any more.
struct Endless(mpsc::Sender<()>);

#[async_trait]
impl WorkerService for Endless {
    async fn control(&self, _: &PeerName, _: ControlRequest) -> ControlReply {
        ControlReply::Released
    }

    async fn admit(&self, _: &PeerName, _: &ProductHeader) -> Result<Box<dyn Admitted>, Refusal> {
        Ok(Box::new(Self(self.0.clone())))
    }

    fn serves(&self, _: &PeerName) -> bool {
        true
    }

    async fn left(&self, _: &PeerName) {}
}

#[async_trait]
impl Admitted for Endless {
    fn inner(&self) -> usize {
        16
    }

    fn outer(&self) -> usize {
        8
    }

    async fn begin(self: Box<Self>, _: Option<Arc<Planes>>) -> Result<Answer, Refusal> {
        let ((sender, tiles), ended) = (mpsc::channel(1), self.0);
        tokio::spawn(async move {
            sender.closed().await;
            ended.send(()).await.unwrap();
        });
        Ok(Answer { tiles, time: PATIENCE, place: Box::new(()) })
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_product_that_nobody_waits_for_is_dropped_at_the_worker() {
    for listen in [TCP, QUIC] {
        let handle = node(SwarmRole::Worker, &[listen], vec![]).await;
        let (sender, mut ended) = mpsc::channel(4);
        let _serving = serve(&handle, Arc::new(Endless(sender)), ServeConfig::default()).await.unwrap();
        let transport = owner_of(&handle, TransportConfig::default()).await;
        let tiles = transport.product(&peer_name(handle.local_peer()), request(1, 9, 16, 8)).await.unwrap();
        tokio::time::sleep(Duration::from_millis(300)).await;
        drop(tiles);
        tokio::time::timeout(PATIENCE, ended.recv()).await.expect("the worker notices").unwrap();
        // The same when the owner's whole process goes.
        let _tiles = transport.product(&peer_name(handle.local_peer()), request(2, 9, 16, 8)).await.unwrap();
        tokio::time::sleep(Duration::from_millis(300)).await;
        transport.handle().shut_down();
        tokio::time::timeout(PATIENCE, ended.recv()).await.expect("the worker notices").unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_reached_or_sent_is_told_apart() {
    let handle = node(SwarmRole::Owner, &[], vec![]).await;
    let transport = Libp2pTransport::new(handle, TransportConfig::default());
    let nobody = peer_name(PeerId::random());
    let error = transport.product(&nobody, request(1, 9, 16, 8)).await.unwrap_err();
    assert!(matches!(error, TransportError::Unreachable { .. }), "{error}");
    let error = transport.control(&nobody, ControlRequest::Release).await.unwrap_err();
    assert!(matches!(error, TransportError::Unreachable { .. }), "{error}");
    let error = transport.product(&PeerName::from("no name"), request(1, 9, 16, 8)).await.unwrap_err();
    assert!(error.to_string().contains("no peer id"), "{error}");
    let mut wrong = request(1, 9, 16, 8);
    wrong.header.operand = Operand::Body { tokens: 10 };
    let without = ProductRequest { body: None, ..request(1, 9, 16, 8) };
    let superfluous = ProductRequest { body: wrong.body.clone(), ..mask_request(&wrong) };
    for invalid in [wrong, without, superfluous] {
        let error = transport.product(&nobody, invalid).await.unwrap_err();
        assert!(matches!(error, TransportError::Invalid { .. }), "{error}");
    }
}

/// Answers one product of [`request`] after the other, as long as some come.
async fn answer_all(mut stream: Stream, sample: ProductRequest) {
    let mut bytes = vec![0; encode(&sample.header).unwrap().len() + body_bytes(&sample).len()];
    while stream.read_exact(&mut bytes).await.is_ok() {
        let tile = TileHeader { call: sample.header.call, first_column: 0, columns: sample.outer as u32 };
        let planes = fake_tile(&sample, 0, sample.outer).rows;
        let answer = [&encode(&ProductReply::Tile(tile)).unwrap(), planes.bytes()].concat();
        stream.write_all(&answer).await.unwrap();
        stream.flush().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_stream_carries_product_after_product() {
    for listen in [TCP, QUIC] {
        let worker = node(SwarmRole::Worker, &[listen], vec![]).await;
        let (opened, request) = (Arc::new(AtomicUsize::new(0)), request(5, 9, 16, 8));
        let mut incoming = worker.streams().accept(PRODUCT_PROTOCOL).unwrap();
        let (count, sample) = (Arc::clone(&opened), request.clone());
        tokio::spawn(async move {
            while let Some((_, stream)) = incoming.next().await {
                count.fetch_add(1, Ordering::Relaxed);
                tokio::spawn(answer_all(stream, sample.clone()));
            }
        });
        let transport = owner_of(&worker, TransportConfig::default()).await;
        let name = peer_name(worker.local_peer());
        let product = async || {
            let tiles = transport.product(&name, request.clone()).await.unwrap();
            assert_eq!(receive(&request, tiles).await.unwrap(), 8);
        };
        for _ in 0..5 {
            product().await;
            // The stream is kept when the last tile has been handed on.
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        assert_eq!(opened.load(Ordering::Relaxed), 1);
        futures::join!(product(), product(), product());
        assert!(opened.load(Ordering::Relaxed) <= 3);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_product_waits_for_hardly_more_than_a_round_trip() {
    const PRODUCTS: u32 = 5;
    // A megabyte there and as much back, several times what a new stream's window holds. Over QUIC, too, more than it sends at
    // first, but no more than a UDP socket of any system holds; what it sends at once stops growing when all of a body is
    // under way, so that the end of one may wait for another round trip.
    for (listen, rows, most) in [(TCP, 256, 2), (QUIC, 16, 3)] {
        let worker = Worker::start(listen, FakeService::new(1024, 1024, 128), ServeConfig::default()).await;
        let line: Line = "200ms".parse().unwrap();
        let (_link, address) = Link::over(&worker.address(), line).await.unwrap().unwrap();
        let handle = node(SwarmRole::Owner, &[], vec![address]).await;
        connected(&handle, worker.handle.local_peer()).await;
        let transport = Libp2pTransport::new(handle, TransportConfig::default());
        let (name, request) = (worker.name(), request(1, rows, 1024, 1024));
        let products = async |count| {
            let start = Instant::now();
            for _ in 0..count {
                let tiles = transport.product(&name, request.clone()).await.unwrap();
                assert_eq!(receive(&request, tiles).await.unwrap(), 1024);
            }
            start.elapsed()
        };
        products(PRODUCTS).await;
        let took = products(PRODUCTS).await;
        assert!(took >= PRODUCTS * line.round_trip && took < most * PRODUCTS * line.round_trip, "{listen}: {took:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_the_worker_has_given_up_is_opened_anew() {
    for listen in [TCP, QUIC] {
        let config = ServeConfig { idle: Duration::from_millis(50), ..ServeConfig::default() };
        let worker = Worker::start(listen, FakeService::new(16, 8, 8), config).await;
        let transport = owner_of(&worker.handle, TransportConfig::default()).await;
        for pause in [0, 40, 50, 60, 300] {
            tokio::time::sleep(Duration::from_millis(pause)).await;
            works(&transport, &worker.name(), 16, 8).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_stops_waits_for_no_idle_stream() {
    let Worker { handle, _serving } = Worker::start(TCP, FakeService::new(16, 8, 8), ServeConfig::default()).await;
    let transport = owner_of(&handle, TransportConfig::default()).await;
    works(&transport, &peer_name(handle.local_peer()), 16, 8).await;
    let stops = _serving.shut_down(Duration::MAX);
    tokio::time::timeout(PATIENCE, stops).await.expect("nothing is left to wait for");
}
