//! The task that owns the swarm: it answers commands, keeps book of peers and routes control messages.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use actors::transport::TransportError;
use futures::StreamExt;
use libp2p::core::transport::ListenerId;
use libp2p::multiaddr::Protocol;
use libp2p::request_response::{self, Message, OutboundFailure, OutboundRequestId};
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use libp2p::swarm::{DialError, SwarmEvent};
use libp2p::{Multiaddr, PeerId, Swarm, identify, kad, mdns, ping};
use protocol::wire::messages::{ControlReply, ControlRequest, Refusal};
use protocol::wire::printable;
use tokio::sync::{broadcast, mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::behaviour::{Behaviour, BehaviourEvent, Parts, build};
use super::config::SwarmConfig;
use super::damper::Damper;
use super::distance::Distances;
use super::error::SwarmError;
use super::gate::Gate;
use super::handle::{Command, InboundControl, KnownPeer, NetworkEvent, peer_name};
use super::io::Counters;
use super::quic::Sockets;
use super::redial::{Redial, peer_of};
use super::{KADEMLIA_PROTOCOL, listen};

/// How long a listener may take to come up: interfaces are asked of the system.
const LISTEN_TIME_OUT: Duration = Duration::from_secs(10);

/// How often configured addresses are looked at.
const REDIAL_INTERVAL: Duration = Duration::from_millis(250);

/// Peers that are kept book of; beyond that, only connected ones.
const MAX_KNOWN_PEERS: usize = 1024;

/// A swarm that listens, and what its handle needs.
pub(super) struct Started {
    pub(super) task: Task,
    pub(super) peer: PeerId,
    pub(super) listening: Vec<Multiaddr>,
    pub(super) streams: libp2p_stream::Control,
}

/// What the task counts and measures, for others to read.
pub(super) struct Shared {
    pub(super) counters: Arc<Counters>,
    pub(super) distances: Arc<Distances>,
}

/// What is known of a peer.
#[derive(Default)]
struct Known {
    connections: u32,
    /// Whether listeners were told of it since it was last lost.
    announced: bool,
    /// Why it was last not reached.
    dial_error: Option<String>,
}

/// The owner of the swarm.
pub(super) struct Task {
    swarm: Swarm<Behaviour>,
    inbox: mpsc::Receiver<Command>,
    events: broadcast::Sender<NetworkEvent>,
    stop: CancellationToken,
    peers: HashMap<PeerId, Known>,
    pending: HashMap<OutboundRequestId, oneshot::Sender<Result<ControlReply, TransportError>>>,
    service: Option<mpsc::Sender<InboundControl>>,
    distances: Arc<Distances>,
    redial: Redial,
    /// Of lines about connections and requests of strangers that were dropped.
    dropped: Damper,
    sockets: Sockets,
}

/// Builds the swarm and waits until it listens everywhere.
pub(super) async fn start(
    config: SwarmConfig,
    inbox: mpsc::Receiver<Command>,
    events: broadcast::Sender<NetworkEvent>,
    shared: Shared,
    stop: CancellationToken,
) -> Result<Started, SwarmError> {
    let peer = config.identity.peer_id();
    let gate = Gate::new(config.gate, config.regulars);
    let parts = Parts { role: config.role, mdns: config.mdns, kademlia: config.kademlia, gate };
    // All before the first is bound: a node's own IPv4 listener would stand in the way of its IPv6 one.
    for address in &config.listen {
        listen::probe(address).map_err(|error| refused(address, &error))?;
    }
    let Shared { counters, distances } = shared;
    let swarm = build(config.identity.into_keypair(), parts, counters)?;
    let streams = swarm.behaviour().product.new_control();
    let redial = Redial::new(config.dial, Instant::now());
    let (peers, pending) = (HashMap::new(), HashMap::new());
    let mut task = Task {
        swarm,
        inbox,
        events,
        stop,
        peers,
        pending,
        service: None,
        distances,
        redial,
        dropped: Damper::default(),
        sockets: Sockets::default(),
    };
    let listening = task.listen(&config.listen).await?;
    let listening = listening.into_iter().map(|address| address.with(Protocol::P2p(peer))).collect();
    Ok(Started { task, peer, listening, streams })
}

fn refused(address: &Multiaddr, why: &dyn std::fmt::Display) -> SwarmError {
    SwarmError::Listen { address: address.clone(), why: why.to_string() }
}

impl Task {
    /// Runs until the last handle is gone or the swarm is told to stop.
    pub(super) async fn run(mut self) {
        let mut redial = tokio::time::interval(REDIAL_INTERVAL);
        redial.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                () = self.stop.cancelled() => break,
                command = self.inbox.recv() => match command {
                    Some(command) => self.on_command(command),
                    None => break,
                },
                event = self.swarm.select_next_some() => self.on_event(event),
                _ = redial.tick() => self.dial_due(),
            }
        }
        self.stop.cancel();
        tracing::debug!("the swarm has ended");
    }

    /// Listens on every address; the addresses that came up.
    async fn listen(&mut self, addresses: &[Multiaddr]) -> Result<Vec<Multiaddr>, SwarmError> {
        let mut waiting: HashMap<ListenerId, Multiaddr> = HashMap::new();
        for address in addresses {
            let listener =
                self.swarm.listen_on(address.clone()).map_err(|error| refused(address, &innermost(&error)))?;
            waiting.insert(listener, address.clone());
        }
        let deadline = tokio::time::Instant::now() + LISTEN_TIME_OUT;
        while !waiting.is_empty() {
            let Ok(event) = tokio::time::timeout_at(deadline, self.swarm.select_next_some()).await else {
                let late = waiting.into_values().next();
                return Err(refused(&late.unwrap_or_else(Multiaddr::empty), &"the address did not come up"));
            };
            match &event {
                SwarmEvent::NewListenAddr { listener_id, .. } => drop(waiting.remove(listener_id)),
                SwarmEvent::ListenerClosed { listener_id, reason, .. } => {
                    if let Some(address) = waiting.remove(listener_id) {
                        let why = reason.as_ref().err().map_or("it was closed".into(), ToString::to_string);
                        return Err(refused(&address, &why));
                    }
                }
                SwarmEvent::ListenerError { listener_id, error } => {
                    if let Some(address) = waiting.remove(listener_id) {
                        return Err(refused(&address, error));
                    }
                }
                _ => {}
            }
            self.on_event(event);
        }
        Ok(self.swarm.listeners().cloned().collect())
    }

    fn on_command(&mut self, command: Command) {
        match command {
            Command::Control { peer, request, reply } => {
                let id = self.swarm.behaviour_mut().control.send_request(&peer, request);
                self.pending.insert(id, reply);
            }
            Command::Respond { channel, reply } => {
                if self.swarm.behaviour_mut().control.send_response(channel, reply).is_err() {
                    tracing::debug!("a peer went away before its control request was answered");
                }
            }
            Command::Peers(reply) => {
                let known = |(&peer, known): (&PeerId, &Known)| KnownPeer { peer, connected: known.connections > 0 };
                let seen = self.peers.iter().filter(|(_, known)| known.announced).map(known).collect();
                // Whoever asked may have stopped waiting.
                let _ = reply.send(seen);
            }
            Command::Serve(sender, reply) => {
                let free = self.service.as_ref().is_none_or(mpsc::Sender::is_closed);
                if free {
                    self.service = Some(sender);
                }
                let _ = reply.send(free);
            }
            Command::Dial(address) => self.redial.add(address, Instant::now()),
            Command::Provide(model) => {
                let provided =
                    self.swarm.behaviour_mut().kademlia.as_mut().map(|kademlia| kademlia.start_providing(key(&model)));
                if let Some(Err(error)) = provided {
                    tracing::warn!(%model, %error, "the model cannot be announced on the DHT");
                }
            }
            Command::FindProviders(model) => {
                if let Some(kademlia) = self.swarm.behaviour_mut().kademlia.as_mut() {
                    kademlia.get_providers(key(&model));
                }
            }
        }
    }

    fn on_event(&mut self, event: SwarmEvent<BehaviourEvent>) {
        match event {
            SwarmEvent::Behaviour(event) => self.on_behaviour(event),
            SwarmEvent::NewListenAddr { address, .. } => self.tell(NetworkEvent::Listening(address)),
            SwarmEvent::ConnectionEstablished { peer_id, connection_id, endpoint, num_established, .. } => {
                self.redial.connected(connection_id, peer_id);
                self.sockets.connected(endpoint.get_remote_address());
                if endpoint.is_dialer() {
                    self.swarm.add_peer_address(peer_id, endpoint.get_remote_address().clone());
                }
                let known = self.peers.entry(peer_id).or_default();
                known.connections = num_established.get();
                known.dial_error = None;
                self.found(peer_id);
            }
            SwarmEvent::ConnectionClosed { peer_id, num_established, cause, .. } => {
                tracing::debug!(%peer_id, ?cause, num_established, "a connection was closed");
                if let Some(known) = self.peers.get_mut(&peer_id) {
                    known.connections = num_established;
                }
                if num_established == 0 {
                    self.distances.lost(peer_id);
                    self.redial.lost(peer_id, Instant::now());
                    self.lost(peer_id);
                }
            }
            SwarmEvent::OutgoingConnectionError { connection_id, peer_id, error } => {
                let why = dial_error(&error);
                if let Some(address) = self.redial.failed(connection_id, Instant::now()) {
                    tracing::debug!(%address, why, "a configured peer does not answer");
                    self.tell(NetworkEvent::DialFailed { address, why: why.clone() });
                }
                if let Some(peer) = peer_id
                    && (self.peers.len() < MAX_KNOWN_PEERS || self.peers.contains_key(&peer))
                {
                    self.peers.entry(peer).or_default().dial_error = Some(why);
                }
            }
            SwarmEvent::IncomingConnectionError { send_back_addr, error, .. } => {
                self.note_dropped("incoming connection", &send_back_addr, &error);
            }
            SwarmEvent::ListenerError { listener_id, error } => {
                self.note_dropped("connection of a listener", &listener_id, &error);
            }
            SwarmEvent::ListenerClosed { addresses, reason, .. } => {
                tracing::error!(?addresses, ?reason, "a listener was closed");
            }
            _ => {}
        }
    }

    fn on_behaviour(&mut self, event: BehaviourEvent) {
        match event {
            BehaviourEvent::Control(event) => self.on_control(event),
            BehaviourEvent::Ping(ping::Event { peer, result: Ok(round_trip), .. })
                if self.peers.get(&peer).is_some_and(|known| known.connections > 0) =>
            {
                self.distances.measured(peer, round_trip);
            }
            BehaviourEvent::Mdns(mdns::Event::Discovered(peers)) => {
                for (peer, address) in peers {
                    self.swarm.add_peer_address(peer, address);
                    self.found(peer);
                }
            }
            BehaviourEvent::Mdns(mdns::Event::Expired(peers)) => {
                for (peer, _) in peers {
                    if self.peers.get(&peer).is_some_and(|known| known.connections == 0) {
                        self.lost(peer);
                    }
                }
            }
            BehaviourEvent::Identify(identify::Event::Received { peer_id, info, .. }) => {
                tracing::debug!(%peer_id, agent = printable(&info.agent_version), "a peer identified itself");
                if info.protocols.contains(&KADEMLIA_PROTOCOL)
                    && let Some(kademlia) = self.swarm.behaviour_mut().kademlia.as_mut()
                {
                    for address in info.listen_addrs {
                        kademlia.add_address(&peer_id, address);
                    }
                }
            }
            BehaviourEvent::Kademlia(kad::Event::OutboundQueryProgressed {
                result: kad::QueryResult::GetProviders(Ok(kad::GetProvidersOk::FoundProviders { providers, .. })),
                ..
            }) => providers.into_iter().for_each(|peer| self.found(peer)),
            _ => {}
        }
    }

    fn on_control(&mut self, event: request_response::Event<ControlRequest, ControlReply>) {
        match event {
            request_response::Event::Message { peer, message: Message::Request { request, channel, .. }, .. } => {
                let inbound = InboundControl { peer, request, channel };
                let (inbound, refusal) = match &self.service {
                    None => (inbound, Refusal::Failed("it serves nothing".into())),
                    Some(service) => match service.try_send(inbound) {
                        Ok(()) => return,
                        Err(mpsc::error::TrySendError::Full(inbound)) => {
                            (inbound, Refusal::Busy("too many requests wait".into()))
                        }
                        Err(mpsc::error::TrySendError::Closed(inbound)) => {
                            (inbound, Refusal::Failed("it no longer serves".into()))
                        }
                    },
                };
                let reply = ControlReply::Refused(refusal);
                self.on_command(Command::Respond { channel: inbound.channel, reply });
            }
            request_response::Event::Message { message: Message::Response { request_id, response }, .. } => {
                self.answer(request_id, Ok(response));
            }
            request_response::Event::OutboundFailure { peer, request_id, error, .. } => {
                let error = self.control_failure(peer, &error);
                self.answer(request_id, Err(error));
            }
            request_response::Event::InboundFailure { peer, error, .. } => {
                self.note_dropped("control request", &peer, &error);
            }
            request_response::Event::ResponseSent { .. } => {}
        }
    }

    fn answer(&mut self, id: OutboundRequestId, answer: Result<ControlReply, TransportError>) {
        if let Some(reply) = self.pending.remove(&id) {
            // Whoever asked may have stopped waiting.
            let _ = reply.send(answer);
        }
    }

    fn control_failure(&self, peer: PeerId, error: &OutboundFailure) -> TransportError {
        let name = peer_name(peer);
        match error {
            OutboundFailure::UnsupportedProtocols => {
                TransportError::Protocol { peer: name, what: format!("it does not speak {}", super::CONTROL_PROTOCOL) }
            }
            OutboundFailure::Io(error) if error.kind() == std::io::ErrorKind::InvalidData => {
                TransportError::Protocol { peer: name, what: error.to_string() }
            }
            OutboundFailure::DialFailure => {
                let why = self.peers.get(&peer).and_then(|known| known.dial_error.clone());
                let what = why.unwrap_or_else(|| "no address of it answers".into());
                TransportError::Unreachable { peer: name, what }
            }
            other => TransportError::Unreachable { peer: name, what: other.to_string() },
        }
    }

    fn dial_due(&mut self) {
        let now = Instant::now();
        while let Some((place, address)) = self.redial.due(now) {
            let options = match peer_of(&address) {
                Some(peer) => DialOpts::peer_id(peer)
                    .addresses(vec![address])
                    .condition(PeerCondition::DisconnectedAndNotDialing)
                    .build(),
                None => DialOpts::unknown_peer_id().address(address).build(),
            };
            let connection = options.connection_id();
            match self.swarm.dial(options) {
                Ok(()) => self.redial.dialing(place, connection),
                Err(error) => {
                    tracing::debug!(%error, "a dial was not begun");
                    self.redial.refused(place, now);
                }
            }
        }
    }

    /// Tells of a peer, once until it is lost.
    fn found(&mut self, peer: PeerId) {
        if peer == *self.swarm.local_peer_id() {
            return;
        }
        if self.peers.len() >= MAX_KNOWN_PEERS && !self.peers.contains_key(&peer) {
            self.peers.retain(|_, known| known.connections > 0);
        }
        let known = self.peers.entry(peer).or_default();
        if !std::mem::replace(&mut known.announced, true) {
            self.tell(NetworkEvent::PeerFound(peer));
        }
    }

    /// Tells that a peer is gone. It stays known, to say why it cannot be reached.
    fn lost(&mut self, peer: PeerId) {
        if self.peers.get_mut(&peer).is_some_and(|known| std::mem::take(&mut known.announced)) {
            self.tell(NetworkEvent::PeerLost(peer));
        }
    }

    /// Says that something of a stranger's was dropped, if that was not said just now.
    fn note_dropped(&mut self, what: &str, from: &dyn std::fmt::Display, why: &dyn std::fmt::Display) {
        match self.dropped.pass(Instant::now()) {
            Some(others) => tracing::warn!(what, %from, %why, others, "dropped, and others before it"),
            None => tracing::debug!(what, %from, %why, "dropped"),
        }
    }

    fn tell(&self, event: NetworkEvent) {
        // Without a listener there is nobody to tell.
        let _ = self.events.send(event);
    }
}

/// Where a model's providers are recorded.
fn key(model: &protocol::ids::ModelDigest) -> kad::RecordKey {
    kad::RecordKey::new(&model.0)
}

/// What a failed dial comes down to, in one line.
fn dial_error(error: &DialError) -> String {
    match error {
        DialError::Transport(errors) => {
            let each = errors.iter().map(|(address, error)| format!("{address}: {}", innermost(error)));
            each.collect::<Vec<_>>().join("; ")
        }
        DialError::WrongPeerId { obtained, address } => format!("{address} is another peer, {obtained}"),
        other => other.to_string(),
    }
}

/// The last error of a chain: libp2p wraps the system's words several times.
fn innermost(error: &dyn std::error::Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}
