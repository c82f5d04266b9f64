//! Base products from f32 weights in the owner's memory: the reference that encrypted training is held against.

use std::collections::HashMap;
use std::sync::Arc;

use protocol::buffer::Buffer;
use protocol::ids::{Direction, LinearId, LinearShape, ProductId};
use protocol::model::{Model, ModelError};
use rayon::prelude::*;

use super::{BackendError, LinearBackend, Product};
use crate::transformer::{Before, Matrix, MatrixMut, Threads, multiply};

/// Every served matrix of a model in f32.
pub struct PlainBackend {
    matrices: HashMap<LinearId, (LinearShape, Vec<f32>)>,
    head: bool,
}

impl PlainBackend {
    /// Reads all of the model's layers.
    ///
    /// # Errors
    /// When the model's files cannot be read.
    pub fn new(model: &Model) -> Result<Self, ModelError> {
        Self::of(model, model.config().linears().collect(), false)
    }

    /// Reads the head too, and serves it: the reference for a head that workers serve. An owner that computes everything
    /// itself is better off without, since it would hold all of the head in f32.
    ///
    /// # Errors
    /// When the model's files cannot be read.
    pub fn with_head(model: &Model) -> Result<Self, ModelError> {
        let config = model.config();
        let head = (0..config.head_slices()).map(|slice| config.head_linear(slice));
        Self::of(model, config.linears().chain(head).collect(), true)
    }

    fn of(model: &Model, linears: Vec<LinearId>, head: bool) -> Result<Self, ModelError> {
        let read = |linear: LinearId| Ok((linear, (model.config().shape(linear.group), model.linear(linear)?)));
        Ok(Self { matrices: linears.into_par_iter().map(read).collect::<Result<_, ModelError>>()?, head })
    }
}

impl LinearBackend for PlainBackend {
    fn apply(&self, product: ProductId, rows: Arc<Buffer>, tokens: usize) -> Result<Product, BackendError> {
        let fail = |why: String| BackendError { product, why: why.into() };
        let (shape, weights) =
            self.matrices.get(&product.linear).ok_or_else(|| fail("the model has no such layer".into()))?;
        let (inner, outer) = shape.along(product.direction);
        if tokens.checked_mul(inner) != Some(rows.len()) {
            return Err(fail(format!("{} values are not {tokens} rows of {inner} features", rows.len())));
        }
        let weights = Matrix::new(weights, shape.d_in, shape.d_out);
        let weights = match product.direction {
            Direction::Forward => weights,
            Direction::Backward => weights.transposed(),
        };
        let mut out = Buffer::scratch(tokens * outer);
        let rows = Matrix::new(&rows, tokens, inner);
        multiply(MatrixMut::new(&mut out, tokens, outer), Before::Replaced, 1.0, rows, weights, Threads::All);
        Ok(Product::of_owner(out))
    }

    fn serves_head(&self) -> bool {
        self.head
    }
}
