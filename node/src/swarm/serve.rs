//! A worker's side: a [`WorkerService`] on the network.
//!
//! Everything is bounded: control requests and streams at the same time, streams of one peer, and the bytes of all
//! bodies together, for which a stream waits before it reads. A header is admitted by the service before its body is
//! read. While tiles are computed and written the stream is watched: when the owner goes away, the product is dropped.
//! A peer that sends something else loses its stream, and the log says why.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use actors::transport::{ProductRequest, TileStream, WorkerService};
use futures::io::{AsyncWriteExt, ReadHalf, WriteHalf};
use futures::{AsyncReadExt, StreamExt};
use libp2p::{PeerId, Stream};
use protocol::wire::messages::{ControlReply, ControlRequest, PROTOCOL_VERSION, ProductHeader, ProductReply, Refusal};
use protocol::wire::{FrameError, PlanesShape, TileLedger, encode};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::PRODUCT_PROTOCOL;
use super::behaviour::CONTROL_TIME_OUT;
use super::error::SwarmError;
use super::handle::{InboundControl, SwarmHandle, peer_name};
use super::io::{Counters, LinkError, read_message, read_planes, write_message};
use super::tiles::write_tile;

/// Control requests that wait for the service.
const WAITING_CONTROL: usize = 64;

/// Control requests that the service answers at the same time.
const CONTROL_AT_ONCE: usize = 16;

/// Limits of a worker's side.
#[derive(Clone, Copy, Debug)]
pub struct ServeConfig {
    /// Product streams at the same time.
    pub max_streams: usize,
    /// Product streams of one peer at the same time.
    pub max_streams_per_peer: usize,
    /// Largest body of a product.
    pub max_body_bytes: usize,
    /// Bodies of all products together.
    pub memory_bytes: usize,
    /// Largest tile that is sent.
    pub max_tile_bytes: usize,
    /// For a product's header to arrive.
    pub header: Duration,
    /// For each 256 KiB that are received or sent.
    pub stall: Duration,
    /// For other bodies to make room.
    pub room: Duration,
}

impl Default for ServeConfig {
    fn default() -> Self {
        Self {
            max_streams: 64,
            max_streams_per_peer: 32,
            max_body_bytes: 1 << 30,
            memory_bytes: 2 << 30,
            max_tile_bytes: 512 << 20,
            header: Duration::from_secs(10),
            stall: Duration::from_secs(60),
            room: Duration::from_secs(45),
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
    let (stop, abort, tasks) = (handle.stop().child_token(), handle.stop().child_token(), TaskTracker::new());
    let server = Arc::new(Server {
        service,
        config,
        counters: handle.counters(),
        memory: Arc::new(Semaphore::new(mebibytes(config.memory_bytes))),
        streams: Mutex::new(HashMap::new()),
        abort: abort.clone(),
        tasks: tasks.clone(),
    });
    handle.runtime().spawn(server.clone().accept(incoming, stop.clone()));
    handle.runtime().spawn(server.answer(handle.clone(), requests, stop.clone()));
    Ok(Serving { stop, abort, tasks })
}

/// Bytes as permits of the memory semaphore, rounded up.
fn mebibytes(bytes: usize) -> usize {
    bytes.div_ceil(1 << 20).min(Semaphore::MAX_PERMITS)
}

struct Server {
    service: Arc<dyn WorkerService>,
    config: ServeConfig,
    counters: Arc<Counters>,
    memory: Arc<Semaphore>,
    streams: Mutex<HashMap<PeerId, usize>>,
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
}

impl From<Refusal> for Ended {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

/// A place among the streams of a peer, given back when dropped.
struct Place {
    server: Arc<Server>,
    peer: PeerId,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut streams = self.server.streams.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(count) = streams.get_mut(&self.peer) {
            *count -= 1;
            if *count == 0 {
                streams.remove(&self.peer);
            }
        }
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

    /// Takes streams until told to stop.
    async fn accept(self: Arc<Self>, mut incoming: libp2p_stream::IncomingStreams, stop: CancellationToken) {
        loop {
            let next = tokio::select! {
                biased;
                () = stop.cancelled() => break,
                next = incoming.next() => next,
            };
            let Some((peer, stream)) = next else { break };
            let place = self.place(peer);
            let server = self.clone();
            self.tasks.spawn(async move {
                tokio::select! {
                    () = server.abort.cancelled() => {}
                    () = server.stream(peer, stream, place) => {}
                }
            });
        }
    }

    /// A place for one more stream of a peer.
    fn place(self: &Arc<Self>, peer: PeerId) -> Result<Place, Refusal> {
        let mut streams = self.streams.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if streams.values().sum::<usize>() >= self.config.max_streams {
            return Err(Refusal::Busy("too many products at the same time".into()));
        }
        let count = streams.entry(peer).or_default();
        if *count >= self.config.max_streams_per_peer {
            return Err(Refusal::Busy("too many products of this owner at the same time".into()));
        }
        *count += 1;
        Ok(Place { server: self.clone(), peer })
    }

    /// One product stream from its first byte to its last.
    async fn stream(&self, peer: PeerId, stream: Stream, place: Result<Place, Refusal>) {
        let (mut reader, mut writer) = stream.split();
        let outcome = match &place {
            Ok(_) => self.product(peer, &mut reader, &mut writer).await,
            Err(refusal) => Err(refusal.clone().into()),
        };
        match outcome {
            Ok(()) => {}
            Err(Ended::OwnerGone) => tracing::debug!(%peer, "an owner dropped a product"),
            Err(Ended::Link(LinkError::Frame(FrameError::Version { theirs }))) => {
                tracing::warn!(%peer, theirs, "a product of another protocol version was refused");
                self.refuse(Refusal::Version(PROTOCOL_VERSION), &mut reader, &mut writer).await;
            }
            Err(Ended::Refused(refusal)) => {
                tracing::debug!(%peer, %refusal, "a product was refused");
                self.refuse(refusal, &mut reader, &mut writer).await;
            }
            Err(error) => return tracing::warn!(%peer, %error, "a product stream was dropped"),
        }
        let closed = timeout(self.config.stall, writer.close()).await;
        tracing::trace!(%peer, ?closed, "a product stream ended");
    }

    async fn product(
        &self,
        peer: PeerId,
        reader: &mut ReadHalf<Stream>,
        writer: &mut WriteHalf<Stream>,
    ) -> Result<(), Ended> {
        let (config, owner) = (&self.config, peer_name(peer));
        let header: ProductHeader = timeout(config.header, read_message(reader, &self.counters))
            .await
            .map_err(|_| LinkError::TimedOut("received", config.header))??;
        if header.version != PROTOCOL_VERSION {
            return Err(Refusal::Version(PROTOCOL_VERSION).into());
        }
        let (inner, outer) = self.service.admit(&owner, &header).await?;
        let shape = PlanesShape::of_body(&header, inner, config.max_body_bytes.min(config.memory_bytes))
            .map_err(|error| Refusal::Malformed(error.to_string()))?;
        let room = self.room(shape.map_or(0, PlanesShape::bytes)).await?;
        let body = match shape {
            Some(shape) => Some(Arc::new(read_planes(reader, shape, config.stall, &self.counters).await?)),
            None => None,
        };

        let mut ledger = TileLedger::new(&header, outer, config.max_tile_bytes);
        let request = ProductRequest { header, body, outer };
        let mut extra = [0];
        let sent = async {
            let tiles = self.service.product(&owner, request).await?;
            self.send_tiles(tiles, &mut ledger, writer).await
        };
        let outcome = tokio::select! {
            outcome = sent => outcome,
            read = reader.read(&mut extra) => match read {
                Ok(0) | Err(_) => Err(Ended::OwnerGone),
                Ok(_) => Err(Ended::Trailing),
            },
        };
        drop(room);
        outcome
    }

    /// Waits until a body of so many bytes has room.
    async fn room(&self, bytes: usize) -> Result<OwnedSemaphorePermit, Ended> {
        let permits = u32::try_from(mebibytes(bytes)).unwrap_or(u32::MAX);
        match timeout(self.config.room, self.memory.clone().acquire_many_owned(permits)).await {
            Ok(Ok(permit)) => Ok(permit),
            _ => Err(Refusal::Busy("no memory for another product".into()).into()),
        }
    }

    async fn send_tiles(
        &self,
        mut tiles: TileStream<Refusal>,
        ledger: &mut TileLedger,
        writer: &mut WriteHalf<Stream>,
    ) -> Result<(), Ended> {
        let stall = self.config.stall;
        while ledger.left() > 0 {
            let Some(tile) = tiles.recv().await else {
                return Err(Refusal::Failed(format!("the product ended {} columns early", ledger.left())).into());
            };
            let tile = tile?;
            let header = ledger.announce(&tile).map_err(|error| Refusal::Failed(error.to_string()))?;
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
    async fn refuse(&self, refusal: Refusal, reader: &mut ReadHalf<Stream>, writer: &mut WriteHalf<Stream>) {
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
        if let Err(error) = timeout(self.config.header, said).await {
            tracing::debug!(%error, "a refusal was cut short");
        }
    }
}
