//! Pads ready for calls of few rows ([`protocol::he::pads`]): made ahead, handed out once, within a budget of memory.
//!
//! Nobody who trains needs them: a backend is told that calls of few rows will come
//! ([`crate::backend::LinearBackend::expect_few_rows`]), and from then on pads are made for every forward product of the table, in the order of
//! the layers, by threads of low priority. A call of up to [`FEW_ROWS`] rows takes its pads from the product's shelf. Where
//! there are none yet, it makes a block itself, which takes as long as encrypting and decrypting without pads would; where there is no room for a
//! block, or one is being made, it goes the way of other calls.
//!
//! **Memory.** One budget holds for all shelves, and each product has the same number of rows as its share of it. Three quarters of
//! these are kept of a block. The rest is there so that turns come one after the other: whenever there is room for another block, the
//! product with the fewest rows gets one, at the beginning some of them a second one. All products are used alike, so that from then on
//! one or the other needs a block at any time, long before it has used its last row. What lies on the shelves is never more than the budget; a block that is being made takes
//! its own size once more for a moment.
//!
//! A row is removed from its shelf before anybody sees it, and belongs to one attempt of one call: another attempt takes another
//! row. What is never used is wiped with the store.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use protocol::he::{EncryptError, MaskDomain, MaskProduct, MaskSeed, PadRow, Precision};
use protocol::ids::{Direction, ProductId};
use tokio::sync::{Notify, OwnedMutexGuard};

use super::CallNumbers;
use super::clock::PhaseClock;
use super::keys::KeyError;
use super::table::LayerTable;
use crate::heavy::{IdleThreads, on_rayon};
use crate::trace::WORK;

/// Most rows of a call that takes pads. A call of more rows uses so much of a block that it had better use all of it. So many are
/// rotated, sketched and verified as one task each, on the thread that asks (`sketch::project` takes no more than these at once).
pub const FEW_ROWS: usize = 16;
/// Rows of each product that are planned for where nothing else is said: the transforms of a block are then less than what is done
/// for each row anyway.
const PLANNED_ROWS: u64 = 384;
/// Memory that is taken at most where nothing else is said, unless it is for [`FEWEST_ROWS`].
const PLANNED_BYTES: u64 = 512 << 20;
/// Rows of each product with which pads are worth while.
const FEWEST_ROWS: u64 = 2 * FEW_ROWS as u64;

/// Rows that are kept of a block, of a share of so many.
const fn of_share(rows: usize) -> usize {
    rows / 4 * 3
}

/// Memory that pads may take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PadRoom {
    /// As the model's size suggests: of 384 rows of each product, up to 512 MiB.
    #[default]
    OfModel,
    /// So many bytes; none is 0.
    Bytes(u64),
}

impl PadRoom {
    /// Bytes for products of which a row takes so many, all together.
    fn bytes(self, of_row: u64) -> u64 {
        let rows = |count: u64| of_row.saturating_mul(count);
        match self {
            Self::OfModel => rows(PLANNED_ROWS).min(PLANNED_BYTES).max(rows(FEWEST_ROWS)),
            Self::Bytes(bytes) => bytes,
        }
    }
}

/// The pads of one product.
struct Shelf {
    rows: Vec<PadRow>,
    /// Bytes of a row, and rows of a block.
    row_bytes: usize,
    block: usize,
    /// Held by whoever makes a block.
    making: Arc<tokio::sync::Mutex<()>>,
}

impl Shelf {
    fn block_bytes(&self) -> usize {
        self.block * self.row_bytes
    }
}

/// What there is and may be.
struct Stock {
    /// Nothing is made before somebody asks.
    wanted: bool,
    shelves: BTreeMap<ProductId, Shelf>,
    /// Bytes that are not taken, nor promised to blocks that are being made.
    room: usize,
}

impl Stock {
    /// Shelves for a table's forward products, as many rows of each as there is room for: none where that is too few to be worth
    /// while.
    fn plan(products: impl IntoIterator<Item = (ProductId, Precision, usize)>, room: PadRoom) -> Self {
        let products: Vec<_> = products.into_iter().collect();
        let of_row = products.iter().map(|(.., bytes)| *bytes as u64).fold(0, u64::saturating_add);
        let bytes = room.bytes(of_row);
        let rows = usize::try_from(bytes.checked_div(of_row).unwrap_or(0)).unwrap_or(usize::MAX);
        let (wanted, room) = (false, usize::try_from(bytes).unwrap_or(usize::MAX));
        if (rows as u64) < FEWEST_ROWS {
            if bytes > 0 && of_row > 0 {
                let mib = of_row.saturating_mul(FEWEST_ROWS).div_ceil(1 << 20);
                tracing::warn!("no pads are made, and tokens take long: they need {mib} MiB (owner.pad_mib)");
            }
            return Self { wanted, shelves: BTreeMap::new(), room: 0 };
        }
        let shelf = |(product, precision, row_bytes): (ProductId, Precision, usize)| {
            let block = of_share(rows).min(precision.set.polynomial_size());
            (product, Shelf { rows: Vec::new(), row_bytes, block, making: Arc::default() })
        };
        Self { wanted, shelves: products.into_iter().map(shelf).collect(), room }
    }

    /// Takes rows off a shelf, if it has so many.
    fn take(&mut self, product: ProductId, count: usize) -> Option<Vec<PadRow>> {
        let shelf = self.shelves.get_mut(&product)?;
        let rows = shelf.rows.split_off(shelf.rows.len().checked_sub(count)?);
        self.room += count * shelf.row_bytes;
        Some(rows)
    }

    /// The product that is to get the next block, if there is room for one: of those that are not getting one, that with the
    /// fewest rows.
    fn neediest(&self) -> Option<ProductId> {
        let waiting = self.shelves.iter().filter(|(_, shelf)| shelf.making.try_lock().is_ok());
        let (product, shelf) = waiting.min_by_key(|(_, shelf)| shelf.rows.len())?;
        (self.wanted && shelf.block_bytes() <= self.room).then_some(*product)
    }
}

/// What rows are prepared with, wherever that is.
#[derive(Clone)]
pub(crate) struct Maker {
    pub(super) seed: MaskSeed,
    pub(super) table: Arc<LayerTable>,
    pub(super) calls: CallNumbers,
    pub(super) clock: Arc<PhaseClock>,
    /// Threads for what nobody waits for yet.
    pub(super) idle: Arc<IdleThreads>,
}

/// See the module's documentation.
pub(crate) struct PadStore {
    pub(super) maker: Maker,
    stock: Mutex<Stock>,
    /// Told whenever there is more room.
    freed: Notify,
}

/// A block that is being made: its memory is promised, and nobody else makes one of the product.
pub(crate) struct Making<'a> {
    store: &'a PadStore,
    product: ProductId,
    rows: usize,
    bytes: usize,
    _only: OwnedMutexGuard<()>,
}

impl PadStore {
    /// Empty shelves for the forward products of a table, in so much memory. Nothing is made until [`Self::want`].
    pub(crate) fn new(maker: Maker, room: PadRoom) -> Self {
        let products = maker.table.entries().map(|(linear, entry)| {
            let (precision, shape) = (entry.precision(Direction::Forward), entry.shape());
            let bytes = PadRow::bytes_for(precision, shape.d_in, shape.d_out);
            (linear.along(Direction::Forward), precision, bytes)
        });
        let stock = Mutex::new(Stock::plan(products, room));
        Self { maker, stock, freed: Notify::new() }
    }

    fn stock(&self) -> MutexGuard<'_, Stock> {
        // A panic while it was locked has at worst lost rows.
        self.stock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// No call will come any more: what is left is wiped, and nothing more is made.
    pub(crate) fn close(&self) {
        *self.stock() = Stock { wanted: false, shelves: BTreeMap::new(), room: 0 };
    }

    /// Calls of few rows will come. Whether that was not known yet, and there are pads to be made.
    pub(crate) fn want(&self) -> bool {
        let mut stock = self.stock();
        self.freed.notify_one();
        if std::mem::replace(&mut stock.wanted, true) || stock.shelves.is_empty() {
            return false;
        }
        let of_token: usize = stock.shelves.values().map(|shelf| shelf.row_bytes).sum();
        let rows = stock.shelves.values().map(|shelf| shelf.block).max();
        tracing::debug!(bytes = stock.room, of_token, rows, "pads are made for calls of few rows");
        true
    }

    /// Whether a call may take pads.
    pub(crate) fn serves(&self, product: ProductId, tokens: usize) -> bool {
        let stock = self.stock();
        stock.wanted && tokens <= FEW_ROWS && stock.shelves.contains_key(&product)
    }

    /// Rows for one attempt of a call, if there are so many.
    pub(crate) fn take(&self, product: ProductId, tokens: usize) -> Option<Vec<PadRow>> {
        let taken = self.stock().take(product, tokens);
        if taken.is_some() {
            self.freed.notify_one();
        }
        taken
    }

    /// The right to make a block of a product. `None` where there is no room, or somebody else makes one: that may be a thread which
    /// gives way to everybody, so that a call which waited for it might wait for long.
    pub(crate) fn begin(&self, product: ProductId) -> Option<Making<'_>> {
        let mut stock = self.stock();
        let shelf = stock.shelves.get(&product)?;
        let only = Arc::clone(&shelf.making).try_lock_owned().ok()?;
        let (rows, bytes) = (shelf.block, shelf.block_bytes());
        stock.room = stock.room.checked_sub(bytes)?;
        Some(Making { store: self, product, rows, bytes, _only: only })
    }

    /// Waits until a product should get a block.
    ///
    /// # Cancel safety
    /// It holds nothing.
    pub(crate) async fn needed(&self) -> ProductId {
        loop {
            let freed = self.freed.notified();
            if let Some(product) = self.stock().neediest() {
                return product;
            }
            freed.await;
        }
    }
}

/// How soon a block is to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Haste {
    /// A call waits for it.
    Now,
    /// Whenever nobody else has work.
    Idle,
}

impl Making<'_> {
    /// Makes the block and puts it on its shelf.
    ///
    /// # Errors
    /// When the mask product is not one of this product, there is no randomness, or the computation panics.
    pub(crate) async fn make(mut self, masks: Arc<MaskProduct>, haste: Haste) -> Result<(), KeyError> {
        let (store, product, rows) = (self.store, self.product, self.rows);
        let Maker { seed, table, calls, clock, idle } = store.maker.clone();
        let entry = table.entry(product.linear).ok_or(KeyError::UnknownLinear(product.linear))?;
        let (features, _) = entry.shape().along(product.direction);
        let domain = MaskDomain { set: entry.precision(product.direction).set, product };
        let prepare = move || {
            let _span = tracing::info_span!(target: WORK, "prepare pads", %product, rows).entered();
            let start = Instant::now();
            calls.count_block();
            let made = PadRow::prepare(&seed, &domain, &masks, features, rows);
            clock.add_pads(start.elapsed());
            made
        };
        let made: Result<Vec<PadRow>, EncryptError> = match haste {
            Haste::Idle => idle.run(prepare).await?,
            Haste::Now => on_rayon(prepare).await?,
        };
        let made = made?;
        let mut stock = store.stock();
        if let Some(shelf) = stock.shelves.get_mut(&product) {
            shelf.rows.extend(made);
            // It is taken now.
            self.bytes = 0;
        }
        Ok(())
    }
}

impl Drop for Making<'_> {
    fn drop(&mut self) {
        if self.bytes > 0 {
            self.store.stock().room += self.bytes;
            self.store.freed.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use protocol::he::ParameterSet;
    use protocol::ids::{Group, LinearId};

    use super::*;

    fn product(layer: u16) -> ProductId {
        LinearId { layer, group: Group::O }.along(Direction::Forward)
    }

    fn stock(rows: [usize; 3], room: PadRoom) -> Stock {
        let products =
            rows.iter().zip(0..).map(|(&bytes, layer)| (product(layer), Precision::standard(ParameterSet::P24), bytes));
        let mut stock = Stock::plan(products, room);
        stock.wanted = true;
        stock
    }

    #[test]
    fn rows_are_planned_alike_for_all_products_and_none_where_they_are_too_few() {
        let blocks = |stock: &Stock| stock.shelves.values().map(|shelf| shelf.block).collect::<Vec<_>>();
        let planned = |room| blocks(&stock([100, 200, 300], room));
        assert_eq!(planned(PadRoom::OfModel), [288; 3]);
        assert_eq!(planned(PadRoom::Bytes(600 * 40 + 599)), [30; 3]);
        assert_eq!(planned(PadRoom::Bytes(u64::MAX)), [1024; 3], "a block has no more");
        assert!(planned(PadRoom::Bytes(600 * 32 - 1)).is_empty());
        assert!(planned(PadRoom::Bytes(0)).is_empty());
        // Of a model of eight billion parameters, and of one so large that the least is more than what is planned for.
        assert_eq!(PadRoom::OfModel.bytes(6_700_000), 512 << 20);
        assert_eq!(PadRoom::OfModel.bytes(33_000_000), 32 * 33_000_000);
        assert!(Stock::plan([], PadRoom::OfModel).shelves.is_empty());
    }

    /// All products are used alike, one row at a time; whatever is needed is made. Blocks are counted, not made.
    #[test]
    fn turns_come_one_after_the_other_and_memory_stays_within_the_budget() {
        let sizes = [100, 200, 300];
        let mut stock = stock(sizes, PadRoom::Bytes(600 * 64));
        let mut left = [0_usize; 3];
        let (mut fewest_ever, mut made) = (usize::MAX, Vec::new());
        for token in 0..1000 {
            while let Some(product) = stock.neediest() {
                let at = usize::from(product.linear.layer);
                assert_eq!(left[at], *left.iter().min().unwrap(), "the neediest first");
                left[at] += 48;
                // Stand-ins of the shelf's rows: what counts here is how many there are.
                stock.room -= 48 * sizes[at];
                stock.shelves.get_mut(&product).unwrap().rows.extend(rows(48));
                made.push(token);
            }
            let held: usize = left.iter().zip(sizes).map(|(rows, size)| rows * size).sum();
            assert_eq!(held + stock.room, 600 * 64, "nothing is lost, and nothing is more than the budget");
            for (at, left) in left.iter_mut().enumerate() {
                assert_eq!(stock.take(product(at as u16), 1).map(|rows| rows.len()), Some(1), "token {token}");
                *left -= 1;
            }
            fewest_ever = fewest_ever.min(*left.iter().min().unwrap());
        }
        assert!(fewest_ever >= 8, "a block is made long before the last row is used: {fewest_ever}");
        assert!(made.iter().filter(|&&token| token == 0).count() > 3);
        let later: Vec<_> = made.iter().filter(|&&token| token > 0).collect();
        assert!(later.windows(2).all(|pair| pair[0] < pair[1]), "no two at the same time: {later:?}");
    }

    /// Rows of the smallest product that there is.
    fn rows(count: usize) -> Vec<PadRow> {
        use protocol::he::{MaskProductBuilder, Planes, ProductTile};
        let precision = Precision::standard(ParameterSet::P24);
        let domain = MaskDomain { set: precision.set, product: product(0) };
        let mut masks = MaskProductBuilder::new(precision, 1).unwrap();
        masks.tile(&ProductTile { first_column: 0, rows: Planes::zeros(3, 1024, 1) }).unwrap();
        #[allow(clippy::disallowed_methods)]
        let masks = masks.finish().unwrap().unchecked();
        PadRow::prepare(&MaskSeed::from_bytes([0; 32]), &domain, &masks, 1, count).unwrap()
    }

    #[test]
    fn rows_leave_their_shelf_and_too_few_stay() {
        let mut stock = stock([100, 200, 300], PadRoom::Bytes(600 * 64));
        stock.shelves.get_mut(&product(1)).unwrap().rows = rows(5);
        assert!(stock.take(product(1), 6).is_none() && stock.take(product(0), 1).is_none());
        assert_eq!(stock.take(product(1), 5).unwrap().len(), 5);
        assert!(stock.take(product(1), 1).is_none() && stock.take(product(9), 1).is_none());
    }
}
