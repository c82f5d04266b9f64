//! Who may connect: limits on what comes in, by where it comes from, and a reserve for those that are served.
//!
//! A connection costs memory and a task before anybody knows who is at its other end. So addresses are counted first: each
//! has a few handshakes at a time, all together have more, and an address from which somebody that is served has come has
//! its few beside those. Once the peer's name is known, *regulars* (the allow-list, and whoever has layers) always come
//! in; of strangers each address has some connections, and when all of them together have too many, a newcomer takes the
//! place of the one that has stood longest at the address that has most: who sits there and does nothing keeps nobody out.

use std::collections::{HashMap, HashSet, VecDeque};
use std::convert::Infallible;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};
use std::task::{Context, Poll, Waker};

use actors::transport::WorkerService;
use libp2p::core::Endpoint;
use libp2p::core::transport::PortUse;
use libp2p::multiaddr::Protocol;
use libp2p::swarm::{
    CloseConnection, ConnectionDenied, ConnectionId, FromSwarm, NetworkBehaviour, THandler, THandlerInEvent,
    THandlerOutEvent, ToSwarm, dummy,
};
use libp2p::{Multiaddr, PeerId};

use super::handle::peer_name;

/// Peers whose connections are never refused, and those whose connections are to be closed.
#[derive(Default)]
pub struct Regulars {
    allowed: HashSet<PeerId>,
    service: RwLock<Option<Weak<dyn WorkerService>>>,
    sent_away: Mutex<Vec<PeerId>>,
}

impl Regulars {
    /// These, and whoever a service serves.
    pub fn new(allowed: impl IntoIterator<Item = PeerId>) -> Self {
        Self { allowed: allowed.into_iter().collect(), ..Self::default() }
    }

    /// From now on, those too that this service serves.
    pub(super) fn serve(&self, service: &Arc<dyn WorkerService>) {
        *self.service.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::downgrade(service));
    }

    /// Has a peer's connections closed, with the swarm's next event.
    pub(super) fn send_away(&self, peer: PeerId) {
        self.sent_away.lock().unwrap_or_else(PoisonError::into_inner).push(peer);
    }

    fn contains(&self, peer: &PeerId) -> bool {
        let service = || self.service.read().unwrap_or_else(PoisonError::into_inner).as_ref().and_then(Weak::upgrade);
        self.allowed.contains(peer) || service().is_some_and(|service| service.serves(&peer_name(*peer)))
    }
}

/// What a node takes at a time.
#[derive(Clone, Copy, Debug)]
pub struct GateLimits {
    /// Handshakes of one address.
    pub handshakes_of_address: usize,
    /// Handshakes of all addresses that no regular has come from.
    pub handshakes: usize,
    /// Connections of strangers from one address.
    pub strangers_of_address: usize,
    /// Connections of strangers.
    pub strangers: usize,
}

impl Default for GateLimits {
    fn default() -> Self {
        Self {
            // A household's or a small cluster's owners and workers behind one address, started at once.
            handshakes_of_address: 16,
            // Each takes some 100 KB for a few seconds.
            handshakes: 256,
            strangers_of_address: 32,
            // Peers of the DHT and owners that look for workers.
            strangers: 128,
        }
    }
}

/// Addresses of regulars that are remembered, newest last.
const REMEMBERED: usize = 64;

/// Where a connection comes from, as far as one machine or household may have it to itself.
type Origin = Option<IpAddr>;

fn origin(address: &Multiaddr) -> Origin {
    match address.iter().next() {
        Some(Protocol::Ip4(ip)) => Some(ip.into()),
        // Whoever has one address of IPv6 has 2^64.
        Some(Protocol::Ip6(ip)) => Some(std::net::Ipv6Addr::from_bits(ip.to_bits() >> 64 << 64).into()),
        _ => None,
    }
}

/// Why a connection is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refused {
    #[error("{0} handshakes of this address are under way")]
    HandshakesOfAddress(usize),
    #[error("{0} handshakes are under way")]
    Handshakes(usize),
    #[error("{0} connections from this address stand")]
    ConnectionsOfAddress(usize),
}

/// The book of connections that came in. Pure: who is a regular is an argument.
#[derive(Debug, Default)]
struct Book {
    handshakes: HashMap<ConnectionId, Origin>,
    /// In the order in which they came.
    connections: Vec<(ConnectionId, PeerId, Origin)>,
    known: VecDeque<Origin>,
}

impl Book {
    fn handshake(&mut self, limits: &GateLimits, id: ConnectionId, origin: Origin) -> Result<(), Refused> {
        let of_address = self.handshakes.values().filter(|&&other| other == origin).count();
        if of_address >= limits.handshakes_of_address {
            return Err(Refused::HandshakesOfAddress(of_address));
        }
        let unknown = self.handshakes.values().filter(|other| !self.known.contains(other)).count();
        if !self.known.contains(&origin) && unknown >= limits.handshakes {
            return Err(Refused::Handshakes(unknown));
        }
        self.handshakes.insert(id, origin);
        Ok(())
    }

    /// A handshake is done. Returns the connection that has to go for this one, if one has.
    fn connected(
        &mut self,
        limits: &GateLimits,
        (id, peer, origin): (ConnectionId, PeerId, Origin),
        is_regular: impl Fn(&PeerId) -> bool,
    ) -> Result<Option<(PeerId, ConnectionId)>, Refused> {
        self.handshakes.remove(&id);
        if is_regular(&peer) {
            self.known.retain(|known| *known != origin);
            self.known.push_back(origin);
            if self.known.len() > REMEMBERED {
                self.known.pop_front();
            }
            self.connections.push((id, peer, origin));
            return Ok(None);
        }
        let strangers: Vec<_> = self.connections.iter().filter(|(_, peer, _)| !is_regular(peer)).collect();
        let mut of_address: HashMap<Origin, usize> = HashMap::new();
        strangers.iter().for_each(|(_, _, origin)| *of_address.entry(*origin).or_default() += 1);
        let own = of_address.get(&origin).copied().unwrap_or(0);
        if own >= limits.strangers_of_address {
            return Err(Refused::ConnectionsOfAddress(own));
        }
        let goes = if strangers.len() >= limits.strangers {
            let most = of_address.values().copied().max();
            strangers.iter().find(|(_, _, origin)| of_address.get(origin).copied() == most)
        } else {
            None
        };
        let goes = goes.map(|&&(id, peer, _)| (peer, id));
        self.connections.push((id, peer, origin));
        Ok(goes)
    }

    fn ended(&mut self, id: ConnectionId) {
        self.handshakes.remove(&id);
        self.connections.retain(|(other, _, _)| *other != id);
    }
}

/// The gate of a swarm.
pub(super) struct Gate {
    limits: GateLimits,
    regulars: Arc<Regulars>,
    book: Book,
    to_close: VecDeque<(PeerId, ConnectionId)>,
    waker: Option<Waker>,
}

impl Gate {
    /// A gate that nobody has come through.
    pub(super) fn new(limits: GateLimits, regulars: Arc<Regulars>) -> Self {
        Self { limits, regulars, book: Book::default(), to_close: VecDeque::new(), waker: None }
    }
}

impl NetworkBehaviour for Gate {
    type ConnectionHandler = dummy::ConnectionHandler;
    type ToSwarm = Infallible;

    fn handle_pending_inbound_connection(
        &mut self,
        id: ConnectionId,
        _: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<(), ConnectionDenied> {
        self.book.handshake(&self.limits, id, origin(remote)).map_err(ConnectionDenied::new)
    }

    fn handle_established_inbound_connection(
        &mut self,
        id: ConnectionId,
        peer: PeerId,
        _: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        let regulars = &self.regulars;
        let came = (id, peer, origin(remote));
        let goes = self.book.connected(&self.limits, came, |peer| regulars.contains(peer));
        if let Some(goes) = goes.map_err(ConnectionDenied::new)? {
            self.to_close.push_back(goes);
            self.waker.take().into_iter().for_each(Waker::wake);
        }
        Ok(dummy::ConnectionHandler)
    }

    fn handle_established_outbound_connection(
        &mut self,
        _: ConnectionId,
        _: PeerId,
        _: &Multiaddr,
        _: Endpoint,
        _: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        Ok(dummy::ConnectionHandler)
    }

    fn on_swarm_event(&mut self, event: FromSwarm<'_>) {
        match event {
            FromSwarm::ConnectionClosed(closed) => self.book.ended(closed.connection_id),
            FromSwarm::ListenFailure(failure) => self.book.ended(failure.connection_id),
            _ => {}
        }
    }

    fn on_connection_handler_event(&mut self, _: PeerId, _: ConnectionId, event: THandlerOutEvent<Self>) {
        match event {}
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<ToSwarm<Self::ToSwarm, THandlerInEvent<Self>>> {
        if let Some((peer_id, id)) = self.to_close.pop_front() {
            return Poll::Ready(ToSwarm::CloseConnection { peer_id, connection: CloseConnection::One(id) });
        }
        if let Some(peer_id) = self.regulars.sent_away.lock().unwrap_or_else(PoisonError::into_inner).pop() {
            return Poll::Ready(ToSwarm::CloseConnection { peer_id, connection: CloseConnection::All });
        }
        self.waker = Some(context.waker().clone());
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const LIMITS: GateLimits =
        GateLimits { handshakes_of_address: 2, handshakes: 4, strangers_of_address: 3, strangers: 6 };

    fn from(text: &str) -> Origin {
        origin(&text.parse().unwrap())
    }

    fn id(number: usize) -> ConnectionId {
        ConnectionId::new_unchecked(number)
    }

    #[test]
    fn an_address_is_a_machine_or_the_network_of_a_household() {
        assert_eq!(from("/ip4/192.0.2.7/tcp/4001"), from("/ip4/192.0.2.7/udp/9/quic-v1"));
        assert_ne!(from("/ip4/192.0.2.7/tcp/4001"), from("/ip4/192.0.2.8/tcp/4001"));
        assert_eq!(from("/ip6/2001:db8::1/tcp/1"), from("/ip6/2001:db8::2:3:4/tcp/1"));
        assert_ne!(from("/ip6/2001:db8::1/tcp/1"), from("/ip6/2001:db8:0:1::1/tcp/1"));
    }

    #[test]
    fn handshakes_are_counted_by_address_and_regulars_addresses_have_their_own() {
        let mut book = Book::default();
        let friend = PeerId::random();
        let at = |host: usize| from(&format!("/ip4/192.0.2.{host}/tcp/1"));
        book.handshake(&LIMITS, id(0), at(9)).unwrap();
        book.connected(&LIMITS, (id(0), friend, at(9)), |peer| *peer == friend).unwrap();
        let shake = |number, host| (number, at(host));
        let mut begin = |(number, origin)| book.handshake(&LIMITS, id(number), origin);
        begin(shake(1, 1)).unwrap();
        begin(shake(2, 1)).unwrap();
        assert_eq!(begin(shake(3, 1)), Err(Refused::HandshakesOfAddress(2)));
        begin(shake(4, 2)).unwrap();
        begin(shake(5, 2)).unwrap();
        assert_eq!(begin(shake(6, 3)), Err(Refused::Handshakes(4)));
        begin(shake(7, 9)).unwrap();
        begin(shake(8, 9)).unwrap();
        assert_eq!(begin(shake(9, 9)), Err(Refused::HandshakesOfAddress(2)));
        book.ended(id(4));
        book.handshake(&LIMITS, id(10), at(3)).unwrap();
    }

    #[test]
    fn a_newcomer_takes_the_place_of_who_sits_longest_where_most_sit() {
        let mut book = Book::default();
        let peers: Vec<PeerId> = (0..10).map(|_| PeerId::random()).collect();
        let at = |host: usize| from(&format!("/ip4/192.0.2.{host}/tcp/1"));
        let mut come = |number: usize, host, regular: &[usize]| {
            let is_regular = |peer: &PeerId| regular.iter().any(|&index| peers[index] == *peer);
            book.connected(&LIMITS, (id(number), peers[number], at(host)), is_regular)
        };
        assert_eq!(come(0, 1, &[]), Ok(None));
        for number in 1..4 {
            assert_eq!(come(number, 2, &[]), Ok(None));
        }
        assert_eq!(come(4, 2, &[]), Err(Refused::ConnectionsOfAddress(3)));
        assert_eq!(come(5, 2, &[5]), Ok(None), "a regular always comes in");
        assert_eq!(come(6, 3, &[5]), Ok(None));
        assert_eq!(come(7, 3, &[5]), Ok(None));
        assert_eq!(come(8, 4, &[5]), Ok(Some((peers[1], id(1)))));
        assert_eq!(come(9, 5, &[1, 5, 6]), Ok(None), "who is served now makes place");
    }
}
