//! The handle through which everybody but the swarm's own task uses the network.

use std::sync::Arc;
use std::time::Duration;

use actors::transport::{PeerName, Traffic, TransportError};
use libp2p::request_response::ResponseChannel;
use libp2p::{Multiaddr, PeerId};
use protocol::ids::ModelDigest;
use protocol::wire::messages::{ControlReply, ControlRequest};
use tokio::runtime::Handle;
use tokio::sync::{broadcast, mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::config::SwarmConfig;
use super::distance::Distances;
use super::error::SwarmError;
use super::gate::Regulars;
use super::io::Counters;
use super::task;

/// Commands that wait for the swarm's task.
const COMMANDS: usize = 64;

/// Events that a slow listener may lag behind; older ones are lost to it.
const EVENTS: usize = 256;

/// What happens on the network.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum NetworkEvent {
    /// The node listens on an address.
    Listening(Multiaddr),
    /// A peer has been seen, or is connected again.
    PeerFound(PeerId),
    /// The last connection to a peer was closed, or it left the local network.
    PeerLost(PeerId),
    /// A configured address does not answer; it will be tried again.
    DialFailed {
        /// The address.
        address: Multiaddr,
        /// Why.
        why: String,
    },
}

/// A peer that can be asked for something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KnownPeer {
    /// Who.
    pub peer: PeerId,
    /// Whether a connection stands.
    pub connected: bool,
}

/// What the swarm's task is told to do.
pub(super) enum Command {
    /// Sends a control request.
    Control { peer: PeerId, request: ControlRequest, reply: oneshot::Sender<Result<ControlReply, TransportError>> },
    /// Answers one.
    Respond { channel: ResponseChannel<ControlReply>, reply: ControlReply },
    /// Lists the peers.
    Peers(oneshot::Sender<Vec<KnownPeer>>),
    /// Hands incoming control requests to a service from now on; `false` if another one has them.
    Serve(mpsc::Sender<InboundControl>, oneshot::Sender<bool>),
    /// Connects to an address and keeps connected.
    Dial(Multiaddr),
    /// Announces a model on the DHT.
    Provide(ModelDigest),
    /// Looks on the DHT for peers that announce a model; they come as [`NetworkEvent::PeerFound`].
    FindProviders(ModelDigest),
}

/// A control request of a peer.
pub(super) struct InboundControl {
    pub(super) peer: PeerId,
    pub(super) request: ControlRequest,
    pub(super) channel: ResponseChannel<ControlReply>,
}

/// A handle on a running swarm. The swarm ends at [`Self::shut_down`] or when the last handle is dropped.
#[derive(Clone)]
pub struct SwarmHandle {
    shared: Arc<Shared>,
}

struct Shared {
    peer: PeerId,
    listening: Vec<Multiaddr>,
    commands: mpsc::Sender<Command>,
    events: broadcast::Sender<NetworkEvent>,
    streams: libp2p_stream::Control,
    counters: Arc<Counters>,
    distances: Arc<Distances>,
    regulars: Arc<Regulars>,
    runtime: Handle,
    stop: CancellationToken,
}

impl SwarmHandle {
    /// Starts a swarm on the current tokio runtime, which also carries the streams of its transport and service.
    /// Every configured address is listened on when this returns.
    ///
    /// # Errors
    /// [`SwarmError::Listen`] for an address that cannot be had, [`SwarmError::Setup`].
    pub async fn start(config: SwarmConfig) -> Result<Self, SwarmError> {
        let (commands, inbox) = mpsc::channel(COMMANDS);
        let (events, _) = broadcast::channel(EVENTS);
        let (counters, stop) = (Arc::new(Counters::default()), CancellationToken::new());
        let regulars = Arc::clone(&config.regulars);
        let distances = Arc::new(Distances::default());
        let known = task::Shared { counters: counters.clone(), distances: distances.clone() };
        let started = task::start(config, inbox, events.clone(), known, stop.clone()).await?;
        let runtime = Handle::current();
        runtime.spawn(started.task.run());
        let (peer, listening, streams) = (started.peer, started.listening, started.streams);
        let shared =
            Shared { peer, listening, commands, events, streams, counters, distances, regulars, runtime, stop };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// The node's own name.
    pub fn local_peer(&self) -> PeerId {
        self.shared.peer
    }

    /// Addresses that the node listens on, each with `/p2p/` and its name: what another node can be given to dial.
    /// Addresses of interfaces that come up later are only told as events.
    pub fn listening(&self) -> &[Multiaddr] {
        &self.shared.listening
    }

    /// What happens from now on. A receiver that is not read misses the oldest events.
    pub fn events(&self) -> broadcast::Receiver<NetworkEvent> {
        self.shared.events.subscribe()
    }

    /// The peers that are connected or were seen on the local network or the DHT.
    ///
    /// # Errors
    /// [`SwarmError::Closed`].
    pub async fn peers(&self) -> Result<Vec<KnownPeer>, SwarmError> {
        let (reply, answer) = oneshot::channel();
        self.command(Command::Peers(reply)).await?;
        answer.await.map_err(|_| SwarmError::Closed)
    }

    /// Connects to an address, with or without `/p2p/PEER`, and connects again whenever the connection is lost.
    ///
    /// # Errors
    /// [`SwarmError::Closed`]; an address that does not answer is told as [`NetworkEvent::DialFailed`].
    pub async fn dial(&self, address: Multiaddr) -> Result<(), SwarmError> {
        self.command(Command::Dial(address)).await
    }

    /// Announces on the DHT that this node serves a model. Does nothing without Kademlia.
    ///
    /// # Errors
    /// [`SwarmError::Closed`].
    pub async fn provide(&self, model: ModelDigest) -> Result<(), SwarmError> {
        self.command(Command::Provide(model)).await
    }

    /// Looks on the DHT for peers that serve a model; they come as [`NetworkEvent::PeerFound`]. Does nothing
    /// without Kademlia.
    ///
    /// # Errors
    /// [`SwarmError::Closed`].
    pub async fn find_providers(&self, model: ModelDigest) -> Result<(), SwarmError> {
        self.command(Command::FindProviders(model)).await
    }

    /// Bytes of messages and planes exchanged so far: `up` is sent, `down` received, whatever the node's role.
    pub fn traffic(&self) -> Traffic {
        self.shared.counters.traffic()
    }

    /// How long the connected peers take to answer on average, without what they compute; `None` before the first has.
    pub fn round_trip(&self) -> Option<Duration> {
        self.shared.distances.mean()
    }

    /// Closes all connections and ends the swarm's task.
    pub fn shut_down(&self) {
        self.shared.stop.cancel();
    }

    /// Sends a control request and waits for its reply, at most as long as the swarm's own limit.
    pub(super) async fn control(&self, peer: PeerId, request: ControlRequest) -> Result<ControlReply, TransportError> {
        let (reply, answer) = oneshot::channel();
        let gone = || TransportError::Unreachable { peer: peer_name(peer), what: SwarmError::Closed.to_string() };
        self.command(Command::Control { peer, request, reply }).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    /// Registers the one receiver of control requests.
    pub(super) async fn take_control(&self, sender: mpsc::Sender<InboundControl>) -> Result<(), SwarmError> {
        let (reply, answer) = oneshot::channel();
        self.command(Command::Serve(sender, reply)).await?;
        let taken = answer.await.map_err(|_| SwarmError::Closed)?;
        if taken { Ok(()) } else { Err(SwarmError::AlreadyServing) }
    }

    /// Sends the answer to a control request; the request's own time limit covers an answer that comes too late.
    pub(super) async fn respond(&self, channel: ResponseChannel<ControlReply>, reply: ControlReply) {
        if self.command(Command::Respond { channel, reply }).await.is_err() {
            tracing::debug!("a control request was answered after the swarm's end");
        }
    }

    /// Opens and accepts streams.
    pub(super) fn streams(&self) -> libp2p_stream::Control {
        self.shared.streams.clone()
    }

    /// The runtime of the swarm.
    pub(super) fn runtime(&self) -> &Handle {
        &self.shared.runtime
    }

    /// The byte counters.
    pub(super) fn counters(&self) -> Arc<Counters> {
        self.shared.counters.clone()
    }

    /// Peers whose connections are never refused.
    pub(super) fn regulars(&self) -> &Regulars {
        &self.shared.regulars
    }

    /// Cancelled when the swarm ends.
    pub(super) fn stop(&self) -> &CancellationToken {
        &self.shared.stop
    }

    async fn command(&self, command: Command) -> Result<(), SwarmError> {
        self.shared.commands.send(command).await.map_err(|_| SwarmError::Closed)
    }
}

/// A peer's name as actors know it.
pub(super) fn peer_name(peer: PeerId) -> PeerName {
    PeerName::from(peer.to_base58().as_str())
}
