//! How far the connected peers are: round trips, as pings measure them.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use libp2p::PeerId;

/// Pings that count. The shortest of them does: what a busy machine adds to others is no distance.
const RECENT: usize = 4;

/// The distances of all connected peers.
#[derive(Debug, Default)]
pub(super) struct Distances {
    of: Mutex<HashMap<PeerId, VecDeque<Duration>>>,
}

impl Distances {
    fn lock(&self) -> MutexGuard<'_, HashMap<PeerId, VecDeque<Duration>>> {
        self.of.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A connected peer has answered after so long.
    pub(super) fn measured(&self, peer: PeerId, round_trip: Duration) {
        let mut of = self.lock();
        let recent = of.entry(peer).or_default();
        if recent.len() == RECENT {
            recent.pop_front();
        }
        recent.push_back(round_trip);
    }

    /// A peer is no longer connected.
    pub(super) fn lost(&self, peer: PeerId) {
        self.lock().remove(&peer);
    }

    /// The mean over the peers, which is what a pass through the layers of all of them waits for on average; `None` as long
    /// as none was measured.
    pub(super) fn mean(&self) -> Option<Duration> {
        let of = self.lock();
        let shortest = of.values().filter_map(|recent| recent.iter().min());
        let (count, sum) = shortest.fold((0, Duration::ZERO), |(count, sum), &one| (count + 1, sum + one));
        (count > 0).then(|| sum / count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shortest_of_each_peer_counts_until_it_is_lost() {
        let (distances, near, far) = (Distances::default(), PeerId::random(), PeerId::random());
        assert_eq!(distances.mean(), None);
        let measured = |peer, milliseconds| distances.measured(peer, Duration::from_millis(milliseconds));
        [9, 2, 50].iter().for_each(|&ms| measured(near, ms));
        assert_eq!(distances.mean(), Some(Duration::from_millis(2)));
        measured(far, 100);
        assert_eq!(distances.mean(), Some(Duration::from_millis(51)));
        // It has moved away.
        [20, 21, 22, 23].iter().for_each(|&ms| measured(near, ms));
        assert_eq!(distances.mean(), Some(Duration::from_millis(60)));
        distances.lost(far);
        distances.lost(near);
        assert_eq!(distances.mean(), None);
    }
}
