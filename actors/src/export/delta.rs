//! What an adapter adds to one projection's weights: `s·B·A`.

use protocol::model::Projection;

use super::ExportError;
use crate::lora::LoraAdapters;

/// One projection's part of an adapter.
pub(super) struct Delta {
    pub(super) layer: u16,
    pub(super) projection: Projection,
    pub(super) rank: usize,
    /// The factor of the product.
    pub(super) scaling: f32,
    pub(super) d_in: usize,
    pub(super) d_out: usize,
    /// `rank × d_in`.
    pub(super) a: Vec<f32>,
    /// `d_out × rank`.
    pub(super) b: Vec<f32>,
}

impl Delta {
    /// All of an adapter, from the lowest layer up.
    ///
    /// # Errors
    /// When the adapter has norms, too, which are no such product, or candle cannot read the tensors.
    pub(super) fn all(adapters: &LoraAdapters) -> Result<Vec<Self>, ExportError> {
        if let Some(norm) = adapters.norms().next() {
            return Err(ExportError::Unsupported(format!(
                "the adapter has norms that were trained ({}, lora.modules_to_save), which are not exported yet; PEFT merges \
                 them (`merge_and_unload`)",
                norm.module
            )));
        }
        let mut all = Vec::new();
        for (linear, group) in adapters.groups() {
            let (a, b) = (group.a.flatten_all()?.to_vec1::<f32>()?, group.b.to_vec1::<f32>()?);
            let d_in = group.a.dim(1)?;
            for slot in group.slots.iter() {
                let (rank, d_out) = (slot.rank, slot.d_out);
                all.push(Self {
                    layer: linear.layer,
                    projection: slot.projection,
                    rank,
                    scaling: slot.scaling,
                    d_in,
                    d_out,
                    a: a[slot.row * d_in..][..rank * d_in].to_vec(),
                    b: b[slot.up..][..d_out * rank].to_vec(),
                });
            }
        }
        Ok(all)
    }

    /// Its weight's name in a Hugging Face model.
    pub(super) fn weight(&self) -> String {
        format!("model.layers.{}.{}.weight", self.layer, self.projection.name())
    }

    /// One row of the product, `d_in` values, to `out`.
    pub(super) fn row(&self, row: usize, out: &mut [f32]) {
        out.fill(0.0);
        let factors = &self.b[row * self.rank..][..self.rank];
        for (factor, a) in factors.iter().zip(self.a.chunks_exact(self.d_in)) {
            let factor = factor * self.scaling;
            out.iter_mut().zip(a).for_each(|(out, a)| *out += factor * a);
        }
    }
}
