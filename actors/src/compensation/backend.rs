//! A backend whose forward products are corrected.

use std::sync::Arc;
use std::time::Duration;

use protocol::buffer::Buffer;
use protocol::ids::{Direction, ProductId};

use super::Compensation;
use crate::backend::{BackendError, LinearBackend, Product};
use crate::transport::Traffic;

/// Adds to the forward products of a backend what its int8 weights lack.
pub struct Compensated {
    inner: Arc<dyn LinearBackend>,
    compensation: Arc<Compensation>,
}

impl Compensated {
    /// The products of `inner`, corrected by what is known of the same model.
    pub fn new(inner: Arc<dyn LinearBackend>, compensation: Arc<Compensation>) -> Self {
        Self { inner, compensation }
    }
}

impl LinearBackend for Compensated {
    fn apply(&self, product: ProductId, rows: Arc<Buffer>, tokens: usize) -> Result<Product, BackendError> {
        let answer = self.inner.apply(product, Arc::clone(&rows), tokens)?;
        if product.direction == Direction::Backward {
            return Ok(answer);
        }
        let mut out = answer.into_rows();
        self.compensation.add(product.linear, &rows, &mut out, tokens);
        Ok(Product::of_owner(out))
    }

    fn expect_few_rows(&self) {
        self.inner.expect_few_rows();
    }

    fn side_by_side(&self, rows: &[usize]) -> Option<Vec<Arc<dyn LinearBackend>>> {
        let corrected = |inner| Arc::new(Self::new(inner, Arc::clone(&self.compensation))) as Arc<dyn LinearBackend>;
        Some(self.inner.side_by_side(rows)?.into_iter().map(corrected).collect())
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
