//! What a worker allows, and whom.

use std::collections::BTreeSet;
use std::time::Duration;

use super::place::Quota;
use super::tenants::TenancyLimits;
use crate::transport::PeerName;

/// Time for layers to load: of a model of tens of billions of parameters from a slow disk. It bounds how long an owner keeps
/// a place for nothing, where loading never ends.
const LOAD: Duration = Duration::from_secs(30 * 60);

/// What a worker allows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerLimits {
    /// Memory of this process for matrices, bytes: those of all devices that have no memory of their own.
    pub memory_bytes: u64,
    /// Owners served at a time.
    pub owners: usize,
    /// The owners that are served; nobody means anybody that asks.
    pub allowed: BTreeSet<PeerName>,
    /// How long an owner keeps its layers after its last product when another one asks for its place.
    pub lease: Duration,
    /// The same before its first product, from when its layers are loaded.
    pub first_use: Duration,
    /// The same while it is not connected.
    pub absence: Duration,
    /// Most rows of a body.
    pub tokens: u32,
    /// Most bytes of one product: what is multiplied and the answer.
    pub product_bytes: u64,
    /// Products of all owners that are computed, wait to be, or whose answer is still being read.
    pub products: usize,
    /// Bytes of all these products; every owner has an equal share.
    pub product_memory_bytes: u64,
    /// How long a product waits for others of its owner to make place.
    pub room: Duration,
}

impl Default for WorkerLimits {
    fn default() -> Self {
        Self {
            // The packed blocks of a model of about four billion parameters; who has less says so.
            memory_bytes: 8 << 30,
            // One owner keeps all cores busy; a second would only make both slower.
            owners: 1,
            allowed: BTreeSet::new(),
            // Longer than an owner's pauses (an evaluation, a checkpoint), short enough that one that hangs blocks nobody.
            lease: Duration::from_secs(120),
            // An owner waits for the slowest of its workers before it begins.
            first_use: Duration::from_secs(60),
            // Longer than a restart or a lost connection takes to be noticed and mended.
            absence: Duration::from_secs(30),
            // Sixteen sequences of 4,096 tokens.
            tokens: 1 << 16,
            // 4,096 tokens of the widest product of an 8-billion-parameter Llama at P32, with room to spare.
            product_bytes: 1 << 30,
            // Enough for the micro-batches that an owner has in flight.
            products: 16,
            // All of these products of a model of a billion parameters, at 2,048 tokens each.
            product_memory_bytes: 2 << 30,
            // Less than an owner waits for its bytes to be taken.
            room: Duration::from_secs(45),
        }
    }
}

impl WorkerLimits {
    /// What each owner may take at a time.
    pub(super) fn quota(&self) -> Quota {
        let owners = self.owners.max(1);
        Quota {
            products: (self.products / owners).max(1),
            memory_bytes: self.product_memory_bytes / owners as u64,
            patience: self.room,
        }
    }

    /// Owners at a time, and their times.
    pub(super) fn tenancy(&self) -> TenancyLimits {
        let Self { owners, lease, first_use, absence, .. } = *self;
        TenancyLimits { owners, lease, first_use, load: LOAD, absence }
    }
}
