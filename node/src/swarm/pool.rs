//! Product streams that are open and have nothing to do: the next product to the same worker goes over one of them.
//!
//! A new stream costs round trips: one until both ends have agreed on what it speaks, and many more until its window, which
//! begins small and grows by round trips, holds a whole body or answer. A stream that was used before has paid for all of
//! this, so that a product waits for one round trip. Those used last are used first: the others are given up when they have
//! been idle for a while, a little before the worker does so on its side.

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
}

impl From<Stream> for ProductStream {
    fn from(stream: Stream) -> Self {
        let (reader, writer) = stream.split();
        Self { reader: BufReader::new(reader), writer }
    }
}

impl ProductStream {
    /// Whether it is open and silent, as it must be between two products.
    fn is_idle(&mut self) -> bool {
        self.reader.fill_buf().now_or_never().is_none()
    }
}

/// The idle streams of an owner.
#[derive(Default)]
pub(super) struct Pool {
    idle: Mutex<HashMap<PeerId, Vec<(ProductStream, Instant)>>>,
}

impl Pool {
    fn lock(&self) -> MutexGuard<'_, HashMap<PeerId, Vec<(ProductStream, Instant)>>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A stream to a worker, out of those that are still good.
    pub(super) fn take(&self, peer: PeerId, now: Instant) -> Option<ProductStream> {
        let mut idle = self.lock();
        let streams = idle.get_mut(&peer)?;
        while let Some((mut stream, since)) = streams.pop() {
            if now.saturating_duration_since(since) < FRESH && stream.is_idle() {
                return Some(stream);
            }
        }
        idle.remove(&peer);
        None
    }

    /// Keeps a stream on which a whole answer has come.
    pub(super) fn give(&self, peer: PeerId, stream: ProductStream, now: Instant) {
        let mut idle = self.lock();
        for streams in idle.values_mut() {
            // The longest idle ones stand first.
            let old = streams.iter().take_while(|(_, since)| now.saturating_duration_since(*since) >= FRESH).count();
            drop(streams.drain(..old));
        }
        idle.retain(|_, streams| !streams.is_empty());
        let streams = idle.entry(peer).or_default();
        if streams.len() < KEPT {
            streams.push((stream, now));
        }
    }

    /// Gives up all streams to a worker: one of them broke, and the others go the same way.
    pub(super) fn forget(&self, peer: PeerId) {
        self.lock().remove(&peer);
    }
}
