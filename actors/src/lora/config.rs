//! What an adapter looks like, as the user chooses it.

use std::collections::BTreeMap;

use protocol::ids::LinearShape;
use protocol::model::{LlamaConfig, Norm};
use serde::{Deserialize, Serialize};

use super::norms::{self, Depth};
use super::{Initialisation, Layers, NamedToken, Patterns, Projection, targets, tokens};
use crate::trainer::InvalidSetting;

/// Largest rank accepted: an adapter of more has nothing low about its rank.
const MAX_RANK: usize = 1024;
/// How much faster `B` may learn than `A`, and how much slower.
const MOST_RATIO: f64 = 1e4;

/// Size and place of the adapters.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LoraConfig {
    /// Inner dimension of `B·A`, at least 1.
    pub rank: usize,
    /// The adapter's output is multiplied by `alpha / rank`.
    pub alpha: f32,
    /// Share of the adapter's input features dropped while training, at least 0 and less than 1.
    pub dropout: f32,
    /// Projections that get an adapter.
    #[serde(deserialize_with = "targets::read")]
    pub target_modules: Vec<Projection>,
    /// Layers in which they do. Checkpoints of runs that adapt all have no such field.
    #[serde(skip_serializing_if = "Layers::is_all")]
    pub layers: Layers,
    /// Other ranks for the modules that these patterns name.
    pub rank_pattern: Patterns<usize>,
    /// The same for alpha.
    pub alpha_pattern: Patterns<f32>,
    /// Multiply by `alpha / √rank` instead (rsLoRA, Kalajdzievski, 2023).
    pub use_rslora: bool,
    /// Learn magnitude and direction of the weights' columns apart (DoRA); refused.
    pub use_dora: bool,
    /// The learning rate of `B` as a multiple of that of `A` (LoRA+, Hayou et al., 2024).
    pub lora_plus_ratio: f64,
    /// How new adapters begin.
    pub init_lora_weights: Initialisation,
    /// Norms that are trained as they are, by the ends of their names.
    pub modules_to_save: Vec<String>,
    /// Tokens whose embeddings are trained as they are. Checkpoints of runs that train none have no such field.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub trainable_token_indices: Vec<NamedToken>,
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self {
            rank: 8,
            alpha: 16.0,
            dropout: 0.0,
            target_modules: Projection::SEPARATE.to_vec(),
            layers: Layers::All,
            rank_pattern: Patterns::default(),
            alpha_pattern: Patterns::default(),
            use_rslora: false,
            use_dora: false,
            lora_plus_ratio: 1.0,
            init_lora_weights: Initialisation::Uniform,
            modules_to_save: Vec::new(),
            trainable_token_indices: Vec::new(),
        }
    }
}

/// What one projection's adapter looks like.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Size {
    /// Inner dimension of `B·A`.
    pub(crate) rank: usize,
    /// The factor of its output.
    pub(crate) scaling: f32,
}

impl LoraConfig {
    /// Every adapted projection of a model, by layer.
    ///
    /// # Errors
    /// When the model has not the layers that are to be adapted, and when a pattern names none of their projections.
    pub(crate) fn sizes(&self, model: &LlamaConfig) -> Result<BTreeMap<(u16, Projection), Size>, InvalidSetting> {
        let rank_failed = |why| InvalidSetting { field: "lora.rank_pattern", why };
        let alpha_failed = |why| InvalidSetting { field: "lora.alpha_pattern", why };
        let mut ranks = self.rank_pattern.matcher().map_err(rank_failed)?;
        let mut alphas = self.alpha_pattern.matcher().map_err(alpha_failed)?;
        let modules = self.modules_of(model)?;
        let mut sizes = BTreeMap::new();
        for layer in self.layers.of(model.layers)? {
            for &projection in &modules {
                let name = format!("model.layers.{layer}.{}", projection.name());
                let rank = ranks.find(&name).map_err(rank_failed)?.unwrap_or(self.rank);
                let alpha = alphas.find(&name).map_err(alpha_failed)?.unwrap_or(self.alpha);
                let scaling = alpha / if self.use_rslora { (rank as f32).sqrt() } else { rank as f32 };
                sizes.insert((layer, projection), Size { rank, scaling });
            }
        }
        let idle = |pattern: &str| format!("has `{pattern}`, which names no adapted projection of the model");
        match (ranks.idle(), alphas.idle()) {
            (Some(pattern), _) => Err(rank_failed(idle(pattern))),
            (_, Some(pattern)) => Err(alpha_failed(idle(pattern))),
            _ => Ok(sizes),
        }
    }

    /// Values that are trained with it in a model.
    ///
    /// # Errors
    /// When the model has not what is to be adapted.
    pub fn values(&self, model: &LlamaConfig) -> Result<usize, InvalidSetting> {
        let pair = |(&(_, projection), size): (&(u16, Projection), &Size)| {
            let LinearShape { d_in, d_out } = projection.shape(model);
            size.rank * (d_in + d_out)
        };
        let rows = self.saved_norms(model)?.len() + self.tokens(model)?.len();
        Ok(self.sizes(model)?.iter().map(pair).sum::<usize>() + rows * model.hidden_size)
    }

    /// The norms that are trained.
    ///
    /// # Errors
    /// When a name means none.
    pub(crate) fn saved_norms(&self, model: &LlamaConfig) -> Result<Vec<Norm>, InvalidSetting> {
        norms::named(&self.modules_to_save, model)
    }

    /// The tokens whose embeddings are trained.
    ///
    /// # Errors
    /// When the model has not one of them, one is named twice, or its number is not known yet.
    pub(crate) fn tokens(&self, model: &LlamaConfig) -> Result<Vec<u32>, InvalidSetting> {
        tokens::of_model(&self.trainable_token_indices, model)
    }

    /// The same with the numbers of tokens that are named by their texts, which `number` finds.
    ///
    /// # Errors
    /// Names a text that is no token.
    pub fn with_numbered_tokens(self, number: impl Fn(&str) -> Option<u32>) -> Result<Self, InvalidSetting> {
        Ok(Self { trainable_token_indices: tokens::numbered(&self.trainable_token_indices, number)?, ..self })
    }

    /// The lowest layer of a model of which something is trained, or that reads what is.
    ///
    /// # Errors
    /// When the model has not what is to be trained.
    pub fn lowest_layer(&self, model: &LlamaConfig) -> Result<usize, InvalidSetting> {
        let adapted = self.layers.of(model.layers)?.first().map_or(0, |&layer| layer.into());
        let norms = self.saved_norms(model)?.into_iter().filter_map(Depth::of_norm);
        let embeddings = self.tokens(model)?.first().map(|_| Depth::EMBEDDINGS);
        Ok(norms.chain(embeddings).map(|depth| depth.layer).fold(adapted, usize::min))
    }

    /// The projections of a model that get an adapter, in the order of the forward pass. Naming all that a layer has where
    /// each is on its own means all of a layer whose family has some of them as one, too.
    ///
    /// # Errors
    /// When one is named that the model has not.
    pub fn modules_of(&self, model: &LlamaConfig) -> Result<Vec<Projection>, InvalidSetting> {
        let of_model: Vec<Projection> = model.family.layer_projections().collect();
        let named = |projection: &Projection| self.target_modules.contains(projection);
        if self.target_modules.len() == Projection::SEPARATE.len() && Projection::SEPARATE.iter().all(named) {
            return Ok(of_model);
        }
        if let Some(unknown) = self.target_modules.iter().find(|projection| !of_model.contains(projection)) {
            let names: Vec<&str> = of_model.iter().map(|projection| projection.module()).collect();
            let (unknown, family) = (unknown.module(), model.family.model_type);
            let why = format!("names {unknown}, but layers of the family `{family}` have {}", names.join(", "));
            return Err(InvalidSetting { field: "lora.target_modules", why });
        }
        Ok(of_model.into_iter().filter(named).collect())
    }

    /// Checks every field; whether a model has the layers is known with the model alone ([`Layers::of`]).
    ///
    /// # Errors
    /// Names the first field that cannot be, and why.
    pub fn validate(&self) -> Result<(), InvalidSetting> {
        let fail = |field, why: String| Err(InvalidSetting { field, why });
        let ranks = [("lora.rank", self.rank)].into_iter();
        for (field, rank) in ranks.chain(self.rank_pattern.values().map(|rank| ("lora.rank_pattern", rank))) {
            if rank == 0 || rank > MAX_RANK {
                return fail(field, format!("is {rank}, and must be from 1 to {MAX_RANK}"));
            }
        }
        let alphas = [("lora.alpha", self.alpha)].into_iter();
        for (field, alpha) in alphas.chain(self.alpha_pattern.values().map(|alpha| ("lora.alpha_pattern", alpha))) {
            if !(alpha.is_finite() && alpha > 0.0) {
                return fail(field, format!("is {alpha}, and must be more than 0"));
            }
        }
        for (field, error) in [
            ("lora.rank_pattern", self.rank_pattern.matcher().err()),
            ("lora.alpha_pattern", self.alpha_pattern.matcher().err()),
        ] {
            if let Some(why) = error {
                return fail(field, why);
            }
        }
        let ratio = self.lora_plus_ratio;
        if !(1.0 / MOST_RATIO..=MOST_RATIO).contains(&ratio) {
            let why = format!("is {ratio}, and must be from {} to {MOST_RATIO}; 1 is plain LoRA", 1.0 / MOST_RATIO);
            return fail("lora.lora_plus_ratio", why);
        }
        if self.use_dora {
            let why = "is true, and DoRA is not supported: the norms of its columns ask the owner for all of the base \
                       model's weights in every step; reading and multiplying them was measured to take a twentieth of an \
                       owner's step more with a model of 135 million parameters, and a third more with one of a billion";
            return fail("lora.use_dora", why.into());
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return fail("lora.dropout", format!("is {}, and must be at least 0 and less than 1", self.dropout));
        }
        if self.target_modules.is_empty() {
            return fail("lora.target_modules", "is empty, so nothing would be trained".into());
        }
        for (i, module) in self.target_modules.iter().enumerate() {
            if self.target_modules[..i].contains(module) {
                return fail("lora.target_modules", format!("names {} twice", module.module()));
            }
        }
        Ok(())
    }
}
