//! The owner's side: who encrypts, who decides where a product is computed, and what the trainer calls.
//!
//! One product passes through these modules in this order:
//!
//! 1. [`backend::EncryptedBackend`] takes rows from a thread of the trainer and asks the scheduler;
//! 2. [`scheduler::LayerScheduler`] has them encrypted by [`keys::KeyManager`], which keeps the ticket; the product of
//!    the mask is kept by [`masks`] since the matrix was first used;
//! 3. the scheduler sends the ciphertext to the worker that the [`fleet`] names, over the transport, and again, encrypted
//!    anew, where that fails;
//! 4. the answer's tiles go to the key manager as they arrive, and decrypted rows go back to the trainer.
//!
//! A call of few rows takes a shorter way, where [`pads`] were made for it ahead, and so does one of several micro-batches that go
//! side by side and share what they are encrypted with (`convoy`): the scheduler itself has them encrypted and decrypted
//! (`call`).
//!
//! What the owner must know of each served matrix (scales, norms, the planned precision) is in
//! [`table::LayerTable`]; who serves what, over time, is decided by the state machine of [`fleet`].

pub mod assignment;
pub mod backend;
mod call;
pub mod clock;
mod convoy;
pub mod fleet;
pub mod keys;
pub mod mask_file;
mod mask_seed;
pub mod mask_store;
pub mod masks;
pub mod pads;
pub mod scheduler;
pub mod table;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use actix::{Addr, Arbiter, Supervisor};
use protocol::he::MaskSeed;
use rand::SeedableRng as _;
use rand_chacha::ChaCha20Rng;

use crate::transport::Transport;

pub use backend::EncryptedBackend;
pub use clock::{PhaseClock, PhaseTimes};
pub use keys::KeyManager;
pub use scheduler::LayerScheduler;
pub use table::LayerTable;

use mask_file::MaskRoom;
use mask_seed::SeedLedger;
use mask_store::MaskStore;
use masks::MaskCache;
use pads::{Maker, PadRoom, PadStore};
use scheduler::{Notice, ScheduleParts};
use tokio::sync::mpsc;

/// Numbers of calls, none twice, whoever draws them.
#[derive(Clone, Default)]
pub(crate) struct CallNumbers {
    next: Arc<AtomicU64>,
    /// Calls that have secrets of their own, and blocks of pads.
    sealed: Arc<AtomicU64>,
    /// Where these are counted under a seed that outlives the run.
    ledger: Option<Arc<SeedLedger>>,
}

impl CallNumbers {
    /// The number of a call with secrets of its own. May block for as long as a small file takes to be written.
    fn next(&self) -> u64 {
        self.count_block();
        self.next_of_pads()
    }

    /// The number of a call that is encrypted with pads, whose secret was counted when they were made.
    fn next_of_pads(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    /// Counts secrets of a block of pads. May block as [`Self::next`] does.
    fn count_block(&self) {
        let before = self.sealed.fetch_add(1, Ordering::Relaxed);
        if let Some(ledger) = &self.ledger {
            ledger.count(before);
        }
    }
}

/// The operating system gave no random bytes.
#[derive(Debug, thiserror::Error)]
#[error("no randomness from the operating system: {0}")]
pub struct NoRandomness(String);

/// The owner's running actors, each on a thread of its own.
pub struct OwnerActors {
    /// Where products are asked for and layers are assigned.
    pub scheduler: Addr<LayerScheduler>,
    /// Where the time goes.
    pub clock: Arc<PhaseClock>,
    arbiters: [Arbiter; 2],
}

impl OwnerActors {
    /// Starts a key manager and a scheduler under supervision, with a fresh seed for the masks of the run, or that of the
    /// products that are kept from run to run; these are kept where there is `room`, and pads in `pads` once a backend expects calls of
    /// few rows. What happens to the workers is told to `notices`. Call it inside an actix system.
    ///
    /// # Errors
    /// When the operating system gives no random bytes.
    pub fn start(
        table: Arc<LayerTable>,
        transport: Arc<dyn Transport>,
        room: MaskRoom,
        pads: PadRoom,
        notices: Option<mpsc::Sender<Notice>>,
    ) -> Result<Self, NoRandomness> {
        let mut rng = ChaCha20Rng::try_from_os_rng().map_err(|error| NoRandomness(error.to_string()))?;
        let seed = room.store().map_or_else(|| MaskSeed::generate(&mut rng), MaskStore::seed);
        let ledger = room.store().map(MaskStore::ledger);
        let (clock, calls) = (Arc::new(PhaseClock::default()), CallNumbers { ledger, ..CallNumbers::default() });
        let arbiters = [Arbiter::new(), Arbiter::new()];
        let (of_masks, of_keys) = (Arc::clone(&clock), Arc::clone(&clock));
        let masks = Arc::new(MaskCache::new(seed, Arc::clone(&table), calls.clone(), of_masks, room));
        let maker = Maker {
            seed,
            table: Arc::clone(&table),
            calls: calls.clone(),
            clock: Arc::clone(&clock),
            idle: Arc::default(),
        };
        let pads = PadStore::new(maker, pads);
        let of_scheduler = Arc::clone(&table);
        let keys =
            Supervisor::start_in_arbiter(&arbiters[0].handle(), move |_| KeyManager::new(seed, table, calls, of_keys));
        let parts = ScheduleParts { transport, keys, masks, pads: Arc::new(pads), table: of_scheduler, notices };
        let scheduler = Supervisor::start_in_arbiter(&arbiters[1].handle(), move |_| LayerScheduler::new(parts));
        Ok(Self { scheduler, clock, arbiters })
    }

    /// Ends the actors and what they still do.
    pub fn stop(self) {
        for arbiter in self.arbiters {
            arbiter.stop();
            // A thread that panicked has said so already.
            let _ = arbiter.join();
        }
    }
}
