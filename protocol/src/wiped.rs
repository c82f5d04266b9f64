//! Vectors of secrets that are wiped when they are dropped, in one sweep.
//!
//! [`zeroize::Zeroizing`] visits a vector element by element, which for the working memory of an encryption takes longer than
//! a transform does; a slice of plain numbers it fills as fast as memory allows. Half a megabyte for each thread and
//! call, cleared, used for some hundred microseconds and wiped, would still be a tenth of an encryption: what is as large as
//! that comes from [`crate::buffer`], and leaves no more behind than the rows there do, beside which it lies.

use std::ops::{Deref, DerefMut};

use zeroize::{DefaultIsZeroes, Zeroize as _};

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
