//! A product from its admission to its tiles.

use std::sync::Arc;

use async_trait::async_trait;
use protocol::he::{MaskDomain, MaskSeed, Planes};
use protocol::wire::PlanesShape;
use protocol::wire::messages::{Operand, ProductHeader, Refusal};
use tokio::sync::mpsc;

use super::parts::HeldLinear;
use super::place::Place;
use super::service::Devices;
use super::streams::forward;
use crate::matmul::{Multiplicand, ProductTask, answer_columns};
use crate::transport::{Admitted, Answer, PeerName};

/// Tiles that wait for a slow reader beside those that the executor holds for it.
const READY_TILES: usize = 2;

/// Bytes of a value at the product that a device's speed is measured with.
const MEASURED_LIMBS: u64 = 3;

/// A product that may be computed: its header was checked, its matrix is loaded, and it has its place.
pub(super) struct AdmittedProduct {
    devices: Arc<Devices>,
    owner: PeerName,
    header: ProductHeader,
    weights: Arc<HeldLinear>,
    place: Arc<Place>,
}

impl AdmittedProduct {
    /// Of a header that was checked.
    pub(super) fn new(
        devices: Arc<Devices>,
        owner: PeerName,
        header: ProductHeader,
        weights: Arc<HeldLinear>,
        place: Arc<Place>,
    ) -> Self {
        Self { devices, owner, header, weights, place }
    }

    fn dimensions(&self) -> (usize, usize) {
        self.weights.shape().along(self.header.product.direction)
    }

    /// Multiply-accumulates, as a device's speed counts them.
    fn operations(&self) -> u64 {
        let (inner, outer) = self.dimensions();
        let values = (self.header.rows() as u64).saturating_mul(inner as u64).saturating_mul(outer as u64);
        values.saturating_mul((self.header.operand_limbs() as u64).div_ceil(MEASURED_LIMBS))
    }
}

#[async_trait]
impl Admitted for AdmittedProduct {
    fn inner(&self) -> usize {
        self.dimensions().0
    }

    fn outer(&self) -> usize {
        self.dimensions().1
    }

    async fn begin(self: Box<Self>, body: Option<Arc<Planes>>) -> Result<Answer, Refusal> {
        let ProductHeader { product, precision, operand, .. } = self.header;
        let rows = match (operand, body) {
            (Operand::Masks { seed }, None) => Multiplicand::Masks {
                seed: MaskSeed::from_bytes(seed),
                domain: MaskDomain { set: precision.set, product },
                first_feature: 0,
            },
            (Operand::Body { .. }, Some(body)) => {
                let shape = PlanesShape::of_body(&self.header, self.inner(), usize::MAX);
                if !shape.is_ok_and(|shape| shape.is_some_and(|shape| shape.fits(&body))) {
                    return Err(Refusal::Malformed("the body is not what its header says".into()));
                }
                Multiplicand::Body(body)
            }
            (Operand::Masks { .. }, Some(_)) => return Err(Refusal::Malformed("a mask product with a body".into())),
            (Operand::Body { .. }, None) => return Err(Refusal::Malformed("a body product without a body".into())),
        };
        let time = self.devices.take_in(&self.owner, &self.place, &self.weights, self.operations())?;
        let (limbs, output_bits) = (self.header.operand_limbs(), self.header.answer_bits());
        let task = ProductTask { direction: product.direction, limbs, output_bits, rows };
        let mut parts = self.devices.multiply(Arc::clone(&self.weights), task, &self.place).await?;
        let (rows, (_, outer)) = (self.header.rows(), self.dimensions());
        if let [(0, _)] = parts[..]
            && answer_columns(rows, outer) >= outer
            && let Some((_, tiles)) = parts.pop()
        {
            // One tile needs nobody to hand it on.
            return Ok(Answer { tiles, time, place: Box::new(self.place) });
        }
        let (sender, tiles) = mpsc::channel(READY_TILES);
        tokio::spawn(forward(parts, sender, Arc::clone(&self.place)));
        Ok(Answer { tiles, time, place: Box::new(self.place) })
    }
}
