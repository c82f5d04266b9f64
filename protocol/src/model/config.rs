//! A Llama's dimensions and constants, whichever file they come from, checked before anything trusts them.

use std::path::Path;

use serde::Deserialize;

use super::error::ModelError;
use crate::ids::{Group, LinearId, LinearShape};

/// Most features that a product sums over: 65,000 products of a byte by an int8 cannot overflow 32 bits.
pub const MAX_FEATURES: usize = 65_000;
const MAX_LAYERS: usize = 1_024;
const MAX_VOCABULARY: usize = 1 << 21;
const MAX_POSITIONS: usize = 1 << 26;

/// Configuration of a Llama.
#[derive(Clone, Debug, PartialEq)]
pub struct LlamaConfig {
    /// Features of the residual stream.
    pub hidden_size: usize,
    /// Features inside the feed-forward block.
    pub intermediate_size: usize,
    /// Transformer layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Features of a head; even.
    pub head_dim: usize,
    /// Tokens in the vocabulary.
    pub vocabulary: usize,
    /// Added to the mean square in RMS norms.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// How rotary frequencies are stretched for long contexts.
    pub rope_scaling: Option<RopeScaling>,
    /// Whether the head is the embedding matrix.
    pub tie_word_embeddings: bool,
    /// Longest sequence that the model was made for.
    pub max_positions: usize,
    /// Token that begins a text.
    pub bos: Option<u32>,
    /// Tokens that end a text or a turn; the first one is the one to write.
    pub eos: Vec<u32>,
}

/// Change of the rotary frequencies for long contexts.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Every frequency divided by a factor.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3: low frequencies divided by a factor, high ones kept, a smooth transition between.
    Llama3(Llama3RopeScaling),
    /// A divisor for each of the `head_dim / 2` frequencies, as GGUF files store Llama 3's (`rope_freqs.weight`).
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

impl LlamaConfig {
    /// Dimensions of a served matrix: those of a group are the same in every layer, those of the head in every slice.
    pub fn shape(&self, group: Group) -> LinearShape {
        let (queries, keys) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let (d_in, d_out) = match group {
            Group::Qkv => (self.hidden_size, queries + 2 * keys),
            Group::O => (queries, self.hidden_size),
            Group::GateUp => (self.hidden_size, 2 * self.intermediate_size),
            Group::Down => (self.intermediate_size, self.hidden_size),
            Group::Head => return self.head_shape(),
        };
        LinearShape { d_in, d_out }
    }

    /// Every served matrix of the layers, in the order of the forward pass: the head's slices are beside them
    /// ([`Self::head_linear`]).
    pub fn linears(&self) -> impl Iterator<Item = LinearId> + use<> {
        let layers = u16::try_from(self.layers).unwrap_or(u16::MAX);
        (0..layers).flat_map(|layer| Group::ALL.map(|group| LinearId { layer, group }))
    }

    /// The `head_dim / 2` rotary frequencies in radians a position, scaled for long contexts where the model says so.
    /// Feature `i` of a head turns together with feature `i + head_dim / 2`.
    pub fn inverse_frequencies(&self) -> Vec<f32> {
        let half = self.head_dim / 2;
        let plain = (0..half).map(|i| self.rope_theta.powf(-(2.0 * i as f64) / self.head_dim as f64));
        let scaled = plain.enumerate().map(|(i, frequency)| match &self.rope_scaling {
            None => frequency,
            Some(RopeScaling::Linear { factor }) => frequency / factor,
            Some(RopeScaling::Llama3(scaling)) => scaling.scale(frequency),
            Some(RopeScaling::Factors(factors)) => frequency / f64::from(factors[i]),
        });
        scaled.map(|frequency| frequency as f32).collect()
    }

    /// Checks that the numbers are possible and that the products fit the integer kernels.
    ///
    /// # Errors
    /// [`ModelError::Config`] naming the file and the setting.
    pub fn validate(&self, path: &Path) -> Result<(), ModelError> {
        let fail = |what: String| Err(ModelError::config(path, what));
        for (name, value, limit) in [
            ("hidden_size", self.hidden_size, MAX_FEATURES),
            ("intermediate_size", self.intermediate_size, MAX_FEATURES),
            ("num_hidden_layers", self.layers, MAX_LAYERS),
            ("num_attention_heads", self.heads, MAX_FEATURES),
            ("num_key_value_heads", self.kv_heads, self.heads),
            ("head_dim", self.head_dim, MAX_FEATURES),
            ("vocab_size", self.vocabulary, MAX_VOCABULARY),
            ("max_position_embeddings", self.max_positions, MAX_POSITIONS),
        ] {
            if value == 0 || value > limit {
                return fail(format!("{name} is {value}; it must be from 1 to {limit}"));
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return fail(format!(
                "num_attention_heads ({}) is not a multiple of num_key_value_heads ({})",
                self.heads, self.kv_heads
            ));
        }
        if !self.head_dim.is_multiple_of(2) {
            return fail(format!("head_dim is {}; rotary positions need an even number", self.head_dim));
        }
        for group in Group::ALL {
            let LinearShape { d_in, d_out } = self.shape(group);
            if d_in.max(d_out) > MAX_FEATURES {
                return fail(format!(
                    "the {group:?} products are {d_in} × {d_out}; more than {MAX_FEATURES} features overflow the integer kernels"
                ));
            }
        }
        for (name, value) in [("rms_norm_eps", self.rms_norm_eps), ("rope_theta", self.rope_theta)] {
            if !(value.is_finite() && value > 0.0) {
                return fail(format!("{name} is {value}; it must be a positive number"));
            }
        }
        if let Some(&id) = self.bos.iter().chain(&self.eos).find(|&&id| id as usize >= self.vocabulary) {
            return fail(format!("the special token {id} is outside the vocabulary of {}", self.vocabulary));
        }
        self.validate_scaling().map_err(|what| ModelError::config(path, what))
    }

    fn validate_scaling(&self) -> Result<(), String> {
        let positive = |value: f64| value.is_finite() && value > 0.0;
        match &self.rope_scaling {
            None => Ok(()),
            Some(RopeScaling::Linear { factor }) if positive(*factor) => Ok(()),
            Some(RopeScaling::Linear { factor }) => Err(format!("rope_scaling.factor is {factor}")),
            Some(RopeScaling::Llama3(s)) => {
                let ordered = positive(s.low_freq_factor) && s.high_freq_factor > s.low_freq_factor;
                let bounded = (1..=MAX_POSITIONS).contains(&s.original_max_position_embeddings);
                if ordered && bounded && positive(s.factor) && s.high_freq_factor.is_finite() {
                    return Ok(());
                }
                Err(format!("the rope_scaling of type llama3 has impossible values: {s:?}"))
            }
            Some(RopeScaling::Factors(factors)) => {
                if factors.len() == self.head_dim / 2 && factors.iter().all(|&f| positive(f.into())) {
                    return Ok(());
                }
                Err(format!("rope_freqs.weight does not hold {} positive divisors", self.head_dim / 2))
            }
        }
    }
}

impl Llama3RopeScaling {
    fn scale(&self, frequency: f64) -> f64 {
        let turns = self.original_max_position_embeddings as f64 * frequency / std::f64::consts::TAU;
        let keep = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor);
        let keep = keep.clamp(0.0, 1.0);
        frequency * (keep + (1.0 - keep) / self.factor)
    }
}

/// Hugging Face's `config.json`: the settings that matter, and those that must have the value that is served.
#[derive(Deserialize)]
struct HfConfig {
    model_type: Option<String>,
    architectures: Option<Vec<String>>,
    hidden_size: Option<usize>,
    intermediate_size: Option<usize>,
    num_hidden_layers: Option<usize>,
    num_attention_heads: Option<usize>,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    vocab_size: Option<usize>,
    rms_norm_eps: Option<f64>,
    rope_theta: Option<f64>,
    rope_scaling: Option<serde_json::Value>,
    rope_parameters: Option<serde_json::Value>,
    tie_word_embeddings: Option<bool>,
    max_position_embeddings: Option<usize>,
    bos_token_id: Option<OneOrMany>,
    eos_token_id: Option<OneOrMany>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    hidden_act: Option<String>,
    quantization_config: Option<serde_json::Value>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

impl OneOrMany {
    fn into_vec(self) -> Vec<u32> {
        match self {
            Self::One(id) => vec![id],
            Self::Many(ids) => ids,
        }
    }
}

impl LlamaConfig {
    /// Reads the text of a Hugging Face `config.json`; `path` is for messages.
    ///
    /// # Errors
    /// [`ModelError::Architecture`] for another architecture, [`ModelError::Config`] for anything that is
    /// missing, impossible or not supported.
    pub fn from_json(path: &Path, json: &str) -> Result<Self, ModelError> {
        let hf: HfConfig = serde_json::from_str(json)
            .map_err(|error| ModelError::config(path, format!("not a config.json: {error}")))?;
        let kind = hf.model_type.clone().or_else(|| hf.architectures.clone().and_then(|mut a| a.pop()));
        match kind.as_deref() {
            Some("llama" | "LlamaForCausalLM") => {}
            found => {
                let found = found.unwrap_or("not given (model_type)").to_owned();
                return Err(ModelError::Architecture { path: path.to_owned(), found });
            }
        }
        let need = |value: Option<usize>, name: &str| {
            value.ok_or_else(|| ModelError::config(path, format!("the setting {name} is missing")))
        };
        for (set, name) in [(hf.attention_bias, "attention_bias"), (hf.mlp_bias, "mlp_bias")] {
            if set == Some(true) {
                return Err(ModelError::config(
                    path,
                    format!("{name} is true; projections with a bias cannot be served"),
                ));
            }
        }
        if let Some(act) = hf.hidden_act.as_deref().filter(|&act| act != "silu") {
            return Err(ModelError::config(path, format!("hidden_act is `{act}`; only `silu` is supported")));
        }
        if hf.quantization_config.is_some() {
            let what =
                "the weights are packed by a quantiser (quantization_config); use the f32, f16, bf16 or GGUF release";
            return Err(ModelError::config(path, what));
        }
        let (hidden_size, heads) =
            (need(hf.hidden_size, "hidden_size")?, need(hf.num_attention_heads, "num_attention_heads")?);
        let (rope_theta, rope_scaling) = rope(path, &hf)?;
        let config = Self {
            hidden_size,
            intermediate_size: need(hf.intermediate_size, "intermediate_size")?,
            layers: need(hf.num_hidden_layers, "num_hidden_layers")?,
            heads,
            kv_heads: hf.num_key_value_heads.unwrap_or(heads),
            head_dim: match hf.head_dim {
                Some(head_dim) => head_dim,
                None => divided_heads(path, hidden_size, heads)?,
            },
            vocabulary: need(hf.vocab_size, "vocab_size")?,
            rms_norm_eps: hf.rms_norm_eps.unwrap_or(1e-6),
            rope_theta,
            rope_scaling,
            tie_word_embeddings: hf.tie_word_embeddings.unwrap_or(false),
            max_positions: hf.max_position_embeddings.unwrap_or(2048),
            bos: hf.bos_token_id.and_then(|ids| ids.into_vec().first().copied()),
            eos: hf.eos_token_id.map(OneOrMany::into_vec).unwrap_or_default(),
        };
        config.validate(path)?;
        Ok(config)
    }
}

/// Head size when it is not given: the hidden features divided among the query heads.
pub(crate) fn divided_heads(path: &Path, hidden_size: usize, heads: usize) -> Result<usize, ModelError> {
    match hidden_size.checked_rem(heads) {
        Some(0) => Ok(hidden_size / heads),
        _ => Err(ModelError::config(
            path,
            format!("the hidden size {hidden_size} cannot be divided among {heads} heads"),
        )),
    }
}

fn rope(path: &Path, hf: &HfConfig) -> Result<(f64, Option<RopeScaling>), ModelError> {
    let fail = |what: String| ModelError::config(path, what);
    let table = hf.rope_parameters.as_ref().or(hf.rope_scaling.as_ref()).filter(|value| !value.is_null());
    let in_table = table.and_then(|table| table.get("rope_theta")).and_then(serde_json::Value::as_f64);
    let theta = hf.rope_theta.or(in_table).unwrap_or(10_000.0);
    let Some(table) = table else { return Ok((theta, None)) };
    let kind = table.get("rope_type").or_else(|| table.get("type")).and_then(serde_json::Value::as_str);
    let scaling = match kind {
        Some("default") => None,
        None if hf.rope_parameters.is_some() => None,
        Some("linear") => {
            let factor = table.get("factor").and_then(serde_json::Value::as_f64);
            Some(RopeScaling::Linear {
                factor: factor.ok_or_else(|| fail("rope_scaling.factor is missing".to_owned()))?,
            })
        }
        Some("llama3") => {
            let scaling = serde_json::from_value(table.clone())
                .map_err(|error| fail(format!("rope_scaling of type llama3: {error}")))?;
            Some(RopeScaling::Llama3(scaling))
        }
        other => {
            let other = other.unwrap_or("not given");
            return Err(fail(format!(
                "the rope_scaling type is `{other}`; `llama3`, `linear` and `default` are supported"
            )));
        }
    };
    Ok((theta, scaling))
}
