//! One pass of a public text through a model, matrix by matrix from the disk: what enters each gives its directions, and the
//! matrix itself, rounded as workers round it, what it lacks in them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use protocol::buffer::Buffer;
use protocol::ids::{Direction, LinearId, LinearShape, ProductId};
use protocol::model::{LlamaConfig, Model, ModelError};
use protocol::quant::{QuantError, Rotation, serve};

use super::directions::first_directions;
use super::{Compensation, CompensationError, Correction, rounded, widened};
use crate::backend::{BackendError, BackendFailure, LinearBackend, Product};
use crate::data::MicroBatch;
use crate::transformer::{Before, Llama, Matrix, MatrixMut, Threads, multiply};

/// Prose, talk, sums, letters, code and data: no more than a model has seen of each kind a thousand times.
const TEXT: &str = include_str!("text.txt");

/// Tokens of it that are used, and of a sequence.
const TOKENS: usize = 1024;
const SEQUENCE: usize = 256;

/// So many times its size a sequence's first row counts. All later ones attend to it (an "attention sink", Xiao et al. 2023),
/// so that what it is off by is in every row. (It makes the loss of SmolLM2 nearer by a quarter.)
const FIRST: f32 = 4.0;

/// Passes the text through the model.
pub(super) fn run(
    model: &Arc<Model>,
    rank: usize,
    progress: impl Fn(usize, usize) -> bool + Send + Sync + 'static,
) -> Result<Compensation, CompensationError> {
    let tokens = tokens(model)?;
    // Every row is labelled, so that it goes through the head.
    let sequences = tokens.chunks(SEQUENCE).map(|part| (part, part.to_vec()));
    let batch = MicroBatch::new(sequences, 0, 1);
    let count = linears(model.config()).count();
    let calibration = Arc::new(Calibration {
        model: Arc::clone(model),
        rank,
        found: Mutex::default(),
        progress: Box::new(move |done| progress(done, count)),
    });
    Llama::new(Arc::clone(model), Arc::clone(&calibration) as Arc<dyn LinearBackend>)?.evaluate(&batch, None)?;
    let corrections = std::mem::take(&mut *calibration.found.lock().unwrap_or_else(PoisonError::into_inner));
    Ok(Compensation { corrections })
}

/// Every matrix that can be served.
pub(super) fn linears(config: &LlamaConfig) -> impl Iterator<Item = LinearId> + '_ {
    config.linears().chain((0..config.head_slices()).map(|slice| config.head_linear(slice)))
}

/// The text as the model reads it; for a model without a tokenizer of its own, numbers that follow no rule. (With such numbers
/// the corrections of SmolLM2 take off almost as much.)
fn tokens(model: &Model) -> Result<Vec<u32>, ModelError> {
    let mut tokens = match model.tokenizer() {
        Ok(tokenizer) => tokenizer.encode(TEXT, true)?,
        Err(error) => {
            tracing::debug!("no text for the calibration, but numbers: {error}");
            let vocabulary = model.config().vocabulary as u64;
            let number = |at: u64| ((at + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) % vocabulary;
            (0..TOKENS as u64).map(|at| number(at) as u32).collect()
        }
    };
    tokens.truncate(TOKENS);
    Ok(tokens)
}

/// Computes products from the disk, and keeps of each what it was for.
struct Calibration {
    model: Arc<Model>,
    rank: usize,
    found: Mutex<HashMap<LinearId, Correction>>,
    /// Told how many matrices are done; whether to go on.
    progress: Box<dyn Fn(usize) -> bool + Send + Sync>,
}

impl LinearBackend for Calibration {
    fn apply(&self, product: ProductId, rows: Arc<Buffer>, tokens: usize) -> Result<Product, BackendError> {
        let fail = |why: BackendFailure| BackendError { product, why };
        if product.direction == Direction::Backward {
            return Err(fail("a calibration has no way back".into()));
        }
        let done = self.found.lock().unwrap_or_else(PoisonError::into_inner).len();
        if !(self.progress)(done) {
            return Err(fail("the calibration was stopped".into()));
        }
        let shape = self.model.config().shape(product.linear.group);
        let weights = self.model.linear(product.linear).map_err(|error| fail(error.to_string().into()))?;
        let out = times(&rows, tokens, &weights, shape);
        let mut rows = rows.to_vec();
        for first in rows.chunks_mut(SEQUENCE * shape.d_in) {
            first[..shape.d_in].iter_mut().for_each(|value| *value *= FIRST);
        }
        let correction =
            correction(&rows, weights, shape, self.rank).map_err(|error| fail(error.to_string().into()))?;
        self.found.lock().unwrap_or_else(PoisonError::into_inner).insert(product.linear, correction);
        Ok(Product::of_owner(out))
    }

    fn serves_head(&self) -> bool {
        true
    }
}

/// What a matrix lacks, once it is rounded, in the first directions of these rows.
pub(super) fn correction(
    rows: &[f32],
    weights: Vec<f32>,
    shape: LinearShape,
    rank: usize,
) -> Result<Correction, QuantError> {
    let LinearShape { d_in, d_out } = shape;
    let directions = rounded(&first_directions(rows, d_in, rank));
    let mut turned = widened(&directions);
    let mut lacking = times(&turned, rank, &weights, shape);
    let (matrix, meta) = serve(weights, shape)?;
    // As the owner comes to a product of the rounded matrix: rotate, multiply, scale, rotate back.
    Rotation::cached(d_in).apply(&mut turned);
    let wide: Vec<f32> = matrix.values.iter().map(|&value| value.into()).collect();
    let mut served = times(&turned, rank, &wide, shape);
    for row in served.chunks_exact_mut(d_out) {
        row.iter_mut().zip(&meta.scales).for_each(|(value, scale)| *value *= scale);
    }
    Rotation::cached(d_out).apply_transpose(&mut served);
    lacking.iter_mut().zip(served.iter()).for_each(|(value, served)| *value -= served);
    Ok(Correction { shape, directions, outputs: rounded(&lacking) })
}

/// `rows·weights`.
fn times(rows: &[f32], count: usize, weights: &[f32], LinearShape { d_in, d_out }: LinearShape) -> Buffer {
    let mut out = Buffer::scratch(count * d_out);
    let to = MatrixMut::new(&mut out, count, d_out);
    let (rows, weights) = (Matrix::new(rows, count, d_in), Matrix::new(weights, d_in, d_out));
    multiply(to, Before::Replaced, 1.0, rows, weights, Threads::All);
    out
}
