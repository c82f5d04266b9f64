//! Where the trainer's base-model products come from: encrypted workers, or plain f32 weights.

mod plain;

use std::sync::Arc;
use std::time::Duration;

use protocol::buffer::Buffer;
use protocol::ids::{LinearId, ProductId};
use protocol::sketch::Verified;

use crate::transformer::KnownPart;
use crate::transport::Traffic;

pub use plain::PlainBackend;

/// A base product that a trainer may use: the owner's own process computed it, or a worker, and then all of it was verified.
#[derive(Debug)]
pub struct Product(Buffer);

impl Product {
    /// What was computed by the owner's own process.
    pub fn of_owner(rows: Buffer) -> Self {
        Self(rows)
    }

    /// `tokens × outer`, row-major.
    pub fn into_rows(self) -> Buffer {
        self.0
    }
}

impl From<Verified<Buffer>> for Product {
    fn from(verified: Verified<Buffer>) -> Self {
        Self(verified.into_values())
    }
}

/// Computes a base-model product for the owner's model.
///
/// Calls block the calling thread (a worker thread of the trainer, never an actor's).
pub trait LinearBackend: Send + Sync + 'static {
    /// `rows` is `tokens × inner`, row-major; returns `tokens × outer`, row-major, where inner and outer are the
    /// dimensions of the product. Rows are shared, so that nobody on their way has to copy them.
    ///
    /// # Errors
    /// When no worker could compute the product.
    fn apply(&self, product: ProductId, rows: Arc<Buffer>, tokens: usize) -> Result<Product, BackendError>;

    /// The part of a matrix's forward products that the caller computes itself, if there is one: [`Self::apply`] is then for what is
    /// left of the rows, and returns what becomes of that.
    fn known(&self, _linear: LinearId) -> Option<&KnownPart> {
        None
    }

    /// Says that forward products of few rows, up to sixteen, will be asked for again and again: for generation, token by token. A backend that
    /// can make these cheap prepares for them from now on, in the background and within its memory for that.
    fn expect_few_rows(&self) {}

    /// Doors for micro-batches of up to so many rows each, in their order, which will go through the model side by side, each a little
    /// behind the one before it: what is done for a product once for several of them is done once then, and what one of them will need
    /// next is made ahead. Each door is for one pass of its micro-batch, there and back. `None` where that saves nothing.
    fn side_by_side(&self, _rows: &[usize]) -> Option<Vec<Arc<dyn LinearBackend>>> {
        None
    }

    /// Whether products of the head are computed too; if not, they are the caller's.
    fn serves_head(&self) -> bool {
        false
    }

    /// Whether products are asked of workers: then a call has its round trip whatever it carries, and products carry the noise of
    /// integers and encryption. What a pass keeps for its way back is rounded then too, by less than they are.
    fn asks_workers(&self) -> bool {
        false
    }

    /// Bytes exchanged with workers so far; none where products are computed by the owner itself.
    fn traffic(&self) -> Traffic {
        Traffic::default()
    }

    /// How far the workers are on average, there and back; `None` where there are none, or that is not known.
    fn round_trip(&self) -> Option<Duration> {
        None
    }
}

/// A product could not be had.
#[derive(Debug, thiserror::Error)]
#[error("{product}: {why}")]
pub struct BackendError {
    /// What was asked for.
    pub product: ProductId,
    /// What happened.
    pub why: BackendFailure,
}

impl BackendError {
    /// Whether there are no workers to go on with: nothing is wrong with the run, which can be resumed when there are.
    pub fn is_lost_workers(&self) -> bool {
        matches!(self.why, BackendFailure::LostWorkers(_))
    }
}

/// Why a product could not be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BackendFailure {
    /// No worker is left, and none came back in time.
    #[error("{0}")]
    LostWorkers(String),
    /// Rows that cannot be encrypted, such as those with a value that is not finite: training went wrong before.
    #[error("{0}")]
    Rows(String),
    /// A worker refuses this product, and no other serves it.
    #[error("{0}")]
    Refused(String),
    /// Something failed on the owner's own side.
    #[error("{0}")]
    Internal(String),
}

impl<T: Into<String>> From<T> for BackendFailure {
    fn from(why: T) -> Self {
        Self::Internal(why.into())
    }
}
