//! How an owner finds its workers: it asks every peer that turns up for its offer, and keeps those that serve the
//! wanted model in the protocol's version. Before the run it looks for as many as are wanted ([`discover`]); during the
//! run it goes on looking for more ([`keep_looking`]), and tells of those that are lost.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::time::Duration;

use actors::transport::{PeerName, TransportError};
use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use libp2p::{Multiaddr, PeerId};
use protocol::ids::ModelDigest;
use protocol::wire::messages::{ControlReply, ControlRequest, PROTOCOL_VERSION, Refusal, WorkerOffer};
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::{Instant, Interval, sleep_until};

use super::error::SwarmError;
use super::handle::{NetworkEvent, peer_name};
use super::owner::Libp2pTransport;

/// How often peers that did not answer are asked again, and the DHT is asked for more.
const ASK_AGAIN: Duration = Duration::from_secs(2);

/// The same during a run, which has workers already.
const LOOK_AGAIN: Duration = Duration::from_secs(15);

/// Limit for one offer: a worker answers it from memory.
const OFFER_TIME_OUT: Duration = Duration::from_secs(10);

/// Who may serve, before anybody is asked.
#[derive(Clone, Debug, Default)]
pub struct Admission {
    /// Peers that may; `None` is anybody.
    pub allowed: Option<HashSet<PeerName>>,
    /// Peers that may not, each with what it did and what to do about it.
    pub banned: HashMap<PeerName, String>,
}

impl Admission {
    /// Why a peer may not serve, if it may not.
    fn refusal(&self, peer: &PeerName) -> Option<String> {
        if let Some(why) = self.banned.get(peer) {
            return Some(why.clone());
        }
        let allowed = self.allowed.as_ref().is_none_or(|allowed| allowed.contains(peer));
        (!allowed).then(|| "it is not among the workers that are allowed (--worker, owner.allowed)".to_owned())
    }
}

/// What is looked for.
#[derive(Clone, Debug)]
pub struct DiscoveryQuery {
    /// The model.
    pub model: ModelDigest,
    /// Who may serve it.
    pub admission: Admission,
    /// How many workers are enough.
    pub wanted: usize,
    /// How long to look.
    pub time_out: Duration,
}

/// A worker that serves the model.
#[derive(Clone, Debug, PartialEq)]
pub struct FoundWorker {
    /// Its name.
    pub peer: PeerName,
    /// What it offers.
    pub offer: WorkerOffer,
}

/// A peer that will not do, or did not answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RejectedPeer {
    /// Its name, or the address that did not answer.
    pub peer: String,
    /// Why, in words.
    pub why: String,
}

/// What happens while looking, for whoever shows it.
#[derive(Clone, Debug)]
pub enum DiscoveryEvent<'a> {
    /// One more worker.
    Found(&'a FoundWorker),
    /// A peer that will not do.
    Rejected(&'a RejectedPeer),
    /// The connection to a peer was lost.
    Lost(&'a PeerName),
}

/// What was found.
#[derive(Clone, Debug, Default)]
pub struct Discovery {
    /// The workers, in the order in which they answered; possibly fewer than wanted.
    pub workers: Vec<FoundWorker>,
    /// The others, and why.
    pub rejected: Vec<RejectedPeer>,
}

impl fmt::Display for Discovery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} workers found", self.workers.len())?;
        self.rejected.iter().try_for_each(|rejected| write!(f, "; {}: {}", rejected.peer, rejected.why))
    }
}

/// What came of asking a peer.
enum Answer {
    Suits(FoundWorker),
    /// It will not do, whenever it is asked.
    Never(String),
    /// It may do later.
    NotNow(String),
}

/// Looks for workers until there are enough or the time is over. Peers come from the swarm: from mDNS, the DHT,
/// and the configured addresses.
///
/// # Errors
/// [`SwarmError::Closed`]. Too few workers are no error: the caller sees how many there are, and why no others.
pub async fn discover(
    transport: &Libp2pTransport,
    query: &DiscoveryQuery,
    mut on_event: impl FnMut(DiscoveryEvent<'_>),
) -> Result<Discovery, SwarmError> {
    let deadline = Instant::now() + query.time_out;
    let mut scout = Scout::new(transport, query, ASK_AGAIN);
    while scout.search.workers.len() < query.wanted {
        tokio::select! {
            () = sleep_until(deadline) => break,
            looked = scout.look(&mut on_event) => looked?,
        }
    }
    Ok(scout.search.finish())
}

/// Looks for workers for ever, and tells of those that are lost; how many are wanted, and for how long, is ignored.
/// Who was found before is found once more.
pub async fn keep_looking(
    transport: &Libp2pTransport,
    query: &DiscoveryQuery,
    mut on_event: impl FnMut(DiscoveryEvent<'_>),
) -> SwarmError {
    let mut scout = Scout::new(transport, query, LOOK_AGAIN);
    loop {
        if let Err(error) = scout.look(&mut on_event).await {
            return error;
        }
    }
}

/// Somebody who looks for workers.
struct Scout<'a> {
    transport: &'a Libp2pTransport,
    query: &'a DiscoveryQuery,
    events: broadcast::Receiver<NetworkEvent>,
    again: Interval,
    search: Search,
    asked: FuturesUnordered<BoxFuture<'a, (PeerId, Answer)>>,
}

impl<'a> Scout<'a> {
    fn new(transport: &'a Libp2pTransport, query: &'a DiscoveryQuery, again: Duration) -> Self {
        let events = transport.handle().events();
        let (again, search) = (tokio::time::interval(again), Search::default());
        Self { transport, query, events, again, search, asked: FuturesUnordered::new() }
    }

    /// Waits for the next thing that happens, and does what follows from it.
    ///
    /// # Cancel safety
    /// What was received has been entered.
    async fn look(&mut self, on_event: &mut impl FnMut(DiscoveryEvent<'_>)) -> Result<(), SwarmError> {
        tokio::select! {
            Some((peer, answer)) = self.asked.next() => self.search.enter(peer, answer, on_event),
            event = self.events.recv() => match event {
                Ok(NetworkEvent::PeerFound(peer)) => self.ask(peer, on_event),
                Ok(NetworkEvent::PeerLost(peer)) => self.search.lost(peer, on_event),
                Ok(NetworkEvent::DialFailed { address, why }) => self.search.dial_failed(&address, why, on_event),
                Ok(_) | Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => return Err(SwarmError::Closed),
            },
            _ = self.again.tick() => {
                let handle = self.transport.handle();
                handle.find_providers(self.query.model).await?;
                for known in handle.peers().await? {
                    self.ask(known.peer, on_event);
                }
            }
        }
        Ok(())
    }

    /// Asks a peer for its offer, unless that is known or it may not serve.
    fn ask(&mut self, peer: PeerId, on_event: &mut impl FnMut(DiscoveryEvent<'_>)) {
        if !self.search.begin(peer) {
            return;
        }
        match self.query.admission.refusal(&peer_name(peer)) {
            Some(why) => self.search.reject(peer.to_base58(), why, on_event),
            None => {
                let (transport, model) = (self.transport, self.query.model);
                self.asked.push(Box::pin(async move { (peer, ask(transport, peer, model).await) }));
            }
        }
    }
}

/// Asks one peer for its offer.
async fn ask(transport: &Libp2pTransport, peer: PeerId, model: ModelDigest) -> Answer {
    let request = ControlRequest::Offer { version: PROTOCOL_VERSION };
    match transport.ask(peer, request, OFFER_TIME_OUT).await {
        Ok(ControlReply::Offer(offer)) if offer.version != PROTOCOL_VERSION => {
            Answer::Never(format!("it speaks protocol version {}, not {PROTOCOL_VERSION}", offer.version))
        }
        Ok(ControlReply::Offer(offer)) if offer.model != model => {
            Answer::Never(format!("it serves model {}, not {model}", offer.model))
        }
        Ok(ControlReply::Offer(offer)) => Answer::Suits(FoundWorker { peer: peer_name(peer), offer }),
        Ok(_) => Answer::Never("it answered something else than an offer".into()),
        Err(TransportError::Refused { refusal: refusal @ (Refusal::Version(_) | Refusal::Model(_)), .. }) => {
            Answer::Never(refusal.to_string())
        }
        Err(TransportError::Protocol { what, .. }) => Answer::Never(what),
        Err(TransportError::Refused { refusal, .. }) => Answer::NotNow(refusal.to_string()),
        Err(error) => Answer::NotNow(error.to_string()),
    }
}

/// The state of a search.
#[derive(Default)]
struct Search {
    workers: Vec<FoundWorker>,
    rejected: BTreeMap<String, String>,
    /// Peers that are being asked, or need not be asked again.
    settled: HashSet<PeerId>,
}

impl Search {
    /// Whether a peer is to be asked.
    fn begin(&mut self, peer: PeerId) -> bool {
        self.settled.insert(peer)
    }

    fn enter(&mut self, peer: PeerId, answer: Answer, on_event: &mut impl FnMut(DiscoveryEvent<'_>)) {
        match answer {
            Answer::Suits(worker) => {
                self.rejected.remove(&peer.to_base58());
                on_event(DiscoveryEvent::Found(&worker));
                self.workers.push(worker);
            }
            Answer::Never(why) => self.reject(peer.to_base58(), why, on_event),
            Answer::NotNow(why) => {
                self.settled.remove(&peer);
                self.reject(peer.to_base58(), why, on_event);
            }
        }
    }

    /// A peer that is not connected any more is asked anew when it is found again.
    fn lost(&mut self, peer: PeerId, on_event: &mut impl FnMut(DiscoveryEvent<'_>)) {
        let name = peer_name(peer);
        self.settled.remove(&peer);
        self.workers.retain(|worker| worker.peer != name);
        on_event(DiscoveryEvent::Lost(&name));
    }

    fn dial_failed(&mut self, address: &Multiaddr, why: String, on_event: &mut impl FnMut(DiscoveryEvent<'_>)) {
        self.reject(address.to_string(), why, on_event);
    }

    /// Enters a rejection, and tells of it when it says something new.
    fn reject(&mut self, peer: String, why: String, on_event: &mut impl FnMut(DiscoveryEvent<'_>)) {
        if self.rejected.get(&peer) != Some(&why) {
            self.rejected.insert(peer.clone(), why.clone());
            on_event(DiscoveryEvent::Rejected(&RejectedPeer { peer, why }));
        }
    }

    fn finish(self) -> Discovery {
        let rejected = self.rejected.into_iter().map(|(peer, why)| RejectedPeer { peer, why }).collect();
        Discovery { workers: self.workers, rejected }
    }
}
