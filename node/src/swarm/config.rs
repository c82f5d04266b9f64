//! What a swarm is started with.

use std::sync::Arc;
use std::time::Duration;

use libp2p::Multiaddr;

use super::gate::{GateLimits, Regulars};
use super::identity::Identity;

/// Which side of the protocol a node is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SwarmRole {
    /// Asks for products; a mere client of the DHT.
    Owner,
    /// Serves products; keeps records of the DHT.
    Worker,
}

impl SwarmRole {
    /// As peers see it in the identify protocol.
    pub(super) fn agent(self) -> String {
        let role = match self {
            Self::Owner => "owner",
            Self::Worker => "worker",
        };
        format!("velum/{} ({role})", env!("CARGO_PKG_VERSION"))
    }

    /// Limit for a handshake. A worker is dialed by strangers, who may leave it waiting; an owner dials, perhaps over a
    /// slow link.
    pub(super) fn handshake_time_out(self) -> Duration {
        match self {
            Self::Owner => Duration::from_secs(10),
            Self::Worker => Duration::from_secs(5),
        }
    }
}

/// Settings of a swarm.
pub struct SwarmConfig {
    /// The node's key.
    pub identity: Identity,
    /// Which side it is on.
    pub role: SwarmRole,
    /// Where to listen, e.g. `/ip4/0.0.0.0/tcp/0` and `/ip4/0.0.0.0/udp/0/quic-v1`. An owner needs none.
    pub listen: Vec<Multiaddr>,
    /// Peers to connect to, and to reconnect to when the connection is lost; with or without `/p2p/PEER`.
    pub dial: Vec<Multiaddr>,
    /// Whether to look for peers on the local network.
    pub mdns: bool,
    /// Whether to take part in the DHT, where workers announce their model.
    pub kademlia: bool,
    /// Peers whose connections are never refused.
    pub regulars: Arc<Regulars>,
    /// What comes in at a time of all others.
    pub gate: GateLimits,
}

impl SwarmConfig {
    /// A swarm that listens nowhere, dials nobody and announces nothing.
    pub fn new(identity: Identity, role: SwarmRole) -> Self {
        Self {
            identity,
            role,
            listen: Vec::new(),
            dial: Vec::new(),
            mdns: false,
            kademlia: false,
            regulars: Arc::default(),
            gate: GateLimits::default(),
        }
    }
}
