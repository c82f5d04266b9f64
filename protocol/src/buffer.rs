//! Numbers whose memory is used again ([`crate::pool`]), and wiped between two steps.
//!
//! They are an owner's private values, or what hides them. What the pools free is wiped at once; what waits in them is wiped when
//! a step is over ([`wipe_idle`]). Wiping each buffer when it is dropped would leave no less behind, since a step holds private
//! values anyway, and would write all that a step does once more. Only what came from a pool goes back to it: then it never
//! holds more than was in use at one time.

use std::fmt;
use std::ops::{Deref, DerefMut};

use zeroize::{DefaultIsZeroes, Zeroizing};

use crate::he::planes;
use crate::pool::Pool;

/// Numbers that have a pool.
pub trait Pooled: DefaultIsZeroes + 'static {
    /// Where their vectors wait.
    fn pool() -> &'static Pool<Self>;
}

macro_rules! pooled {
    ($($(#[$why:meta])* $number:ty: $mebibytes:literal),*) => {
        $(
            $(#[$why])*
            impl Pooled for $number {
                fn pool() -> &'static Pool<Self> {
                    static POOL: Pool<$number> = Pool::new($mebibytes << 20);
                    &POOL
                }
            }
        )*

        /// Wipes what waits for its next use. What is in use is not touched.
        pub fn wipe_idle() {
            $(<$number>::pool().wipe();)*
        }
    };
}

pooled!(
    /// What the layers of a small model ask for at one time, or one of a billion parameters.
    f32: 192,
    /// What a pass keeps for its way back: all of a small model's, some layers' of one of a billion parameters.
    u16: 384,
    /// Blocks that several calls share.
    u8: 64,
    /// The working memory of some dozens of threads.
    u32: 64,
    /// The same.
    u64: 64
);

/// Gives the memory of rows and planes that wait back to the operating system: where those of other sizes are asked for
/// next, it would be of no use, and stand beside them.
pub fn free_idle() {
    f32::pool().drain().into_iter().for_each(wiped_and_freed);
    planes::free_idle();
}

fn wiped_and_freed<T: Pooled>(mut values: Vec<T>) {
    values.fill(T::default());
    // The compiler may not leave this out, although nobody reads the values any more.
    zeroize::optimization_barrier(values.as_slice());
}

/// A vector of numbers that goes back to a pool on drop, and is wiped there by [`wipe_idle`].
#[derive(Default)]
pub struct Reused<T: Pooled> {
    /// At least `length` values; those behind are of earlier use.
    values: Vec<T>,
    length: usize,
}

/// A row-major matrix or a vector of f32, whoever made it.
pub type Buffer = Reused<f32>;

impl<T: Pooled> Reused<T> {
    /// `length` values that are whatever they were: every one has to be written before it is read.
    pub fn scratch(length: usize) -> Self {
        Self { values: T::pool().scratch(length), length }
    }

    /// `length` zeros.
    pub fn zeroed(length: usize) -> Self {
        match T::pool().used(length) {
            Some(values) => {
                let mut buffer = Self { values, length };
                buffer.fill(T::default());
                buffer
            }
            // The operating system's pages are zero already.
            None => Self { values: Pool::fresh(length), length },
        }
    }

    /// A copy of values that lie elsewhere.
    pub fn copy_of(values: &[T]) -> Self {
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

impl<T: Pooled> Deref for Reused<T> {
    type Target = [T];

    #[inline(always)]
    fn deref(&self) -> &[T] {
        &self.values[..self.length]
    }
}

impl<T: Pooled> DerefMut for Reused<T> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.values[..self.length]
    }
}

impl<T: Pooled> fmt::Debug for Reused<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The values are private, and many.
        write!(f, "{} values", self.length)
    }
}

impl<T: Pooled> Drop for Reused<T> {
    fn drop(&mut self) {
        T::pool().put(std::mem::take(&mut self.values)).into_iter().for_each(wiped_and_freed);
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
        assert!(f32::pool().used(length).is_some(), "the copy waits");
        assert!(f32::pool().used(length).is_none(), "the vector itself does not");
    }

    #[test]
    fn what_waits_in_the_pool_is_wiped() {
        // Of a size that no other test uses.
        let length = 123_456;
        Buffer::copy_of(&vec![7.0; length]);
        wipe_idle();
        let waiting = f32::pool().used(length).unwrap_or_default();
        assert!(waiting.len() >= length && waiting.iter().all(|&x| x == 0.0));
        Reused::<u64>::scratch(length).fill(7);
        assert!(Reused::<u64>::scratch(length).iter().all(|&x| x == 7), "nothing but a step's end wipes it");
        wipe_idle();
        assert!(Reused::<u64>::scratch(length).iter().all(|&x| x == 0));
    }
}
