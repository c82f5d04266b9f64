//! Vectors of secrets that are wiped: small ones when they are dropped, in one sweep; large ones, that every call needs
//! again, between two steps.
//!
//! [`zeroize::Zeroizing`] visits a vector element by element, which for the working memory of an encryption takes longer than
//! a transform does; a slice of plain numbers it fills as fast as memory allows. But half a megabyte for each thread and
//! call, cleared, used for some hundred microseconds and wiped, is still a tenth of an encryption: this is what [`Reused`]
//! is for. It leaves no more behind than [`crate::buffer`] does, since a secret lies beside the rows that it hides.

use std::ops::{Deref, DerefMut};

use zeroize::{DefaultIsZeroes, Zeroize as _};

use crate::pool::Pool;

/// A vector of numbers, wiped on drop. Its length never changes, so that no copy of it is left behind.
pub(crate) struct Wiped<T: DefaultIsZeroes>(Box<[T]>);

impl<T: DefaultIsZeroes> Wiped<T> {
    /// So many zeros.
    pub(crate) fn zeros(length: usize) -> Self {
        Self(vec![T::default(); length].into())
    }
}

impl<T: DefaultIsZeroes> Deref for Wiped<T> {
    type Target = [T];

    #[inline(always)]
    fn deref(&self) -> &[T] {
        &self.0
    }
}

impl<T: DefaultIsZeroes> DerefMut for Wiped<T> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.0
    }
}

impl<T: DefaultIsZeroes> Drop for Wiped<T> {
    fn drop(&mut self) {
        // Of the slice: that of the box would visit its elements.
        <[T]>::zeroize(&mut self.0);
    }
}

/// Numbers whose vectors are used again.
pub trait Reusable: DefaultIsZeroes + 'static {
    /// Where they wait.
    fn pool() -> &'static Pool<Self>;
}

macro_rules! reusable {
    ($($(#[$why:meta])* $number:ty: $mebibytes:literal),*) => {$(
        $(#[$why])*
        impl Reusable for $number {
            fn pool() -> &'static Pool<Self> {
                static POOL: Pool<$number> = Pool::new($mebibytes << 20);
                &POOL
            }
        }
    )*};
}

reusable!(
    /// What a pass keeps for its way back: all of a small model's, some layers' of one of a billion parameters.
    u16: 384,
    /// The working memory of some dozens of threads.
    u32: 64,
    /// The same.
    u64: 64
);

/// Wipes what waits for its next use. What is in use is not touched.
pub(crate) fn wipe_idle() {
    u16::pool().wipe();
    u32::pool().wipe();
    u64::pool().wipe();
}

/// A vector of numbers that goes back to a pool on drop, and is wiped there by [`crate::buffer::wipe_idle`].
pub struct Reused<T: Reusable>(Vec<T>);

impl<T: Reusable> Reused<T> {
    /// At least so many numbers that are whatever they were: every one has to be written before it is read.
    pub fn scratch(length: usize) -> Self {
        Self(T::pool().scratch(length))
    }
}

impl<T: Reusable> Deref for Reused<T> {
    type Target = [T];

    #[inline(always)]
    fn deref(&self) -> &[T] {
        &self.0
    }
}

impl<T: Reusable> DerefMut for Reused<T> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.0
    }
}

impl<T: Reusable> Drop for Reused<T> {
    fn drop(&mut self) {
        for mut freed in T::pool().put(std::mem::take(&mut self.0)) {
            freed.as_mut_slice().zeroize();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_waits_is_used_again_and_wiped_between() {
        // Of a size that no other test uses.
        let length = 543_210;
        Reused::<u64>::scratch(length).fill(7);
        assert!(Reused::<u64>::scratch(length).iter().all(|&x| x == 7), "nothing but a step's end wipes it");
        wipe_idle();
        assert!(Reused::<u64>::scratch(length).iter().all(|&x| x == 0));
    }
}
