//! Hugging Face's `config.json` of any family: what it says and what it leaves out, as transformers 5 understands it.

use std::path::Path;

use serde_json::{Map, Value};

use super::rope_json::RopeReader;
use super::settings::Settings;
use super::traits::{Activation, Biases, LayerSet, Traits, Window};
use super::{BiasRule, Cap, Family, WindowRule, names};
use crate::model::config::{LlamaConfig, divided_heads, possible_layers};
use crate::model::error::ModelError;

/// Dropout that Hugging Face applies in training, of what the owner computes; it is left out here.
const DROPOUTS: [&str; 3] = ["attention_dropout", "resid_pdrop", "embd_pdrop"];
/// Packings of weights that are read.
const FP8: [&str; 3] = ["fp8", "fbgemm_fp8", "compressed-tensors"];

impl LlamaConfig {
    /// Reads the text of a Hugging Face `config.json`; `path` is for messages. Where two statements contradict each other,
    /// what was made of them is added to `notes`.
    ///
    /// # Errors
    /// [`ModelError::Architecture`] for a family that is not known, [`ModelError::Config`] for anything that is
    /// missing, impossible or not supported.
    pub fn from_json(path: &Path, json: &str, notes: &mut Vec<String>) -> Result<Self, ModelError> {
        let parsed: Value = serde_json::from_str(json)
            .map_err(|error| ModelError::config(path, format!("not a config.json: {error}")))?;
        let Value::Object(map) = &parsed else {
            return Err(ModelError::config(path, "not a config.json: it is no table of settings"));
        };
        let whole = Settings::new(path, map);
        let part = text_part(whole, map, notes)?;
        let (family, settings) = match &part {
            Some((family, text)) => (*family, Settings::new(path, text)),
            None => (family(path, whole)?, whole),
        };
        check_packing(whole)?;
        if settings.flag("use_bidirectional_attention")? == Some(true) {
            return Err(settings.fail("use_bidirectional_attention is true; only causal attention is supported"));
        }
        for name in DROPOUTS {
            if settings.number(name)?.is_some_and(|rate| rate > 0.0) {
                notes.push(format!("config.json: {name} is not applied; lora.dropout is the dropout of a run"));
            }
        }
        let defaults = family.defaults;
        let layers = possible_layers(path, settings.need_count("num_hidden_layers")?)?;
        let (hidden_size, heads) = (settings.need_count("hidden_size")?, settings.need_count("num_attention_heads")?);
        let head_dim = match settings.count("head_dim")?.or(defaults.head_dim) {
            Some(head_dim) => head_dim,
            None => divided_heads(path, hidden_size, heads)?,
        };
        let max_positions = settings.count("max_position_embeddings")?.unwrap_or(defaults.max_positions);
        let mut traits = traits(family, settings, layers, hidden_size)?;
        let (rope, local_rope) = RopeReader { family, settings, head_dim, max_positions, notes }.read()?;
        traits.local_rope = local_rope;
        traits.of_larger = part.is_some();
        let config = Self {
            family,
            hidden_size,
            intermediate_size: settings.need_count("intermediate_size")?,
            layers,
            heads,
            kv_heads: settings.count("num_key_value_heads")?.unwrap_or(heads),
            head_dim,
            vocabulary: settings.need_count("vocab_size")?,
            rms_norm_eps: settings.number("rms_norm_eps")?.unwrap_or(defaults.rms_norm_eps),
            rope,
            tie_word_embeddings: settings.flag("tie_word_embeddings")?.unwrap_or(defaults.tied),
            max_positions,
            bos: settings.tokens("bos_token_id")?.first().copied(),
            eos: settings.tokens("eos_token_id")?,
            traits,
        };
        config.validate(path)?;
        Ok(config)
    }
}

/// What a configuration calls the model.
fn model_type<'a>(settings: Settings<'a>) -> Result<Option<&'a str>, ModelError> {
    let class = settings.list("architectures")?.and_then(<[_]>::last).and_then(Value::as_str);
    Ok(settings.text("model_type")?.or(class))
}

/// The family and the settings of a text's model in a larger one.
type TextPart = (&'static Family, Map<String, Value>);

/// The settings of the text's model, if that is part of a larger one: as transformers has them where they are left out, and with
/// what it takes from the larger one.
fn text_part(
    whole: Settings<'_>,
    map: &Map<String, Value>,
    notes: &mut Vec<String>,
) -> Result<Option<TextPart>, ModelError> {
    let Some((family, of)) = model_type(whole)?.and_then(Family::of_whole) else { return Ok(None) };
    let Some(text) = whole.get("text_config").and_then(Value::as_object) else {
        let what = format!("a `{}` has its text model described in text_config, which is missing", of.model_type);
        return Err(whole.fail(what));
    };
    if let Some(other) = text.get("model_type").filter(|&other| *other != family.model_type && !other.is_null()) {
        let (of, known) = (of.model_type, family.model_type);
        return Err(whole.fail(format!("text_config.model_type is {other}; that of a `{of}` is `{known}`")));
    }
    let mut settings = text.clone();
    for &(name, size) in of.sizes {
        if settings.get(name).is_none_or(Value::is_null) {
            settings.insert(name.to_owned(), size.into());
        }
    }
    for name in ["bos_token_id", "eos_token_id"] {
        if let Some(token) = whole.get(name) {
            settings.insert(name.to_owned(), token.clone());
        }
    }
    // transformers asks the larger model whether the head is tied.
    let tied = map.get("tie_word_embeddings").cloned().unwrap_or(family.defaults.tied.into());
    if let Some(other) = settings.insert("tie_word_embeddings".to_owned(), tied.clone()).filter(|other| *other != tied)
    {
        notes.push(format!(
            "config.json: text_config.tie_word_embeddings is {other}, but that of the whole model is {tied}, which counts, as with \
             Hugging Face"
        ));
    }
    Ok(Some((family, settings)))
}

fn family(path: &Path, settings: Settings<'_>) -> Result<&'static Family, ModelError> {
    let found = model_type(settings)?;
    let family = found.and_then(Family::of_model_type);
    if let (None, Some(_), Some(found)) = (family, settings.get("text_config"), found) {
        return Err(settings.fail(format!(
            "`{found}` takes more than text: its text model is a part of it (text_config); models of text alone can be read, of \
             the families {}",
            names()
        )));
    }
    family.ok_or_else(|| ModelError::Architecture {
        path: path.to_owned(),
        found: found.unwrap_or("not given (model_type)").to_owned(),
        known: names(),
    })
}

fn check_packing(settings: Settings<'_>) -> Result<(), ModelError> {
    let Some(packing) = settings.table("quantization_config", "quantization_config.")? else { return Ok(()) };
    match packing.text("quant_method")? {
        Some(method) if FP8.contains(&method) => Ok(()),
        method => Err(settings.fail(format!(
            "the weights are packed by a quantiser (quantization_config, `{}`); use the f32, f16, bf16, FP8 or GGUF release",
            method.unwrap_or("of no name")
        ))),
    }
}

fn traits(
    family: &'static Family,
    settings: Settings<'_>,
    layers: usize,
    hidden_size: usize,
) -> Result<Traits, ModelError> {
    let defaults = family.defaults;
    let bias = |rule| match rule {
        BiasRule::Never => Ok(false),
        BiasRule::Always => Ok(true),
        BiasRule::Flag(name) => Ok(settings.flag(name)?.unwrap_or(false)),
    };
    for name in ["attention_bias", "mlp_bias"] {
        if settings.flag(name)? == Some(true) && !family.has_setting(name) {
            let what = format!("{name} is true, but models of the family `{}` have no such setting", family.model_type);
            return Err(settings.fail(what));
        }
    }
    let activation = match settings.text(family.activation)? {
        None => defaults.activation,
        Some(name) => Activation::of_name(name).ok_or_else(|| {
            settings.fail(format!("{} is `{name}`; `silu` and `gelu_pytorch_tanh` are supported", family.activation))
        })?,
    };
    // A cap that is `null` is none; one that is left out is the family's.
    let cap = |name: &str, cap| match cap {
        Cap::Never => Ok::<_, ModelError>(None),
        Cap::UnlessSaid(_) if settings.is_null(name) => Ok(None),
        Cap::UnlessSaid(default) => Ok(settings.number(name)?.or(default)),
    };
    let unrotated = unrotated(family, settings, layers)?;
    Ok(Traits {
        biases: Biases { qkv: bias(family.biases.qkv)?, o: bias(family.biases.o)?, mlp: bias(family.biases.mlp)? },
        activation,
        window: window(family, settings, layers, &unrotated)?,
        local_rope: None,
        unrotated,
        query_scalar: match defaults.query_scalar {
            Some(default) => Some(settings.number("query_pre_attn_scalar")?.unwrap_or(default)),
            None => None,
        },
        score_cap: cap("attn_logit_softcapping", defaults.score_cap)?,
        logit_cap: cap("final_logit_softcapping", defaults.logit_cap)?,
        embedding_scale: family.scaled_embeddings.then(|| (hidden_size as f64).sqrt()),
        of_larger: false,
    })
}

/// Layers without rotary positions: `no_rope_layers` has a 1 for each layer that has them.
fn unrotated(family: &'static Family, settings: Settings<'_>, layers: usize) -> Result<LayerSet, ModelError> {
    let Some(each) = family.defaults.unrotated_each else { return Ok(LayerSet::default()) };
    if let Some(list) = settings.list("no_rope_layers")? {
        if list.len() < layers {
            return Err(settings.fail(format!("no_rope_layers speaks of {} layers; there are {layers}", list.len())));
        }
        let rotated = |layer: usize| list[layer].as_bool().unwrap_or(list[layer].as_u64() != Some(0));
        return Ok(LayerSet::of(layers, |layer| !rotated(layer)));
    }
    match settings.count("no_rope_layer_interval")?.unwrap_or(each) {
        0 => Err(settings.fail("no_rope_layer_interval is 0; it must be at least 1")),
        each => Ok(LayerSet::of(layers, |layer| (layer + 1).is_multiple_of(each))),
    }
}

fn window(
    family: &'static Family,
    settings: Settings<'_>,
    layers: usize,
    unrotated: &LayerSet,
) -> Result<Option<Window>, ModelError> {
    let flag = settings.flag("use_sliding_window")? == Some(true);
    let given = settings.count("sliding_window")?;
    let or = |default| if settings.is_null("sliding_window") { None } else { given.or(default) };
    let kinds = settings.list("layer_types")?;
    let (keys, usual) = match family.windows {
        WindowRule::Never => return Ok(None),
        WindowRule::Every { default } => return Ok(or(default).map(|keys| Window { keys, layers: LayerSet::Every })),
        WindowRule::FromLayer { default, first } => {
            let first = settings.count("max_window_layers")?.unwrap_or(first);
            (or(Some(default)).filter(|_| flag), LayerSet::of(layers, |layer| flag && layer >= first))
        }
        WindowRule::Unrotated => {
            let usual = if flag && given.is_some() { unrotated.clone() } else { LayerSet::default() };
            (given, usual)
        }
        WindowRule::AllBut { default, each, setting } => {
            let each = setting.map(|name| settings.count(name)).transpose()?.flatten().unwrap_or(each);
            if each == 0 {
                return Err(settings.fail("sliding_window_pattern is 0; it must be at least 1"));
            }
            (or(Some(default)), LayerSet::of(layers, |layer| !(layer + 1).is_multiple_of(each)))
        }
    };
    let chosen = match kinds {
        None => usual,
        Some(kinds) => layers_by_kind(settings, kinds, layers)?,
    };
    match keys {
        _ if chosen == LayerSet::default() => Ok(None),
        Some(keys) => Ok(Some(Window { keys, layers: chosen })),
        None => Err(settings.fail("some layers have a sliding window (layer_types), but there is no sliding_window")),
    }
}

fn layers_by_kind(settings: Settings<'_>, kinds: &[Value], layers: usize) -> Result<LayerSet, ModelError> {
    if kinds.len() != layers {
        return Err(settings.fail(format!("layer_types speaks of {} layers; there are {layers}", kinds.len())));
    }
    if let Some(other) =
        kinds.iter().find(|kind| !matches!(kind.as_str(), Some("full_attention" | "sliding_attention")))
    {
        return Err(settings.fail(format!(
            "layer_types has {other}; layers of `full_attention` and `sliding_attention` are supported"
        )));
    }
    Ok(LayerSet::of(layers, |layer| kinds[layer] == "sliding_attention"))
}
