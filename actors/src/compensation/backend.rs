//! A backend that is asked for what is left of forward products.

use std::sync::Arc;
use std::time::Duration;

use protocol::buffer::Buffer;
use protocol::ids::{LinearId, ProductId};

use super::Compensation;
use crate::backend::{BackendError, LinearBackend, Product};
use crate::transformer::KnownPart;
use crate::transport::Traffic;

/// Has the parts of a backend's forward products that are known taken out of their rows.
pub struct Compensated {
    inner: Arc<dyn LinearBackend>,
    compensation: Arc<Compensation>,
}

impl Compensated {
    /// The products of `inner`, but for what is known of the same model.
    pub fn new(inner: Arc<dyn LinearBackend>, compensation: Arc<Compensation>) -> Self {
        Self { inner, compensation }
    }
}

impl LinearBackend for Compensated {
    fn apply(&self, product: ProductId, rows: Arc<Buffer>, tokens: usize) -> Result<Product, BackendError> {
        self.inner.apply(product, rows, tokens)
    }

    fn known(&self, linear: LinearId) -> Option<&KnownPart> {
        self.compensation.parts.get(&linear)
    }

    fn expect_few_rows(&self) {
        self.inner.expect_few_rows();
    }

    fn side_by_side(&self, rows: &[usize]) -> Option<Vec<Arc<dyn LinearBackend>>> {
        let compensated = |inner| Arc::new(Self::new(inner, Arc::clone(&self.compensation))) as Arc<dyn LinearBackend>;
        Some(self.inner.side_by_side(rows)?.into_iter().map(compensated).collect())
    }

    fn serves_head(&self) -> bool {
        self.inner.serves_head()
    }

    fn asks_workers(&self) -> bool {
        self.inner.asks_workers()
    }

    fn traffic(&self) -> Traffic {
        self.inner.traffic()
    }

    fn round_trip(&self) -> Option<Duration> {
        self.inner.round_trip()
    }
}
