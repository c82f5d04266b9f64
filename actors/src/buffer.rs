//! Rows of numbers whose memory is used again.
//!
//! A step asks for the same few sizes thousands of times. Fresh from the operating system, each page of a buffer
//! costs a fault and is cleared before it is written, which for a small model takes longer than the arithmetic; so
//! a dropped buffer waits in a pool for the next one of its size, up to a limit.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Values of the smallest buffer that is kept: the allocator is good at less.
const SMALLEST: usize = 1 << 12;
/// Values that may wait in the pool, 192 MiB of them: what one layer of a model of a billion parameters uses between
/// two products, and more is returned to the allocator.
const MOST_IDLE: usize = 48 << 20;

/// A row-major matrix or a vector of f32, whoever made it.
#[derive(Default)]
pub struct Buffer {
    /// At least `length` values; those behind are of earlier use.
    values: Vec<f32>,
    length: usize,
}

impl Buffer {
    /// `length` values that are whatever they were: every one has to be written before it is read.
    pub fn scratch(length: usize) -> Self {
        let class = class(length);
        let used = pool().take(class);
        Self { values: used.unwrap_or_else(|| vec![0.0; class]), length }
    }

    /// `length` zeros.
    pub fn zeroed(length: usize) -> Self {
        let class = class(length);
        let used = pool().take(class);
        match used {
            Some(values) => {
                let mut buffer = Self { values, length };
                buffer.fill(0.0);
                buffer
            }
            // The operating system's pages are zero already.
            None => Self { values: vec![0.0; class], length },
        }
    }

    /// A copy of values that lie elsewhere.
    pub fn copy_of(values: &[f32]) -> Self {
        let mut buffer = Self::scratch(values.len());
        buffer.copy_from_slice(values);
        buffer
    }
}

/// Takes a vector over as it is.
impl From<Vec<f32>> for Buffer {
    fn from(values: Vec<f32>) -> Self {
        Self { length: values.len(), values }
    }
}

impl Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.values[..self.length]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.values[..self.length]
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The values are private, and many.
        write!(f, "Buffer({} values)", self.length)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let values = std::mem::take(&mut self.values);
        let refused = pool().put(values);
        // Freed here, where the pool is not locked any more.
        drop(refused);
    }
}

/// The size in which a buffer of `length` values is allocated: the next quarter of a power of two, so that lengths
/// that differ a little share buffers.
fn class(length: usize) -> usize {
    if length < SMALLEST {
        return length;
    }
    let step = (length.next_power_of_two() / 8).max(1);
    length.next_multiple_of(step)
}

struct Pool {
    /// By their length.
    idle: BTreeMap<usize, Vec<Vec<f32>>>,
    /// Values of all of them.
    values: usize,
}

impl Pool {
    const fn new() -> Self {
        Self { idle: BTreeMap::new(), values: 0 }
    }

    /// A vector of `class` initialised values.
    fn take(&mut self, class: usize) -> Option<Vec<f32>> {
        let values = self.idle.get_mut(&class)?.pop()?;
        self.values -= class;
        Some(values)
    }

    /// Keeps a vector for later, or gives it back.
    fn put(&mut self, values: Vec<f32>) -> Option<Vec<f32>> {
        let length = values.len();
        if length < SMALLEST || length > MOST_IDLE - self.values || class(length) != length {
            return Some(values);
        }
        self.values += length;
        self.idle.entry(length).or_default().push(values);
        None
    }
}

static POOL: Mutex<Pool> = Mutex::new(Pool::new());

fn pool() -> MutexGuard<'static, Pool> {
    // A panic while it was locked has at worst lost a buffer.
    POOL.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_class_wastes_a_quarter_at_most_and_is_its_own_class() {
        for length in (1..200_000).step_by(97) {
            let class = class(length);
            assert!(class >= length && 4 * class <= 5 * length.max(4), "{length}: {class}");
            assert_eq!(super::class(class), class);
        }
    }

    #[test]
    fn the_pool_gives_back_what_it_took_up_to_its_limit() {
        let mut pool = Pool::new();
        assert!(pool.take(SMALLEST).is_none());
        assert!(pool.put(vec![1.0; SMALLEST]).is_none());
        assert!(pool.put(vec![1.0; SMALLEST - 1]).is_some(), "too small to be worth it");
        assert!(pool.put(vec![1.0; SMALLEST + 1]).is_some(), "nobody would ask for it");
        assert!(pool.take(2 * SMALLEST).is_none());
        assert_eq!(pool.take(SMALLEST).map(|values| values.len()), Some(SMALLEST));
        assert!(pool.take(SMALLEST).is_none());
        assert_eq!(pool.values, 0);
        pool.values = MOST_IDLE - SMALLEST + 1;
        assert!(pool.put(vec![1.0; SMALLEST]).is_some());
    }

    #[test]
    fn zeros_are_zeros_in_used_memory_too() {
        let length = SMALLEST + 5;
        for _ in 0..3 {
            let mut buffer = Buffer::zeroed(length);
            assert!(buffer.len() == length && buffer.iter().all(|&x| x == 0.0));
            buffer.fill(7.0);
        }
        assert_eq!(Buffer::copy_of(&[1.0, 2.0])[..], [1.0, 2.0]);
        assert_eq!(Buffer::from(vec![3.0; 9]).len(), 9);
    }
}
