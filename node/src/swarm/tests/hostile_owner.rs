//! A worker and peers that send it what they should not. After each of them it serves as before.

use std::io::{Read, Write};

use futures::{AsyncReadExt, AsyncWriteExt};
use libp2p::{Stream, StreamProtocol};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
use protocol::wire::{MAX_PAYLOAD_BYTES, PREFIX_BYTES, decode, encode};

use super::*;

/// A worker, an honest owner, and a peer that opens streams by hand.
struct Scene {
    worker: Worker,
    honest: Libp2pTransport,
    hostile: SwarmHandle,
}

const INNER: usize = 16;
const OUTER: usize = 8;

impl Scene {
    async fn set(listen: &str) -> Self {
        let config =
            ServeConfig { header: Duration::from_secs(1), stall: Duration::from_secs(1), ..Default::default() };
        let worker = Worker::start(listen, FakeService::new(INNER, OUTER, 4), config).await;
        let honest = owner_of(&worker.handle, TransportConfig::default()).await;
        let hostile = owner_of(&worker.handle, TransportConfig::default()).await.handle().clone();
        Self { worker, honest, hostile }
    }

    async fn stream(&self, protocol: StreamProtocol) -> Stream {
        self.hostile.streams().open_stream(self.worker.handle.local_peer(), protocol).await.unwrap()
    }

    /// Sends bytes and closes the writing side if told so; all that comes back until the worker ends the stream.
    async fn send(&self, protocol: StreamProtocol, bytes: &[u8], close: bool) -> Vec<u8> {
        let mut stream = self.stream(protocol).await;
        // The worker may end the stream before it has read everything.
        let _ = stream.write_all(bytes).await;
        let _ = stream.flush().await;
        if close {
            let _ = stream.close().await;
        }
        let mut answer = Vec::new();
        let read = stream.read_to_end(&mut answer);
        // An error is an end as well: the stream was reset.
        let _ = tokio::time::timeout(PATIENCE, read).await.expect("the worker ends the stream");
        answer
    }

    async fn worker_is_well(&self) {
        works(&self.honest, &self.worker.name(), INNER, OUTER).await;
        let offer = ControlRequest::Offer { version: PROTOCOL_VERSION };
        assert!(matches!(self.honest.control(&self.worker.name(), offer).await, Ok(ControlReply::Offer(_))));
    }
}

fn refusal(answer: &[u8]) -> Refusal {
    match decode::<ProductReply>(&answer[PREFIX_BYTES..]).unwrap() {
        ProductReply::Refused(refusal) => refusal,
        ProductReply::Tile(_) => panic!("a tile"),
    }
}

fn random_bytes(count: usize) -> Vec<Vec<u8>> {
    let mut runner = TestRunner::default();
    let bytes = prop::collection::vec(any::<u8>(), 0..2000);
    (0..count).map(|_| bytes.new_tree(&mut runner).unwrap().current()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_bytes_on_every_protocol() {
    for listen in [TCP, QUIC] {
        let scene = Scene::set(listen).await;
        for bytes in random_bytes(20) {
            assert_ne!(bytes.get(..4), Some(PROTOCOL_VERSION.to_le_bytes().as_slice()), "a chance of 2^-32");
            let version_answer = scene.send(PRODUCT_PROTOCOL, &bytes, true).await;
            assert!(version_answer.is_empty() || refusal(&version_answer) == Refusal::Version(PROTOCOL_VERSION));
            assert!(scene.send(CONTROL_PROTOCOL, &bytes, true).await.is_empty());
            // With a good prefix the bytes reach the decoder.
            let length = u32::try_from(bytes.len()).unwrap().to_le_bytes();
            let framed = [&PROTOCOL_VERSION.to_le_bytes()[..], &length, &bytes].concat();
            assert!(scene.send(PRODUCT_PROTOCOL, &framed, true).await.is_empty());
        }
        scene.worker_is_well().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_bytes_on_the_port_itself() {
    let scene = Scene::set(TCP).await;
    let port = scene.worker.address().to_string().split('/').nth(4).unwrap().to_owned();
    let noise = random_bytes(20).into_iter().chain([b"GET / HTTP/1.1\r\n\r\n".to_vec(), vec![]]);
    let sent = tokio::task::spawn_blocking(move || {
        for bytes in noise {
            let mut socket = std::net::TcpStream::connect(format!("127.0.0.1:{port}")).unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            // The worker may hang up at any moment.
            let _ = socket.write_all(&bytes);
            let _ = socket.shutdown(std::net::Shutdown::Write);
            let _ = socket.read_to_end(&mut Vec::new());
        }
    });
    sent.await.unwrap();
    scene.worker_is_well().await;

    let scene = Scene::set(QUIC).await;
    let port = scene.worker.address().to_string().split('/').nth(4).unwrap().to_owned();
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    for bytes in random_bytes(20) {
        socket.send_to(&bytes, format!("127.0.0.1:{port}")).unwrap();
    }
    scene.worker_is_well().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lengths_and_sizes_beyond_the_limits() {
    let scene = Scene::set(TCP).await;
    let mut long = PROTOCOL_VERSION.to_le_bytes().to_vec();
    long.extend((MAX_PAYLOAD_BYTES as u32 + 1).to_le_bytes());
    long.extend(vec![0; MAX_PAYLOAD_BYTES + 1]);
    assert!(scene.send(PRODUCT_PROTOCOL, &long, false).await.is_empty());
    assert!(scene.send(CONTROL_PROTOCOL, &long, false).await.is_empty());

    // 2^32 tokens are refused by the header alone: nothing of the body is ever sent.
    let mut header = request(1, 9, INNER, OUTER).header;
    header.operand = Operand::Body { tokens: u32::MAX };
    let answer = scene.send(PRODUCT_PROTOCOL, &encode(&header).unwrap(), true).await;
    assert!(matches!(refusal(&answer), Refusal::Malformed(_)));

    // Another version, in the frame and in the header.
    let mut foreign = encode(&header).unwrap();
    foreign[0] = 1;
    assert_eq!(refusal(&scene.send(PRODUCT_PROTOCOL, &foreign, true).await), Refusal::Version(PROTOCOL_VERSION));
    assert!(scene.send(CONTROL_PROTOCOL, &foreign, true).await.is_empty());
    header.version = 1;
    let answer = scene.send(PRODUCT_PROTOCOL, &encode(&header).unwrap(), true).await;
    assert_eq!(refusal(&answer), Refusal::Version(PROTOCOL_VERSION));
    scene.worker_is_well().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bodies_too_short_too_long_and_too_slow() {
    for listen in [TCP, QUIC] {
        let scene = Scene::set(listen).await;
        let request = request(1, 9, INNER, OUTER);
        let header = encode(&request.header).unwrap();
        let body = body_bytes(&request);
        let cut = [&header, &body[..body.len() - 1]].concat();
        assert!(scene.send(PRODUCT_PROTOCOL, &cut, true).await.is_empty());
        // Not closed: the worker's own time limits end these.
        assert!(scene.send(PRODUCT_PROTOCOL, &cut, false).await.is_empty());
        assert!(scene.send(PRODUCT_PROTOCOL, &header[..5], false).await.is_empty());
        assert!(scene.send(PRODUCT_PROTOCOL, &[], false).await.is_empty());
        scene.worker_is_well().await;
    }
    // Bytes behind a body, and behind the header of a mask, to a worker that is still computing.
    let mut service = FakeService::new(INNER, OUTER, 4);
    service.delay = Duration::from_secs(30);
    let worker = Worker::start(TCP, service, ServeConfig::default()).await;
    let honest = owner_of(&worker.handle, TransportConfig::default()).await;
    let scene = Scene { hostile: honest.handle().clone(), honest, worker };
    let request = request(1, 9, INNER, OUTER);
    let bytes = [&encode(&request.header).unwrap(), body_bytes(&request), &[0]].concat();
    assert!(scene.send(PRODUCT_PROTOCOL, &bytes, false).await.is_empty());
    let bytes = [&encode(&mask_request(&request).header).unwrap()[..], &[0]].concat();
    assert!(scene.send(PRODUCT_PROTOCOL, &bytes, false).await.is_empty());
}
