//! A configuration as llama.cpp's metadata say it: the way back from what [`LlamaConfig::from_gguf`] reads.
//!
//! Much of what a family computes llama.cpp has in its code, and no metadata can say otherwise. What a file that was written
//! means is therefore read again, and compared with what was meant ([`differs`]).

use super::entries::{Entries, Entry};
use crate::model::family::{Family, RopeScaling, WindowRule, YarnRopeScaling};
use crate::model::{LlamaConfig, ModelError, Traits};

/// Numbers that went through 32 bits are this near.
const NEAR: f64 = 1e-6;

/// Adds the metadata of a configuration.
///
/// # Errors
/// What of it llama.cpp has no metadata for, in words.
pub(super) fn set(entries: &mut Entries<'_>, config: &LlamaConfig) -> Result<(), String> {
    let architecture = config.family.gguf_architecture();
    let mut set = |key: &str, value: Entry<'static>| entries.set(format!("{architecture}.{key}"), value);
    for (key, count) in [
        ("vocab_size", config.vocabulary),
        ("context_length", config.max_positions),
        ("embedding_length", config.hidden_size),
        ("block_count", config.layers),
        ("feed_forward_length", config.intermediate_size),
        ("rope.dimension_count", config.rope.features),
        ("attention.head_count", config.heads),
        ("attention.head_count_kv", config.kv_heads),
        ("attention.key_length", config.head_dim),
        ("attention.value_length", config.head_dim),
    ] {
        set(key, Entry::U32(u32::try_from(count).map_err(|_| format!("{key} is {count}"))?));
    }
    set("attention.layer_norm_rms_epsilon", Entry::F32(config.rms_norm_eps as f32));
    set("rope.freq_base", Entry::F32(config.rope.theta as f32));
    let text = |text: &str| Entry::Text(text.to_owned());
    match &config.rope.scaling {
        None | Some(RopeScaling::Llama3(_) | RopeScaling::Factors(_)) => {}
        Some(RopeScaling::Linear { factor }) => {
            set("rope.scaling.type", text("linear"));
            set("rope.scaling.factor", Entry::F32(*factor as f32));
        }
        Some(RopeScaling::Yarn(yarn)) => {
            let usual = YarnRopeScaling::usual_attention_factor(yarn.factor, 1.0);
            set("rope.scaling.type", text("yarn"));
            set("rope.scaling.factor", Entry::F32(yarn.factor as f32));
            set("rope.scaling.original_context_length", Entry::U32(yarn.context as u32));
            set("rope.scaling.attn_factor", Entry::F32((yarn.attention_factor / usual) as f32));
            set("rope.scaling.yarn_beta_fast", Entry::F32(yarn.beta_fast as f32));
            set("rope.scaling.yarn_beta_slow", Entry::F32(yarn.beta_slow as f32));
        }
        Some(RopeScaling::LongRope(long)) => {
            set("rope.scaling.original_context_length", Entry::U32(long.context as u32));
            set("rope.scaling.attn_factor", Entry::F32(long.attention_factor as f32));
        }
        Some(RopeScaling::Dynamic { .. }) => {
            return Err(
                "its rotary positions are stretched as a text grows (dynamic), which llama.cpp does not do".into()
            );
        }
    }
    if let Some(window) = &config.traits.window {
        // Where llama.cpp has no windows in a family's code, saying so would be of no effect.
        if matches!(config.family.windows, WindowRule::FromLayer { .. } | WindowRule::Unrotated) {
            return Err("some of its layers have a window, which llama.cpp leaves out".to_owned());
        }
        set("attention.sliding_window", Entry::U32(window.keys as u32));
    }
    if let Some(rope) = &config.traits.local_rope {
        set("rope.freq_base_swa", Entry::F32(rope.theta as f32));
    }
    for (key, cap) in
        [("attn_logit_softcapping", config.traits.score_cap), ("final_logit_softcapping", config.traits.logit_cap)]
    {
        if let Some(cap) = cap {
            set(key, Entry::F32(cap as f32));
        }
    }
    Ok(())
}

/// Tensors that are made of the configuration: what rotary frequencies are divided by.
pub(super) fn rope_tensors(config: &LlamaConfig) -> Vec<(&'static str, Vec<f32>)> {
    let single = |factors: &[f64]| factors.iter().map(|&factor| factor as f32).collect();
    match &config.rope.scaling {
        Some(RopeScaling::Factors(factors)) => vec![("rope_freqs.weight", factors.clone())],
        Some(RopeScaling::Llama3(llama3)) => vec![("rope_freqs.weight", single(&llama3.divisors(&config.rope)))],
        Some(RopeScaling::LongRope(long)) => {
            vec![("rope_factors_long.weight", single(&long.long)), ("rope_factors_short.weight", single(&long.short))]
        }
        _ => Vec::new(),
    }
}

/// The first thing in which what a file computes differs from what was meant.
pub(super) fn differs(meant: &LlamaConfig, file: &LlamaConfig) -> Option<String> {
    let near = |a: f64, b: f64| (a - b).abs() <= NEAR * a.abs().max(b.abs());
    let counts = |config: &LlamaConfig| {
        [
            ("hidden_size", config.hidden_size),
            ("intermediate_size", config.intermediate_size),
            ("num_hidden_layers", config.layers),
            ("num_attention_heads", config.heads),
            ("num_key_value_heads", config.kv_heads),
            ("head_dim", config.head_dim),
            ("vocab_size", config.vocabulary),
            ("max_position_embeddings", config.max_positions),
            ("tie_word_embeddings", config.tie_word_embeddings.into()),
            ("the features of a head that turn", config.rope.features),
        ]
    };
    for ((name, meant), (_, file)) in counts(meant).into_iter().zip(counts(file)) {
        if meant != file {
            return Some(format!("{name} is {file} in place of {meant}"));
        }
    }
    let alike = |a: &Family, b: &Family| a.norms == b.norms && a.qk_norm == b.qk_norm && a.fused == b.fused;
    if !alike(meant.family, file.family) {
        return Some(format!("the family is `{}`", file.family.model_type));
    }
    if !near(meant.rms_norm_eps, file.rms_norm_eps) {
        return Some(format!("rms_norm_eps is {} in place of {}", file.rms_norm_eps, meant.rms_norm_eps));
    }
    for length in [1, meant.max_positions] {
        let frequencies = (meant.rope.frequencies(length), file.rope.frequencies(length));
        let turned = frequencies.0.iter().zip(&frequencies.1).all(|(a, b)| {
            let (a, b) = (f64::from(*a), f64::from(*b));
            (a - b).abs() <= 10.0 * NEAR * a
        });
        if !turned || !near(meant.rope.attention_factor(), file.rope.attention_factor()) {
            return Some("rotary positions turn otherwise".to_owned());
        }
    }
    if meant.traits.biases != file.traits.biases {
        return Some("biases are added otherwise".to_owned());
    }
    // Without a window no layer turns by positions of its own.
    let numbers = |config: &LlamaConfig| match config.traits.window {
        None => Traits { local_rope: None, ..config.traits.clone() }.in_numbers(),
        Some(_) => config.traits.in_numbers(),
    };
    let (traits, found) = (numbers(meant), numbers(file));
    let unlike = |(name, numbers): &&(&'static str, Vec<f64>)| {
        !found.iter().any(|(other, others)| {
            name == other && numbers.len() == others.len() && numbers.iter().zip(others).all(|(&a, &b)| near(a, b))
        })
    };
    if let Some((name, _)) = traits.iter().find(unlike) {
        return Some(format!("the model's {name} cannot be said"));
    }
    let more = found.iter().find(|(name, _)| !traits.iter().any(|(known, _)| known == name));
    more.map(|(name, _)| format!("the file's {name} is none of the model's"))
}

/// Why a model has no such file.
pub(super) fn unsaid(model: &std::path::Path, what: &str) -> ModelError {
    ModelError::config(
        model,
        format!("llama.cpp cannot compute this model: {what}; `node export merged` writes it for other tools"),
    )
}
