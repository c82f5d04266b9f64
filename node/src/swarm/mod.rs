//! The libp2p swarm: how peers find each other, and what they say.
//!
//! One task owns the swarm ([`SwarmHandle::start`]); everybody else holds a cloneable [`SwarmHandle`] and talks to
//! that task over a private channel. On top of it stand the two ends of the protocol:
//!
//! - an owner's [`Libp2pTransport`], which is the network that its actors see, and [`discover()`], which collects
//!   workers that serve a model;
//! - a worker's [`serve()`], which puts a [`actors::transport::WorkerService`] on the network.
//!
//! Small messages are request-response (`/velum/control/1`). A product has a stream to itself
//! (`/velum/product/2`): header and body one way, tiles the other, both at once, so that no side waits for the
//! other to finish writing. After its last tile the stream may carry another product. Whatever a peer sends is bounded before it is read, and a stream that sends something
//! else is dropped alone: connection and node live on.

mod behaviour;
mod codec;
mod config;
mod damper;
mod discover;
mod distance;
mod error;
mod gate;
mod handle;
mod identity;
mod io;
mod listen;
mod muxer;
mod owner;
mod pool;
mod quic;
mod redial;
mod serve;
mod streams;
mod task;
mod tiles;
mod tls;

pub use config::{SwarmConfig, SwarmRole};
pub use discover::{
    Admission, Discovery, DiscoveryEvent, DiscoveryQuery, FoundWorker, RejectedPeer, discover, keep_looking,
};
pub use error::SwarmError;
pub use gate::{GateLimits, Regulars};
pub use handle::{KnownPeer, NetworkEvent, SwarmHandle};
pub use identity::{Identity, IdentityError, IdentityLock};
pub use libp2p::{Multiaddr, PeerId};
pub use owner::{Libp2pTransport, TransportConfig};
pub use serve::{ServeConfig, Serving, serve};

/// Name of the control protocol; its number is that of the framing, the messages carry their own version.
pub(crate) const CONTROL_PROTOCOL: libp2p::StreamProtocol = libp2p::StreamProtocol::new("/velum/control/1");

/// Name of the product protocol.
pub(crate) const PRODUCT_PROTOCOL: libp2p::StreamProtocol = libp2p::StreamProtocol::new("/velum/product/2");

/// Name of the DHT, so that Velum's peers keep no records for other networks.
pub(crate) const KADEMLIA_PROTOCOL: libp2p::StreamProtocol = libp2p::StreamProtocol::new("/velum/kad/1");

#[cfg(test)]
mod tests;
