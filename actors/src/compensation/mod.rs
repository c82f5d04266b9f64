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
//! since `W` itself is in `P·W`, that of the ciphertext since its step goes by what is left to be encrypted (of SmolLM2's
//! products 53 to 73 % in the root mean square, of its logits 26 %: `benches/RESULTS.md`). Neither asks of `P` that it be exact; any directions lead to
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

use protocol::ids::{Group, LinearId};
use protocol::model::{Model, ModelError};

pub use backend::Compensated;

use crate::transformer::{KnownPart, LlamaError};

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
                    tracing::warn!("what is known of products is not kept for the next run: {error}");
                }
                found
            }
        };
        // The file has it all the same: it is one for both.
        found.parts.retain(|linear, _| head || linear.group != Group::Head);
        Ok(found)
    }
}
