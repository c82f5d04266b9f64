//! Places for product streams: those of owners that were assigned layers first.
//!
//! An owner with layers has places of its own, which nobody else can take. All others share a few: enough to be told why
//! they are refused. A stream that has no place is dropped without a word, since a word would take a place, too. And a
//! peer that opens stream after stream without having layers is sent away ([`Visits`]): new streams of all peers go
//! through one narrow door, in which it would stand in the way.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use libp2p::PeerId;

/// How many streams there may be.
#[derive(Clone, Copy, Debug)]
pub(super) struct StreamLimits {
    /// Of one owner that has layers.
    pub(super) of_owner: usize,
    /// Of one other peer.
    pub(super) of_stranger: usize,
    /// Of all other peers together.
    pub(super) of_strangers: usize,
}

/// Whose places a stream takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Lane {
    /// An owner that has layers.
    Owner,
    /// Such an owner's streams beyond its places, which are told so.
    Surplus,
    /// Anybody else.
    Stranger,
}

/// The streams at the moment.
#[derive(Debug)]
pub(super) struct Streams {
    limits: StreamLimits,
    open: Mutex<HashMap<(PeerId, Lane), usize>>,
}

impl Streams {
    /// No stream.
    pub(super) fn new(limits: StreamLimits) -> Arc<Self> {
        Arc::new(Self { limits, open: Mutex::default() })
    }

    /// A place for one more stream of a peer, which has layers or has not.
    pub(super) fn place(self: &Arc<Self>, peer: PeerId, has_layers: bool) -> Option<StreamPlace> {
        let StreamLimits { of_owner, of_stranger, of_strangers } = self.limits;
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let count = |lane| open.get(&(peer, lane)).copied().unwrap_or(0);
        let strangers =
            || open.iter().filter(|((_, lane), _)| *lane == Lane::Stranger).map(|(_, count)| count).sum::<usize>();
        let lane = match has_layers {
            true if count(Lane::Owner) < of_owner => Lane::Owner,
            true if count(Lane::Surplus) < of_owner => Lane::Surplus,
            false if count(Lane::Stranger) < of_stranger && of_strangers > strangers() => Lane::Stranger,
            _ => return None,
        };
        *open.entry((peer, lane)).or_default() += 1;
        Some(StreamPlace { streams: Arc::clone(self), peer, lane })
    }
}

/// A stream's place, given back when dropped.
#[derive(Debug)]
pub(super) struct StreamPlace {
    streams: Arc<Streams>,
    peer: PeerId,
    /// Whose.
    pub(super) lane: Lane,
}

impl Drop for StreamPlace {
    fn drop(&mut self) {
        let mut open = self.streams.open.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (self.peer, self.lane);
        if let Some(count) = open.get_mut(&key) {
            *count -= 1;
            if *count == 0 {
                open.remove(&key);
            }
        }
    }
}

/// Streams that a peer without layers may open in a [`VISITS_COUNTED`]: twice those that an owner that has just lost its
/// layers may have under way, each tried as often as it tries.
const MOST_VISITS: u32 = 320;

/// Time over which they are counted.
const VISITS_COUNTED: Duration = Duration::from_secs(60);

/// How often peers without layers opened streams lately.
#[derive(Debug)]
pub(super) struct Visits {
    since: Instant,
    of_peer: HashMap<PeerId, u32>,
}

impl Visits {
    /// None.
    pub(super) fn new(now: Instant) -> Self {
        Self { since: now, of_peer: HashMap::new() }
    }

    /// One more stream. Whether its peer is to be sent away; then it begins anew.
    pub(super) fn visit(&mut self, peer: PeerId, now: Instant) -> bool {
        if now.saturating_duration_since(self.since) >= VISITS_COUNTED {
            *self = Self::new(now);
        }
        let count = self.of_peer.entry(peer).or_default();
        *count += 1;
        let too_often = *count > MOST_VISITS;
        if too_often {
            self.of_peer.remove(&peer);
        }
        too_often
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn strangers_share_a_few_places_and_owners_have_their_own() {
        let streams = Streams::new(StreamLimits { of_owner: 3, of_stranger: 2, of_strangers: 5 });
        let peers: Vec<PeerId> = (0..4).map(|_| PeerId::random()).collect();
        let mut held = Vec::new();
        let mut take = |peer: usize, has_layers| {
            let place = streams.place(peers[peer], has_layers);
            let lane = place.as_ref().map(|place| place.lane);
            held.extend(place);
            lane
        };
        let strangers: Vec<_> = [0, 0, 0, 1, 1, 2, 2].map(|peer| take(peer, false)).into();
        let some = Some(Lane::Stranger);
        assert_eq!(strangers, [some, some, None, some, some, some, None]);
        let owner: Vec<_> = (0..7).map(|_| take(3, true)).collect();
        let (own, surplus) = (Some(Lane::Owner), Some(Lane::Surplus));
        assert_eq!(owner, [own, own, own, surplus, surplus, surplus, None]);
        assert_eq!(take(0, true), own, "it was assigned layers meanwhile");
        held.clear();
        assert!(streams.open.lock().unwrap().is_empty());
    }

    #[test]
    fn who_comes_again_and_again_is_sent_away() {
        let (start, busy, quiet) = (Instant::now(), PeerId::random(), PeerId::random());
        let mut visits = Visits::new(start);
        assert!((0..MOST_VISITS).all(|_| !visits.visit(busy, start)));
        assert!(!visits.visit(quiet, start) && visits.visit(busy, start) && !visits.visit(busy, start));
        let mut slow = (0..10 * MOST_VISITS).map(|i| start + VISITS_COUNTED * i / MOST_VISITS);
        let steady = PeerId::random();
        assert!(slow.all(|now| !visits.visit(steady, now)), "as many in every minute are no flood");
    }
}
