//! Micro-batches that go through the model side by side, each a while behind the other, and share the blocks of their products
//! ([`protocol::he::share`]).
//!
//! The first of them to come to a product has the block made for all, and the block of the product that comes next with it, so that
//! it does not wait for that one; the half that answers are decrypted with is made while its rows travel. The others find
//! theirs. Threads make them that give way to everybody else's: more members wait for these than for a block, and what is made
//! ahead is not waited for yet. Which rows are whose does not depend on who is faster, and a member that comes again, because a
//! worker failed, or a row wrapped, goes its own way: its rows of the block are used up.
//!
//! One that goes alone has blocks of its own in the same way, where they are small. It need not share them to gain by them: a block is made
//! column by column and used row by row, so that what is sent is encrypted right where it is encoded, and what comes back is
//! decrypted right where it is verified.
//!
//! Between its two halves a block's secret is here, and nowhere else; it goes when the second one is made, or with the convoy.
//!
//! **Memory.** A block lies here from its first member's coming to its last one's, or to the end of the step where one does not
//! come, since its attempt failed or it has no need of the product. Members go at about the same speed, so these are the blocks of
//! some few products; where one falls behind and they become more than there is room for, the next products are everybody's own.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use protocol::he::{
    EncryptError, MaskDomain, MaskProduct, SharedAnswer, SharedRows, SharedSecret, share, shared_bytes,
};
use protocol::ids::{Direction, Group, LinearId, ProductId};
use tokio::sync::Mutex as AsyncMutex;

use super::keys::KeyError;
use super::pads::Maker;
use crate::heavy::Panicked;
use crate::trace::WORK;

/// Memory that a convoy's blocks take at most, as long as not all members have come for theirs.
pub(super) const ROOM: usize = 256 << 20;

/// The most that a block of one member takes. With larger ones a billion parameters took the owner some 5 % more, and
/// 100 MB, than with calls whose secrets are kept.
const ALONE: usize = 8 << 20;

/// See the module's documentation.
pub(crate) struct Convoy {
    /// Rows of each member, at most.
    members: Vec<usize>,
    /// Bytes that blocks may take.
    room: usize,
    /// Bytes of those that lie here.
    taken: Arc<AtomicUsize>,
    slots: Mutex<HashMap<ProductId, Slot>>,
}

/// The block of one product.
#[derive(Clone)]
enum Slot {
    Shared(Arc<Block>),
    /// There was no room for it, or all of it was taken.
    Alone,
}

/// A block, or the promise of one.
pub(crate) struct Block {
    parts: AsyncMutex<Parts>,
    other: AsyncMutex<Other>,
    bytes: usize,
    /// Gives [`Self::bytes`] back.
    taken: Arc<AtomicUsize>,
}

impl Drop for Block {
    fn drop(&mut self) {
        self.taken.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// What bodies are encrypted with, for each member until it takes its own.
enum Parts {
    Promised,
    Made(Vec<Option<SharedRows>>),
}

/// What answers are decrypted with, likewise.
enum Other {
    /// The first half is not made yet, or the second could not be.
    None,
    Secret(SharedSecret),
    Made(Vec<Option<SharedAnswer>>),
}

/// A member's place.
#[derive(Clone)]
pub(crate) struct Seat {
    convoy: Arc<Convoy>,
    member: usize,
}

/// A member's rows of a block, and where the other half of them will be.
pub(crate) struct Place {
    pub(crate) rows: SharedRows,
    pub(crate) block: Arc<Block>,
}

impl Convoy {
    /// A place for each of some members, which go with up to so many rows, their blocks in so much room.
    pub(crate) fn seats(members: Vec<usize>, room: usize) -> Vec<Seat> {
        let count = members.len();
        let convoy = Arc::new(Self { members, room, taken: Arc::default(), slots: Mutex::default() });
        (0..count).map(|member| Seat { convoy: Arc::clone(&convoy), member }).collect()
    }

    /// The slot of a product; `None` where the table has no such product.
    fn slot(&self, maker: &Maker, product: ProductId) -> Option<Slot> {
        let entry = maker.table.entry(product.linear)?;
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let new = || {
            let (precision, rows) = (entry.precision(product.direction), self.members.iter().sum::<usize>());
            let (inner, outer) = entry.shape().along(product.direction);
            let bytes = shared_bytes(precision, rows, inner, outer);
            if rows > precision.set.polynomial_size()
                || (self.members.len() == 1 && bytes > ALONE)
                || self.taken.load(Ordering::Relaxed).saturating_add(bytes) > self.room
            {
                return Slot::Alone;
            }
            self.taken.fetch_add(bytes, Ordering::Relaxed);
            let (parts, other) = (AsyncMutex::new(Parts::Promised), AsyncMutex::new(Other::None));
            Slot::Shared(Arc::new(Block { parts, other, bytes, taken: Arc::clone(&self.taken) }))
        };
        Some(slots.entry(product).or_insert_with(new).clone())
    }

    /// All members have taken their rows of a product, which need not be found here any more.
    fn close(&self, product: ProductId) {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner).insert(product, Slot::Alone);
    }
}

impl Seat {
    /// This member's rows of a product; `None` where it has had them, or goes its own way.
    ///
    /// # Errors
    /// When a block cannot be made.
    ///
    /// # Cancel safety
    /// A block that is being made is lost, and made anew by the next member.
    pub(crate) async fn take(
        &self,
        maker: &Maker,
        product: ProductId,
        tokens: usize,
    ) -> Result<Option<Place>, KeyError> {
        if self.convoy.members.get(self.member).is_none_or(|&most| tokens > most) {
            return Ok(None);
        }
        let Some(Slot::Shared(block)) = self.convoy.slot(maker, product) else { return Ok(None) };
        let mut parts = block.made(maker, product, &self.convoy.members).await?;
        let first = parts.iter().all(Option::is_some);
        let rows = parts.get_mut(self.member).and_then(Option::take);
        if parts.iter().all(Option::is_none) {
            self.convoy.close(product);
        }
        drop(parts);
        if let Some(next) = next(product).filter(|_| first)
            && let Some(Slot::Shared(ahead)) = self.convoy.slot(maker, next)
        {
            let (maker, convoy) = (maker.clone(), Arc::clone(&self.convoy));
            // Whoever comes there finds out what went wrong.
            actix::spawn(async move { ahead.made(&maker, next, &convoy.members).await.map(drop).ok() });
        }
        Ok(rows.map(|rows| Place { rows, block }))
    }

    /// What this member's answer is decrypted with, made from the mask product if nobody has done it; `None` where it was lost, or
    /// is not made and there is no mask product.
    ///
    /// # Errors
    /// When it cannot be made.
    pub(crate) async fn answer(
        &self,
        maker: &Maker,
        product: ProductId,
        block: Arc<Block>,
        masks: Option<Arc<MaskProduct>>,
    ) -> Result<Option<SharedAnswer>, KeyError> {
        let (maker, member) = (maker.clone(), self.member);
        // A task of its own: the secret is not lost where this member waits no more.
        let made = actix::spawn(async move {
            let mut other = block.other.lock().await;
            if let Some(masks) = masks
                && matches!(*other, Other::Secret(_))
                && let Other::Secret(secret) = std::mem::replace(&mut *other, Other::None)
            {
                let clock = Arc::clone(&maker.clock);
                let finished = maker.idle.run(move || {
                    let _span = tracing::info_span!(target: WORK, "share decryption", %product).entered();
                    let start = Instant::now();
                    let finished = secret.finish(&masks);
                    clock.add_decrypt(start.elapsed());
                    finished
                });
                *other = Other::Made(finished.await??.into_iter().map(Some).collect());
            }
            Ok(match &mut *other {
                Other::Made(answers) => answers.get_mut(member).and_then(Option::take),
                _ => None,
            })
        });
        made.await.unwrap_or(Err(Panicked.into()))
    }
}

impl Block {
    /// Whether the half that answers are decrypted with is still to be made. Otherwise nobody need read the mask product, which means
    /// going through all of it for its checksum.
    pub(crate) fn wants_masks(&self) -> bool {
        // Whoever holds it while others ask makes it.
        self.other.try_lock().is_ok_and(|other| matches!(*other, Other::Secret(_)))
    }

    /// The first half, made if nobody has done it.
    async fn made(
        &self,
        maker: &Maker,
        product: ProductId,
        members: &[usize],
    ) -> Result<tokio::sync::MappedMutexGuard<'_, Vec<Option<SharedRows>>>, KeyError> {
        let mut parts = self.parts.lock().await;
        if let Parts::Promised = *parts {
            let entry = maker.table.entry(product.linear).ok_or(KeyError::UnknownLinear(product.linear))?;
            let domain = MaskDomain { set: entry.precision(product.direction).set, product };
            let (features, _) = entry.shape().along(product.direction);
            let (its, members) = (maker.clone(), members.to_vec());
            let made = maker.idle.run(move || {
                let _span = tracing::info_span!(target: WORK, "share encryption", %product).entered();
                let start = Instant::now();
                // Calls may be counted in a file: no actor waits for that.
                its.calls.count_block();
                let made = share(&its.seed, &domain, features, &members)?;
                its.clock.add_shared(start.elapsed());
                Ok::<_, EncryptError>(made)
            });
            let (made, secret) = made.await??;
            *self.other.lock().await = Other::Secret(secret);
            *parts = Parts::Made(made.into_iter().map(Some).collect());
        }
        tokio::sync::MutexGuard::try_map(parts, |parts| match parts {
            Parts::Made(made) => Some(made),
            Parts::Promised => None,
        })
        .map_err(|_| Panicked.into())
    }
}

/// The product that comes after one, on the way through the layers and on the way back; `None` where that is the head's.
fn next(ProductId { linear, direction }: ProductId) -> Option<ProductId> {
    let LinearId { layer, group } = linear;
    let (layer, group) = match (direction, group) {
        (_, Group::Head) => return None,
        // No gradient is asked for below the first layer.
        (Direction::Backward, Group::O) if layer == 0 => return None,
        (Direction::Forward, Group::Qkv) => (layer, Group::O),
        (Direction::Forward, Group::O) => (layer, Group::GateUp),
        (Direction::Forward, Group::GateUp) => (layer, Group::Down),
        (Direction::Forward, Group::Down) => (layer.checked_add(1)?, Group::Qkv),
        (Direction::Backward, Group::Down) => (layer, Group::GateUp),
        (Direction::Backward, Group::GateUp) => (layer, Group::O),
        (Direction::Backward, Group::O) => (layer, Group::Qkv),
        (Direction::Backward, Group::Qkv) => (layer.checked_sub(1)?, Group::Down),
    };
    Some(LinearId { layer, group }.along(direction))
}
