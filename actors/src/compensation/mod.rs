//! What int8 weights and ciphertexts cost forward products, given back where it shows most: a part of low rank that the owner
//! computes itself.
//!
//! A worker multiplies by `Ŵ`, the matrix rounded to int8, and not by `W`: some 0.8 % of the product, the same in every step. The
//! ciphertext adds about as much, anew in each, in proportion to what the product of the encrypted rows is. The owner has `W`,
//! though not the time to multiply by it. It does not need to: inputs are far from filling their space. A sixteenth or less
//! of its dimensions hold most of what the rows of a Llama are made of, and what `W` makes of these `P` is known once and for
//! all. So the owner keeps this part, and workers get the rest:
//!
//! ```text
//! y = (x − l·P)·Ŵ + l·(P·W)        l = x·Pᵀ
//! ```
//!
//! It takes `rank·(2·d_in + d_out)` operations a row, as an adapter does. Of both errors the part in `P` is gone: that of the weights
//! since `W` itself is in `P·W`, that of the ciphertext since its step goes by what is left to be encrypted, half of a product
//! and less (of the rows that all others attend to, a tenth). Neither asks of `P` that it be exact; any directions lead to
//! the product. (Compare GPTQ, Frantar et al. 2022, LQER, Zhang et al. 2024, and the outliers that LLM.int8(), Dettmers et al.
//! 2022, keeps apart: all of them go by what inputs look like.) `P` are the first directions of the inputs that a public text leads
//! to (`calibrate`): of the owner's own data nothing is in them, and to workers nothing changes.
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
use protocol::ids::{Direction, Group, LinearId, LinearShape, ProductId};
use protocol::model::{Model, ModelError};

pub use backend::Compensated;

use crate::transformer::{Before, LlamaError, Matrix, MatrixMut, Threads, block, for_each_block, for_each_block2, multiply};

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
}

/// The owner's parts of a model's forward products. Public: they follow from the model alone.
pub struct Compensation {
    parts: HashMap<LinearId, KnownPart>,
}

impl Compensation {
    /// Those of all layers and, if it is served, the `head`, for `rank` directions of the inputs of each matrix: those
    /// in the folder `kept`, if they are whole and of this model, or else those that the public text leads to, which are kept
    /// there then. Blocks, the first time for as long as a forward pass of a thousand tokens from the disk
    /// takes; `progress` is told of how many matrices how many are done, and says whether to go on.
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
                    tracing::warn!("the compensation of 8-bit weights is not kept for the next run: {error}");
                }
                found
            }
        };
        // The file has it all the same: it is one for both.
        found.parts.retain(|linear, _| head || linear.group != Group::Head);
        Ok(found)
    }

    /// That of a product, if there is one.
    fn of(&self, product: ProductId) -> Option<&KnownPart> {
        (product.direction == Direction::Forward).then(|| self.parts.get(&product.linear))?
    }
}

/// That of one matrix.
#[derive(Clone, Debug, PartialEq)]
struct KnownPart {
    shape: LinearShape,
    /// `P`, `[rank][d_in]`: whatever they are rounded to, the product is that of these.
    directions: Vec<bf16>,
    /// `P·W`, `[rank][d_out]`: added to the product as they are.
    outputs: Vec<f32>,
}

impl KnownPart {
    fn rank(&self) -> usize {
        self.directions.len() / self.shape.d_in
    }

    /// What rows have of each direction, `tokens × rank`, and what is left of them, `tokens × d_in`.
    fn take(&self, rows: &[f32], tokens: usize) -> (Buffer, Buffer) {
        let (d_in, rank) = (self.shape.d_in, self.rank());
        assert_eq!(rows.len(), tokens * d_in, "rows of this product");
        let directions = widened(&self.directions);
        let directions = Matrix::new(&directions, rank, d_in);
        let (mut low, mut rest) = (Buffer::scratch(tokens * rank), Buffer::scratch(tokens * d_in));
        for_each_block2(tokens, (&mut low, rank), (&mut rest, d_in), |first, low, rest| {
            let rows = block(rows, d_in, first);
            let count = rows.len() / d_in;
            let (to, x) = (MatrixMut::new(low, count, rank), Matrix::new(rows, count, d_in));
            multiply(to, Before::Replaced, 1.0, x, directions.transposed(), Threads::One);
            rest.copy_from_slice(rows);
            let (to, low) = (MatrixMut::new(rest, count, d_in), Matrix::new(low, count, rank));
            multiply(to, Before::Kept, -1.0, low, directions, Threads::One);
        });
        (low, rest)
    }

    /// Adds the product of what was [taken](Self::take) to that of the rest, `tokens × d_out`.
    fn give_back(&self, low: &[f32], out: &mut [f32], tokens: usize) {
        let (d_out, rank) = (self.shape.d_out, self.rank());
        assert!(low.len() == tokens * rank && out.len() == tokens * d_out, "rows of this product");
        let outputs = Matrix::new(&self.outputs, rank, d_out);
        for_each_block(tokens, (out, d_out), |first, out| {
            let low = block(low, rank, first);
            let count = low.len() / rank;
            let to = MatrixMut::new(out, count, d_out);
            multiply(to, Before::Kept, 1.0, Matrix::new(low, count, rank), outputs, Threads::One);
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
