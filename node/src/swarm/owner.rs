//! An owner's transport: control requests and products to workers over the swarm.
//!
//! A product goes in four steps. (1) A stream is taken that has nothing to do ([`super::pool`]), or else opened. (2) Header
//! and body are written while (3) tiles are read: both at once, in one task, so that neither side's full buffers can hold
//! up the other's. (4) When every column has come, the stream is kept for the next product; at the first thing that is
//! wrong it is dropped. A worker whose queue of new streams is full drops a stream without a word, and one that was idle
//! may have been given up at the other end; as long as nothing was answered, the same bytes are sent again on a new one.

use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use actors::transport::{PeerName, ProductRequest, TileStream, Traffic, Transport, TransportError};
use async_trait::async_trait;
use futures::future::{Either, select};
use futures::io::{AsyncWriteExt, WriteHalf};
use libp2p::{PeerId, Stream};
use protocol::he::ProductTile;
use protocol::wire::TileLedger;
use protocol::wire::messages::{ControlReply, ControlRequest, ProductReply};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{sleep, timeout};

use super::PRODUCT_PROTOCOL;
use super::error::SwarmError;
use super::handle::{SwarmHandle, peer_name};
use super::io::{Counters, LinkError, read_message, write_with_planes};
use super::pool::{Pool, ProductStream, Reader};
use super::tiles::read_tile;

/// Streams that are opened for one product before it is given up.
const ATTEMPTS: u32 = 5;

/// Wait before the second attempt; it doubles.
const FIRST_BACKOFF: Duration = Duration::from_millis(20);

/// How long a refusal may take to arrive after the worker stopped reading.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Limits of an owner's transport.
#[derive(Clone, Copy, Debug)]
pub struct TransportConfig {
    /// To reach a worker and open a stream.
    pub connect: Duration,
    /// For a control request and its reply.
    pub control: Duration,
    /// For each 256 KiB that are sent or received.
    pub stall: Duration,
    /// From the last byte of the body to the first tile.
    pub first_tile: Duration,
    /// From one tile to the next.
    pub next_tile: Duration,
    /// Bytes a second that a whole product must make, there and back, beside one pause of each kind.
    pub least_rate: u64,
    /// Largest tile.
    pub max_tile_bytes: usize,
    /// Tiles that wait for whoever decrypts them.
    pub waiting_tiles: usize,
}

impl Default for TransportConfig {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            control: Duration::from_secs(30),
            stall: Duration::from_secs(60),
            first_tile: Duration::from_secs(120),
            next_tile: Duration::from_secs(60),
            // A link of half a megabit a second. Who is slower would keep a step waiting for hours.
            least_rate: 64 << 10,
            max_tile_bytes: 512 << 20,
            waiting_tiles: 2,
        }
    }
}

/// The owner's way to its workers over libp2p. Peer names are base-58 peer ids.
#[derive(Clone)]
pub struct Libp2pTransport {
    handle: SwarmHandle,
    config: TransportConfig,
    idle: Arc<Pool>,
}

impl Libp2pTransport {
    /// A transport over a running swarm.
    pub fn new(handle: SwarmHandle, config: TransportConfig) -> Self {
        Self { handle, config, idle: Arc::default() }
    }

    /// The swarm below.
    pub fn handle(&self) -> &SwarmHandle {
        &self.handle
    }

    /// One control request with a limit of its own.
    pub(super) async fn ask(
        &self,
        peer: PeerId,
        request: ControlRequest,
        limit: Duration,
    ) -> Result<ControlReply, TransportError> {
        let handle = self.handle.clone();
        // On the swarm's runtime, so that callers may be on any executor.
        let asked = async move { timeout(limit, handle.control(peer, request)).await };
        let name = || peer_name(peer);
        let reply = match self.handle.runtime().spawn(asked).await {
            Ok(Ok(reply)) => reply?,
            Ok(Err(_)) => {
                let what = format!("no reply within {limit:?}");
                return Err(TransportError::Unreachable { peer: name(), what });
            }
            Err(_) => return Err(TransportError::Unreachable { peer: name(), what: "the runtime is ending".into() }),
        };
        match reply {
            ControlReply::Refused(refusal) => Err(TransportError::Refused { peer: name(), refusal }),
            reply => Ok(reply),
        }
    }
}

/// The libp2p name behind a peer's name.
fn peer_id(name: &PeerName) -> Result<PeerId, TransportError> {
    name.0.parse().map_err(|_| TransportError::Unreachable { peer: name.clone(), what: "it is no peer id".into() })
}

#[async_trait]
impl Transport for Libp2pTransport {
    async fn control(&self, worker: &PeerName, request: ControlRequest) -> Result<ControlReply, TransportError> {
        self.ask(peer_id(worker)?, request, self.config.control).await
    }

    async fn product(
        &self,
        worker: &PeerName,
        request: ProductRequest,
    ) -> Result<TileStream<TransportError>, TransportError> {
        let peer = peer_id(worker)?;
        let inner = request.body.as_ref().map_or(0, |body| body.columns());
        if !request.is_consistent(inner) || request.outer == 0 {
            return Err(TransportError::Invalid {
                what: "the body does not have the shape that the header says".into(),
            });
        }
        let (tiles, stream) = mpsc::channel(self.config.waiting_tiles.max(1));
        let (opened, open) = oneshot::channel();
        let call = Call { transport: self.clone(), peer, request, tiles, counters: self.handle.counters() };
        self.handle.runtime().spawn(call.run(opened));
        let ended = |_| TransportError::Unreachable { peer: worker.clone(), what: "the runtime is ending".into() };
        open.await.map_err(ended)??;
        Ok(stream)
    }

    fn traffic(&self) -> Traffic {
        self.handle.traffic()
    }

    fn round_trip(&self) -> Option<Duration> {
        self.handle.round_trip()
    }
}

/// One product on its way.
struct Call {
    transport: Libp2pTransport,
    peer: PeerId,
    request: ProductRequest,
    tiles: mpsc::Sender<Result<ProductTile, TransportError>>,
    counters: Arc<Counters>,
}

/// Whether a stream can take no other product after one that was answered.
enum Spent {
    No,
    Yes,
}

/// How an exchange on one stream ended early.
enum Failure {
    /// For good.
    Final(TransportError),
    /// The stream was dropped before anything was answered.
    Dropped(TransportError),
    /// Nobody waits for the tiles any more.
    Cancelled,
}

impl Call {
    /// The call until it is over or the swarm ends.
    async fn run(self, opened: oneshot::Sender<Result<(), TransportError>>) {
        tokio::select! {
            () = self.call(opened) => {}
            () = self.transport.handle.stop().cancelled() => {
                // A full queue says the same by ending too early.
                let _ = self.tiles.try_send(Err(self.unreachable(SwarmError::Closed.to_string())));
            }
        }
    }

    /// Takes or opens a stream, says whether that worked, and goes through the exchange.
    async fn call(&self, opened: oneshot::Sender<Result<(), TransportError>>) {
        let idle = self.transport.idle.take(self.peer, Instant::now());
        let mut used_before = idle.is_some();
        let first = match idle {
            Some(stream) => Ok(stream),
            None => self.open().await,
        };
        let mut stream = match first {
            Ok(stream) => stream,
            Err(error) => return drop(opened.send(Err(error))),
        };
        if opened.send(Ok(())).is_err() {
            return;
        }
        let (mut attempt, mut backoff) = (1, FIRST_BACKOFF);
        loop {
            let began = Instant::now();
            let error = match self.exchange(&mut stream).await {
                Ok(Spent::No) => {
                    stream.carried(self.bytes(), began.elapsed());
                    return self.transport.idle.give(self.peer, stream, Instant::now());
                }
                Ok(Spent::Yes) | Err(Failure::Cancelled) => return,
                Err(Failure::Dropped(error)) if used_before || attempt < ATTEMPTS => error,
                Err(Failure::Dropped(error) | Failure::Final(error)) => return self.fail(error).await,
            };
            tracing::debug!(peer = %self.peer, call = self.request.header.call, %error, attempt, "sending again");
            if used_before {
                // That it was given up meanwhile says nothing about the worker.
                self.transport.idle.forget(self.peer);
                used_before = false;
            } else {
                sleep(backoff).await;
                (attempt, backoff) = (attempt + 1, 2 * backoff);
            }
            stream = match self.open().await {
                Ok(stream) => stream,
                Err(error) => return self.fail(error).await,
            };
        }
    }

    async fn fail(&self, error: TransportError) {
        // The receiver may be gone, and then nobody needs to know.
        let _ = self.tiles.send(Err(error)).await;
    }

    async fn open(&self) -> Result<ProductStream, TransportError> {
        let limit = self.transport.config.connect;
        let mut streams = self.transport.handle.streams();
        match timeout(limit, streams.open_stream(self.peer, PRODUCT_PROTOCOL)).await {
            Ok(Ok(stream)) => Ok(stream.into()),
            Ok(Err(libp2p_stream::OpenStreamError::UnsupportedProtocol(protocol))) => {
                Err(self.protocol(format!("it does not speak {protocol}")))
            }
            Ok(Err(error)) => Err(self.unreachable(error.to_string())),
            Err(_) => Err(self.unreachable(format!("no connection within {limit:?}"))),
        }
    }

    /// [`Self::converse`], within the time that a product of this size may take as a whole: single tiles that come just
    /// in time do not make a good answer.
    async fn exchange(&self, stream: &mut ProductStream) -> Result<Spent, Failure> {
        let limit = self.time_for_all();
        match timeout(limit, self.converse(stream)).await {
            Ok(outcome) => outcome,
            Err(_) => Err(Failure::Final(self.unreachable(format!("the answer was not whole within {limit:?}")))),
        }
    }

    /// How long the product may take. What a worker says of its speed does not matter.
    fn time_for_all(&self) -> Duration {
        let config = &self.transport.config;
        // One pause of each kind is nobody's fault.
        let pauses = config.stall + config.first_tile + config.next_tile;
        pauses + Duration::from_secs(self.bytes() / config.least_rate.max(1))
    }

    /// Bytes of the body and of the answer, before they are packed into bits.
    fn bytes(&self) -> u64 {
        let ProductRequest { header, body, outer } = &self.request;
        let answer = header.rows().saturating_mul(*outer).saturating_mul(header.answer_limbs());
        answer.saturating_add(body.as_ref().map_or(0, |body| body.bytes().len())) as u64
    }

    /// Sends the request and receives the tiles on one stream.
    async fn converse(&self, stream: &mut ProductStream) -> Result<Spent, Failure> {
        let ProductStream { reader, writer, .. } = stream;
        let (sent, all_sent) = oneshot::channel();
        let receive = pin!(async {
            tokio::select! {
                outcome = self.receive(reader, all_sent) => outcome,
                () = self.tiles.closed() => Err(Failure::Cancelled),
            }
        });
        let send = pin!(self.send(writer, sent));
        match select(receive, send).await {
            // An answer to half a body.
            Either::Left((outcome, _)) => outcome.map(|()| Spent::Yes),
            Either::Right((Ok(()), receive)) => receive.await.map(|()| Spent::No),
            // The worker stopped reading: it may have said why.
            Either::Right((Err(error), receive)) => match timeout(LAST_WORDS, receive).await {
                Ok(outcome) => outcome.map(|()| Spent::Yes),
                Err(_) => Err(Failure::Dropped(self.link_error(error))),
            },
        }
    }

    async fn send(&self, writer: &mut WriteHalf<Stream>, sent: oneshot::Sender<()>) -> Result<(), LinkError> {
        let stall = self.transport.config.stall;
        let stalled = |_| LinkError::TimedOut("accepted", stall);
        let ProductRequest { header, body, .. } = &self.request;
        write_with_planes(writer, header, body.as_deref(), stall, &self.counters).await?;
        timeout(stall, writer.flush()).await.map_err(stalled)??;
        // The writing side stays open: its end would tell the worker that nobody waits for the tiles.
        let _ = sent.send(());
        Ok(())
    }

    async fn receive(&self, reader: &mut Reader, sent: oneshot::Receiver<()>) -> Result<(), Failure> {
        let config = &self.transport.config;
        let mut ledger = TileLedger::new(&self.request.header, self.request.outer, config.max_tile_bytes);
        let mut reply = self.first_reply(reader, sent).await?;
        loop {
            let tile = match reply {
                ProductReply::Tile(tile) => tile,
                ProductReply::Refused(refusal) => {
                    return Err(Failure::Final(TransportError::Refused { peer: peer_name(self.peer), refusal }));
                }
            };
            let shape = ledger.accept(&tile).map_err(|error| Failure::Final(self.protocol(error.to_string())))?;
            let tile = read_tile(reader, shape, config.stall, &self.counters).await;
            let tile = tile.map_err(|error| Failure::Final(self.link_error(error)))?;
            self.tiles.send(Ok(tile)).await.map_err(|_| Failure::Cancelled)?;
            if ledger.left() == 0 {
                return Ok(());
            }
            reply = match timeout(config.next_tile, read_message(reader, &self.counters)).await {
                Ok(Ok(reply)) => reply,
                Ok(Err(error)) => return Err(Failure::Final(self.link_error(error))),
                Err(_) => {
                    let what = format!("{} columns missing, and no tile for {:?}", ledger.left(), config.next_tile);
                    return Err(Failure::Final(self.unreachable(what)));
                }
            };
        }
    }

    /// The first reply. Its time begins when the body has been sent.
    async fn first_reply(&self, reader: &mut Reader, sent: oneshot::Receiver<()>) -> Result<ProductReply, Failure> {
        let limit = self.transport.config.first_tile;
        let expired = async {
            match sent.await {
                Ok(()) => sleep(limit).await,
                // Sending failed, and whoever saw that has a limit for what comes now.
                Err(_) => std::future::pending().await,
            }
        };
        tokio::select! {
            reply = read_message(reader, &self.counters) => reply.map_err(|error| match error {
                LinkError::Closed | LinkError::Broken(_) => Failure::Dropped(self.link_error(error)),
                error => Failure::Final(self.link_error(error)),
            }),
            () = expired => Err(Failure::Final(self.unreachable(format!("no tile within {limit:?}")))),
        }
    }

    fn link_error(&self, error: LinkError) -> TransportError {
        match error {
            LinkError::Frame(error) => self.protocol(error.to_string()),
            error => self.unreachable(error.to_string()),
        }
    }

    fn unreachable(&self, what: String) -> TransportError {
        TransportError::Unreachable { peer: peer_name(self.peer), what }
    }

    fn protocol(&self, what: String) -> TransportError {
        TransportError::Protocol { peer: peer_name(self.peer), what }
    }
}
