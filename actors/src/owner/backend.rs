//! The trainer's door to encrypted products.

use std::sync::Arc;

use actix::Addr;
use protocol::ids::ProductId;

use super::scheduler::{Apply, LayerScheduler};
use crate::backend::{BackendError, LinearBackend};
use crate::buffer::Buffer;
use crate::transport::{Traffic, Transport};

/// Computes products by asking the layer scheduler and waiting for its answer.
pub struct EncryptedBackend {
    scheduler: Addr<LayerScheduler>,
    transport: Arc<dyn Transport>,
}

impl EncryptedBackend {
    /// A backend over a scheduler whose layers are assigned; `transport` is asked only for its traffic.
    pub fn new(scheduler: Addr<LayerScheduler>, transport: Arc<dyn Transport>) -> Self {
        Self { scheduler, transport }
    }
}

impl LinearBackend for EncryptedBackend {
    fn apply(&self, product: ProductId, rows: Arc<Buffer>, tokens: usize) -> Result<Buffer, BackendError> {
        let failed = |why: String| BackendError { product, why };
        let request = Apply { product, rows, tokens };
        futures::executor::block_on(self.scheduler.send(request))
            .map_err(|error| failed(format!("the layer scheduler is gone ({error})")))?
            .map_err(|error| failed(error.to_string()))
    }

    fn traffic(&self) -> Traffic {
        self.transport.traffic()
    }
}
