//! This project's scheme behind the interface of the baselines.

use std::sync::Arc;

use rand::TryRngCore;
use rand::rngs::OsRng;

use super::{Scheme, SchemeError};
use crate::he::reference::{reference_answer, reference_masks};
use crate::he::{
    MaskDomain, MaskProduct, MaskProductBuilder, MaskSeed, Plaintext, Planes, Precision, ProductTile, Ticket, encrypt,
};
use crate::ids::{Direction, Group, LinearId, LinearShape, ProductId};
use crate::quant::encoding_steps;

/// This project's scheme, with products of the caller's choice, in any tiles: the reference, or a kernel. The mask
/// product is asked for once, when the scheme is made.
pub struct ColumnPacked<M> {
    precision: Precision,
    shape: LinearShape,
    max_norm: f64,
    seed: MaskSeed,
    masks: Arc<MaskProduct>,
    mask_bytes: usize,
    multiply: M,
}

/// The matrix that [`ColumnPacked`] multiplies by, as far as masks are concerned.
const PRODUCT: ProductId = LinearId { layer: 0, group: Group::Qkv }.along(Direction::Forward);

impl<M: Fn(&Planes) -> Vec<ProductTile>> ColumnPacked<M> {
    /// The scheme over `weights`, `d_in × d_out` row-major, of which it reads the norms only: `multiply_masks` gives the
    /// worker's mask product, `multiply` its product of a body.
    ///
    /// # Errors
    /// When the mask product does not fit.
    pub fn with_products(
        precision: Precision,
        weights: &[i8],
        shape: LinearShape,
        multiply_masks: impl FnOnce(&MaskSeed, &MaskDomain) -> Vec<ProductTile>,
        multiply: M,
    ) -> Result<Self, SchemeError> {
        let mut squares = vec![0.0f64; shape.d_out];
        for row in weights.chunks_exact(shape.d_out) {
            for (square, &weight) in squares.iter_mut().zip(row) {
                *square += f64::from(weight).powi(2);
            }
        }
        let max_norm = squares.into_iter().fold(0.0, f64::max).sqrt();
        let seed = MaskSeed::generate(&mut OsRng.unwrap_err());
        let mut masks = MaskProductBuilder::new(precision, shape.d_out)?;
        let mut mask_bytes = seed.to_bytes().len();
        for tile in multiply_masks(&seed, &domain(precision)) {
            masks.tile(&tile)?;
            mask_bytes += tile.rows.bytes().len();
        }
        Ok(Self {
            precision,
            shape,
            max_norm,
            seed,
            masks: Arc::new(masks.finish()?.unchecked()),
            mask_bytes,
            multiply,
        })
    }

    /// Bytes that the mask product took on the wire, once.
    pub fn mask_bytes(&self) -> usize {
        self.mask_bytes
    }
}

fn domain(precision: Precision) -> MaskDomain {
    MaskDomain { set: precision.set, product: PRODUCT }
}

/// This project's scheme over the reference product.
///
/// # Errors
/// When the precision contradicts itself.
pub fn with_reference_product(
    precision: Precision,
    weights: Vec<i8>,
    shape: LinearShape,
) -> Result<ColumnPacked<impl Fn(&Planes) -> Vec<ProductTile>>, SchemeError> {
    let shared = Arc::new(weights);
    let weights = Arc::clone(&shared);
    let masks = |seed: &MaskSeed, domain: &MaskDomain| vec![reference_masks(precision, seed, domain, &shared, shape)];
    let body = move |body: &Planes| vec![reference_answer(precision, PRODUCT.direction, body, &weights, shape)];
    ColumnPacked::with_products(precision, &shared, shape, masks, body)
}

impl<M: Fn(&Planes) -> Vec<ProductTile>> Scheme for ColumnPacked<M> {
    type Request = Planes;
    type Ticket = Ticket;
    type Answer = Vec<ProductTile>;

    fn name(&self) -> String {
        self.precision.to_string()
    }

    fn encrypt(&self, rows: &[f32], tokens: usize) -> Result<(Self::Request, Self::Ticket), SchemeError> {
        let inner = self.shape.d_in;
        if tokens == 0 || tokens.checked_mul(inner) != Some(rows.len()) {
            return Err(SchemeError::Shape { values: rows.len(), tokens, inner });
        }
        let steps = encoding_steps(rows, tokens, self.max_norm, self.precision)?;
        let plaintext = Plaintext { rows, tokens, features: inner, steps: &steps };
        Ok(encrypt(&self.seed, &domain(self.precision), self.precision, plaintext)?)
    }

    fn multiply(&self, request: &Self::Request) -> Self::Answer {
        (self.multiply)(request)
    }

    fn decrypt(&self, ticket: Self::Ticket, answer: &Self::Answer) -> Result<Vec<f32>, SchemeError> {
        let out = vec![0.0; ticket.tokens() * self.shape.d_out];
        let mut decryption = ticket.open(Arc::clone(&self.masks), self.precision, out)?;
        for tile in answer {
            decryption.tile(tile.clone())?;
        }
        Ok(decryption.finish()?.unchecked())
    }

    fn request_bytes(&self, request: &Self::Request) -> usize {
        request.bytes().len()
    }

    fn answer_bytes(&self, answer: &Self::Answer) -> usize {
        answer.iter().map(|tile| tile.rows.bytes().len()).sum()
    }
}
