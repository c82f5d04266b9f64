//! What a product takes of a worker while it is under way, and what an owner may take in all.
//!
//! Every owner that was assigned layers has an [`Account`]: so many products at a time, and so much memory for what they
//! bring and what goes back. A product takes its [`Place`] before anything of it is read, and whoever has a part in it
//! (the stream, the device's queue, the task that hands tiles on) holds the place until it is done with it: what an
//! owner leaves unread is its own.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};
use std::time::Duration;

use protocol::ids::LinearId;
use protocol::wire::messages::Refusal;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::parts::HeldLinear;
use crate::transport::PeerName;

/// Memory is counted in pieces of this size, rounded up.
const PIECE_BYTES: u64 = 1 << 10;

/// What an owner may take at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quota {
    /// Products under way.
    pub products: usize,
    /// Memory of all of them together.
    pub memory_bytes: u64,
    /// How long a product waits for others to make place.
    pub patience: Duration,
}

/// What was done for an owner.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Work {
    /// Products computed, those broken off included. Of a product's parts only the first counts.
    pub calls: u64,
    /// Seconds spent on products and on parts of them.
    pub busy_seconds: f64,
}

/// One owner's.
#[derive(Debug)]
pub struct Account {
    quota: Quota,
    products: Arc<Semaphore>,
    memory: Arc<Semaphore>,
    closed: CancellationToken,
    work: Mutex<Work>,
    known: Mutex<Known>,
}

/// Matrices that an owner was found to have, so that not every product has to ask for them.
#[derive(Debug, Default)]
struct Known {
    /// How often layers were assigned meanwhile: what was found before is not the owner's any more.
    assigned: u64,
    /// Kept by whoever holds them, and known here for as long.
    matrices: HashMap<LinearId, Weak<HeldLinear>>,
}

impl Account {
    /// An account of which nothing is taken.
    pub fn new(quota: Quota) -> Self {
        let pieces = usize::try_from(quota.memory_bytes / PIECE_BYTES).unwrap_or(usize::MAX);
        Self {
            quota,
            products: Arc::new(Semaphore::new(quota.products)),
            memory: Arc::new(Semaphore::new(pieces.min(Semaphore::MAX_PERMITS))),
            closed: CancellationToken::new(),
            work: Mutex::default(),
            known: Mutex::default(),
        }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A matrix that the owner is known to have.
    ///
    /// # Errors
    /// Where none is known, what [`Self::remember`] has to be told.
    pub fn matrix(&self, linear: LinearId) -> Result<Arc<HeldLinear>, u64> {
        let known = self.known();
        known.matrices.get(&linear).and_then(Weak::upgrade).ok_or(known.assigned)
    }

    /// Remembers a matrix that was found to be the owner's, unless it was assigned other layers since then.
    pub fn remember(&self, assigned: u64, linear: LinearId, matrix: &Arc<HeldLinear>) {
        let mut known = self.known();
        if known.assigned == assigned {
            known.matrices.insert(linear, Arc::downgrade(matrix));
        }
    }

    /// The owner was assigned layers.
    fn assigned(&self) {
        let mut known = self.known();
        known.assigned += 1;
        known.matrices.clear();
    }

    /// Takes a place for a product of so many bytes, and waits for it while others are under way.
    ///
    /// # Errors
    /// When it takes more than the whole account has, when nothing becomes free in time, or when the account is closed.
    pub async fn place(self: &Arc<Self>, bytes: u64, backlog: &Arc<Backlog>) -> Result<Arc<Place>, Refusal> {
        let Quota { products, memory_bytes, patience } = self.quota;
        let pieces = bytes.div_ceil(PIECE_BYTES);
        let pieces = u32::try_from(pieces).ok().filter(|_| pieces <= memory_bytes / PIECE_BYTES);
        let Some(pieces) = pieces else {
            return Err(Refusal::Capacity(format!("a product of {bytes} bytes, where an owner has {memory_bytes}")));
        };
        let taken = async {
            let product = Arc::clone(&self.products).acquire_owned().await?;
            Ok::<_, tokio::sync::AcquireError>((product, Arc::clone(&self.memory).acquire_many_owned(pieces).await?))
        };
        let busy = || {
            let mib = memory_bytes >> 20;
            Refusal::Busy(format!("an owner has {products} products and {mib} MiB of memory for them at a time"))
        };
        match timeout(patience, taken).await {
            Ok(Ok((product, memory))) => Ok(Arc::new(Place {
                account: Arc::clone(self),
                backlog: Arc::clone(backlog),
                operations: AtomicU64::new(0),
                _permits: [product, memory],
            })),
            // Closed.
            Ok(Err(_)) => Err(Refusal::Layers("this owner any more".into())),
            Err(_) => Err(busy()),
        }
    }

    /// Drops what is under way, and gives no place any more.
    pub fn close(&self) {
        self.products.close();
        self.memory.close();
        self.closed.cancel();
    }

    /// What was done so far.
    pub fn work(&self) -> Work {
        *self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The accounts of all owners that have layers.
#[derive(Debug)]
pub struct Accounts {
    quota: Quota,
    open: RwLock<BTreeMap<PeerName, Arc<Account>>>,
}

impl Accounts {
    /// No account; each that is opened has this quota.
    pub fn new(quota: Quota) -> Self {
        Self { quota, open: RwLock::default() }
    }

    /// An owner's account.
    pub fn of(&self, owner: &PeerName) -> Option<Arc<Account>> {
        self.open.read().unwrap_or_else(PoisonError::into_inner).get(owner).map(Arc::clone)
    }

    /// Opens an account for an owner that is assigned layers, unless it has one.
    pub fn open(&self, owner: PeerName) {
        let mut open = self.open.write().unwrap_or_else(PoisonError::into_inner);
        open.entry(owner).or_insert_with(|| Arc::new(Account::new(self.quota))).assigned();
    }

    /// Closes an account, if there is one: what is under way is dropped.
    pub fn close(&self, owner: &PeerName) {
        let closed = self.open.write().unwrap_or_else(PoisonError::into_inner).remove(owner);
        if let Some(account) = closed {
            account.close();
        }
    }
}

/// Work that waits for the devices or is under way on them, of all owners: multiply-accumulates.
#[derive(Debug, Default)]
pub struct Backlog(AtomicU64);

/// A product's place. It is free again when the last that holds it drops it.
#[derive(Debug)]
pub struct Place {
    account: Arc<Account>,
    backlog: Arc<Backlog>,
    operations: AtomicU64,
    _permits: [OwnedSemaphorePermit; 2],
}

impl Place {
    /// The product goes to the devices; all that they have to do before it is done. Once a place.
    pub fn begin(&self, operations: u64) -> u64 {
        self.operations.store(operations, Ordering::Relaxed);
        self.backlog.0.fetch_add(operations, Ordering::Relaxed).saturating_add(operations)
    }

    /// Ends when the product's owner has lost its layers.
    pub async fn lost(&self) {
        self.account.closed.cancelled().await;
    }

    /// Whether it has.
    pub fn is_lost(&self) -> bool {
        self.account.closed.is_cancelled()
    }

    /// Puts work down to the owner.
    pub fn charge(&self, calls: u64, busy_seconds: f64) {
        let mut work = self.account.work.lock().unwrap_or_else(PoisonError::into_inner);
        work.calls += calls;
        work.busy_seconds += busy_seconds;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.backlog.0.fetch_sub(*self.operations.get_mut(), Ordering::Relaxed);
    }
}

#[cfg(test)]
pub(super) mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const QUOTA: Quota = Quota { products: 2, memory_bytes: 10 << 10, patience: Duration::ZERO };

    /// A place of an account of its own.
    pub(in crate::worker) async fn place() -> Arc<Place> {
        Arc::new(Account::new(QUOTA)).place(1, &Arc::default()).await.unwrap()
    }

    #[tokio::test]
    async fn products_and_memory_are_counted_until_the_last_holder_is_done() {
        let (account, backlog) = (Arc::new(Account::new(QUOTA)), Arc::new(Backlog::default()));
        let take = |bytes| account.place(bytes, &backlog);
        let first = take(8 << 10).await.unwrap();
        assert!(matches!(take((2 << 10) + 1).await, Err(Refusal::Busy(_))), "no memory");
        let second = take(2 << 10).await.unwrap();
        assert!(matches!(take(0).await, Err(Refusal::Busy(_))), "two products");
        let elsewhere = Arc::clone(&first);
        drop(first);
        assert!(matches!(take(0).await, Err(Refusal::Busy(_))), "somebody has a part in it still");
        drop(elsewhere);
        let third = take(8 << 10).await.unwrap();
        assert!(matches!(take((10 << 10) + 1).await, Err(Refusal::Capacity(_))), "it never fits");
        assert!(matches!(take(u64::MAX).await, Err(Refusal::Capacity(_))));
        assert_eq!((second.begin(5), third.begin(7)), (5, 12));
        drop(second);
        assert_eq!(backlog.0.load(Ordering::Relaxed), 7);
    }

    #[test]
    fn a_matrix_is_known_while_it_is_held_and_its_owner_keeps_its_layers() {
        let accounts = Accounts::new(QUOTA);
        let owner = PeerName::from("owner");
        accounts.open(owner.clone());
        let account = accounts.of(&owner).unwrap();
        let linear = LinearId { layer: 3, group: protocol::ids::Group::O };
        let shape = protocol::ids::LinearShape { d_in: 2, d_out: 2 };
        let matrix = protocol::quant::Int8Matrix { values: vec![1; 4], shape };
        let held = Arc::new(HeldLinear::hold(&[], &[], &matrix).unwrap());
        let assigned = account.matrix(linear).err().unwrap();
        account.remember(assigned, linear, &held);
        assert!(account.matrix(linear).is_ok_and(|known| Arc::ptr_eq(&known, &held)));
        accounts.open(owner.clone());
        assert_eq!(account.matrix(linear).err(), Some(assigned + 1), "other layers may be its own now");
        account.remember(assigned, linear, &held);
        assert!(account.matrix(linear).is_err(), "what was found before they were");
        account.remember(assigned + 1, linear, &held);
        assert!(account.matrix(linear).is_ok());
        drop(held);
        assert!(account.matrix(linear).is_err(), "nobody holds it any more");
    }

    #[tokio::test]
    async fn a_closed_account_gives_up_what_waits_and_what_is_under_way() {
        let patient = Quota { products: 1, patience: Duration::from_secs(3600), ..QUOTA };
        let (accounts, backlog, owner) = (Accounts::new(patient), Arc::default(), PeerName::from("owner"));
        accounts.open(owner.clone());
        let account = accounts.of(&owner).unwrap();
        accounts.open(owner.clone());
        assert!(Arc::ptr_eq(&account, &accounts.of(&owner).unwrap()), "an owner has one account");
        let place = account.place(1, &backlog).await.unwrap();
        let waiting = account.place(1, &backlog);
        let closing = async {
            accounts.close(&owner);
            place.lost().await;
        };
        let (waited, ()) = tokio::join!(waiting, closing);
        assert!(matches!(waited, Err(Refusal::Layers(_))) && place.is_lost());
        assert!(accounts.of(&owner).is_none());
        place.charge(1, 0.5);
        assert_eq!(account.work(), Work { calls: 1, busy_seconds: 0.5 });
    }
}
