//! Memory that is used again.
//!
//! A step asks for the same few sizes thousands of times. Fresh from the operating system, each page of a buffer
//! costs a fault and is cleared before it is written, which for a small model takes as long as the arithmetic; so a
//! buffer that is no longer needed waits here for the next one of its size, up to a limit.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Bytes of the smallest vector that is kept: the allocator is good at less.
const SMALLEST_BYTES: usize = 1 << 14;

/// Idle vectors of one element type, by their length.
pub struct Pool<T> {
    idle: Mutex<Idle<T>>,
    most_bytes: usize,
}

struct Idle<T> {
    by_class: BTreeMap<usize, Vec<Vec<T>>>,
    bytes: usize,
}

impl<T> Idle<T> {
    fn take(&mut self, class: usize) -> Option<Vec<T>> {
        let values = self.by_class.get_mut(&class)?.pop()?;
        self.bytes -= size_of::<T>() * class;
        Some(values)
    }
}

impl<T> Pool<T> {
    /// An empty pool that keeps at most so many bytes.
    pub const fn new(most_bytes: usize) -> Self {
        Self { idle: Mutex::new(Idle { by_class: BTreeMap::new(), bytes: 0 }), most_bytes }
    }

    fn idle(&self) -> MutexGuard<'_, Idle<T>> {
        // A panic while it was locked has at worst lost a vector.
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: Clone + Default> Pool<T> {
    /// An idle vector of at least `length` elements, whose values are of earlier use.
    pub fn used(&self, length: usize) -> Option<Vec<T>> {
        self.idle().take(Self::class(length))
    }

    /// At least `length` elements that are whatever they were: each has to be written before it is read.
    pub fn scratch(&self, length: usize) -> Vec<T> {
        self.used(length).unwrap_or_else(|| Self::fresh(length))
    }

    /// At least `length` elements of the default value, from the allocator.
    pub fn fresh(length: usize) -> Vec<T> {
        vec![T::default(); Self::class(length)]
    }

    /// Takes back what [`Self::scratch`] gave. What was used last is used next, so a full pool frees something else for
    /// it: vectors of the length that it has most of. Returns what is freed, for whoever has to wipe it.
    pub fn put(&self, values: Vec<T>) -> Vec<Vec<T>> {
        let (length, bytes) = (values.len(), size_of::<T>() * values.len());
        if bytes < SMALLEST_BYTES || Self::class(length) != length || bytes > self.most_bytes {
            return vec![values];
        }
        let mut freed = Vec::new();
        let mut idle = self.idle();
        while bytes > self.most_bytes - idle.bytes {
            let most = idle.by_class.iter().max_by_key(|(class, idle)| *class * idle.len()).map(|(&class, _)| class);
            match most.and_then(|class| idle.take(class)) {
                Some(values) => freed.push(values),
                None => break,
            }
        }
        idle.bytes += bytes;
        idle.by_class.entry(length).or_default().push(values);
        drop(idle);
        freed
    }

    /// Gives up all that waits, for whoever has to wipe it.
    #[must_use]
    pub fn drain(&self) -> Vec<Vec<T>> {
        let mut idle = self.idle();
        idle.bytes = 0;
        std::mem::take(&mut idle.by_class).into_values().flatten().collect()
    }

    /// Fills all that waits with the default value.
    pub fn wipe(&self) {
        self.idle().by_class.values_mut().flatten().for_each(|values| values.fill(T::default()));
    }

    /// The length in which a vector of at least `length` elements is allocated: the next eighth of a power of two, so
    /// that lengths that differ a little share vectors.
    pub fn class(length: usize) -> usize {
        if size_of::<T>() * length < SMALLEST_BYTES {
            return length;
        }
        length.next_multiple_of((length.next_power_of_two() / 8).max(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALLEST: usize = SMALLEST_BYTES / 4;

    #[test]
    fn a_class_wastes_a_quarter_at_most_and_is_its_own_class() {
        for length in (1..200_000).step_by(97) {
            let class = Pool::<f32>::class(length);
            assert!(class >= length && 4 * class <= 5 * length.max(4), "{length}: {class}");
            assert_eq!(Pool::<f32>::class(class), class);
        }
    }

    #[test]
    fn a_pool_gives_back_what_it_took_up_to_its_limit() {
        let pool = Pool::<f32>::new(3 * SMALLEST_BYTES);
        assert!(pool.used(SMALLEST).is_none());
        assert!(pool.put(vec![7.0; SMALLEST]).is_empty());
        assert_eq!(pool.put(vec![7.0; SMALLEST - 1])[0].len(), SMALLEST - 1);
        assert_eq!(pool.put(vec![7.0; SMALLEST + 1])[0].len(), SMALLEST + 1);
        assert!(pool.used(2 * SMALLEST).is_none());
        assert_eq!(pool.used(SMALLEST), Some(vec![7.0; SMALLEST]));
        assert!(pool.used(SMALLEST).is_none(), "too small to be worth it, or of a length that nobody asks for");
        assert_eq!(pool.idle().bytes, 0);
        pool.put(vec![7.0; 2 * SMALLEST]);
        pool.put(vec![8.0; SMALLEST]);
        pool.put(vec![9.0; SMALLEST]);
        assert!(pool.used(2 * SMALLEST).is_none(), "it was freed for the last one");
        assert_eq!(pool.used(SMALLEST), Some(vec![9.0; SMALLEST]));
        assert_eq!(pool.used(SMALLEST), Some(vec![8.0; SMALLEST]));
        pool.put(vec![7.0; 4 * SMALLEST]);
        assert!(pool.used(4 * SMALLEST).is_none(), "there is never room for it");
        assert_eq!(pool.scratch(SMALLEST), vec![0.0; SMALLEST]);
        pool.put(vec![7.0; SMALLEST]);
        pool.wipe();
        assert_eq!(pool.used(SMALLEST), Some(vec![0.0; SMALLEST]));
        pool.put(vec![7.0; SMALLEST]);
        pool.put(vec![8.0; 2 * SMALLEST]);
        assert_eq!(pool.drain(), [vec![7.0; SMALLEST], vec![8.0; 2 * SMALLEST]]);
        assert!(pool.used(SMALLEST).is_none() && pool.idle().bytes == 0);
    }
}
