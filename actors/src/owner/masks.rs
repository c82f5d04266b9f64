//! Products of the masks: asked for once, kept for every later call.
//!
//! A mask is public and the same for all calls of a run; only secrets and errors are fresh. So its product with a
//! served matrix, `A' = A·W`, is the same for all calls too: the owner asks a worker for it when the matrix is first
//! used in a direction, and from then on only bodies travel and are multiplied. Kept products are in the form in which
//! decryption reads them. They hold no secret, and they belong to the matrix, not to the worker that computed them.
//!
//! Memory is bounded: what has no place any more is asked for in every call, and shared by the calls that need it at
//! the same time.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Instant;

use protocol::he::{DecryptError, MaskProduct, MaskProductBuilder, MaskSeed, ProductTile};
use protocol::model::{Direction, LinearId};
use protocol::wire::messages::{Operand, PROTOCOL_VERSION, ProductHeader};
use tokio::sync::OnceCell;
use tracing::Instrument as _;

use super::clock::PhaseClock;
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
    /// There for as long as a call holds it.
    Passing(Weak<Cell>),
}

struct Places {
    by_product: HashMap<(LinearId, Direction), Place>,
    /// Bytes that may still be kept.
    room: usize,
}

/// See the module's documentation.
pub(crate) struct MaskCache {
    seed: MaskSeed,
    table: Arc<LayerTable>,
    clock: Arc<PhaseClock>,
    calls: AtomicU64,
    places: Mutex<Places>,
}

impl MaskCache {
    /// A cache for the masks of `seed` that keeps at most `memory_bytes`.
    pub(crate) fn new(seed: MaskSeed, table: Arc<LayerTable>, clock: Arc<PhaseClock>, memory_bytes: usize) -> Self {
        let places = Places { by_product: HashMap::new(), room: memory_bytes };
        Self { seed, table, clock, calls: AtomicU64::new(0), places: Mutex::new(places) }
    }

    /// The product of the mask by a matrix: the one kept, or one asked of `peer`.
    ///
    /// # Errors
    /// When `peer` does not give it; the next call asks again.
    pub(crate) async fn product(
        &self,
        transport: &dyn Transport,
        peer: &PeerName,
        linear: LinearId,
        direction: Direction,
    ) -> Result<Arc<MaskProduct>, MaskError> {
        let entry = self.table.entry(linear).ok_or(MaskError::UnknownLinear(linear))?;
        let (precision, (_, outer)) = (entry.precision(direction), entry.shape().along(direction));
        let cell = self.cell(linear, direction, MaskProduct::memory_for(precision, outer));
        let fetch = || {
            let operand = Operand::Masks { seed: self.seed.to_bytes() };
            let call = self.calls.fetch_add(1, Ordering::Relaxed);
            let header = ProductHeader { version: PROTOCOL_VERSION, call, linear, direction, precision, operand };
            let flight = tracing::info_span!(target: FLIGHT, "mask product", %linear, ?direction);
            self.fetch(transport, peer, ProductRequest { header, body: None, outer }).instrument(flight)
        };
        cell.get_or_try_init(fetch).await.map(Arc::clone)
    }

    /// Where a product of so many bytes is, or will be.
    fn cell(&self, linear: LinearId, direction: Direction, bytes: usize) -> Arc<Cell> {
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        let found = match places.by_product.get(&(linear, direction)) {
            Some(Place::Kept(cell)) => Some(Arc::clone(cell)),
            Some(Place::Passing(cell)) => cell.upgrade(),
            None => None,
        };
        if let Some(cell) = found {
            return cell;
        }
        let cell = Arc::new(Cell::new());
        let place = match places.room.checked_sub(bytes) {
            Some(room) => {
                places.room = room;
                Place::Kept(Arc::clone(&cell))
            }
            None => Place::Passing(Arc::downgrade(&cell)),
        };
        places.by_product.insert((linear, direction), place);
        cell
    }

    async fn fetch(
        &self,
        transport: &dyn Transport,
        peer: &PeerName,
        request: ProductRequest,
    ) -> Result<Arc<MaskProduct>, MaskError> {
        let start = Instant::now();
        let linear = request.header.linear;
        let mut builder = MaskProductBuilder::new(request.header.precision, request.outer)?;
        let mut tiles = transport.product(peer, request).await?;
        while let Some(tile) = tiles.recv().await {
            let tile = tile?;
            builder = on_rayon(move || {
                let _span = tracing::info_span!(target: WORK, "keep masks", %linear).entered();
                add_tile(builder, &tile)
            })
            .await??;
        }
        let product = builder.finish()?;
        self.clock.add_mask_product(start.elapsed());
        Ok(Arc::new(product))
    }
}

fn add_tile(mut builder: MaskProductBuilder, tile: &ProductTile) -> Result<MaskProductBuilder, DecryptError> {
    builder.tile(tile)?;
    Ok(builder)
}
