//! How an owner finds its workers: it asks every peer that turns up for its offer, and keeps those that serve the
//! wanted model in the protocol's version.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::time::Duration;

use actors::transport::{PeerName, TransportError};
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use libp2p::{Multiaddr, PeerId};
use protocol::ids::ModelDigest;
use protocol::wire::messages::{ControlReply, ControlRequest, PROTOCOL_VERSION, Refusal, WorkerOffer};
use tokio::sync::broadcast::error::RecvError;
use tokio::time::{Instant, sleep_until};

use super::error::SwarmError;
use super::handle::{NetworkEvent, peer_name};
use super::owner::Libp2pTransport;

/// How often peers that did not answer are asked again, and the DHT is asked for more.
const ASK_AGAIN: Duration = Duration::from_secs(2);

/// Limit for one offer: a worker answers it from memory.
const OFFER_TIME_OUT: Duration = Duration::from_secs(10);

/// What is looked for.
#[derive(Clone, Copy, Debug)]
pub struct DiscoveryQuery {
    /// The model.
    pub model: ModelDigest,
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
    query: DiscoveryQuery,
    mut on_event: impl FnMut(DiscoveryEvent<'_>),
) -> Result<Discovery, SwarmError> {
    let handle = transport.handle();
    let mut events = handle.events();
    let deadline = Instant::now() + query.time_out;
    let mut again = tokio::time::interval(ASK_AGAIN);
    let mut search = Search::default();
    let mut asked = FuturesUnordered::new();
    let mut to_ask: Vec<PeerId> = Vec::new();
    while search.workers.len() < query.wanted {
        for peer in to_ask.drain(..) {
            if search.begin(peer) {
                asked.push(async move { (peer, ask(transport, peer, query.model).await) });
            }
        }
        tokio::select! {
            () = sleep_until(deadline) => break,
            Some((peer, answer)) = asked.next() => search.enter(peer, answer, &mut on_event),
            event = events.recv() => match event {
                Ok(NetworkEvent::PeerFound(peer)) => to_ask.push(peer),
                Ok(NetworkEvent::DialFailed { address, why }) => search.dial_failed(&address, why, &mut on_event),
                Ok(_) | Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => return Err(SwarmError::Closed),
            },
            _ = again.tick() => {
                handle.find_providers(query.model).await?;
                to_ask.extend(handle.peers().await?.into_iter().map(|known| known.peer));
            }
        }
    }
    Ok(search.finish())
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
