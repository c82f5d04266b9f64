//! Rotary positions: how fast each pair of a head's features turns, whatever stretches a model for long contexts.
//!
//! The rules are those of Hugging Face's `modeling_rope_utils`, with one difference where they depend on a text's length
//! (dynamic and longrope scaling): each text turns by its own length, as if it were alone, not by that of the longest one
//! that happens to be in the same batch.

use serde::Deserialize;

/// Longest context that a scaling may speak of.
const MAX_CONTEXT: usize = 1 << 26;

/// The rotary positions of some layers.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// Features of a head that turn, from its first on; even. The others stay as they are.
    pub features: usize,
    /// How frequencies are stretched for long contexts.
    pub scaling: Option<RopeScaling>,
}

/// Change of the rotary frequencies for long contexts.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Every frequency divided by a factor.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// A base that grows with texts beyond the context that the model was trained with.
    Dynamic {
        /// How far the base grows with the length.
        factor: f64,
        /// The longest text that turns as without scaling.
        context: usize,
    },
    /// Llama 3: low frequencies divided by a factor, high ones kept, a smooth transition between.
    Llama3(Llama3RopeScaling),
    /// YaRN: the same by a ramp over the frequencies' numbers, with attention made sharper.
    Yarn(YarnRopeScaling),
    /// Divisors of each frequency: some for texts within the first context, others for longer ones.
    LongRope(LongRopeScaling),
    /// A divisor for each of the frequencies, as GGUF files store Llama 3's (`rope_freqs.weight`).
    Factors(Vec<f32>),
}

/// Parameters of Llama 3's frequency scaling.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
pub struct Llama3RopeScaling {
    /// Divisor of the low frequencies.
    pub factor: f64,
    /// Turns within the original context up to which a frequency is low.
    pub low_freq_factor: f64,
    /// Turns within the original context from which a frequency is high.
    pub high_freq_factor: f64,
    /// The context length that the model was first trained with.
    pub original_max_position_embeddings: usize,
}

/// Parameters of YaRN (Peng et al., 2023).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct YarnRopeScaling {
    /// Divisor of the low frequencies.
    pub factor: f64,
    /// Factor of turned queries and of turned keys.
    pub attention_factor: f64,
    /// Turns within the original context from which a frequency is kept.
    pub beta_fast: f64,
    /// Turns up to which it is divided.
    pub beta_slow: f64,
    /// The context length that the model was first trained with.
    pub context: usize,
    /// Whether the ends of the ramp are whole numbers.
    pub truncate: bool,
}

/// Parameters of LongRoPE (Ding et al., 2024), as Phi-3 and Phi-4-mini have them.
#[derive(Clone, Debug, PartialEq)]
pub struct LongRopeScaling {
    /// Divisors for texts within the original context.
    pub short: Vec<f64>,
    /// Divisors for longer ones.
    pub long: Vec<f64>,
    /// The context length that the model was first trained with.
    pub context: usize,
    /// Factor of turned queries and of turned keys.
    pub attention_factor: f64,
}

impl Rope {
    /// Without scaling.
    pub fn plain(theta: f64, features: usize) -> Self {
        Self { theta, features, scaling: None }
    }

    /// The `features / 2` frequencies in radians a position, for a text of so many tokens. Feature `i` of a head turns
    /// together with feature `i + features / 2`.
    pub fn frequencies(&self, length: usize) -> Vec<f32> {
        let plain = |theta: f64| {
            let exponents = (0..self.features / 2).map(|i| -(2.0 * i as f64) / self.features as f64);
            exponents.map(|exponent| theta.powf(exponent)).collect::<Vec<_>>()
        };
        let mut frequencies = plain(self.theta);
        let divide = |frequencies: &mut [f64], divisors: &mut dyn Iterator<Item = f64>| {
            frequencies.iter_mut().zip(divisors).for_each(|(frequency, divisor)| *frequency /= divisor);
        };
        match &self.scaling {
            None => {}
            Some(RopeScaling::Linear { factor }) => divide(&mut frequencies, &mut std::iter::repeat(*factor)),
            &Some(RopeScaling::Dynamic { factor, context }) => {
                let stretched = factor * length.max(context) as f64 / context as f64 - (factor - 1.0);
                let features = self.features as f64;
                frequencies = plain(self.theta * stretched.powf(features / (features - 2.0)));
            }
            Some(RopeScaling::Llama3(scaling)) => frequencies.iter_mut().for_each(|f| *f = scaling.scale(*f)),
            Some(RopeScaling::Yarn(scaling)) => scaling.scale(self, &mut frequencies),
            Some(RopeScaling::LongRope(scaling)) => {
                let divisors = if length > scaling.context { &scaling.long } else { &scaling.short };
                divide(&mut frequencies, &mut divisors.iter().copied());
            }
            Some(RopeScaling::Factors(factors)) => divide(&mut frequencies, &mut factors.iter().map(|&f| f.into())),
        }
        frequencies.into_iter().map(|frequency| frequency as f32).collect()
    }

    /// What turned queries and turned keys are multiplied by.
    pub fn attention_factor(&self) -> f64 {
        match &self.scaling {
            Some(RopeScaling::Yarn(scaling)) => scaling.attention_factor,
            Some(RopeScaling::LongRope(scaling)) => scaling.attention_factor,
            _ => 1.0,
        }
    }

    /// The longest text that turns by the frequencies of a short one, if longer ones turn by others.
    pub fn one_for_up_to(&self) -> Option<usize> {
        match &self.scaling {
            Some(RopeScaling::Dynamic { context, .. }) => Some(*context),
            Some(RopeScaling::LongRope(scaling)) => Some(scaling.context),
            _ => None,
        }
    }

    /// Checks that the numbers are possible in a head of so many features.
    ///
    /// # Errors
    /// Names the setting that is not, as Hugging Face calls it.
    pub(crate) fn validate(&self, head_dim: usize) -> Result<(), String> {
        let positive = |value: f64| value.is_finite() && value > 0.0;
        let context = |context: usize| (1..=MAX_CONTEXT).contains(&context);
        if !positive(self.theta) {
            return Err(format!("rope_theta is {}; it must be a positive number", self.theta));
        }
        if !self.features.is_multiple_of(2) || self.features == 0 || self.features > head_dim {
            let what = if self.features == head_dim { "head_dim" } else { "the part of head_dim that turns" };
            return Err(format!(
                "{what} is {}; rotary positions need an even number, at most {head_dim}",
                self.features
            ));
        }
        let divisors = |name: &str, divisors: &[f64]| {
            if divisors.len() == self.features / 2 && divisors.iter().copied().all(positive) {
                return Ok(());
            }
            Err(format!("{name} does not hold {} positive divisors", self.features / 2))
        };
        match &self.scaling {
            None => Ok(()),
            Some(RopeScaling::Linear { factor }) if positive(*factor) => Ok(()),
            Some(RopeScaling::Linear { factor }) => Err(format!("rope_scaling.factor is {factor}")),
            Some(RopeScaling::Dynamic { factor, context: length })
                if factor.is_finite() && *factor >= 1.0 && context(*length) && self.features > 2 =>
            {
                Ok(())
            }
            Some(RopeScaling::Dynamic { factor, .. }) => {
                Err(format!("rope_scaling.factor is {factor}; it must be at least 1 where the scaling is dynamic"))
            }
            Some(RopeScaling::Llama3(s)) => {
                let ordered = positive(s.low_freq_factor) && s.high_freq_factor > s.low_freq_factor;
                let bounded = context(s.original_max_position_embeddings) && s.high_freq_factor.is_finite();
                if ordered && bounded && positive(s.factor) {
                    return Ok(());
                }
                Err(format!("the rope_scaling of type llama3 has impossible values: {s:?}"))
            }
            Some(RopeScaling::Yarn(s)) => {
                let turns = positive(s.beta_slow) && s.beta_fast.is_finite() && s.beta_fast >= s.beta_slow;
                if turns && context(s.context) && positive(s.factor) && positive(s.attention_factor) && self.theta > 1.0
                {
                    return Ok(());
                }
                Err(format!("the rope_scaling of type yarn has impossible values: {s:?}"))
            }
            Some(RopeScaling::LongRope(s)) => {
                divisors("rope_scaling.short_factor", &s.short)?;
                divisors("rope_scaling.long_factor", &s.long)?;
                if context(s.context) && positive(s.attention_factor) {
                    return Ok(());
                }
                let (length, factor) = (s.context, s.attention_factor);
                Err(format!(
                    "the rope_scaling of type longrope has the context {length} and the attention_factor {factor}"
                ))
            }
            Some(RopeScaling::Factors(factors)) => {
                divisors("rope_freqs.weight", &factors.iter().map(|&factor| f64::from(factor)).collect::<Vec<_>>())
            }
        }
    }

    /// Everything that it is, as a word and numbers, for a model's digest.
    pub(crate) fn scaling_in_numbers(&self) -> (&'static str, Vec<f64>) {
        match &self.scaling {
            None => ("none", Vec::new()),
            Some(RopeScaling::Linear { factor }) => ("linear", vec![*factor]),
            Some(RopeScaling::Dynamic { factor, context }) => ("dynamic", vec![*factor, *context as f64]),
            Some(RopeScaling::Llama3(s)) => {
                let context = s.original_max_position_embeddings as f64;
                ("llama3", vec![s.factor, s.low_freq_factor, s.high_freq_factor, context])
            }
            Some(RopeScaling::Yarn(s)) => {
                let truncate = f64::from(u8::from(s.truncate));
                ("yarn", vec![s.factor, s.attention_factor, s.beta_fast, s.beta_slow, s.context as f64, truncate])
            }
            Some(RopeScaling::LongRope(s)) => {
                let constants = [s.context as f64, s.attention_factor];
                ("longrope", constants.iter().chain(&s.short).chain(&s.long).copied().collect())
            }
            Some(RopeScaling::Factors(factors)) => ("factors", factors.iter().map(|&factor| factor.into()).collect()),
        }
    }
}

impl Llama3RopeScaling {
    /// What each frequency of these rotary positions is divided by.
    pub(crate) fn divisors(&self, rope: &Rope) -> Vec<f64> {
        let exponents = (0..rope.features / 2).map(|i| -(2.0 * i as f64) / rope.features as f64);
        exponents.map(|exponent| rope.theta.powf(exponent)).map(|plain| plain / self.scale(plain)).collect()
    }

    fn scale(&self, frequency: f64) -> f64 {
        let turns = self.original_max_position_embeddings as f64 * frequency / std::f64::consts::TAU;
        let keep = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor);
        let keep = keep.clamp(0.0, 1.0);
        frequency * (keep + (1.0 - keep) / self.factor)
    }
}

impl YarnRopeScaling {
    /// The factor of attention where a configuration gives none.
    pub(crate) fn usual_attention_factor(factor: f64, mscale: f64) -> f64 {
        if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
    }

    fn scale(&self, rope: &Rope, frequencies: &mut [f64]) {
        let features = rope.features as f64;
        // The number of the frequency that turns so often within the original context.
        let number = |turns: f64| {
            let wave = self.context as f64 / (turns * std::f64::consts::TAU);
            features * wave.ln() / (2.0 * rope.theta.ln())
        };
        let (mut low, mut high) = (number(self.beta_fast), number(self.beta_slow));
        if self.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(features - 1.0));
        if low == high {
            high += 0.001;
        }
        for (i, frequency) in frequencies.iter_mut().enumerate() {
            let divided = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
            *frequency *= divided / self.factor + (1.0 - divided);
        }
    }
}

impl LongRopeScaling {
    /// The factor of attention where a configuration gives none: of a context that is so many times the original one.
    pub(crate) fn usual_attention_factor(factor: f64, context: usize) -> f64 {
        if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / (context as f64).ln()).sqrt() }
    }
}
