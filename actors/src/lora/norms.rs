//! Norms that are trained as they are, beside the adapters, and saved whole: PEFT's `modules_to_save`.
//!
//! They are the owner's anyway, and no worker has to know that they changed. Embeddings and the head are not trained as wholes:
//! a served head is the same for everybody. Rows of them are ([`tokens`](super::tokens)).

use candle_core::{Device, Result, Tensor, Var};
use protocol::ids::{Group, LinearId};
use protocol::model::{LlamaConfig, Norm};

use crate::trainer::InvalidSetting;

const FIELD: &str = "lora.modules_to_save";

/// The trained norms, in the order of the forward pass.
#[derive(Default)]
pub(crate) struct SavedNorms(Vec<SavedNorm>);

/// One of them.
pub(crate) struct SavedNorm {
    pub(crate) norm: Norm,
    /// The module that it is, as PEFT knows it.
    pub(crate) module: String,
    /// Its factors.
    pub(crate) factors: Var,
}

/// The module that a norm of a model is, as PEFT knows it.
fn module(model: &LlamaConfig, norm: Norm) -> Option<String> {
    Some(model.family.norm_name(norm)?.trim_end_matches(".weight").to_owned())
}

/// Every norm of a model with the module that it is, in the order of the forward pass.
fn all(model: &LlamaConfig) -> Vec<(Norm, String)> {
    let norms = (0..model.layers).flat_map(|layer| model.family.layer_norms(layer)).chain([Norm::Final]);
    norms.filter_map(|norm| Some((norm, module(model, norm)?))).collect()
}

/// Whether a norm can be trained: one that reads the stream.
fn reads_stream(norm: Norm) -> bool {
    matches!(norm, Norm::BeforeAttention(_) | Norm::BeforeFeedForward(_) | Norm::Final)
}

/// The norms that these names mean: as in PEFT, each whose own name ends like that.
///
/// # Errors
/// Names what is no norm, and norms that cannot be trained.
pub(super) fn named(names: &[String], model: &LlamaConfig) -> std::result::Result<Vec<Norm>, InvalidSetting> {
    let all = all(model);
    let fail = |why| Err(InvalidSetting { field: FIELD, why });
    let (family, can) = (model.family.model_type, || {
        let mut names: Vec<&str> =
            all.iter().filter(|(norm, _)| reads_stream(*norm)).map(|(_, name)| last(name)).collect();
        names.dedup();
        names.sort_unstable();
        names.dedup();
        names.join(", ")
    });
    for name in names {
        let mut meant = all.iter().filter(|(_, module)| !name.is_empty() && module.ends_with(name.as_str())).peekable();
        if matches!(last(name), "lm_head" | "embed_tokens") {
            return fail(format!(
                "names {name}, which is not trained: workers serve the head as it was published, and embeddings are as \
                 large; give norms: {}, or tokens whose rows are to be trained (lora.trainable_token_indices)",
                can()
            ));
        }
        if meant.peek().is_none() {
            return fail(format!("names `{name}`, which is no norm of the model; give {}", can()));
        }
        if let Some((_, module)) = meant.find(|(norm, _)| !reads_stream(*norm)) {
            return fail(format!("names `{name}`, which means {module}, too, which is not trained; give {}", can()));
        }
        if model.family.has_centred_norms() {
            return fail(format!("names {name}, but norms of the family `{family}` are not trained"));
        }
    }
    let meant = |module: &str| names.iter().any(|name| module.ends_with(name.as_str()));
    Ok(all.into_iter().filter(|(_, module)| meant(module)).map(|(norm, _)| norm).collect())
}

/// The last part of a module's name.
fn last(module: &str) -> &str {
    module.rsplit('.').next().unwrap_or_default()
}

impl SavedNorms {
    /// These norms of a model, whose factors are 1 until [`Self::set`].
    pub(super) fn new(norms: Vec<Norm>, model: &LlamaConfig) -> Result<Self> {
        let features = model.hidden_size;
        let ones = || Var::from_vec(vec![1f32; features], features, &Device::Cpu);
        let named = norms.into_iter().filter_map(|norm| Some((norm, module(model, norm)?)));
        let saved = named.map(|(norm, module)| Ok(SavedNorm { norm, module, factors: ones()? }));
        Ok(Self(saved.collect::<Result<_>>()?))
    }

    /// The norms.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &SavedNorm> {
        self.0.iter()
    }

    /// Replaces each norm's factors by those that `read` returns for it and its module.
    pub(super) fn set<E: From<candle_core::Error>>(
        &self,
        mut read: impl FnMut(Norm, &str) -> std::result::Result<Vec<f32>, E>,
    ) -> std::result::Result<(), E> {
        for SavedNorm { norm, module, factors } in self.iter() {
            factors.set(&Tensor::from_vec(read(*norm, module)?, factors.shape(), &Device::Cpu)?)?;
        }
        Ok(())
    }
}

/// How far down the way back goes: what lies below has nothing to learn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Depth {
    /// The lowest layer of which something is trained.
    pub(crate) layer: usize,
    /// What the gradient need not go through any more; `None` where it goes down to the embeddings.
    end: Option<LinearId>,
}

impl Depth {
    /// Down to the embeddings.
    pub(super) const EMBEDDINGS: Self = Self { layer: 0, end: None };

    /// Down to a group's adapters.
    pub(super) fn of_group(linear: LinearId) -> Self {
        Self { layer: linear.layer.into(), end: Some(linear) }
    }

    /// Down to a norm: through the group that reads it. The last norm is above every layer.
    pub(super) fn of_norm(norm: Norm) -> Option<Self> {
        let id = |layer: usize, group| LinearId { layer: layer as u16, group };
        match norm {
            Norm::BeforeAttention(layer) => {
                Some(Self { layer, end: layer.checked_sub(1).map(|below| id(below, Group::Down)) })
            }
            Norm::BeforeFeedForward(layer) => Some(Self { layer, end: Some(id(layer, Group::O)) }),
            // The last one; others are not trained.
            _ => None,
        }
    }

    /// The lower of the two.
    pub(super) fn lower(self, other: Self) -> Self {
        if other.end < self.end { other } else { self }
    }

    /// Whether something below a group's product is trained.
    pub(crate) fn is_below(&self, linear: LinearId) -> bool {
        self.end < Some(linear)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::testing::TinyModel;

    #[test]
    fn names_mean_what_they_mean_to_peft() {
        let tiny = TinyModel::new();
        let named = |names: &[&str]| {
            let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
            named(&names, tiny.config()).map_err(|error| error.to_string())
        };
        assert_eq!(named(&["model.norm"]), Ok(vec![Norm::Final]));
        assert_eq!(named(&["input_layernorm"]), Ok(vec![Norm::BeforeAttention(0), Norm::BeforeAttention(1)]));
        assert_eq!(named(&["layers.1.post_attention_layernorm"]), Ok(vec![Norm::BeforeFeedForward(1)]));
        // Every norm's name ends in it.
        assert_eq!(named(&["norm"]).unwrap().len(), 5);
        assert!(named(&["lm_head"]).unwrap_err().contains("workers serve the head"));
        assert!(named(&["q_proj"]).unwrap_err().contains("`q_proj`, which is no norm"));
        assert!(named(&[""]).is_err());
    }

    #[test]
    fn the_way_back_ends_below_what_is_trained() {
        let id = |layer, group| LinearId { layer, group };
        let group = Depth::of_group(id(1, Group::O));
        assert!(group.is_below(id(1, Group::GateUp)) && !group.is_below(id(1, Group::O)));
        let norm = Depth::of_norm(Norm::BeforeAttention(1)).unwrap();
        assert!(norm.is_below(id(1, Group::Qkv)) && !norm.is_below(id(0, Group::Down)));
        assert_eq!((group.lower(norm), norm.lower(group)), (norm, norm));
        let first = Depth::of_norm(Norm::BeforeAttention(0)).unwrap();
        assert!(first.is_below(id(0, Group::Qkv)) && norm.lower(first) == first);
        let middle = Depth::of_norm(Norm::BeforeFeedForward(0)).unwrap();
        assert!(middle.is_below(id(0, Group::GateUp)) && !middle.is_below(id(0, Group::O)));
        assert_eq!(Depth::of_norm(Norm::Final), None);
    }
}
