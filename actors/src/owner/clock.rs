//! Where the time of a step goes: seconds spent in each phase of the encrypted products, counted as they happen.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Counters of the owner's phases, shared by its actors. Products in flight at the same time add up, so the sum
/// of the phases may exceed the wall clock.
#[derive(Debug, Default)]
pub struct PhaseClock {
    products: AtomicU64,
    mask_products: AtomicU64,
    masks: AtomicU64,
    encrypt: AtomicU64,
    exchange: AtomicU64,
    decrypt: AtomicU64,
    pad_blocks: AtomicU64,
    pads: AtomicU64,
    products_with_pads: AtomicU64,
    shared_blocks: AtomicU64,
}

/// A reading of a [`PhaseClock`].
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PhaseTimes {
    /// Products of ciphertexts finished.
    pub products: u64,
    /// Products of masks finished: one for each matrix and direction, more only where they are not kept.
    pub mask_products: u64,
    /// Seconds from asking for the product of a mask to having it.
    pub mask_seconds: f64,
    /// Seconds in rotation, encoding and encryption.
    pub encrypt_seconds: f64,
    /// Seconds between sending a product and its last tile, less the decryption of tiles meanwhile: the network
    /// and the workers.
    pub exchange_seconds: f64,
    /// Seconds in decryption, verification and un-rotation.
    pub decrypt_seconds: f64,
    /// Blocks of pads that were made, and the seconds that it took.
    pub pad_blocks: u64,
    /// See [`Self::pad_blocks`].
    pub pad_seconds: f64,
    /// Products among all that were encrypted with pads.
    pub products_with_pads: u64,
    /// Blocks that were made for the calls of several micro-batches; the time that it took counts as encryption's and decryption's.
    pub shared_blocks: u64,
}

impl PhaseClock {
    pub(crate) fn add_encrypt(&self, time: Duration) {
        add(&self.encrypt, time);
    }

    /// A block was made for several calls, as far as encryption needs it.
    pub(crate) fn add_shared(&self, time: Duration) {
        self.shared_blocks.fetch_add(1, Ordering::Relaxed);
        self.add_encrypt(time);
    }

    pub(crate) fn add_decrypt(&self, time: Duration) {
        add(&self.decrypt, time);
    }

    /// One product is done: `exchange` is its time on the network and at the worker, `decrypt` what decryption took.
    pub(crate) fn add_product(&self, exchange: Duration, decrypt: Duration) {
        self.products.fetch_add(1, Ordering::Relaxed);
        add(&self.exchange, exchange);
        add(&self.decrypt, decrypt);
    }

    /// A product that is done was encrypted with pads.
    pub(crate) fn add_product_with_pads(&self, exchange: Duration, decrypt: Duration) {
        self.products_with_pads.fetch_add(1, Ordering::Relaxed);
        self.add_product(exchange, decrypt);
    }

    /// A block of pads was made, in so much time.
    pub(crate) fn add_pads(&self, time: Duration) {
        self.pad_blocks.fetch_add(1, Ordering::Relaxed);
        add(&self.pads, time);
    }

    /// The product of a mask was asked for and came, in so much time.
    pub(crate) fn add_mask_product(&self, time: Duration) {
        self.mask_products.fetch_add(1, Ordering::Relaxed);
        add(&self.masks, time);
    }

    /// The sums so far.
    pub fn read(&self) -> PhaseTimes {
        let seconds = |counter: &AtomicU64| Duration::from_nanos(counter.load(Ordering::Relaxed)).as_secs_f64();
        PhaseTimes {
            products: self.products.load(Ordering::Relaxed),
            mask_products: self.mask_products.load(Ordering::Relaxed),
            mask_seconds: seconds(&self.masks),
            encrypt_seconds: seconds(&self.encrypt),
            exchange_seconds: seconds(&self.exchange),
            decrypt_seconds: seconds(&self.decrypt),
            pad_blocks: self.pad_blocks.load(Ordering::Relaxed),
            pad_seconds: seconds(&self.pads),
            products_with_pads: self.products_with_pads.load(Ordering::Relaxed),
            shared_blocks: self.shared_blocks.load(Ordering::Relaxed),
        }
    }
}

fn add(counter: &AtomicU64, time: Duration) {
    counter.fetch_add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
}
