//! A configuration as the `config.json` that says it: what a family's own rules do not say already is spelt out.

use serde_json::{Map, Value as Json, json};

use super::{StoredAs, tokenizer};
use crate::model::LlamaConfig;
use crate::model::family::{BiasRule, Cap, Rope, RopeScaling, WindowRule};

/// The settings of a model.
pub(super) fn of(config: &LlamaConfig, stored_as: StoredAs) -> Json {
    let (family, traits) = (config.family, &config.traits);
    let mut settings = json!({
        "architectures": [family.class], "model_type": family.model_type, "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size, "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads, "num_key_value_heads": config.kv_heads, "head_dim": config.head_dim,
        "vocab_size": config.vocabulary, "rms_norm_eps": config.rms_norm_eps, "rope_theta": config.rope.theta,
        "rope_scaling": scaling(&config.rope), "tie_word_embeddings": config.tie_word_embeddings,
        "max_position_embeddings": config.max_positions, "bos_token_id": tokenizer::TURN, "eos_token_id": tokenizer::END,
        "torch_dtype": stored_as.in_config(),
    });
    let mut more = Map::new();
    let mut set = |name: &str, value: Json| drop(more.insert(name.to_owned(), value));
    set(family.activation, traits.activation.name().into());
    for (rule, value) in [
        (family.biases.qkv, traits.biases.qkv),
        (family.biases.o, traits.biases.o),
        (family.biases.mlp, traits.biases.mlp),
    ] {
        if let BiasRule::Flag(name) = rule {
            set(name, value.into());
        }
    }
    if family.windows != WindowRule::Never {
        set("sliding_window", traits.window.as_ref().map(|window| window.keys).into());
        set("use_sliding_window", traits.window.is_some().into());
        if !matches!(family.windows, WindowRule::Every { .. }) {
            let windowed = |layer| config.window_of(layer).is_some();
            let kind = |layer| if windowed(layer) { "sliding_attention" } else { "full_attention" };
            set("layer_types", (0..config.layers).map(kind).collect());
        }
    }
    if family.defaults.unrotated_each.is_some() {
        let rotated = |layer| u8::from(config.rope_of(layer).is_some());
        set("no_rope_layers", (0..config.layers).map(rotated).collect());
    }
    if let Some(rope) = &traits.local_rope {
        set("rope_local_base_freq", rope.theta.into());
    }
    if family.partial_rotary {
        set("partial_rotary_factor", (config.rope.features as f64 / config.head_dim as f64).into());
    }
    if let (Some(_), Some(RopeScaling::LongRope(scaling))) = (family.defaults.original_context, &config.rope.scaling) {
        set("original_max_position_embeddings", scaling.context.into());
    }
    for (name, cap, value) in [
        ("attn_logit_softcapping", family.defaults.score_cap, traits.score_cap),
        ("final_logit_softcapping", family.defaults.logit_cap, traits.logit_cap),
    ] {
        if cap != Cap::Never {
            set(name, value.into());
        }
    }
    if let Some(scalar) = traits.query_scalar {
        // Hugging Face takes nothing but a whole number.
        set("query_pre_attn_scalar", if scalar.fract() == 0.0 { (scalar as u64).into() } else { scalar.into() });
    }
    if let Json::Object(settings) = &mut settings {
        settings.append(&mut more);
    }
    settings
}

fn scaling(rope: &Rope) -> Json {
    match &rope.scaling {
        None | Some(RopeScaling::Factors(_)) => Json::Null,
        Some(RopeScaling::Linear { factor }) => json!({"rope_type": "linear", "factor": factor}),
        Some(RopeScaling::Dynamic { factor, .. }) => json!({"rope_type": "dynamic", "factor": factor}),
        Some(RopeScaling::Llama3(s)) => json!({
            "rope_type": "llama3", "factor": s.factor, "low_freq_factor": s.low_freq_factor,
            "high_freq_factor": s.high_freq_factor,
            "original_max_position_embeddings": s.original_max_position_embeddings,
        }),
        Some(RopeScaling::Yarn(s)) => json!({
            "rope_type": "yarn", "factor": s.factor, "attention_factor": s.attention_factor, "beta_fast": s.beta_fast,
            "beta_slow": s.beta_slow, "original_max_position_embeddings": s.context, "truncate": s.truncate,
        }),
        Some(RopeScaling::LongRope(s)) => json!({
            "rope_type": "longrope", "short_factor": s.short, "long_factor": s.long,
            "attention_factor": s.attention_factor, "original_max_position_embeddings": s.context,
        }),
    }
}
