//! One pass of a public text through a model, matrix by matrix from the disk: what enters each gives its directions, and the
//! matrix itself what becomes of them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use half::bf16;
use protocol::buffer::Buffer;
use protocol::ids::{Direction, LinearId, LinearShape, ProductId};
use protocol::model::{LlamaConfig, Model, ModelError};

use super::directions::first_directions;
use super::{Compensation, CompensationError};
use crate::backend::{BackendError, BackendFailure, LinearBackend, Product};
use crate::data::MicroBatch;
use crate::transformer::{Before, KnownPart, Llama, Matrix, MatrixMut, Threads, multiply};

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
    let parts = std::mem::take(&mut *calibration.found.lock().unwrap_or_else(PoisonError::into_inner));
    Ok(Compensation { parts })
}

/// Every matrix that can be served.
pub(super) fn linears(config: &LlamaConfig) -> impl Iterator<Item = LinearId> + '_ {
    config.linears().chain((0..config.head_slices()).map(|slice| config.head_linear(slice)))
}

/// The text as the model reads it; for a model without a tokenizer of its own, numbers that follow no rule. (With such numbers
/// the loss of SmolLM2 comes almost as near.)
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
    found: Mutex<HashMap<LinearId, KnownPart>>,
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
        let part = known_part(&rows, &weights, shape, self.rank);
        let part = part.ok_or_else(|| fail("a matrix without inputs".into()))?;
        self.found.lock().unwrap_or_else(PoisonError::into_inner).insert(product.linear, part);
        Ok(Product::of_owner(out))
    }

    fn serves_head(&self) -> bool {
        true
    }
}

/// The first directions of these rows, and what a matrix makes of them.
pub(super) fn known_part(rows: &[f32], weights: &[f32], shape: LinearShape, rank: usize) -> Option<KnownPart> {
    let directions = first_directions(rows, shape.d_in, rank);
    let directions: Vec<bf16> = directions.into_iter().map(bf16::from_f32).collect();
    // The product of what they are rounded to.
    let wide: Vec<f32> = directions.iter().map(|value| value.to_f32()).collect();
    let outputs = times(&wide, rank, weights, shape).to_vec();
    KnownPart::new(shape, directions, outputs)
}

/// `rows·weights`.
fn times(rows: &[f32], count: usize, weights: &[f32], LinearShape { d_in, d_out }: LinearShape) -> Buffer {
    let mut out = Buffer::scratch(count * d_out);
    let to = MatrixMut::new(&mut out, count, d_out);
    let (rows, weights) = (Matrix::new(rows, count, d_in), Matrix::new(weights, d_in, d_out));
    multiply(to, Before::Replaced, 1.0, rows, weights, Threads::All);
    out
}
