//! Where the trainer's base-model products come from: encrypted workers, or plain f32 weights.

mod plain;

use std::sync::Arc;

use protocol::ids::ProductId;

use crate::buffer::Buffer;
use crate::transport::Traffic;

pub use plain::PlainBackend;

/// Computes a base-model product for the owner's model.
///
/// Calls block the calling thread (a worker thread of the trainer, never an actor's).
pub trait LinearBackend: Send + Sync + 'static {
    /// `rows` is `tokens × inner`, row-major; returns `tokens × outer`, row-major, where inner and outer are the
    /// dimensions of the product. Rows are shared, so that nobody on their way has to copy them.
    ///
    /// # Errors
    /// When no worker could compute the product.
    fn apply(&self, product: ProductId, rows: Arc<Buffer>, tokens: usize) -> Result<Buffer, BackendError>;

    /// Bytes exchanged with workers so far; none where products are computed by the owner itself.
    fn traffic(&self) -> Traffic {
        Traffic::default()
    }
}

/// Why a product could not be had.
#[derive(Debug, thiserror::Error)]
#[error("{product}: {why}")]
pub struct BackendError {
    /// What was asked for.
    pub product: ProductId,
    /// What happened.
    pub why: String,
}
