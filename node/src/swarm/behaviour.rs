//! What the swarm consists of, and how it is built.

use std::sync::Arc;
use std::time::Duration;

use libp2p::connection_limits::{self, ConnectionLimits};
use libp2p::identity::Keypair;
use libp2p::kad::store::MemoryStore;
use libp2p::request_response::{self, ProtocolSupport};
use libp2p::swarm::NetworkBehaviour;
use libp2p::swarm::behaviour::toggle::Toggle;
use libp2p::{Swarm, SwarmBuilder, identify, kad, mdns, noise, ping, tcp};

use super::codec::ControlCodec;
use super::config::SwarmRole;
use super::error::SwarmError;
use super::gate::Gate;
use super::io::Counters;
use super::muxer::Yamux;
use super::quic::LateQuic;
use super::tls::Tls;
use super::{CONTROL_PROTOCOL, KADEMLIA_PROTOCOL};

/// A connection that carries no stream is kept this long: an owner may compute for minutes between two products.
const IDLE_CONNECTION: Duration = Duration::from_secs(15 * 60);

/// Limit for a control request at either end. Requests are answered at once: loading a model is only begun.
pub(super) const CONTROL_TIME_OUT: Duration = Duration::from_secs(30);

/// Control requests of one connection that are answered at the same time.
const CONTROL_STREAMS: usize = 16;

/// Connections to one peer: one of each transport, and as many made anew while the end of those before is not noticed yet.
/// Each may have a connection's window of bytes lie unread ([`super::muxer`]).
const MAX_PER_PEER: u32 = 4;

/// Everything that runs on a connection.
#[derive(NetworkBehaviour)]
pub(super) struct Behaviour {
    gate: Gate,
    limits: connection_limits::Behaviour,
    identify: identify::Behaviour,
    ping: ping::Behaviour,
    mdns: Toggle<mdns::tokio::Behaviour>,
    pub(super) kademlia: Toggle<kad::Behaviour<MemoryStore>>,
    pub(super) control: request_response::Behaviour<ControlCodec>,
    pub(super) product: libp2p_stream::Behaviour,
}

/// Which of the optional parts run.
pub(super) struct Parts {
    pub(super) role: SwarmRole,
    pub(super) mdns: bool,
    pub(super) kademlia: bool,
    pub(super) gate: Gate,
}

/// A swarm over TCP (TLS or Noise, Yamux) and QUIC that does not listen yet.
pub(super) fn build(keypair: Keypair, parts: Parts, counters: Arc<Counters>) -> Result<Swarm<Behaviour>, SwarmError> {
    let setup = |part: &'static str| move |why: String| SwarmError::Setup { part, why };
    let mdns = if parts.mdns {
        let peer = keypair.public().to_peer_id();
        let mdns = mdns::tokio::Behaviour::new(mdns::Config::default(), peer);
        Some(mdns.map_err(|error| setup("mDNS")(error.to_string()))?)
    } else {
        None
    };
    let handshake = parts.role.handshake_time_out();
    let swarm = SwarmBuilder::with_existing_identity(keypair)
        .with_tokio()
        .with_tcp(tcp::Config::default().nodelay(true), (Tls::new, noise::Config::new), Yamux::default)
        .map_err(|error| setup("TCP")(error.to_string()))?
        .with_other_transport(LateQuic::new)
        .map_err(|error| setup("QUIC")(error.to_string()))?
        .with_dns()
        .map_err(|error| setup("name resolution")(error.to_string()))?
        .with_behaviour(|keypair| behaviour(keypair, parts, mdns, counters))
        .map_err(|error| setup("the protocols")(error.to_string()))?
        .with_swarm_config(|config| config.with_idle_connection_timeout(IDLE_CONNECTION))
        .with_connection_timeout(handshake)
        .build();
    Ok(swarm)
}

fn behaviour(
    keypair: &Keypair,
    parts: Parts,
    mdns: Option<mdns::tokio::Behaviour>,
    counters: Arc<Counters>,
) -> Behaviour {
    let peer = keypair.public().to_peer_id();
    let limits = ConnectionLimits::default().with_max_established_per_peer(Some(MAX_PER_PEER));
    let identify = identify::Config::new("/velum/1".into(), keypair.public()).with_agent_version(parts.role.agent());
    let kademlia = parts.kademlia.then(|| {
        let mut kademlia =
            kad::Behaviour::with_config(peer, MemoryStore::new(peer), kad::Config::new(KADEMLIA_PROTOCOL));
        kademlia.set_mode(Some(match parts.role {
            SwarmRole::Owner => kad::Mode::Client,
            SwarmRole::Worker => kad::Mode::Server,
        }));
        kademlia
    });
    let control = request_response::Config::default()
        .with_request_timeout(CONTROL_TIME_OUT)
        .with_max_concurrent_streams(CONTROL_STREAMS);
    Behaviour {
        gate: parts.gate,
        limits: connection_limits::Behaviour::new(limits),
        identify: identify::Behaviour::new(identify),
        ping: ping::Behaviour::default(),
        mdns: mdns.into(),
        kademlia: kademlia.into(),
        control: request_response::Behaviour::with_codec(
            ControlCodec { counters },
            [(CONTROL_PROTOCOL, ProtocolSupport::Full)],
            control,
        ),
        product: libp2p_stream::Behaviour::new(),
    }
}
