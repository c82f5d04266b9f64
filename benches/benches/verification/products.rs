//! A product as owner and worker compute it, with a place where a worker can lie.

use std::ops::ControlFlow;
use std::sync::{Arc, Mutex};

use actors::matmul::{CpuDevice, Device as _, HeldMatrix, Multiplicand, ProductTask, best_kernel, tile_columns};
use anyhow::Context as _;
use protocol::he::{
    Decrypted, MaskDomain, MaskProduct, MaskProductBuilder, MaskSeed, Plaintext, Planes, Precision, ProductTile,
    UnverifiedMasks, encrypt,
};
use protocol::ids::{Direction, ProductId};
use protocol::model::Model;
use protocol::quant::{Int8Matrix, LinearMeta, PrecisionTarget, ProductCodec, RowScales, Step, plan, serve};
use protocol::sketch::{Checks, Expected};

pub(crate) const SEED: MaskSeed = MaskSeed::from_bytes([0x5e; 32]);

/// One served matrix in one direction.
pub(crate) struct Product {
    pub(crate) id: ProductId,
    pub(crate) matrix: Arc<Int8Matrix>,
    pub(crate) meta: Arc<LinearMeta>,
    pub(crate) held: Arc<dyn HeldMatrix>,
    pub(crate) precision: Precision,
    pub(crate) codec: ProductCodec,
    pub(crate) checks: Checks,
}

/// Rows on their way.
pub(crate) struct Sent {
    pub(crate) body: Arc<Planes>,
    pub(crate) precision: Precision,
    pub(crate) ticket: protocol::he::Ticket,
    pub(crate) expected: Expected,
    pub(crate) scales: RowScales,
    /// Rotated rows and their steps.
    pub(crate) rows: Vec<f32>,
    pub(crate) steps: Vec<f64>,
}

impl Product {
    /// Both directions of a matrix.
    pub(crate) fn of(model: &Model, linear: protocol::ids::LinearId) -> anyhow::Result<[Self; 2]> {
        let (matrix, meta) = serve(model.linear(linear)?, model.config().shape(linear.group))?;
        let held = CpuDevice::new(best_kernel()).hold(matrix.shape, &matrix.values)?;
        let checks = Checks::draw(&matrix.values, matrix.shape)?;
        let (matrix, meta) = (Arc::new(matrix), Arc::new(meta));
        let mut checks = checks.into_iter();
        let mut along = |direction| {
            let precision = plan(&meta, direction, &PrecisionTarget::default());
            anyhow::Ok(Self {
                id: linear.along(direction),
                matrix: Arc::clone(&matrix),
                meta: Arc::clone(&meta),
                held: Arc::clone(&held),
                precision,
                codec: ProductCodec::new(&meta, direction, precision)?,
                checks: checks.next().context("checks of both directions")?,
            })
        };
        Ok([along(Direction::Forward)?, along(Direction::Backward)?])
    }

    /// `(inner, outer)`.
    pub(crate) fn dimensions(&self) -> (usize, usize) {
        self.matrix.shape.along(self.id.direction)
    }

    pub(crate) fn domain(&self) -> MaskDomain {
        MaskDomain { set: self.precision.set, product: self.id }
    }

    /// The product of the masks, all bytes of it.
    pub(crate) fn masks(&self, forge: impl FnOnce(&mut ProductTile)) -> anyhow::Result<UnverifiedMasks> {
        self.masks_of(&self.held, forge)
    }

    /// The same of a worker that has these weights.
    pub(crate) fn masks_of(
        &self,
        held: &Arc<dyn HeldMatrix>,
        forge: impl FnOnce(&mut ProductTile),
    ) -> anyhow::Result<UnverifiedMasks> {
        let limbs = self.precision.set.limbs();
        let rows = Multiplicand::Masks { seed: SEED, domain: self.domain(), first_feature: 0 };
        let mut tile = self.multiply(held, limbs, self.precision.set.modulus_bits(), rows)?;
        forge(&mut tile);
        let precision = Precision { mask_limbs: limbs as u8, ..self.precision };
        let mut builder = MaskProductBuilder::new(precision, self.dimensions().1)?;
        builder.tile(&tile)?;
        Ok(builder.finish()?)
    }

    /// The same, verified.
    pub(crate) fn verified_masks(&self) -> anyhow::Result<Arc<MaskProduct>> {
        let masks = self.masks(|_| {})?;
        Ok(Arc::new(self.checks.masks.verify(masks, &SEED, &self.domain(), self.precision.mask_limbs)?))
    }

    pub(crate) fn send(&self, rows: &[f32], step: Step) -> anyhow::Result<Sent> {
        let (inner, _) = self.dimensions();
        let tokens = rows.len() / inner;
        let (prepared, expected) = self.codec.prepare_expecting(rows, tokens, &self.checks.sketch, step)?;
        let plaintext = Plaintext { rows: &prepared.rows, tokens, features: inner, steps: &prepared.steps };
        let precision = self.codec.precision(step);
        let (body, ticket) = encrypt(&SEED, &self.domain(), precision, plaintext)?;
        let protocol::quant::Prepared { rows, steps, scales } = prepared;
        Ok(Sent {
            body: Arc::new(body),
            precision,
            ticket,
            expected,
            scales,
            rows: rows.to_vec(),
            steps: steps.to_vec(),
        })
    }

    /// What a worker with these weights answers.
    pub(crate) fn answer(&self, held: &Arc<dyn HeldMatrix>, sent: &Sent) -> anyhow::Result<ProductTile> {
        let body = Multiplicand::Body(Arc::clone(&sent.body));
        self.multiply(held, sent.body.limbs(), sent.precision.output_bits.into(), body)
    }

    pub(crate) fn decrypt(
        &self,
        ticket: protocol::he::Ticket,
        masks: &Arc<MaskProduct>,
        answer: &ProductTile,
    ) -> anyhow::Result<Decrypted<Vec<f32>>> {
        let out = vec![0.0; answer.rows.rows() * self.dimensions().1];
        let precision = ticket.precision();
        let mut decryption = ticket.open(Arc::clone(masks), precision, out)?;
        decryption.tile(answer.clone())?;
        Ok(decryption.finish()?)
    }

    /// A product in one tile.
    fn multiply(
        &self,
        held: &Arc<dyn HeldMatrix>,
        limbs: usize,
        output_bits: u32,
        rows: Multiplicand,
    ) -> anyhow::Result<ProductTile> {
        let (_, outer) = self.dimensions();
        let count = rows.count();
        let whole = Mutex::new(Planes::zeros(output_bits.div_ceil(8) as usize, count, outer));
        let task = ProductTask { direction: self.id.direction, limbs, output_bits, rows };
        held.multiply(&task, tile_columns(outer), &|tile: ProductTile| {
            let width = tile.rows.columns();
            let mut whole = whole.lock().expect("nobody panicked");
            let spread = tile.rows.spread();
            let rows = whole.bytes_mut().chunks_exact_mut(outer).zip(spread.bytes().chunks_exact(width));
            rows.for_each(|(to, from)| to[tile.first_column..][..width].copy_from_slice(from));
            ControlFlow::Continue(())
        })?;
        Ok(ProductTile { first_column: 0, rows: whole.into_inner().expect("nobody panicked").pack(output_bits) })
    }
}
