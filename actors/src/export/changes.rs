//! What an adapter changes of a model's weights: products `s·B·A` that are added, and norms that are replaced.

use std::collections::BTreeMap;

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
    /// All products of an adapter, from the lowest layer up.
    ///
    /// # Errors
    /// When candle cannot read the tensors.
    pub(super) fn all(adapters: &LoraAdapters) -> Result<Vec<Self>, ExportError> {
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

    /// Whether it adds nothing but zeros.
    pub(super) fn is_zero(&self) -> bool {
        let zero = |values: &[f32]| values.iter().all(|&value| value == 0.0);
        zero(&self.a) || zero(&self.b) || self.scaling == 0.0
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

/// What is done to one of the model's tensors.
pub(super) enum Change {
    /// A product is added.
    Add(Delta),
    /// A norm's scales are these.
    Replace(Vec<f32>),
}

impl Change {
    /// The shape of the tensor.
    pub(super) fn shape(&self) -> Vec<usize> {
        match self {
            Self::Add(delta) => vec![delta.d_out, delta.d_in],
            Self::Replace(scales) => vec![scales.len()],
        }
    }

    /// Changes a row of the tensor.
    pub(super) fn apply(&self, row: usize, values: &mut [f64]) {
        match self {
            Self::Add(delta) => {
                let mut added = vec![0.0; values.len()];
                delta.row(row, &mut added);
                values.iter_mut().zip(added).for_each(|(value, added)| *value += f64::from(added));
            }
            Self::Replace(scales) => values.iter_mut().zip(scales).for_each(|(value, &scale)| *value = scale.into()),
        }
    }
}

/// All changes, by the Hugging Face name of the tensor.
pub(super) struct Changes(BTreeMap<String, Change>);

impl Changes {
    /// Those of an adapter.
    ///
    /// # Errors
    /// When it adds nothing, or candle cannot read the tensors.
    pub(super) fn of(adapters: &LoraAdapters) -> Result<Self, ExportError> {
        let deltas = Delta::all(adapters)?;
        if deltas.iter().all(Delta::is_zero) && adapters.norms().next().is_none() {
            return Err(nothing());
        }
        let mut changes: BTreeMap<String, Change> =
            deltas.into_iter().map(|delta| (delta.weight(), Change::Add(delta))).collect();
        for norm in adapters.norms() {
            let scales = norm.factors.flatten_all()?.to_vec1::<f32>()?;
            changes.insert(format!("{}.weight", norm.module), Change::Replace(scales));
        }
        Ok(Self(changes))
    }

    /// The change of a tensor, if it has one.
    pub(super) fn get(&self, name: &str) -> Option<&Change> {
        self.0.get(name)
    }

    /// All of them.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&String, &Change)> {
        self.0.iter()
    }
}

/// What is said of an adapter that changes nothing.
pub(super) fn nothing() -> ExportError {
    ExportError::Unsupported(
        "the adapter adds nothing to any of the model's weights: was it trained, and is it the one that was meant?"
            .to_owned(),
    )
}
