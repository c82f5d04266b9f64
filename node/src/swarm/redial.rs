//! The peers that a node is told to connect to, and when to try again. Time comes in as an argument.

use std::time::{Duration, Instant};

use libp2p::multiaddr::Protocol;
use libp2p::swarm::ConnectionId;
use libp2p::{Multiaddr, PeerId};

/// Wait after the first failure; it doubles with every further one.
const FIRST_WAIT: Duration = Duration::from_secs(1);

/// Longest wait: a worker that comes back should not idle long.
const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// One configured address.
struct Target {
    address: Multiaddr,
    peer: Option<PeerId>,
    state: State,
    failures: u32,
}

enum State {
    Waiting(Instant),
    Dialing(ConnectionId),
    Connected,
}

/// All configured addresses.
pub(super) struct Redial {
    targets: Vec<Target>,
}

/// The peer that an address names, if it names one.
pub(super) fn peer_of(address: &Multiaddr) -> Option<PeerId> {
    match address.iter().last() {
        Some(Protocol::P2p(peer)) => Some(peer),
        _ => None,
    }
}

impl Redial {
    /// All addresses are due at once.
    pub(super) fn new(addresses: Vec<Multiaddr>, now: Instant) -> Self {
        let target = |address| Target { peer: peer_of(&address), address, state: State::Waiting(now), failures: 0 };
        Self { targets: addresses.into_iter().map(target).collect() }
    }

    /// Adds an address that is due at once.
    pub(super) fn add(&mut self, address: Multiaddr, now: Instant) {
        if self.targets.iter().all(|target| target.address != address) {
            let peer = peer_of(&address);
            self.targets.push(Target { peer, address, state: State::Waiting(now), failures: 0 });
        }
    }

    /// An address whose time has come, and its place.
    pub(super) fn due(&self, now: Instant) -> Option<(usize, Multiaddr)> {
        self.targets.iter().enumerate().find_map(|(place, target)| match target.state {
            State::Waiting(until) if until <= now => Some((place, target.address.clone())),
            _ => None,
        })
    }

    /// A dial has begun.
    pub(super) fn dialing(&mut self, place: usize, connection: ConnectionId) {
        self.targets[place].state = State::Dialing(connection);
    }

    /// A dial was not even begun.
    pub(super) fn refused(&mut self, place: usize, now: Instant) {
        self.targets[place].wait(now);
    }

    /// A connection stands.
    pub(super) fn connected(&mut self, connection: ConnectionId, peer: PeerId) {
        for target in &mut self.targets {
            let ours = matches!(target.state, State::Dialing(id) if id == connection);
            if ours || target.peer == Some(peer) {
                target.peer = Some(peer);
                target.state = State::Connected;
                target.failures = 0;
            }
        }
    }

    /// A dial failed; the address, if it was one of these.
    pub(super) fn failed(&mut self, connection: ConnectionId, now: Instant) -> Option<Multiaddr> {
        let ours = |target: &&mut Target| matches!(target.state, State::Dialing(id) if id == connection);
        let target = self.targets.iter_mut().find(ours)?;
        target.wait(now);
        Some(target.address.clone())
    }

    /// The last connection to a peer was closed.
    pub(super) fn lost(&mut self, peer: PeerId, now: Instant) {
        let lost = |target: &&mut Target| target.peer == Some(peer) && matches!(target.state, State::Connected);
        self.targets.iter_mut().filter(lost).for_each(|target| target.wait(now));
    }
}

impl Target {
    fn wait(&mut self, now: Instant) {
        let wait = FIRST_WAIT.saturating_mul(1 << self.failures.min(16)).min(LONGEST_WAIT);
        self.failures = self.failures.saturating_add(1);
        self.state = State::Waiting(now + wait);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn waits_double_up_to_a_limit_and_begin_anew_after_a_connection() {
        let start = Instant::now();
        let address: Multiaddr = "/ip4/127.0.0.1/tcp/9".parse().unwrap();
        let mut redial = Redial::new(vec![address.clone()], start);
        let mut now = start;
        for (attempt, wait) in [1, 2, 4, 8, 16, 30, 30].into_iter().enumerate() {
            let connection = ConnectionId::new_unchecked(attempt);
            let (place, due) = redial.due(now).unwrap();
            assert_eq!(due, address);
            redial.dialing(place, connection);
            assert!(redial.due(now).is_none());
            assert_eq!(redial.failed(connection, now), Some(address.clone()));
            assert!(redial.due(now + Duration::from_secs(wait) - Duration::from_millis(1)).is_none());
            now += Duration::from_secs(wait);
        }
        let (connection, peer) = (ConnectionId::new_unchecked(100), PeerId::random());
        redial.dialing(0, connection);
        redial.connected(connection, peer);
        assert!(redial.due(now + LONGEST_WAIT).is_none());
        redial.lost(peer, now);
        assert!(redial.due(now).is_none() && redial.due(now + FIRST_WAIT).is_some());
    }
}
