//! What an adapter changes of a model's weights: products `s·B·A` that are added, and norms and rows of the embeddings that are
//! replaced.

use std::collections::BTreeMap;

use protocol::model::{LlamaConfig, Projection};

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
    /// Some rows of a tensor of this shape are these.
    Rows { shape: Vec<usize>, rows: BTreeMap<usize, Vec<f32>> },
}

impl Change {
    /// The shape of the tensor.
    pub(super) fn shape(&self) -> Vec<usize> {
        match self {
            Self::Add(delta) => vec![delta.d_out, delta.d_in],
            Self::Replace(scales) => vec![scales.len()],
            Self::Rows { shape, .. } => shape.clone(),
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
            Self::Replace(scales) => replace(values, scales),
            Self::Rows { rows, .. } => rows.get(&row).into_iter().for_each(|row| replace(values, row)),
        }
    }
}

fn replace(values: &mut [f64], by: &[f32]) {
    values.iter_mut().zip(by).for_each(|(value, &by)| *value = by.into());
}

/// The model's embeddings, and the head if it has one of its own, in a Hugging Face model.
const EMBEDDINGS: &str = "model.embed_tokens.weight";
pub(super) const HEAD: &str = "lm_head.weight";

/// All changes, by the Hugging Face name of the tensor.
pub(super) struct Changes(BTreeMap<String, Change>);

impl Changes {
    /// Those of an adapter of a model.
    ///
    /// # Errors
    /// When it adds nothing, or candle cannot read the tensors.
    pub(super) fn of(adapters: &LoraAdapters, model: &LlamaConfig) -> Result<Self, ExportError> {
        let deltas = Delta::all(adapters)?;
        let replaces = adapters.norms().next().is_some() || adapters.token_rows().is_some();
        if deltas.iter().all(Delta::is_zero) && !replaces {
            return Err(nothing());
        }
        let mut changes: BTreeMap<String, Change> =
            deltas.into_iter().map(|delta| (delta.weight(), Change::Add(delta))).collect();
        for norm in adapters.norms() {
            let scales = norm.factors.flatten_all()?.to_vec1::<f32>()?;
            changes.insert(format!("{}.weight", norm.module), Change::Replace(scales));
        }
        if let Some(trained) = adapters.token_rows() {
            let tokens = trained.tokens.iter().map(|&token| token as usize);
            let rows = tokens.zip(trained.rows.to_vec2::<f32>()?).collect();
            let shape = vec![model.vocabulary, model.hidden_size];
            changes.insert(EMBEDDINGS.to_owned(), Change::Rows { shape, rows });
        }
        Ok(Self(changes))
    }

    /// The same where the files of a model whose head is its embeddings have that twice: both must stay one.
    pub(super) fn with_copied_head(mut self) -> Self {
        if let Some(Change::Rows { shape, rows }) = self.0.get(EMBEDDINGS) {
            let (shape, rows) = (shape.clone(), rows.clone());
            self.0.insert(HEAD.to_owned(), Change::Rows { shape, rows });
        }
        self
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
