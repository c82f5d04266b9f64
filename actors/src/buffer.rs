//! Rows of numbers whose memory is used again ([`protocol::pool`]).

use std::fmt;
use std::ops::{Deref, DerefMut};

use protocol::pool::Pool;

/// What waits for the next buffers: all that a pass through a small model keeps, or what some layers of a model of a
/// billion parameters do.
static POOL: Pool<f32> = Pool::new(384 << 20);

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
        POOL.put(std::mem::take(&mut self.values));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_are_zeros_in_used_memory_too() {
        let length = 10_005;
        for _ in 0..3 {
            let mut buffer = Buffer::zeroed(length);
            assert!(buffer.len() == length && buffer.iter().all(|&x| x == 0.0));
            buffer.fill(7.0);
        }
        assert_eq!(Buffer::copy_of(&[1.0, 2.0])[..], [1.0, 2.0]);
        assert_eq!(Buffer::from(vec![3.0; 9]).len(), 9);
    }
}
