//! Rows of numbers whose memory is used again ([`crate::pool`]), and wiped between two steps.
//!
//! The rows are an owner's private values. What the pool frees is wiped at once; what waits in it is wiped when a step is
//! over ([`wipe_idle`]). Wiping each buffer when it is dropped would leave no less behind, since a step holds private values
//! anyway, and would write all that a step does once more. Only what came from the pool goes back to it: then it never
//! holds more than was in use at one time.

use std::fmt;
use std::ops::{Deref, DerefMut};

use zeroize::Zeroizing;

use crate::pool::Pool;
use crate::wiped;

/// What waits for the next buffers: all that a pass through a small model keeps, or what some layers of a model of a
/// billion parameters do.
static POOL: Pool<f32> = Pool::new(384 << 20);

/// Wipes what waits for the next buffers, and the working memory of encryption and decryption. What is in use is not touched.
pub fn wipe_idle() {
    POOL.wipe();
    wiped::wipe_idle();
}

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
        Self { values: POOL.scratch(length), length }
    }

    /// `length` zeros.
    pub fn zeroed(length: usize) -> Self {
        match POOL.used(length) {
            Some(values) => {
                let mut buffer = Self { values, length };
                buffer.fill(0.0);
                buffer
            }
            // The operating system's pages are zero already.
            None => Self { values: Pool::fresh(length), length },
        }
    }

    /// A copy of values that lie elsewhere.
    pub fn copy_of(values: &[f32]) -> Self {
        let mut buffer = Self::scratch(values.len());
        buffer.copy_from_slice(values);
        buffer
    }
}

/// Copies a vector, whose own memory is not the pool's, and wipes it.
impl From<Vec<f32>> for Buffer {
    fn from(values: Vec<f32>) -> Self {
        Self::copy_of(&Zeroizing::new(values))
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
        for mut freed in POOL.put(std::mem::take(&mut self.values)) {
            freed.fill(0.0);
            // The compiler may not leave this out, although nobody reads the values any more.
            zeroize::optimization_barrier(freed.as_slice());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_are_zeros_in_used_memory_too() {
        for length in [10_005, 10_000, 10_005] {
            let mut buffer = Buffer::zeroed(length);
            assert!(buffer.len() == length && buffer.iter().all(|&x| x == 0.0));
            buffer.fill(7.0);
        }
        assert_eq!(Buffer::copy_of(&[1.0, 2.0])[..], [1.0, 2.0]);
        assert_eq!(Buffer::from(vec![3.0; 9])[..], [3.0; 9]);
    }

    #[test]
    fn only_what_came_from_the_pool_goes_back_to_it() {
        // Lengths that no other test uses, so that nobody else takes or gives them.
        let length = Pool::<f32>::class(234_567);
        drop(Buffer::from(vec![1.0; length]));
        assert!(POOL.used(length).is_some(), "the copy waits");
        assert!(POOL.used(length).is_none(), "the vector itself does not");
    }

    #[test]
    fn what_waits_in_the_pool_is_wiped() {
        // Of a size that no other test uses.
        let length = 123_456;
        Buffer::copy_of(&vec![7.0; length]);
        wipe_idle();
        let waiting = POOL.used(length).unwrap_or_default();
        assert!(waiting.len() >= length && waiting.iter().all(|&x| x == 0.0));
    }
}
