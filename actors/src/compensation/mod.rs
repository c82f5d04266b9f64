//! What int8 weights cost, given back where it shows most: a correction of low rank that the owner adds to forward products.
//!
//! A worker multiplies by `Ŵ`, the matrix rounded to int8, and not by `W`. The error `x·(W − Ŵ)` is some 0.8 % of the
//! product, and of all that keeps encrypted training from the loss of plain training it is the largest part: the ciphertext
//! adds about as much, but anew in each product, while this error is the same in every step. The owner has `W`, though not the
//! time to multiply by it. It does not need to: inputs are far from filling their space. A sixteenth or less of its dimensions
//! hold most of what the rows of a Llama are made of, and in these `P` the error is known once and for all:
//!
//! ```text
//! y = x·Ŵ + (x·P)·C        C = Pᵀ·(W − Ŵ)
//! ```
//!
//! takes `rank·(d_in + d_out)` operations a row, as an adapter of that rank does. What is left is the error of `x` without its
//! part in `P` (compare GPTQ, Frantar et al. 2022, and LQER, Zhang et al. 2024, which make up for the error of weights by what
//! inputs look like). `P` are the first directions of the inputs that a public text leads to (`calibrate`): of the owner's own
//! data nothing is in them, and to workers nothing changes.
//!
//! Gradients are left as they are: `dy·Ŵᵀ` is off by as much, but what is added up over a batch is off far more than by its
//! products.

mod backend;
mod calibrate;
mod directions;
mod file;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use half::bf16;
use half::slice::HalfFloatSliceExt as _;
use protocol::buffer::Buffer;
use protocol::ids::{Group, LinearId, LinearShape};
use protocol::model::{Model, ModelError};
use protocol::quant::QuantError;

pub use backend::Compensated;

use crate::transformer::{Before, LlamaError, Matrix, MatrixMut, Threads, block, for_each_block, multiply};

/// Why a compensation could not be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CompensationError {
    /// The model could not be read.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The text could not be passed through the model.
    #[error("the calibration's text could not be passed through the model: {0}")]
    Pass(#[from] LlamaError),
    /// A matrix could not be quantised.
    #[error(transparent)]
    Quant(#[from] QuantError),
}

/// The corrections of a model's forward products. Public: they follow from the model alone.
pub struct Compensation {
    corrections: HashMap<LinearId, Correction>,
}

impl Compensation {
    /// The corrections of all layers and, if it is served, the `head`, for `rank` directions of the inputs of each matrix: those
    /// in the folder `kept`, if they are whole and of this model, or else those that the public text leads to, which are kept
    /// there then. Blocks, the first time for as long as a forward pass of a thousand tokens and the reading of all weights
    /// take; `progress` is told of how many matrices how many are done, and says whether to go on.
    ///
    /// # Errors
    /// When the model cannot be read, or `progress` says no.
    pub fn of_model(
        model: &Arc<Model>,
        rank: usize,
        head: bool,
        kept: Option<&Path>,
        progress: impl Fn(usize, usize) -> bool + Send + Sync + 'static,
    ) -> Result<Self, CompensationError> {
        let digest = model.digest()?;
        let path = kept.map(|folder| file::path(folder, digest, rank));
        let mut found = match path.as_deref().and_then(|path| file::read(path, model.config(), rank)) {
            Some(found) => found,
            None => {
                let found = calibrate::run(model, rank, progress)?;
                if let Some(Err(error)) = path.as_deref().map(|path| file::write(path, &found)) {
                    tracing::warn!("the compensation of int8 weights is not kept for the next run: {error}");
                }
                found
            }
        };
        // The file has it all the same: it is one for both.
        found.corrections.retain(|linear, _| head || linear.group != Group::Head);
        Ok(found)
    }

    /// Adds its correction to a product, if the matrix has one: `rows` are `tokens × d_in`, `out` is `tokens × d_out`.
    fn add(&self, linear: LinearId, rows: &[f32], out: &mut [f32], tokens: usize) {
        if let Some(correction) = self.corrections.get(&linear) {
            correction.add(rows, out, tokens);
        }
    }
}

/// That of one matrix. Rounded to bfloat16: by 0.4 % of what is itself a percent.
#[derive(Clone, Debug, PartialEq)]
struct Correction {
    shape: LinearShape,
    /// `P`, `[rank][d_in]`.
    directions: Vec<bf16>,
    /// `C`, `[rank][d_out]`.
    outputs: Vec<bf16>,
}

impl Correction {
    fn rank(&self) -> usize {
        self.directions.len() / self.shape.d_in
    }

    fn add(&self, rows: &[f32], out: &mut [f32], tokens: usize) {
        let (LinearShape { d_in, d_out }, rank) = (self.shape, self.rank());
        assert!(rows.len() == tokens * d_in && out.len() == tokens * d_out, "rows of this product");
        let (directions, outputs) = (widened(&self.directions), widened(&self.outputs));
        let directions = Matrix::new(&directions, rank, d_in).transposed();
        let outputs = Matrix::new(&outputs, rank, d_out);
        for_each_block(tokens, (out, d_out), |first, out| {
            let rows = block(rows, d_in, first);
            let count = rows.len() / d_in;
            let mut low = Buffer::scratch(count * rank);
            let to = MatrixMut::new(&mut low, count, rank);
            multiply(to, Before::Replaced, 1.0, Matrix::new(rows, count, d_in), directions, Threads::One);
            let to = MatrixMut::new(out, count, d_out);
            multiply(to, Before::Kept, 1.0, Matrix::new(&low, count, rank), outputs, Threads::One);
        });
    }
}

fn widened(values: &[bf16]) -> Buffer {
    let mut wide = Buffer::scratch(values.len());
    values.convert_to_f32_slice(&mut wide);
    wide
}

fn rounded(values: &[f32]) -> Vec<bf16> {
    values.iter().map(|&value| bf16::from_f32(value)).collect()
}
