//! A worker's side: a [`WorkerService`] on the network.
//!
//! Everything is bounded: control requests at the same time, streams ([`super::streams`]), and how long each part of a
//! product may take. A product is admitted by its header: the service gives it its place, the memory of its answer
//! included, before anything of its body is read, and the place goes with it to its last byte. While tiles are computed
//! and written the stream is watched: when the owner goes away, the product is dropped. After the last tile an owner that
//! has layers may send its next product on the same stream; nothing is held for it but the stream, and not for long. A peer
//! that sends something else loses its stream, and the log says why, in few lines.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use actors::transport::{Answer, TileStream, WorkerService};
use futures::StreamExt;
use futures::io::{AsyncBufReadExt, AsyncWriteExt, WriteHalf};
use libp2p::{PeerId, Stream};
use protocol::wire::messages::{ControlReply, ControlRequest, PROTOCOL_VERSION, ProductHeader, ProductReply, Refusal};
use protocol::wire::{FrameError, PlanesShape, TileLedger, encode};
use tokio::sync::{Semaphore, broadcast, mpsc};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::PRODUCT_PROTOCOL;
use super::behaviour::CONTROL_TIME_OUT;
use super::damper::Damper;
use super::error::SwarmError;
use super::handle::{InboundControl, NetworkEvent, SwarmHandle, peer_name};
use super::io::{Counters, LinkError, read_message, read_planes, write_message};
use super::pool::{IDLE, ProductStream, Reader};
use super::streams::{Lane, StreamLimits, StreamPlace, Streams, Visits};
use super::tiles::write_tile;

/// Control requests that wait for the service.
const WAITING_CONTROL: usize = 64;

/// Control requests that the service answers at the same time.
const CONTROL_AT_ONCE: usize = 16;

/// Limits of a worker's side.
#[derive(Clone, Copy, Debug)]
pub struct ServeConfig {
    /// Product streams at the same time of one owner that has layers.
    pub streams_per_owner: usize,
    /// Product streams at the same time of one other peer.
    pub streams_per_stranger: usize,
    /// Product streams at the same time of all other peers.
    pub stranger_streams: usize,
    /// Largest body of a product.
    pub max_body_bytes: usize,
    /// Largest tile that is sent.
    pub max_tile_bytes: usize,
    /// For an owner's header to arrive.
    pub header: Duration,
    /// For another peer's.
    pub stranger_header: Duration,
    /// From an owner's product to the next one on the same stream.
    pub idle: Duration,
    /// For each 256 KiB that are received or sent.
    pub stall: Duration,
    /// For a whole body or answer, however small.
    pub slack: Duration,
    /// Bytes a second that a whole body or answer must keep up beyond that.
    pub least_rate: u64,
}

impl Default for ServeConfig {
    fn default() -> Self {
        Self {
            // Twice the products that a worker takes at a time, so that the next are there when it is done.
            streams_per_owner: 32,
            // To be told why a product is refused, no more.
            streams_per_stranger: 2,
            stranger_streams: 8,
            max_body_bytes: 1 << 30,
            max_tile_bytes: 512 << 20,
            header: Duration::from_secs(10),
            stranger_header: Duration::from_secs(3),
            idle: IDLE,
            stall: Duration::from_secs(60),
            slack: Duration::from_secs(30),
            // Sixteen products at a time over a link of 4 Mbit/s.
            least_rate: 32 << 10,
        }
    }
}

/// A service on the network. Dropping it takes the service off, at once and in the middle of products.
pub struct Serving {
    stop: CancellationToken,
    abort: CancellationToken,
    tasks: TaskTracker,
}

impl Serving {
    /// Takes no more requests, and waits until those at work are done or `grace` is over.
    pub async fn shut_down(self, grace: Duration) {
        self.stop.cancel();
        self.tasks.close();
        if timeout(grace, self.tasks.wait()).await.is_err() {
            tracing::warn!(left = self.tasks.len(), "products are dropped in the middle");
        }
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.stop.cancel();
        self.abort.cancel();
    }
}

/// Puts a service on the network.
///
/// # Errors
/// [`SwarmError::AlreadyServing`], [`SwarmError::Closed`].
pub async fn serve(
    handle: &SwarmHandle,
    service: Arc<dyn WorkerService>,
    config: ServeConfig,
) -> Result<Serving, SwarmError> {
    let incoming = handle.streams().accept(PRODUCT_PROTOCOL).map_err(|_| SwarmError::AlreadyServing)?;
    let (sender, requests) = mpsc::channel(WAITING_CONTROL);
    handle.take_control(sender).await?;
    handle.regulars().serve(&service);
    let (stop, abort, tasks) = (handle.stop().child_token(), handle.stop().child_token(), TaskTracker::new());
    let server = Arc::new(Server {
        service,
        config,
        counters: handle.counters(),
        streams: Streams::new(StreamLimits {
            of_owner: config.streams_per_owner,
            of_stranger: config.streams_per_stranger,
            of_strangers: config.stranger_streams,
        }),
        dropped: Mutex::default(),
        stop: stop.clone(),
        abort: abort.clone(),
        tasks: tasks.clone(),
    });
    handle.runtime().spawn(server.clone().accept(handle.clone(), incoming, stop.clone()));
    handle.runtime().spawn(server.clone().watch(handle.events(), stop.clone()));
    handle.runtime().spawn(server.answer(handle.clone(), requests, stop.clone()));
    Ok(Serving { stop, abort, tasks })
}

struct Server {
    service: Arc<dyn WorkerService>,
    config: ServeConfig,
    counters: Arc<Counters>,
    streams: Arc<Streams>,
    /// Of lines about streams that were dropped.
    dropped: Mutex<Damper>,
    stop: CancellationToken,
    abort: CancellationToken,
    tasks: TaskTracker,
}

/// Why a stream is ended early.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error("refused: {0}")]
    Refused(Refusal),
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error("the owner went away")]
    OwnerGone,
    #[error("bytes came behind the body")]
    Trailing,
    #[error("{0} took longer than {1:?}")]
    Slow(&'static str, Duration),
}

impl From<Refusal> for Ended {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl Server {
    /// Answers control requests until told to stop.
    async fn answer(
        self: Arc<Self>,
        handle: SwarmHandle,
        mut requests: mpsc::Receiver<InboundControl>,
        stop: CancellationToken,
    ) {
        let at_once = Arc::new(Semaphore::new(CONTROL_AT_ONCE));
        loop {
            let request = tokio::select! {
                biased;
                () = stop.cancelled() => break,
                request = requests.recv() => request,
            };
            let Some(InboundControl { peer, request, channel }) = request else { break };
            let Ok(permit) = at_once.clone().acquire_owned().await else { break };
            let (server, handle) = (self.clone(), handle.clone());
            self.tasks.spawn(async move {
                let reply = server.control(peer, request).await;
                handle.respond(channel, reply).await;
                drop(permit);
            });
        }
    }

    async fn control(&self, peer: PeerId, request: ControlRequest) -> ControlReply {
        if matches!(request, ControlRequest::Offer { version } if version != PROTOCOL_VERSION) {
            return ControlReply::Refused(Refusal::Version(PROTOCOL_VERSION));
        }
        let refused = |text: String| ControlReply::Refused(Refusal::Failed(text));
        let owner = peer_name(peer);
        let Ok(reply) = timeout(CONTROL_TIME_OUT, self.service.control(&owner, request)).await else {
            return refused("it took too long to answer".into());
        };
        // An answer that cannot be sent would otherwise look like a broken connection.
        encode(&reply).map_or_else(|error| refused(error.to_string()), |_| reply)
    }

    /// Tells the service who left, until told to stop.
    async fn watch(self: Arc<Self>, mut events: broadcast::Receiver<NetworkEvent>, stop: CancellationToken) {
        loop {
            let event = tokio::select! {
                biased;
                () = stop.cancelled() => break,
                event = events.recv() => event,
            };
            match event {
                Ok(NetworkEvent::PeerLost(peer)) => self.service.left(&peer_name(peer)).await,
                // Whoever's leaving was missed keeps its place until its lease is over.
                Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => break,
            }
        }
    }

    /// Takes streams until told to stop.
    async fn accept(
        self: Arc<Self>,
        handle: SwarmHandle,
        mut incoming: libp2p_stream::IncomingStreams,
        stop: CancellationToken,
    ) {
        let mut visits = Visits::new(Instant::now());
        loop {
            let next = tokio::select! {
                biased;
                () = stop.cancelled() => break,
                next = incoming.next() => next,
            };
            let Some((peer, stream)) = next else { break };
            let has_layers = self.service.serves(&peer_name(peer));
            if !has_layers && visits.visit(peer, Instant::now()) {
                tracing::debug!(%peer, "sent away: it opens stream after stream without having layers");
                handle.regulars().send_away(peer);
                continue;
            }
            let Some(place) = self.streams.place(peer, has_layers) else {
                self.note_dropped(peer, &"there are too many");
                continue;
            };
            let server = self.clone();
            self.tasks.spawn(async move {
                tokio::select! {
                    () = server.abort.cancelled() => {}
                    () = server.stream(peer, stream, &place) => {}
                }
                drop(place);
            });
        }
    }

    /// Says that a stream was dropped, if that was not said just now.
    fn note_dropped(&self, peer: PeerId, why: &dyn std::fmt::Display) {
        let pass = self.dropped.lock().unwrap_or_else(PoisonError::into_inner).pass(Instant::now());
        match pass {
            Some(others) => tracing::warn!(%peer, %why, others, "a product stream was dropped, and others before it"),
            None => tracing::debug!(%peer, %why, "a product stream was dropped"),
        }
    }

    /// One product stream from its first byte to its last.
    async fn stream(&self, peer: PeerId, stream: Stream, place: &StreamPlace) {
        let ProductStream { mut reader, mut writer, .. } = stream.into();
        let patience = match place.lane {
            Lane::Owner | Lane::Surplus => self.config.header,
            Lane::Stranger => self.config.stranger_header,
        };
        let outcome = match place.lane {
            Lane::Surplus => Err(Refusal::Busy("too many products of this owner at the same time".into()).into()),
            Lane::Stranger => self.product(peer, &mut reader, &mut writer, patience).await,
            Lane::Owner => self.products(peer, &mut reader, &mut writer, patience).await,
        };
        match outcome {
            Ok(()) => {}
            Err(Ended::OwnerGone) => tracing::debug!(%peer, "an owner dropped a product"),
            Err(Ended::Link(LinkError::Frame(FrameError::Version { theirs }))) => {
                self.note_dropped(peer, &format!("it speaks protocol version {theirs}"));
                self.refuse(Refusal::Version(PROTOCOL_VERSION), &mut reader, &mut writer, patience).await;
            }
            Err(Ended::Refused(refusal)) => {
                tracing::debug!(%peer, %refusal, "a product was refused");
                self.refuse(refusal, &mut reader, &mut writer, patience).await;
            }
            Err(error) => return self.note_dropped(peer, &error),
        }
        let closed = timeout(self.config.stall, writer.close()).await;
        tracing::trace!(%peer, ?closed, "a product stream ended");
    }

    /// One product after the other, until the owner has no more for a while.
    async fn products(
        &self,
        peer: PeerId,
        reader: &mut Reader,
        writer: &mut WriteHalf<Stream>,
        patience: Duration,
    ) -> Result<(), Ended> {
        loop {
            self.product(peer, reader, writer, patience).await?;
            let next = tokio::select! {
                biased;
                () = self.stop.cancelled() => return Ok(()),
                next = timeout(self.config.idle, reader.fill_buf()) => next,
            };
            // The end of the stream, however it came, is no loss between two products.
            if !matches!(next, Ok(Ok(bytes)) if !bytes.is_empty()) {
                return Ok(());
            }
        }
    }

    async fn product(
        &self,
        peer: PeerId,
        reader: &mut Reader,
        writer: &mut WriteHalf<Stream>,
        patience: Duration,
    ) -> Result<(), Ended> {
        let (config, owner) = (&self.config, peer_name(peer));
        let header: ProductHeader = timeout(patience, read_message(reader, &self.counters))
            .await
            .map_err(|_| LinkError::TimedOut("received", patience))??;
        if header.version != PROTOCOL_VERSION {
            return Err(Refusal::Version(PROTOCOL_VERSION).into());
        }
        let admitted = self.service.admit(&owner, &header).await?;
        let outer = admitted.outer();
        let shape = PlanesShape::of_body(&header, admitted.inner(), config.max_body_bytes)
            .map_err(|error| Refusal::Malformed(error.to_string()))?;
        let body = match shape {
            Some(shape) => {
                let limit = self.time_of(shape.bytes() as u64);
                let read = timeout(limit, read_planes(reader, shape, config.stall, &self.counters)).await;
                Some(Arc::new(read.map_err(|_| Ended::Slow("the body", limit))??))
            }
            None => None,
        };

        let mut ledger = TileLedger::new(&header, outer, config.max_tile_bytes);
        let bytes = (header.answer_limbs() as u64).saturating_mul(header.rows() as u64).saturating_mul(outer as u64);
        // An owner that has the last byte of the answer may send its next header before this task has seen it off.
        let answered = AtomicBool::new(false);
        let sent = async {
            // The place is kept until the last tile is sent, or the stream is dropped.
            let Answer { tiles, time, place: _place } = admitted.begin(body).await?;
            let limit = time.saturating_add(self.time_of(bytes));
            let sent = timeout(limit, self.send_tiles(tiles, &mut ledger, writer, &answered)).await;
            sent.map_err(|_| Ended::Slow("the answer", limit))?
        };
        let watched = async {
            match reader.fill_buf().await {
                Ok([]) | Err(_) => Ended::OwnerGone,
                Ok(_) if answered.load(Ordering::Relaxed) => std::future::pending().await,
                Ok(_) => Ended::Trailing,
            }
        };
        tokio::select! {
            outcome = sent => outcome,
            ended = watched => Err(ended),
        }
    }

    /// Time for so many bytes to be received or sent.
    fn time_of(&self, bytes: u64) -> Duration {
        self.config.slack.saturating_add(Duration::from_secs(bytes / self.config.least_rate.max(1)))
    }

    async fn send_tiles(
        &self,
        mut tiles: TileStream<Refusal>,
        ledger: &mut TileLedger,
        writer: &mut WriteHalf<Stream>,
        answered: &AtomicBool,
    ) -> Result<(), Ended> {
        let stall = self.config.stall;
        while ledger.left() > 0 {
            let Some(tile) = tiles.recv().await else {
                return Err(Refusal::Failed(format!("the product ended {} columns early", ledger.left())).into());
            };
            let tile = tile?;
            let header = ledger.announce(&tile).map_err(|error| Refusal::Failed(error.to_string()))?;
            answered.store(ledger.left() == 0, Ordering::Relaxed);
            write_tile(writer, header, &tile, stall, &self.counters).await?;
            timeout(stall, writer.flush())
                .await
                .map_err(|_| LinkError::TimedOut("accepted", stall))?
                .map_err(LinkError::from)?;
        }
        Ok(())
    }

    /// Says why, and reads on for a moment: a stream that is dropped with unread bytes is reset, and a reset may
    /// overtake the refusal.
    async fn refuse(&self, refusal: Refusal, reader: &mut Reader, writer: &mut WriteHalf<Stream>, patience: Duration) {
        let said = async {
            let reply = ProductReply::Refused(refusal);
            let reply = match encode(&reply) {
                Ok(_) => reply,
                Err(error) => ProductReply::Refused(Refusal::Failed(error.to_string())),
            };
            write_message(writer, &reply, &self.counters).await?;
            writer.close().await?;
            futures::io::copy(reader, &mut futures::io::sink()).await?;
            Ok::<_, LinkError>(())
        };
        if let Err(error) = timeout(patience, said).await {
            tracing::debug!(%error, "a refusal was cut short");
        }
    }
}
