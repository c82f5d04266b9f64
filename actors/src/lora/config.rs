//! What an adapter looks like, as the user chooses it.

use protocol::ids::LinearShape;
use protocol::model::LlamaConfig;
use serde::{Deserialize, Serialize};

use super::{Layers, Projection};
use crate::trainer::InvalidSetting;

/// Largest rank accepted: an adapter of more has nothing low about its rank.
const MAX_RANK: usize = 1024;

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
    pub target_modules: Vec<Projection>,
    /// Layers in which they do. Checkpoints of runs that adapt all have no such field.
    #[serde(skip_serializing_if = "Layers::is_all")]
    pub layers: Layers,
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self { rank: 8, alpha: 16.0, dropout: 0.0, target_modules: Projection::SEPARATE.to_vec(), layers: Layers::All }
    }
}

impl LoraConfig {
    /// The factor of the adapter's output, `alpha / rank`.
    pub fn scaling(&self) -> f32 {
        self.alpha / self.rank as f32
    }

    /// Values that are trained with it in a model.
    ///
    /// # Errors
    /// When the model has not the layers that are to be adapted.
    pub fn values(&self, model: &LlamaConfig) -> Result<usize, InvalidSetting> {
        let pair = |projection: &Projection| {
            let LinearShape { d_in, d_out } = projection.shape(model);
            self.rank * (d_in + d_out)
        };
        Ok(self.layers.of(model.layers)?.len() * self.modules_of(model)?.iter().map(pair).sum::<usize>())
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
        if self.rank == 0 || self.rank > MAX_RANK {
            return fail("lora.rank", format!("is {}, and must be from 1 to {MAX_RANK}", self.rank));
        }
        if !(self.alpha.is_finite() && self.alpha > 0.0) {
            return fail("lora.alpha", format!("is {}, and must be more than 0", self.alpha));
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
