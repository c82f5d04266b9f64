//! The network as the owner's actors see it, and as a worker's service is seen by whoever serves it.

pub mod memory;

use std::any::Any;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use protocol::he::{Planes, ProductTile};
use protocol::wire::PlanesShape;
use protocol::wire::messages::{ControlReply, ControlRequest, ProductHeader, Refusal};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

pub use memory::{Faults, MemoryTransport};

/// Name of a peer: the text form of its libp2p identity, or any text in tests.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PeerName(pub Arc<str>);

impl std::fmt::Display for PeerName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<&str> for PeerName {
    fn from(name: &str) -> Self {
        Self(name.into())
    }
}

/// A product on its way to a worker.
#[derive(Clone, Debug)]
pub struct ProductRequest {
    /// What is asked for.
    pub header: ProductHeader,
    /// The body, `tokens × inner dimension` values of `body_bits`, if that is what is multiplied; the worker expands a mask itself.
    pub body: Option<Arc<Planes>>,
    /// Columns of the answer. It does not travel: the owner knows it from the layer table, the worker from
    /// [`Admitted::outer`], and tiles are checked against it before anything is allocated for them.
    pub outer: usize,
}

impl ProductRequest {
    /// Whether the body is what the header says, for a matrix with so many inner elements.
    pub fn is_consistent(&self, inner: usize) -> bool {
        match (PlanesShape::of_body(&self.header, inner, usize::MAX), &self.body) {
            (Ok(Some(shape)), Some(body)) => shape.fits(body),
            (Ok(None), None) => true,
            _ => false,
        }
    }
}

/// Bytes that an owner exchanged with its workers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    /// Bytes to the workers.
    pub up: u64,
    /// Bytes from the workers.
    pub down: u64,
}

impl Traffic {
    /// What was exchanged since an earlier reading.
    pub fn since(self, earlier: Self) -> Self {
        Self { up: self.up.saturating_sub(earlier.up), down: self.down.saturating_sub(earlier.down) }
    }
}

/// Tiles of an answer as they come; the channel ends after the last tile or after the first error.
pub type TileStream<E> = mpsc::Receiver<Result<ProductTile, E>>;

/// Why a worker did not answer.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TransportError {
    /// It answered, with a refusal.
    #[error("{peer}: {refusal}")]
    Refused {
        /// The worker.
        peer: PeerName,
        /// What it said.
        refusal: Refusal,
    },
    /// The request contradicts itself, so that it was not sent: the owner's own mistake, not the worker's.
    #[error("the request was not sent: {what}")]
    Invalid {
        /// What is wrong with it.
        what: String,
    },
    /// It sent something that the protocol does not allow.
    #[error("{peer} broke the protocol: {what}")]
    Protocol {
        /// The worker.
        peer: PeerName,
        /// What was wrong.
        what: String,
    },
    /// It cannot be reached, or the connection broke, or it took too long.
    #[error("{peer} cannot be reached: {what}")]
    Unreachable {
        /// The worker.
        peer: PeerName,
        /// What happened.
        what: String,
    },
}

/// The owner's way to its workers.
#[async_trait]
pub trait Transport: Send + Sync + 'static {
    /// One small request and its reply. A [`ControlReply::Refused`] comes back as [`TransportError::Refused`].
    async fn control(&self, worker: &PeerName, request: ControlRequest) -> Result<ControlReply, TransportError>;

    /// Sends a product; its tiles come on the stream in any order.
    async fn product(
        &self,
        worker: &PeerName,
        request: ProductRequest,
    ) -> Result<TileStream<TransportError>, TransportError>;

    /// Bytes exchanged so far, headers included.
    fn traffic(&self) -> Traffic;

    /// How far the workers are on average, from the departure of a question to its answer; `None` where that is not known.
    fn round_trip(&self) -> Option<Duration> {
        None
    }
}

/// A worker as the network sees it: what serves the two protocols.
#[async_trait]
pub trait WorkerService: Send + Sync + 'static {
    /// Answers a small request.
    async fn control(&self, owner: &PeerName, request: ControlRequest) -> ControlReply;

    /// Checks a product's header and gives the product a place, for which it may have to wait: both before anything of
    /// its body is read or room is made for it.
    async fn admit(&self, owner: &PeerName, header: &ProductHeader) -> Result<Box<dyn Admitted>, Refusal>;

    /// Whether a peer was assigned layers. What others ask for may be answered last, or not at all.
    fn serves(&self, peer: &PeerName) -> bool;

    /// A peer's last connection was closed.
    async fn left(&self, peer: &PeerName);
}

/// A product that has its place. Dropping it gives the place back.
#[async_trait]
pub trait Admitted: Send {
    /// Inner dimension of the product: columns of a body.
    fn inner(&self) -> usize;

    /// Outer dimension: columns of the answer.
    fn outer(&self) -> usize;

    /// Has it computed, with the body whose header was admitted.
    async fn begin(self: Box<Self>, body: Option<Arc<Planes>>) -> Result<Answer, Refusal>;
}

/// A product under way at a worker.
pub struct Answer {
    /// Its tiles, in any order.
    pub tiles: TileStream<Refusal>,
    /// Time that computing takes at most, generously: after it something is wrong.
    pub time: Duration,
    /// The product's place: whoever sends the tiles on keeps it until the last one is sent.
    pub place: Box<dyn Any + Send + Sync>,
}
