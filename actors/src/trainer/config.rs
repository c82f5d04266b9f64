//! Everything about a training run that a user chooses, in one structure that configuration files embed.

use serde::{Deserialize, Serialize};

use super::Schedule;
use super::objective::{Objective, Preference, Reference};
use super::schedule::Timing;
use crate::lora::LoraConfig;

/// Steps of a run that is told neither steps nor epochs.
const DEFAULT_STEPS: usize = 100;
/// Steps in which such a learning rate climbs that is told nothing of them.
const DEFAULT_WARMUP: usize = 5;
/// The longest run, in steps and in passes over the data.
const MOST_STEPS: usize = 100_000_000;
const MOST_EPOCHS: f64 = 1e6;

/// Micro-batches at once: more would only wait for one another.
pub(super) const MOST_IN_FLIGHT: usize = 64;

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
    /// What is minimised.
    pub objective: Objective,
    /// How much a preference weighs; 0.1 where nothing is said.
    pub beta: Option<f64>,
    /// What DPO compares with; what the run begins with where nothing is said.
    pub reference: Option<Reference>,
    /// Optimiser steps; 100 where neither they nor epochs are given.
    pub steps: Option<usize>,
    /// Passes over the examples that are trained on, in place of steps: rounded up to whole steps.
    pub epochs: Option<f64>,
    /// Sequences that go through the model together; what one remote product carries.
    pub micro_batch: usize,
    /// Micro-batches summed into one optimiser step: a step sees `micro_batch × accumulation` sequences.
    pub accumulation: usize,
    /// Micro-batches of a step that are computed at once, so that network, workers and owner overlap; 0 takes more the
    /// further the workers are. What is learnt does not depend on it.
    pub in_flight: usize,
    /// Parts of some sequences into which a micro-batch is cut, so that one is computed while the products of another travel;
    /// 0 takes more the further the workers are and the fewer micro-batches a step has, and 1 cuts none. Those with
    /// preferences, dropout or noise on the embeddings are left whole, and more than 1 is refused with these.
    pub strands: usize,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Steps during which the learning rate climbs from nothing to its peak; a shorter run ends before. 5 where neither they
    /// nor their share are given, and none if the learning rate is constant.
    pub warmup_steps: Option<usize>,
    /// The same as a share of all steps, rounded up.
    pub warmup_ratio: Option<f64>,
    /// How the learning rate goes down afterwards.
    pub schedule: Schedule,
    /// Half cosines of a schedule that restarts; 1 where nothing is given.
    pub schedule_cycles: Option<u32>,
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
    /// End the run after so many evaluations in a row that are none better than the best before them.
    pub early_stopping_patience: Option<usize>,
    /// By how much the loss of an evaluation must be lower to be better.
    pub early_stopping_threshold: f64,
    /// Whether a run ends with the adapters of its best evaluation, and not with its last; it does where nothing is said and
    /// it may be stopped early.
    pub load_best: Option<bool>,
    /// Noise on the embeddings of what is trained on, at `alpha / √(tokens · features)` of a sequence; 0 adds none (NEFTune).
    pub neftune_noise_alpha: f32,
    /// The adapters.
    pub lora: LoraConfig,
}

impl Default for TrainingConfig {
    fn default() -> Self {
        Self {
            objective: Objective::Sft,
            beta: None,
            reference: None,
            steps: None,
            epochs: None,
            micro_batch: 4,
            accumulation: 1,
            in_flight: 0,
            strands: 0,
            learning_rate: 2e-4,
            warmup_steps: None,
            warmup_ratio: None,
            schedule: Schedule::Cosine,
            schedule_cycles: None,
            weight_decay: 0.01,
            betas: (0.9, 0.999),
            epsilon: 1e-8,
            max_gradient_norm: 1.0,
            seed: 0,
            data_seed: None,
            eval_every: 0,
            eval_batches: 16,
            early_stopping_patience: None,
            early_stopping_threshold: 0.0,
            load_best: None,
            neftune_noise_alpha: 0.0,
            lora: LoraConfig::default(),
        }
    }
}

impl TrainingConfig {
    /// How preferences become a loss; `None` if there are none.
    pub fn preference(&self) -> Option<Preference> {
        Preference::new(self.objective, self.beta)
    }

    /// Whether the run ends with the adapters of its best evaluation.
    pub fn loads_best(&self) -> bool {
        self.load_best.unwrap_or(self.early_stopping_patience.is_some())
    }

    /// Sequences of one optimiser step, or pairs of them.
    pub fn batch(&self) -> usize {
        self.micro_batch.saturating_mul(self.accumulation)
    }

    /// Optimiser steps; epochs are none before they are [`Self::resolved`].
    pub fn steps(&self) -> usize {
        self.steps.unwrap_or(DEFAULT_STEPS)
    }

    /// Steps during which the learning rate climbs.
    pub fn warmup_steps(&self) -> usize {
        match (self.warmup_steps, self.warmup_ratio) {
            (Some(steps), _) => steps,
            (None, Some(ratio)) => (ratio * self.steps() as f64).ceil() as usize,
            (None, None) if self.schedule == Schedule::Constant => 0,
            (None, None) => DEFAULT_WARMUP.min(self.steps()),
        }
    }

    /// The same settings with what follows from the number of examples to train on said in steps: so a run is the same
    /// whichever way it was told its length.
    ///
    /// # Errors
    /// When the epochs are more steps than a run can have.
    pub fn resolved(&self, examples: usize) -> Result<Self, InvalidSetting> {
        let steps = match self.epochs {
            Some(epochs) => (epochs * examples as f64 / self.batch() as f64).ceil().max(1.0),
            None => self.steps() as f64,
        };
        if steps > MOST_STEPS as f64 {
            let why = format!("are {steps} steps of {examples} examples, and a run has at most {MOST_STEPS}");
            return Err(InvalidSetting { field: "epochs", why });
        }
        let sized = Self { steps: Some(steps as usize), epochs: None, ..self.clone() };
        Ok(Self { warmup_steps: Some(sized.warmup_steps()), warmup_ratio: None, ..sized })
    }

    /// Learning rate of a step, counted from 0.
    pub fn learning_rate_at(&self, step: usize) -> f64 {
        let timing =
            Timing { warmup: self.warmup_steps(), steps: self.steps(), cycles: self.schedule_cycles.unwrap_or(1) };
        self.learning_rate * self.schedule.factor(step, timing)
    }

    /// Whether the losses of a micro-batch's sequences depend on one another, or on their places in it.
    pub(super) fn is_drawn_or_compared(&self) -> bool {
        self.preference().is_some() || self.lora.dropout > 0.0 || self.neftune_noise_alpha > 0.0
    }

    /// Checks every field.
    ///
    /// # Errors
    /// Names the first field that cannot be, and why.
    pub fn validate(&self) -> Result<(), InvalidSetting> {
        let fail = |field, why: String| Err(InvalidSetting { field, why });
        for (field, value, limit) in [
            ("steps", self.steps(), MOST_STEPS),
            ("micro_batch", self.micro_batch, 4096),
            ("accumulation", self.accumulation, 65_536),
        ] {
            if value == 0 || value > limit {
                return fail(field, format!("is {value}, and must be from 1 to {limit}"));
            }
        }
        self.validate_length()?;
        self.validate_objective()?;
        self.validate_stopping()?;
        if self.in_flight > MOST_IN_FLIGHT {
            let why = format!("is {}, and must be at most {MOST_IN_FLIGHT}; 0 leaves it to the owner", self.in_flight);
            return fail("in_flight", why);
        }
        if self.strands > MOST_IN_FLIGHT {
            let why = format!("is {}, and must be at most {MOST_IN_FLIGHT}; 0 leaves it to the owner", self.strands);
            return fail("strands", why);
        }
        if self.strands > 1 && self.is_drawn_or_compared() {
            let why =
                "cuts micro-batches that are left whole, with preferences, dropout or neftune_noise_alpha; 0 or 1";
            return fail("strands", why.into());
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

    /// The objective and what it needs.
    fn validate_objective(&self) -> Result<(), InvalidSetting> {
        let fail = |field, why: String| Err(InvalidSetting { field, why });
        if let Some(beta) = self.beta {
            if !(beta.is_finite() && beta > 0.0) {
                return fail("beta", format!("is {beta}, and must be more than 0"));
            }
            if self.objective == Objective::Sft {
                return fail("beta", format!("is {beta}, but only the objectives \"dpo\" and \"orpo\" have one"));
            }
        }
        if self.reference.is_some() && self.objective != Objective::Dpo {
            return fail("reference", "is set, but only the objective \"dpo\" has one".into());
        }
        let noise = self.neftune_noise_alpha;
        if !(noise.is_finite() && noise >= 0.0) {
            return fail("neftune_noise_alpha", format!("is {noise}, and must be at least 0, which adds none"));
        }
        Ok(())
    }

    /// When a run ends early, and with which of its steps.
    fn validate_stopping(&self) -> Result<(), InvalidSetting> {
        let fail = |field, why: String| Err(InvalidSetting { field, why });
        let threshold = self.early_stopping_threshold;
        if !(threshold.is_finite() && threshold >= 0.0) {
            return fail("early_stopping_threshold", format!("is {threshold}, and must be at least 0"));
        }
        match self.early_stopping_patience {
            Some(0) => {
                fail("early_stopping_patience", "is 0, and must be at least 1; leave it out to stop at the end".into())
            }
            Some(_) if self.eval_every == 0 => {
                fail("early_stopping_patience", "is set, but eval_every is 0: nothing is evaluated on the way".into())
            }
            None if threshold > 0.0 => {
                fail("early_stopping_threshold", "is set without early_stopping_patience".into())
            }
            _ => Ok(()),
        }
    }

    /// Steps and epochs, the warm-up and the schedule.
    fn validate_length(&self) -> Result<(), InvalidSetting> {
        let fail = |field, why: String| Err(InvalidSetting { field, why });
        if let Some(epochs) = self.epochs {
            if !(epochs > 0.0 && epochs <= MOST_EPOCHS) {
                return fail("epochs", format!("is {epochs}, and must be more than 0 and at most {MOST_EPOCHS}"));
            }
            if let Some(steps) = self.steps {
                return fail("epochs", format!("is {epochs} beside steps = {steps}: either says how long the run is"));
            }
        }
        if let Some(ratio) = self.warmup_ratio {
            if !(0.0..=1.0).contains(&ratio) {
                return fail("warmup_ratio", format!("is {ratio}, and must be from 0 to 1"));
            }
            if let Some(steps) = self.warmup_steps {
                let why = format!("is {ratio} beside warmup_steps = {steps}: either says how long the warm-up is");
                return fail("warmup_ratio", why);
            }
        }
        let (steps, share) = (self.warmup_steps.unwrap_or(0) > 0, self.warmup_ratio.unwrap_or(0.0) > 0.0);
        if self.schedule == Schedule::Constant && (steps || share) {
            let field = if steps { "warmup_steps" } else { "warmup_ratio" };
            return fail(
                field,
                "is set, but a constant schedule has no warm-up: write schedule = \"constant_with_warmup\"".into(),
            );
        }
        match self.schedule_cycles {
            Some(0) => fail("schedule_cycles", "is 0, and must be at least 1".into()),
            Some(cycles) if self.schedule != Schedule::CosineWithRestarts => {
                let why = format!("is {cycles}, but only schedule = \"cosine_with_restarts\" has cycles");
                fail("schedule_cycles", why)
            }
            _ => Ok(()),
        }
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
    fn epochs_and_shares_become_steps() {
        let config = TrainingConfig { micro_batch: 2, accumulation: 3, ..TrainingConfig::default() };
        let resolved = |config: &TrainingConfig, examples| {
            let resolved = config.resolved(examples).unwrap();
            assert_eq!((resolved.epochs, resolved.warmup_ratio), (None, None));
            assert_eq!(resolved.resolved(1).unwrap(), resolved, "nothing is left to follow from the examples");
            (resolved.steps(), resolved.warmup_steps())
        };
        let epochs = |epochs| TrainingConfig { epochs: Some(epochs), ..config.clone() };
        assert_eq!(resolved(&config, 7), (100, 5));
        assert_eq!(resolved(&epochs(1.0), 60), (10, 5));
        assert_eq!(resolved(&epochs(2.5), 61), (26, 5));
        assert_eq!(resolved(&epochs(0.01), 60), (1, 1));
        assert_eq!(resolved(&TrainingConfig { warmup_ratio: Some(0.25), ..epochs(1.0) }, 60), (10, 3));
        assert_eq!(resolved(&TrainingConfig { warmup_steps: Some(0), ..epochs(1.0) }, 60), (10, 0));
        let constant = TrainingConfig { schedule: Schedule::Constant, ..epochs(1.0) };
        assert_eq!(resolved(&constant, 60), (10, 0));
        let error = epochs(1e6).resolved(1 << 40).unwrap_err();
        assert!(error.to_string().starts_with("epochs are"), "{error}");
    }

    #[test]
    fn the_field_that_cannot_be_is_named() {
        type Spoil = fn(&mut TrainingConfig);
        let spoiled: [(&str, Spoil); 34] = [
            ("beta", |c| c.beta = Some(0.1)),
            ("beta", |c| (c.objective, c.beta) = (Objective::Dpo, Some(0.0))),
            ("reference", |c| (c.objective, c.reference) = (Objective::Orpo, Some(Reference::Base))),
            ("neftune_noise_alpha", |c| c.neftune_noise_alpha = -1.0),
            ("early_stopping_patience", |c| c.early_stopping_patience = Some(2)),
            ("early_stopping_patience", |c| (c.eval_every, c.early_stopping_patience) = (5, Some(0))),
            ("early_stopping_threshold", |c| c.early_stopping_threshold = 0.1),
            ("early_stopping_threshold", |c| c.early_stopping_threshold = f64::NAN),
            ("lora.lora_plus_ratio", |c| c.lora.lora_plus_ratio = 0.0),
            ("lora.rank_pattern", |c| c.lora.rank_pattern = [("q_proj".to_owned(), 0)].into_iter().collect()),
            ("steps", |c| c.steps = Some(0)),
            ("epochs", |c| c.epochs = Some(0.0)),
            ("epochs", |c| c.epochs = Some(f64::NAN)),
            ("epochs", |c| (c.steps, c.epochs) = (Some(100), Some(1.0))),
            ("warmup_ratio", |c| c.warmup_ratio = Some(1.1)),
            ("warmup_ratio", |c| (c.warmup_steps, c.warmup_ratio) = (Some(0), Some(0.1))),
            ("warmup_ratio", |c| (c.schedule, c.warmup_ratio) = (Schedule::Constant, Some(0.1))),
            ("warmup_steps", |c| (c.schedule, c.warmup_steps) = (Schedule::Constant, Some(1))),
            ("schedule_cycles", |c| c.schedule_cycles = Some(2)),
            ("schedule_cycles", |c| (c.schedule, c.schedule_cycles) = (Schedule::CosineWithRestarts, Some(0))),
            ("betas", |c| c.betas.0 = -0.1),
            ("micro_batch", |c| c.micro_batch = 0),
            ("in_flight", |c| c.in_flight = 1000),
            ("strands", |c| c.strands = 1000),
            ("strands", |c| (c.strands, c.lora.dropout) = (2, 0.1)),
            ("strands", |c| (c.strands, c.neftune_noise_alpha) = (2, 5.0)),
            ("strands", |c| (c.strands, c.objective) = (2, Objective::Dpo)),
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
