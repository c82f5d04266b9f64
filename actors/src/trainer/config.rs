//! Everything about a training run that a user chooses, in one structure that configuration files embed.

use serde::{Deserialize, Serialize};

use super::Schedule;
use crate::lora::LoraConfig;

/// Micro-batches at once: more would only wait for one another.
const MOST_IN_FLIGHT: usize = 64;

/// A setting that cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field} {why}")]
pub struct InvalidSetting {
    /// The setting's path, such as `lora.rank`.
    pub field: &'static str,
    /// What is wrong with its value.
    pub why: String,
}

/// Hyper-parameters of a training run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainingConfig {
    /// Optimiser steps.
    pub steps: usize,
    /// Sequences that go through the model together; what one remote product carries.
    pub micro_batch: usize,
    /// Micro-batches summed into one optimiser step: a step sees `micro_batch × accumulation` sequences.
    pub accumulation: usize,
    /// Micro-batches of a step that are computed at once, so that network, workers and owner overlap; 0 takes more the
    /// further the workers are. What is learnt does not depend on it.
    pub in_flight: usize,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Steps during which the learning rate climbs from nothing to its peak; a shorter run ends before.
    pub warmup_steps: usize,
    /// How the learning rate goes down afterwards.
    pub schedule: Schedule,
    /// AdamW's decoupled weight decay.
    pub weight_decay: f64,
    /// AdamW's decay rates of the first and second moment.
    pub betas: (f64, f64),
    /// AdamW's addend to the root of the second moment.
    pub epsilon: f64,
    /// Gradients whose norm over all adapters is larger are scaled down to it; 0 switches clipping off.
    pub max_gradient_norm: f64,
    /// Seed of the adapters' initial weights, of dropout and of what is held out.
    pub seed: u64,
    /// Seed of the order of the data; without one each run draws its own, since an order that others know tells them
    /// which texts a step sees.
    pub data_seed: Option<u64>,
    /// Evaluate after every so many steps, besides before the first and after the last; 0 only then.
    pub eval_every: usize,
    /// Most micro-batches of the held-out split that one evaluation takes; 0 takes all.
    pub eval_batches: usize,
    /// The adapters.
    pub lora: LoraConfig,
}

impl Default for TrainingConfig {
    fn default() -> Self {
        Self {
            steps: 100,
            micro_batch: 2,
            accumulation: 2,
            in_flight: 0,
            learning_rate: 2e-4,
            warmup_steps: 5,
            schedule: Schedule::Cosine,
            weight_decay: 0.01,
            betas: (0.9, 0.999),
            epsilon: 1e-8,
            max_gradient_norm: 1.0,
            seed: 0,
            data_seed: None,
            eval_every: 0,
            eval_batches: 16,
            lora: LoraConfig::default(),
        }
    }
}

impl TrainingConfig {
    /// Sequences of one optimiser step.
    pub fn batch(&self) -> usize {
        self.micro_batch.saturating_mul(self.accumulation)
    }

    /// Learning rate of a step, counted from 0.
    pub fn learning_rate_at(&self, step: usize) -> f64 {
        self.learning_rate * self.schedule.factor(step, self.warmup_steps, self.steps)
    }

    /// Checks every field.
    ///
    /// # Errors
    /// Names the first field that cannot be, and why.
    pub fn validate(&self) -> Result<(), InvalidSetting> {
        let fail = |field, why: String| Err(InvalidSetting { field, why });
        for (field, value, limit) in [
            ("steps", self.steps, 100_000_000),
            ("micro_batch", self.micro_batch, 4096),
            ("accumulation", self.accumulation, 65_536),
        ] {
            if value == 0 || value > limit {
                return fail(field, format!("is {value}, and must be from 1 to {limit}"));
            }
        }
        if self.in_flight > MOST_IN_FLIGHT {
            let why = format!("is {}, and must be at most {MOST_IN_FLIGHT}; 0 leaves it to the owner", self.in_flight);
            return fail("in_flight", why);
        }
        for (field, value) in [("learning_rate", self.learning_rate), ("epsilon", self.epsilon)] {
            if !(value.is_finite() && value > 0.0) {
                return fail(field, format!("is {value}, and must be more than 0"));
            }
        }
        for (field, value) in [("weight_decay", self.weight_decay), ("max_gradient_norm", self.max_gradient_norm)] {
            if !(value.is_finite() && value >= 0.0) {
                return fail(field, format!("is {value}, and must be at least 0"));
            }
        }
        for beta in [self.betas.0, self.betas.1] {
            if !(0.0..1.0).contains(&beta) {
                return fail("betas", format!("has {beta}, and both must be at least 0 and less than 1"));
            }
        }
        self.lora.validate()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::lora::Projection;

    #[test]
    fn the_defaults_are_valid() {
        TrainingConfig::default().validate().unwrap();
    }

    #[test]
    fn unknown_fields_are_refused_and_known_ones_read() {
        let error = serde_json::from_str::<TrainingConfig>(r#"{"lerning_rate": 1.0}"#).unwrap_err();
        assert!(error.to_string().contains("lerning_rate"), "{error}");
        let error = serde_json::from_str::<TrainingConfig>(r#"{"lora": {"r": 8}}"#).unwrap_err();
        assert!(error.to_string().contains("`r`"), "{error}");
        let read: TrainingConfig = serde_json::from_str(
            r#"{"schedule": "linear", "lora": {"rank": 4, "target_modules": ["q_proj", "down_proj"]}}"#,
        )
        .unwrap();
        assert_eq!(read.schedule, Schedule::Linear);
        assert_eq!(read.lora.target_modules, [Projection::Q, Projection::Down]);
        assert_eq!(read.steps, TrainingConfig::default().steps);
    }

    #[test]
    fn the_field_that_cannot_be_is_named() {
        type Spoil = fn(&mut TrainingConfig);
        let spoiled: [(&str, Spoil); 10] = [
            ("steps", |c| c.steps = 0),
            ("micro_batch", |c| c.micro_batch = 0),
            ("in_flight", |c| c.in_flight = 1000),
            ("learning_rate", |c| c.learning_rate = f64::NAN),
            ("weight_decay", |c| c.weight_decay = -1.0),
            ("betas", |c| c.betas.1 = 1.0),
            ("lora.rank", |c| c.lora.rank = 0),
            ("lora.dropout", |c| c.lora.dropout = 1.0),
            ("lora.target_modules", |c| c.lora.target_modules.clear()),
            ("lora.target_modules", |c| c.lora.target_modules.push(Projection::Q)),
        ];
        for (field, spoil) in spoiled {
            let mut config = TrainingConfig::default();
            spoil(&mut config);
            assert_eq!(config.validate().unwrap_err().field, field);
        }
    }
}
