//! Base products from f32 weights in the owner's memory: the reference that encrypted training is held against.

use std::collections::HashMap;
use std::iter::repeat_with;
use std::sync::Arc;

use protocol::buffer::Buffer;
use protocol::ids::{Direction, LinearId, LinearShape, ProductId};
use protocol::model::{Model, ModelError};
use rayon::prelude::*;

use super::{BackendError, LinearBackend, Product};
use crate::transformer::{Before, Matrix, MatrixMut, Threads, add_rows, multiply};

/// Up to so many rows are multiplied one by one.
const FEW: usize = 16;
/// Columns of a task of these.
const COLUMNS: usize = 256;
/// Rows of a task's part of the weights that stay in the cache while they meet every row.
const DEPTH: usize = 64;

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

/// The product of a few rows: each weight is read once, and what comes out for a row does not depend on the others.
fn few(rows: &[f32], weights: &[f32], inner: usize, outer: usize) -> Buffer {
    let tokens = rows.len() / inner;
    let mut out = Buffer::zeroed(tokens * outer);
    let mut tasks: Vec<Vec<&mut [f32]>> = repeat_with(Vec::new).take(outer.div_ceil(COLUMNS)).collect();
    for row in out.chunks_exact_mut(outer) {
        tasks.iter_mut().zip(row.chunks_mut(COLUMNS)).for_each(|(task, part)| task.push(part));
    }
    tasks.into_par_iter().enumerate().for_each(|(task, mut parts)| {
        for first in (0..inner).step_by(DEPTH) {
            let depth = DEPTH.min(inner - first);
            for (part, row) in parts.iter_mut().zip(rows.chunks_exact(inner)) {
                add_rows(part, &row[first..first + depth], &weights[first * outer + task * COLUMNS..], outer);
            }
        }
    });
    out
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
        if tokens <= FEW && product.direction == Direction::Forward {
            return Ok(Product::of_owner(few(&rows, weights, inner, outer)));
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
