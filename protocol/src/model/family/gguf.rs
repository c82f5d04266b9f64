//! How llama.cpp writes a family: its names of tensors, the order of query and key rows, and a configuration in metadata.
//! What the metadata leave out (which layers have windows, how scores are scaled) llama.cpp has in its code; here it is in
//! the family's description.

use std::collections::HashMap;
use std::path::Path;

use super::rope::{LongRopeScaling, Rope, RopeScaling, YarnRopeScaling};
use super::traits::{Biases, LayerSet, Traits, Window};
use super::{BiasRule, Family, WindowRule, names};
use crate::model::Projection;
use crate::model::config::{LlamaConfig, divided_heads, possible_layers};
use crate::model::error::ModelError;
use crate::model::weights::{Rows, Value};

/// What llama.cpp does with a family.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct GgufLayout {
    /// `general.architecture`.
    pub(crate) architecture: &'static str,
    /// Whether the rows of queries and keys are interleaved for its own rotary positions.
    pub(crate) interleaved: bool,
    /// Each so-manieth layer has no window where the others have one.
    pub(crate) each_sees_all: Option<usize>,
    /// The number of layers of a model whose scores are scaled by `hidden_size / heads`, not by the features of a head.
    pub(crate) scaled_by_hidden: Option<usize>,
}

/// llama.cpp's name of a tensor, and whether its rows are interleaved.
pub(crate) fn gguf_name(family: &Family, name: &str) -> Option<(String, bool)> {
    let whole = match name {
        "model.embed_tokens.weight" => Some("token_embd.weight"),
        "model.norm.weight" => Some("output_norm.weight"),
        "lm_head.weight" => Some("output.weight"),
        _ => None,
    };
    if let Some(name) = whole {
        return Some((name.to_owned(), false));
    }
    let (layer, part) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let (part, kind) = part.rsplit_once('.').filter(|(_, kind)| matches!(*kind, "weight" | "bias"))?;
    let norms = &family.norms;
    let part = match part {
        part if norms.before_attention == Some(part) => "attn_norm",
        part if norms.after_attention == Some(part) => "post_attention_norm",
        part if norms.before_feed_forward == Some(part) => "ffn_norm",
        part if norms.after_feed_forward == Some(part) => "post_ffw_norm",
        "self_attn.q_norm" => "attn_q_norm",
        "self_attn.k_norm" => "attn_k_norm",
        "self_attn.q_proj" => "attn_q",
        "self_attn.k_proj" => "attn_k",
        "self_attn.v_proj" => "attn_v",
        "self_attn.qkv_proj" => "attn_qkv",
        "self_attn.o_proj" => "attn_output",
        "mlp.gate_proj" => "ffn_gate",
        "mlp.up_proj" | "mlp.gate_up_proj" => "ffn_up",
        "mlp.down_proj" => "ffn_down",
        _ => return None,
    };
    let interleaved = family.gguf.interleaved && matches!(part, "attn_q" | "attn_k");
    Some((format!("blk.{layer}.{part}.{kind}"), interleaved))
}

/// Where llama.cpp has a projection's weights.
pub struct GgufPlace {
    name: String,
    rows: Rows,
}

impl GgufPlace {
    /// Its tensor's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Which row of its tensor is row `row` of the projection, an output feature.
    pub fn row(&self, row: usize) -> usize {
        self.rows.in_file(row)
    }
}

impl Family {
    /// What llama.cpp calls it (`general.architecture`).
    pub fn gguf_architecture(&self) -> &'static str {
        self.gguf.architecture
    }
}

impl LlamaConfig {
    /// Where llama.cpp has the weights of a layer's projection; `None` if it has no name for it.
    pub fn gguf_place(&self, layer: usize, projection: Projection) -> Option<GgufPlace> {
        let name = format!("model.layers.{layer}.{}.weight", projection.name());
        let (name, interleaved) = gguf_name(self.family, &name)?;
        let rows = if interleaved { Rows::Interleaved { head_dim: self.head_dim } } else { Rows::Plain };
        Some(GgufPlace { name, rows })
    }
}

/// Reads the numbers of a vector, by its name in the file, if it is there.
type ReadVector<'a> = dyn Fn(&str) -> Result<Option<Vec<f32>>, ModelError> + 'a;

/// What a configuration is made of.
pub(crate) struct GgufSource<'a> {
    pub(crate) path: &'a Path,
    pub(crate) metadata: &'a HashMap<&'a str, Value<'a>>,
    /// The shape of a tensor, by its name in the file, if it is there.
    pub(crate) shape: &'a dyn Fn(&str) -> Option<&'a [usize]>,
    pub(crate) vector: &'a ReadVector<'a>,
}

/// Metadata of one family by their names without its own.
struct Metadata<'a> {
    path: &'a Path,
    all: &'a HashMap<&'a str, Value<'a>>,
    architecture: &'static str,
}

impl<'a> Metadata<'a> {
    fn get(&self, key: &str) -> Option<&'a Value<'a>> {
        self.all.get(format!("{}.{key}", self.architecture).as_str())
    }

    fn count(&self, key: &str) -> Option<usize> {
        self.get(key).and_then(Value::count)
    }

    fn float(&self, key: &str) -> Option<f64> {
        self.get(key).and_then(Value::float)
    }

    fn need(&self, key: &str) -> Result<usize, ModelError> {
        let missing = || format!("the metadata {}.{key} is missing or not a count", self.architecture);
        self.count(key).ok_or_else(|| ModelError::config(self.path, missing()))
    }

    fn need_float(&self, key: &str) -> Result<f64, ModelError> {
        let missing = || format!("the metadata {}.{key} is missing or not a number", self.architecture);
        self.float(key).ok_or_else(|| ModelError::config(self.path, missing()))
    }

    fn fail<T>(&self, what: String) -> Result<T, ModelError> {
        Err(ModelError::config(self.path, what))
    }
}

impl LlamaConfig {
    /// The configuration that a GGUF file's metadata and a few of its tensors make.
    pub(crate) fn from_gguf(source: &GgufSource<'_>) -> Result<Self, ModelError> {
        let (path, all) = (source.path, source.metadata);
        let found = all.get("general.architecture").and_then(Value::text);
        let Some(family) = found.and_then(Family::of_gguf) else {
            let found = found.unwrap_or("not given (general.architecture)").to_owned();
            return Err(ModelError::Architecture { path: path.to_owned(), found, known: names() });
        };
        let metadata = Metadata { path, all, architecture: family.gguf.architecture };
        if metadata.count("expert_count").is_some_and(|experts| experts > 0) {
            return metadata.fail("the model is a mixture of experts, which cannot be served".to_owned());
        }
        let (hidden_size, heads) = (metadata.need("embedding_length")?, metadata.need("attention.head_count")?);
        let head_dim = match metadata.count("attention.key_length") {
            Some(head_dim) => head_dim,
            None => divided_heads(path, hidden_size, heads)?,
        };
        let architecture = family.gguf.architecture;
        if let Some(found) = metadata.count("attention.value_length").filter(|&found| found != head_dim) {
            return metadata.fail(format!(
                "{architecture}.attention.value_length is {found} where a head has {head_dim} features"
            ));
        }
        let features = metadata.count("rope.dimension_count").unwrap_or(head_dim);
        if features != head_dim && !family.partial_rotary {
            return metadata.fail(format!(
                "{architecture}.rope.dimension_count is {features} where a head has {head_dim} features"
            ));
        }
        let layers = possible_layers(path, metadata.need("block_count")?)?;
        let tokens = all.get("tokenizer.ggml.tokens").and_then(Value::array).map(<[_]>::len);
        let embedded = (source.shape)("token_embd.weight").and_then(|shape| shape.first().copied());
        let vocabulary = embedded.or(tokens).or(metadata.count("vocab_size"));
        let token = |key: &str| all.get(key).and_then(Value::count).and_then(|id| u32::try_from(id).ok());
        let defaults = family.defaults;
        let theta = metadata.float("rope.freq_base").unwrap_or(defaults.rope_theta);
        let has = |part: &str| (source.shape)(&format!("blk.0.{part}.bias")).is_some();
        let window = window(family, &metadata, layers)?;
        let local_theta = metadata.float("rope.freq_base_swa").or(defaults.local_rope_theta);
        Ok(Self {
            family,
            hidden_size,
            intermediate_size: metadata.need("feed_forward_length")?,
            layers,
            heads,
            kv_heads: metadata.count("attention.head_count_kv").unwrap_or(heads),
            head_dim,
            vocabulary: vocabulary.unwrap_or(0),
            rms_norm_eps: metadata.need_float("attention.layer_norm_rms_epsilon")?,
            rope: Rope { theta, features, scaling: scaling(&metadata, source.vector)? },
            tie_word_embeddings: (source.shape)("output.weight").is_none(),
            max_positions: metadata.need("context_length")?,
            bos: token("tokenizer.ggml.bos_token_id"),
            eos: token("tokenizer.ggml.eos_token_id").into_iter().collect(),
            traits: Traits {
                of_larger: false,
                biases: Biases {
                    qkv: family.biases.qkv == BiasRule::Always || has("attn_q") || has("attn_qkv"),
                    o: has("attn_output"),
                    mlp: has("ffn_up") || has("ffn_down"),
                },
                activation: defaults.activation,
                local_rope: local_theta.filter(|_| window.is_some()).map(|theta| Rope::plain(theta, features)),
                window,
                unrotated: match defaults.unrotated_each {
                    Some(each) => LayerSet::of(layers, |layer| (layer + 1).is_multiple_of(each)),
                    None => LayerSet::default(),
                },
                query_scalar: defaults.query_scalar.map(|_| match family.gguf.scaled_by_hidden {
                    Some(large) if large == layers => (hidden_size / heads.max(1)) as f64,
                    _ => head_dim as f64,
                }),
                score_cap: metadata.float("attn_logit_softcapping"),
                logit_cap: metadata.float("final_logit_softcapping"),
                embedding_scale: family.scaled_embeddings.then(|| (hidden_size as f64).sqrt()),
            },
        })
    }
}

fn window(family: &Family, metadata: &Metadata<'_>, layers: usize) -> Result<Option<Window>, ModelError> {
    let Some(keys) = metadata.count("attention.sliding_window").filter(|&keys| keys > 0) else { return Ok(None) };
    let pattern = metadata.get("attention.sliding_window_pattern").and_then(Value::array);
    let layers = match (pattern, family.gguf.each_sees_all) {
        (Some(pattern), _) => {
            let windowed: Vec<bool> = pattern.iter().map(|layer| layer.flag().unwrap_or(false)).collect();
            LayerSet::of(layers, |layer| windowed.get(layer).copied().unwrap_or(false))
        }
        (None, Some(each)) => LayerSet::of(layers, |layer| !(layer + 1).is_multiple_of(each)),
        (None, None) => LayerSet::Every,
    };
    if layers == LayerSet::default() {
        return Ok(None);
    }
    if family.windows == WindowRule::Never && family.gguf.architecture != Family::LLAMA.gguf.architecture {
        let architecture = family.gguf.architecture;
        return metadata.fail(format!(
            "{architecture}.attention.sliding_window is {keys}, but `{}` has no windows: the file is of a later family, \
             which is not known",
            family.model_type
        ));
    }
    Ok(Some(Window { keys, layers }))
}

fn scaling(metadata: &Metadata<'_>, factors: &ReadVector<'_>) -> Result<Option<RopeScaling>, ModelError> {
    if let Some(factors) = factors("rope_freqs.weight")? {
        return Ok(Some(RopeScaling::Factors(factors)));
    }
    let context = metadata.count("rope.scaling.original_context_length");
    let attention_factor = metadata.float("rope.scaling.attn_factor").unwrap_or(1.0);
    if let (Some(short), Some(long)) = (factors("rope_factors_short.weight")?, factors("rope_factors_long.weight")?) {
        let Some(context) = context else {
            let key = "rope.scaling.original_context_length";
            return metadata.fail(format!("the metadata {}.{key} is missing or not a count", metadata.architecture));
        };
        let numbers = |factors: Vec<f32>| factors.into_iter().map(f64::from).collect();
        let (short, long) = (numbers(short), numbers(long));
        return Ok(Some(RopeScaling::LongRope(LongRopeScaling { short, long, context, attention_factor })));
    }
    match metadata.get("rope.scaling.type").and_then(Value::text) {
        None | Some("none") => Ok(None),
        Some("linear") => Ok(Some(RopeScaling::Linear { factor: metadata.need_float("rope.scaling.factor")? })),
        Some("yarn") => {
            let factor = metadata.need_float("rope.scaling.factor")?;
            Ok(Some(RopeScaling::Yarn(YarnRopeScaling {
                factor,
                attention_factor: attention_factor * YarnRopeScaling::usual_attention_factor(factor, 1.0),
                beta_fast: metadata.float("rope.scaling.yarn_beta_fast").unwrap_or(32.0),
                beta_slow: metadata.float("rope.scaling.yarn_beta_slow").unwrap_or(1.0),
                context: context.map_or_else(|| metadata.need("context_length"), Ok)?,
                truncate: true,
            })))
        }
        Some(other) => metadata.fail(format!(
            "{}.rope.scaling.type is `{other}`; `linear` and `yarn` are supported",
            metadata.architecture
        )),
    }
}
