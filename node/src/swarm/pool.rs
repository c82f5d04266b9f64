//! Product streams that are open and have nothing to do: the next product to the same worker goes over one of them.
//!
//! A new stream costs round trips: one until both ends have agreed on what it speaks, and many more until its window, which
//! begins small and grows by round trips, holds a whole body or answer. A stream that was used before has paid for all of
//! this, so that a product waits for one round trip. Those that were fastest are used first. They have the widest windows, and those
//! of all streams have a bound together ([`super::muxer`]): one that came too late for its share would stay slow, be the last to
//! come back, and be used again first. The others are given up when they have been idle for a while, a little before the worker does
//! so on its side.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures::io::{BufReader, ReadHalf, WriteHalf};
use futures::{AsyncBufReadExt as _, AsyncReadExt as _, FutureExt as _};
use libp2p::{PeerId, Stream};

/// How long a worker keeps a stream that nothing comes on: the longest that an owner computes by itself between two products.
pub(super) const IDLE: Duration = Duration::from_secs(300);
/// How long an owner uses such a stream: less by what its clock and the last answer's way may take.
const FRESH: Duration = Duration::from_secs(240);
/// Idle streams to one worker: the places that it has for products at a time.
const KEPT: usize = 16;

/// The reading half. Its buffer takes headers; planes go past it.
pub(super) type Reader = BufReader<ReadHalf<Stream>>;

/// One end of a product stream.
pub(super) struct ProductStream {
    pub(super) reader: Reader,
    pub(super) writer: WriteHalf<Stream>,
    /// The most bytes a second that a product and its answer had.
    rate: f64,
}

impl From<Stream> for ProductStream {
    fn from(stream: Stream) -> Self {
        let (reader, writer) = stream.split();
        Self { reader: BufReader::new(reader), writer, rate: 0.0 }
    }
}

impl ProductStream {
    /// It has carried so many bytes, there and back, in so long.
    pub(super) fn carried(&mut self, bytes: u64, took: Duration) {
        self.rate = self.rate.max(bytes as f64 / took.as_secs_f64().max(f64::MIN_POSITIVE));
    }

    /// Whether it is open and silent, as it must be between two products.
    fn is_idle(&mut self) -> bool {
        self.reader.fill_buf().now_or_never().is_none()
    }
}

/// Idle streams to one worker, each with its rate and the time since which it is idle.
struct Idle<S>(Vec<(S, f64, Instant)>);

impl<S> Idle<S> {
    /// The fastest of those that are still good.
    fn take(&mut self, now: Instant) -> Option<S> {
        self.tidy(now);
        let fastest = self.0.iter().enumerate().max_by(|(_, (_, a, _)), (_, (_, b, _))| a.total_cmp(b));
        fastest.map(|(place, _)| place).map(|place| self.0.swap_remove(place).0)
    }

    /// One more; beyond as many as are kept, the slowest goes.
    fn give(&mut self, stream: S, rate: f64, now: Instant) {
        self.0.push((stream, rate, now));
        let slowest = self.0.iter().enumerate().min_by(|(_, (_, a, _)), (_, (_, b, _))| a.total_cmp(b));
        if let Some((place, _)) = slowest.filter(|_| self.0.len() > KEPT) {
            self.0.swap_remove(place);
        }
    }

    /// Gives up those that are idle for too long.
    fn tidy(&mut self, now: Instant) {
        self.0.retain(|(_, _, since)| now.saturating_duration_since(*since) < FRESH);
    }
}

/// The idle streams of an owner.
#[derive(Default)]
pub(super) struct Pool {
    idle: Mutex<HashMap<PeerId, Idle<ProductStream>>>,
}

impl Pool {
    fn lock(&self) -> MutexGuard<'_, HashMap<PeerId, Idle<ProductStream>>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A stream to a worker, out of those that are still good.
    pub(super) fn take(&self, peer: PeerId, now: Instant) -> Option<ProductStream> {
        let mut all = self.lock();
        let idle = all.get_mut(&peer)?;
        while let Some(mut stream) = idle.take(now) {
            if stream.is_idle() {
                return Some(stream);
            }
        }
        all.remove(&peer);
        None
    }

    /// Keeps a stream on which a whole answer has come.
    pub(super) fn give(&self, peer: PeerId, stream: ProductStream, now: Instant) {
        let mut all = self.lock();
        all.values_mut().for_each(|idle| idle.tidy(now));
        all.retain(|_, idle| !idle.0.is_empty());
        let rate = stream.rate;
        all.entry(peer).or_insert_with(|| Idle(Vec::new())).give(stream, rate, now);
    }

    /// Gives up all streams to a worker: one of them broke, and the others go the same way.
    pub(super) fn forget(&self, peer: PeerId) {
        self.lock().remove(&peer);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fastest_is_used_first_and_the_slowest_is_given_up() {
        let (now, mut idle) = (Instant::now(), Idle(Vec::new()));
        for rate in [3, 1, 2] {
            idle.give(rate, f64::from(rate), now);
        }
        assert_eq!([(); 4].map(|()| idle.take(now)), [Some(3), Some(2), Some(1), None]);
        (1..=KEPT + 2).for_each(|rate| idle.give(rate as i32, rate as f64, now));
        let kept: Vec<_> = std::iter::from_fn(|| idle.take(now)).collect();
        assert!(kept.len() == KEPT && kept[0] == KEPT as i32 + 2 && kept[KEPT - 1] == 3, "{kept:?}");
    }

    #[test]
    fn one_that_is_idle_for_too_long_is_not_used() {
        let (now, mut idle) = (Instant::now(), Idle(Vec::new()));
        idle.give("old", 2.0, now);
        idle.give("new", 1.0, now + Duration::from_secs(1));
        assert_eq!(idle.take(now + FRESH), Some("new"));
        assert_eq!(idle.take(now + FRESH), None);
    }
}
