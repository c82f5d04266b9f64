//! Products of the masks: asked for once, kept for every later call.
//!
//! A mask is public and the same for all calls of a run, and of later ones; only secrets and errors are fresh. So its product with a
//! served matrix, `A' = A·W`, is the same for all calls too: the owner asks a worker for it when the matrix is first
//! used in a direction, and from then on only bodies travel and are multiplied. Kept products are in the form in which
//! decryption reads them. They hold no secret, and they belong to the matrix, not to the worker that computed them: each was
//! verified when it came, before its first use, by a check that is exact. So all bytes of its values travel, and the owner
//! rounds off itself what it does not keep.
//!
//! Products are kept on a disk, too, where later runs find them ([`super::mask_store`]). Memory is bounded: what has no place
//! there is read from that disk for every call, or from a file of the run ([`super::mask_file`]), and what has none there
//! either is asked for in every call; calls that need it at the same time share it.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Instant;

use protocol::he::{DecryptError, MaskDomain, MaskProduct, MaskProductBuilder, MaskSeed, Precision, ProductTile};
use protocol::ids::{LinearId, ProductId};
use protocol::sketch::ForgedMasks;
use protocol::wire::messages::{Operand, PROTOCOL_VERSION, ProductHeader};
use tokio::sync::OnceCell;
use tracing::Instrument as _;

use super::CallNumbers;
use super::clock::PhaseClock;
use super::mask_file::{Extent, MaskDisk, MaskRoom};
use super::mask_store::MaskKey;
use super::table::LayerTable;
use crate::heavy::{Panicked, on_rayon};
use crate::trace::{FLIGHT, WORK};
use crate::transport::{PeerName, ProductRequest, Transport, TransportError};

/// Why the product of a mask could not be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MaskError {
    /// The owner knows nothing of this layer.
    #[error("{0} is not in the owner's layer table")]
    UnknownLinear(LinearId),
    /// The answer did not arrive whole.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// The answer is not the product of a mask.
    #[error("the product of the mask cannot be used: {0}")]
    Answer(#[from] DecryptError),
    /// The answer is no product of the mask by this matrix: the worker lied, or its memory did.
    #[error("the product of the mask is refused: {0}")]
    Refuted(#[from] ForgedMasks),
    /// A bug.
    #[error(transparent)]
    Panicked(#[from] Panicked),
}

/// Filled by whoever needs it first; the others wait.
type Cell = OnceCell<Arc<MaskProduct>>;

/// Where the product of one matrix and direction is.
enum Place {
    /// Here to stay: its memory is counted.
    Kept(Arc<Cell>),
    /// There for as long as a call holds it, and perhaps in the file.
    Passing(Weak<Cell>, Option<Extent>),
}

struct Places {
    by_product: HashMap<ProductId, Place>,
    /// Bytes that may still be kept.
    room: usize,
}

/// See the module's documentation.
pub(crate) struct MaskCache {
    seed: MaskSeed,
    table: Arc<LayerTable>,
    clock: Arc<PhaseClock>,
    calls: CallNumbers,
    places: Mutex<Places>,
    disk: Option<Arc<MaskDisk>>,
}

impl MaskCache {
    /// A cache for the masks of `seed` that numbers its calls by `calls` and keeps what there is room for.
    pub(crate) fn new(
        seed: MaskSeed,
        table: Arc<LayerTable>,
        calls: CallNumbers,
        clock: Arc<PhaseClock>,
        room: MaskRoom,
    ) -> Self {
        let places = Mutex::new(Places { by_product: HashMap::new(), room: room.memory_bytes });
        Self { seed, table, clock, calls, places, disk: room.disk.map(Arc::new) }
    }

    /// The product of the mask by a matrix: the one kept, in memory or on the disk, or one asked of `peer`.
    ///
    /// # Errors
    /// When `peer` does not give it; the next call asks again.
    pub(crate) async fn product(
        &self,
        transport: &dyn Transport,
        peer: &PeerName,
        product: ProductId,
    ) -> Result<Arc<MaskProduct>, MaskError> {
        let entry = self.table.entry(product.linear).ok_or(MaskError::UnknownLinear(product.linear))?;
        let (precision, (_, outer)) = (entry.precision(product.direction), entry.shape().along(product.direction));
        let cell = self.cell(product, MaskProduct::memory_for(precision, outer));
        let make = || async move {
            if let Some(filed) = self.read(product).await {
                return Ok(Arc::new(filed));
            }
            let operand = Operand::Masks { seed: self.seed.to_bytes() };
            let precision = Precision { mask_limbs: precision.set.limbs() as u8, ..precision };
            let calls = self.calls.clone();
            let call = on_rayon(move || calls.next()).await?;
            let header = ProductHeader { version: PROTOCOL_VERSION, call, product, precision, operand };
            let flight = tracing::info_span!(target: FLIGHT, "mask product", %product);
            let request = ProductRequest { header, body: None, outer };
            let fetched = self.fetch(transport, peer, request).instrument(flight).await?;
            self.write(product, &fetched).await;
            Ok(fetched)
        };
        cell.get_or_try_init(make).await.map(Arc::clone)
    }

    /// [`Self::product`], unless that is known to be read from the disk.
    ///
    /// # Errors
    /// Those of [`Self::product`].
    pub(crate) async fn unless_filed(
        &self,
        transport: &dyn Transport,
        peer: &PeerName,
        product: ProductId,
    ) -> Result<Option<Arc<MaskProduct>>, MaskError> {
        if self.is_read(product) {
            return Ok(None);
        }
        self.product(transport, peer, product).await.map(Some)
    }

    /// Whether a call has the product from the disk.
    fn is_read(&self, product: ProductId) -> bool {
        let passes = matches!(self.places().by_product.get(&product), Some(Place::Passing(..)));
        match self.disk.as_deref() {
            Some(MaskDisk::Kept(store)) => passes && store.knows(product),
            Some(MaskDisk::Run(_)) => self.extent(product).is_some(),
            None => false,
        }
    }

    /// What the product is found by on a disk that is kept.
    fn key(&self, product: ProductId) -> Option<MaskKey> {
        let entry = self.table.entry(product.linear)?;
        let precision = entry.precision(product.direction);
        Some(MaskKey::new(&self.seed, product, precision, entry.digest(), entry.shape()))
    }

    /// Where the file has the product, if it has.
    fn extent(&self, product: ProductId) -> Option<Extent> {
        match self.places().by_product.get(&product) {
            Some(&Place::Passing(_, extent)) => extent,
            _ => None,
        }
    }

    fn places(&self) -> MutexGuard<'_, Places> {
        // A panic while it was locked has at worst lost a place.
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The product, if the disk has it and it can be read.
    async fn read(&self, product: ProductId) -> Option<MaskProduct> {
        let disk = Arc::clone(self.disk.as_ref()?);
        let (extent, key) = (self.extent(product), self.key(product)?);
        let read = move || {
            let _span = tracing::info_span!(target: WORK, "read masks", %product).entered();
            match &*disk {
                MaskDisk::Run(file) => extent.map(|extent| file.read(extent)).transpose(),
                MaskDisk::Kept(store) => store.read(&key),
            }
        };
        match blocking(read).await {
            Ok(found) => found,
            Err(error) => {
                tracing::warn!(%product, %error, "the product of a mask cannot be read and is asked for anew");
                None
            }
        }
    }

    /// Writes a product to the disk, if there is one and it has room: to one that is kept in any case, to the run's file if
    /// memory has no place.
    async fn write(&self, product: ProductId, fetched: &Arc<MaskProduct>) {
        let passes = matches!(self.places().by_product.get(&product), Some(Place::Passing(..)));
        let (Some(disk), Some(key)) = (self.disk.as_ref().map(Arc::clone), self.key(product)) else { return };
        let fetched = Arc::clone(fetched);
        let write = move || match &*disk {
            MaskDisk::Run(file) if passes => file.write(&fetched),
            MaskDisk::Run(_) => Ok(None),
            MaskDisk::Kept(store) => store.write(&key, &fetched).map(|()| None),
        };
        match blocking(write).await {
            Ok(written) => {
                if let Some(Place::Passing(_, extent)) = self.places().by_product.get_mut(&product) {
                    *extent = written;
                }
            }
            Err(error) => {
                tracing::warn!(%error, "no more products of the masks can be written to the disk: later runs ask for them \
                                        anew, and this one in every step for those that have no place in memory");
            }
        }
    }

    /// Where a product of so many bytes is, or will be.
    fn cell(&self, product: ProductId, bytes: usize) -> Arc<Cell> {
        let mut places = self.places();
        let Places { by_product, room } = &mut *places;
        match by_product.entry(product) {
            Entry::Occupied(mut place) => match place.get_mut() {
                Place::Kept(cell) => Arc::clone(cell),
                Place::Passing(cell, _) => cell.upgrade().unwrap_or_else(|| {
                    let anew = Arc::new(Cell::new());
                    *cell = Arc::downgrade(&anew);
                    anew
                }),
            },
            Entry::Vacant(place) => {
                let cell = Arc::new(Cell::new());
                place.insert(match room.checked_sub(bytes) {
                    Some(rest) => {
                        *room = rest;
                        Place::Kept(Arc::clone(&cell))
                    }
                    None => Place::Passing(Arc::downgrade(&cell), None),
                });
                cell
            }
        }
    }

    async fn fetch(
        &self,
        transport: &dyn Transport,
        peer: &PeerName,
        request: ProductRequest,
    ) -> Result<Arc<MaskProduct>, MaskError> {
        let start = Instant::now();
        let product = request.header.product;
        let mut builder = MaskProductBuilder::new(request.header.precision, request.outer)?;
        let mut tiles = transport.product(peer, request).await?;
        while let Some(tile) = tiles.recv().await {
            let tile = tile?;
            builder = on_rayon(move || {
                let _span = tracing::info_span!(target: WORK, "keep masks", %product).entered();
                add_tile(builder, &tile)
            })
            .await??;
        }
        let whole = builder.finish()?;
        self.clock.add_mask_product(start.elapsed());
        let entry = self.table.entry(product.linear).ok_or(MaskError::UnknownLinear(product.linear))?;
        let (checks, precision, seed) =
            (entry.checks(product.direction), entry.precision(product.direction), self.seed);
        let verified = on_rayon(move || {
            let _span = tracing::info_span!(target: WORK, "verify masks", %product).entered();
            let domain = MaskDomain { set: precision.set, product };
            checks.masks.verify(whole, &seed, &domain, precision.mask_limbs)
        })
        .await??;
        Ok(Arc::new(verified))
    }
}

/// Runs what waits for a disk where that keeps nobody else waiting.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

fn add_tile(mut builder: MaskProductBuilder, tile: &ProductTile) -> Result<MaskProductBuilder, DecryptError> {
    builder.tile(tile)?;
    Ok(builder)
}
