//! What a swarm is started with.

use libp2p::Multiaddr;

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
}

impl SwarmConfig {
    /// A swarm that listens nowhere, dials nobody and announces nothing.
    pub fn new(identity: Identity, role: SwarmRole) -> Self {
        Self { identity, role, listen: Vec::new(), dial: Vec::new(), mdns: false, kademlia: false }
    }
}
