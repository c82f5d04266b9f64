//! The families that are known.

use super::gguf::GgufLayout;
use super::{Activation, BiasRule, BiasRules, Cap, Defaults, Family, LayerNorms, QkNorm, Whole, WindowRule};

pub(super) const FAMILIES: &[&Family] = &[&LLAMA, &MISTRAL, &QWEN2, &QWEN3, &SMOLLM3, &OLMO2, &PHI3, &GEMMA2, &GEMMA3];

/// Before attention and before the feed-forward block.
const PRE_NORMS: LayerNorms = LayerNorms {
    before_attention: Some("input_layernorm"),
    after_attention: None,
    before_feed_forward: Some("post_attention_layernorm"),
    after_feed_forward: None,
};
/// On both sides of each.
const FOUR_NORMS: LayerNorms = LayerNorms {
    before_attention: Some("input_layernorm"),
    after_attention: Some("post_attention_layernorm"),
    before_feed_forward: Some("pre_feedforward_layernorm"),
    after_feed_forward: Some("post_feedforward_layernorm"),
};
/// Of what each adds to the stream alone.
const POST_NORMS: LayerNorms = LayerNorms { before_attention: None, before_feed_forward: None, ..FOUR_NORMS };

const NO_BIASES: BiasRules = BiasRules { qkv: BiasRule::Never, o: BiasRule::Never, mlp: BiasRule::Never };
/// `attention_bias` speaks of all four projections of attention.
const ATTENTION_FLAG: BiasRules =
    BiasRules { qkv: BiasRule::Flag("attention_bias"), o: BiasRule::Flag("attention_bias"), mlp: BiasRule::Never };

const DEFAULTS: Defaults = Defaults {
    head_dim: None,
    rms_norm_eps: 1e-6,
    rope_theta: 10_000.0,
    local_rope_theta: None,
    max_positions: 2048,
    tied: false,
    activation: Activation::Silu,
    query_scalar: None,
    score_cap: Cap::Never,
    logit_cap: Cap::Never,
    original_context: None,
    unrotated_each: None,
};

/// Llama 2 and 3, and what has their configuration: SmolLM2, TinyLlama, Yi.
pub(super) const LLAMA: Family = Family {
    model_type: "llama",
    class: "LlamaForCausalLM",
    whole: None,
    norms: PRE_NORMS,
    qk_norm: None,
    centred_norms: false,
    fused: false,
    partial_rotary: false,
    scaled_embeddings: false,
    biases: BiasRules { mlp: BiasRule::Flag("mlp_bias"), ..ATTENTION_FLAG },
    windows: WindowRule::Never,
    activation: "hidden_act",
    defaults: DEFAULTS,
    gguf: GgufLayout { architecture: "llama", interleaved: true, each_sees_all: None, scaled_by_hidden: None },
};

/// Mistral; llama.cpp knows it as Llama.
const MISTRAL: Family = Family {
    model_type: "mistral",
    class: "MistralForCausalLM",
    biases: NO_BIASES,
    windows: WindowRule::Every { default: Some(4096) },
    defaults: Defaults { max_positions: 131_072, ..DEFAULTS },
    gguf: LLAMA.gguf,
    ..LLAMA
};

/// Qwen 2 and 2.5.
const QWEN2: Family = Family {
    model_type: "qwen2",
    class: "Qwen2ForCausalLM",
    biases: BiasRules { qkv: BiasRule::Always, ..NO_BIASES },
    windows: WindowRule::FromLayer { default: 4096, first: 28 },
    defaults: Defaults { max_positions: 32_768, ..DEFAULTS },
    gguf: GgufLayout { architecture: "qwen2", interleaved: false, ..LLAMA.gguf },
    ..LLAMA
};

/// Qwen 3 without experts.
const QWEN3: Family = Family {
    model_type: "qwen3",
    class: "Qwen3ForCausalLM",
    qk_norm: Some(QkNorm::PerHead),
    biases: ATTENTION_FLAG,
    defaults: Defaults { head_dim: Some(128), ..QWEN2.defaults },
    gguf: GgufLayout { architecture: "qwen3", ..QWEN2.gguf },
    ..QWEN2
};

/// SmolLM3.
const SMOLLM3: Family = Family {
    model_type: "smollm3",
    class: "SmolLM3ForCausalLM",
    windows: WindowRule::Unrotated,
    defaults: Defaults {
        rope_theta: 2_000_000.0,
        max_positions: 32_768,
        tied: true,
        unrotated_each: Some(4),
        ..DEFAULTS
    },
    gguf: GgufLayout { architecture: "smollm3", ..LLAMA.gguf },
    ..LLAMA
};

/// OLMo 2.
const OLMO2: Family = Family {
    model_type: "olmo2",
    class: "Olmo2ForCausalLM",
    norms: POST_NORMS,
    qk_norm: Some(QkNorm::Whole),
    biases: ATTENTION_FLAG,
    defaults: Defaults { rms_norm_eps: 1e-5, ..DEFAULTS },
    gguf: GgufLayout { architecture: "olmo2", ..QWEN2.gguf },
    ..LLAMA
};

/// Phi-3 and Phi-4.
const PHI3: Family = Family {
    model_type: "phi3",
    class: "Phi3ForCausalLM",
    fused: true,
    partial_rotary: true,
    biases: NO_BIASES,
    windows: WindowRule::Every { default: None },
    defaults: Defaults { rms_norm_eps: 1e-5, max_positions: 4096, original_context: Some(4096), ..DEFAULTS },
    gguf: GgufLayout { architecture: "phi3", ..QWEN2.gguf },
    ..LLAMA
};

/// Gemma 2.
const GEMMA2: Family = Family {
    model_type: "gemma2",
    class: "Gemma2ForCausalLM",
    norms: FOUR_NORMS,
    centred_norms: true,
    scaled_embeddings: true,
    biases: ATTENTION_FLAG,
    windows: WindowRule::AllBut { default: 4096, each: 2, setting: None },
    activation: "hidden_activation",
    defaults: Defaults {
        head_dim: Some(256),
        max_positions: 8192,
        tied: true,
        activation: Activation::GeluTanh,
        query_scalar: Some(256.0),
        score_cap: Cap::UnlessSaid(Some(50.0)),
        logit_cap: Cap::UnlessSaid(Some(30.0)),
        ..DEFAULTS
    },
    gguf: GgufLayout { architecture: "gemma2", each_sees_all: Some(2), scaled_by_hidden: Some(46), ..QWEN2.gguf },
    ..LLAMA
};

/// Gemma 3, of which those with images have it for their text.
const GEMMA3: Family = Family {
    model_type: "gemma3_text",
    class: "Gemma3ForCausalLM",
    whole: Some(&Whole {
        model_type: "gemma3",
        class: "Gemma3ForConditionalGeneration",
        sizes: &[
            ("vocab_size", 262_208),
            ("hidden_size", 2304),
            ("intermediate_size", 9216),
            ("num_hidden_layers", 26),
            ("num_attention_heads", 8),
            ("num_key_value_heads", 4),
        ],
    }),
    qk_norm: Some(QkNorm::PerHead),
    windows: WindowRule::AllBut { default: 4096, each: 6, setting: Some("sliding_window_pattern") },
    defaults: Defaults {
        rope_theta: 1_000_000.0,
        local_rope_theta: Some(10_000.0),
        max_positions: 131_072,
        score_cap: Cap::Never,
        logit_cap: Cap::UnlessSaid(None),
        ..GEMMA2.defaults
    },
    gguf: GgufLayout { architecture: "gemma3", each_sees_all: Some(6), scaled_by_hidden: Some(62), ..GEMMA2.gguf },
    ..GEMMA2
};
