//! A backend that is asked for the unknown part of forward products only.

use std::sync::Arc;
use std::time::Duration;

use protocol::buffer::Buffer;
use protocol::ids::ProductId;

use super::Compensation;
use crate::backend::{BackendError, LinearBackend, Product};
use crate::transport::Traffic;

/// Takes out of the rows of forward products what is known of them, and adds what becomes of it to the backend's products.
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
        let Some(known) = self.compensation.of(product) else {
            return self.inner.apply(product, rows, tokens);
        };
        let (low, rest) = known.take(&rows, tokens);
        let mut out = self.inner.apply(product, Arc::new(rest), tokens)?.into_rows();
        known.give_back(&low, &mut out, tokens);
        Ok(Product::of_owner(out))
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
