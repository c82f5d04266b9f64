//! Memory of operands: cache lines, and buffers that are kept from product to product.

use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, PoisonError};

use bytemuck::{Pod, Zeroable};

/// 32-bit words of a [`Line`].
pub(crate) const LINE_WORDS: usize = 16;

/// A cache line: what a vector or a row of an AMX tile is loaded from at once.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C, align(64))]
pub(crate) struct Line(pub(crate) [u32; LINE_WORDS]);

impl Line {
    pub(crate) const ZERO: Self = Self([0; LINE_WORDS]);
}

/// Makes `buffer` at least `count` elements long and returns so many: old content, of which nothing is kept when it
/// has to grow.
pub(crate) fn at_least<T: Copy>(buffer: &mut Vec<T>, count: usize, fill: T) -> &mut [T] {
    if buffer.len() < count {
        // Not `resize`, which would copy.
        *buffer = vec![fill; count];
    }
    &mut buffer[..count]
}

/// Buffers that wait for their next use: as many as were ever in use at once.
pub(crate) struct Pool<T>(Mutex<Vec<T>>);

impl<T: Default> Pool<T> {
    pub(crate) const fn new() -> Self {
        Self(Mutex::new(Vec::new()))
    }

    /// A buffer that was used before, or a new one.
    pub(crate) fn take(&self) -> Pooled<'_, T> {
        let item = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        Pooled { pool: self, item: item.unwrap_or_default() }
    }
}

/// A buffer that goes back to its pool when it is dropped.
pub(crate) struct Pooled<'a, T: Default> {
    pool: &'a Pool<T>,
    item: T,
}

impl<T: Default> Deref for Pooled<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.item
    }
}

impl<T: Default> DerefMut for Pooled<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.item
    }
}

impl<T: Default> Drop for Pooled<'_, T> {
    fn drop(&mut self) {
        let item = std::mem::take(&mut self.item);
        self.pool.0.lock().unwrap_or_else(PoisonError::into_inner).push(item);
    }
}
