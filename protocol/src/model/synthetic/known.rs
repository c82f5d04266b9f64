//! Configurations of published models, by name, so that shapes, memory and speed can be measured without a download.

use std::fmt;
use std::str::FromStr;

use super::{SyntheticLlama, tokenizer};
use crate::model::LlamaConfig;
use crate::model::family::{Activation, Family, LayerSet, Llama3RopeScaling, Rope, RopeScaling, Traits, Window};

/// A published model whose configuration is known here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KnownModel {
    /// Two layers of 64 features; nobody's model, but small enough for any test.
    Tiny,
    /// SmolLM2-135M.
    SmolLm2_135m,
    /// Qwen3-0.6B.
    Qwen3_0_6b,
    /// Gemma 3 1B.
    Gemma3_1b,
    /// Llama-3.2-1B.
    Llama32_1b,
    /// Qwen3-1.7B.
    Qwen3_1_7b,
    /// SmolLM3-3B.
    SmolLm3_3b,
    /// Llama-3.2-3B.
    Llama32_3b,
    /// Qwen3-4B.
    Qwen3_4b,
    /// Mistral-7B of version 0.1, with a window.
    Mistral7b,
    /// Llama-3.1-8B.
    Llama31_8b,
    /// Qwen3-8B.
    Qwen3_8b,
    /// Llama-3.3-70B.
    Llama33_70b,
}

impl KnownModel {
    /// All of them, smallest first.
    pub const ALL: [Self; 13] = [
        Self::Tiny,
        Self::SmolLm2_135m,
        Self::Qwen3_0_6b,
        Self::Gemma3_1b,
        Self::Llama32_1b,
        Self::Qwen3_1_7b,
        Self::SmolLm3_3b,
        Self::Llama32_3b,
        Self::Qwen3_4b,
        Self::Mistral7b,
        Self::Llama31_8b,
        Self::Qwen3_8b,
        Self::Llama33_70b,
    ];

    /// Its name on a command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tiny => "tiny",
            Self::SmolLm2_135m => "smollm2-135m",
            Self::Qwen3_0_6b => "qwen3-0.6b",
            Self::Gemma3_1b => "gemma-3-1b",
            Self::Llama32_1b => "llama-3.2-1b",
            Self::Qwen3_1_7b => "qwen3-1.7b",
            Self::SmolLm3_3b => "smollm3-3b",
            Self::Llama32_3b => "llama-3.2-3b",
            Self::Qwen3_4b => "qwen3-4b",
            Self::Mistral7b => "mistral-7b",
            Self::Llama31_8b => "llama-3.1-8b",
            Self::Qwen3_8b => "qwen3-8b",
            Self::Llama33_70b => "llama-3.3-70b",
        }
    }

    /// Its dimensions and constants. The special tokens are those of the synthetic tokenizer.
    pub fn config(self) -> LlamaConfig {
        match self {
            Self::Tiny => SyntheticLlama::tiny(0).config,
            Self::SmolLm2_135m => LlamaConfig {
                heads: 9,
                kv_heads: 3,
                vocabulary: 49_152,
                rope: Rope::plain(100_000.0, 64),
                max_positions: 8_192,
                ..llama_3(576, 1536, 30, 9)
            },
            Self::Llama32_1b => llama_3(2048, 8_192, 16, 32),
            Self::Llama32_3b => {
                LlamaConfig { head_dim: 128, rope: llama_3_rope(128, 32.0), ..llama_3(3072, 8_192, 28, 24) }
            }
            Self::Llama31_8b => llama_3_large(4096, 14_336, 32, 32),
            Self::Llama33_70b => llama_3_large(8192, 28_672, 80, 64),
            Self::Qwen3_0_6b => qwen_3(1024, 3_072, 28, 16),
            Self::Qwen3_1_7b => qwen_3(2048, 6_144, 28, 16),
            Self::Qwen3_4b => qwen_3(2560, 9_728, 36, 32),
            Self::Qwen3_8b => LlamaConfig { tie_word_embeddings: false, ..qwen_3(4096, 12_288, 36, 32) },
            Self::Mistral7b => mistral_7b(),
            Self::SmolLm3_3b => smollm_3(),
            Self::Gemma3_1b => gemma_3_1b(),
        }
    }
}

fn family(model_type: &str) -> &'static Family {
    Family::of_model_type(model_type).unwrap_or(Family::LLAMA)
}

fn mistral_7b() -> LlamaConfig {
    LlamaConfig {
        family: family("mistral"),
        head_dim: 128,
        vocabulary: 32_000,
        rope: Rope::plain(10_000.0, 128),
        tie_word_embeddings: false,
        max_positions: 32_768,
        traits: Traits { window: Some(Window { keys: 4_096, layers: LayerSet::Every }), ..Traits::default() },
        ..llama_3(4096, 14_336, 32, 32)
    }
}

/// What the models of Qwen 3 without experts share.
fn qwen_3(hidden_size: usize, intermediate_size: usize, layers: usize, heads: usize) -> LlamaConfig {
    LlamaConfig {
        family: family("qwen3"),
        head_dim: 128,
        vocabulary: 151_936,
        rms_norm_eps: 1e-6,
        rope: Rope::plain(1_000_000.0, 128),
        max_positions: 40_960,
        ..llama_3(hidden_size, intermediate_size, layers, heads)
    }
}

fn smollm_3() -> LlamaConfig {
    let layers = 36;
    LlamaConfig {
        family: family("smollm3"),
        kv_heads: 4,
        head_dim: 128,
        rms_norm_eps: 1e-6,
        rope: Rope::plain(5_000_000.0, 128),
        max_positions: 65_536,
        traits: Traits { unrotated: LayerSet::of(layers, |layer| (layer + 1).is_multiple_of(4)), ..Traits::default() },
        ..llama_3(2048, 11_008, layers, 16)
    }
}

fn gemma_3_1b() -> LlamaConfig {
    let (hidden_size, layers) = (1152, 26);
    LlamaConfig {
        family: family("gemma3_text"),
        kv_heads: 1,
        head_dim: 256,
        vocabulary: 262_144,
        rms_norm_eps: 1e-6,
        rope: Rope::plain(1_000_000.0, 256),
        max_positions: 32_768,
        traits: Traits {
            activation: Activation::GeluTanh,
            window: Some(Window { keys: 512, layers: LayerSet::of(layers, |layer| !(layer + 1).is_multiple_of(6)) }),
            local_rope: Some(Rope::plain(10_000.0, 256)),
            query_scalar: Some(256.0),
            embedding_scale: Some((hidden_size as f64).sqrt()),
            ..Traits::default()
        },
        ..llama_3(hidden_size, 6_912, layers, 4)
    }
}

/// What the large models of Llama 3 share.
fn llama_3_large(hidden_size: usize, intermediate_size: usize, layers: usize, heads: usize) -> LlamaConfig {
    LlamaConfig {
        head_dim: 128,
        rope: llama_3_rope(128, 8.0),
        tie_word_embeddings: false,
        ..llama_3(hidden_size, intermediate_size, layers, heads)
    }
}

fn llama_3_rope(features: usize, factor: f64) -> Rope {
    let scaling = Llama3RopeScaling {
        factor,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8_192,
    };
    Rope { theta: 500_000.0, features, scaling: Some(RopeScaling::Llama3(scaling)) }
}

/// What all models of Llama 3 share, with what the two small ones of Llama 3.2 have of their own.
fn llama_3(hidden_size: usize, intermediate_size: usize, layers: usize, heads: usize) -> LlamaConfig {
    LlamaConfig {
        family: Family::LLAMA,
        hidden_size,
        intermediate_size,
        layers,
        heads,
        kv_heads: 8,
        head_dim: 64,
        vocabulary: 128_256,
        rms_norm_eps: 1e-5,
        rope: llama_3_rope(64, 32.0),
        tie_word_embeddings: true,
        max_positions: 131_072,
        bos: Some(tokenizer::TURN),
        eos: vec![tokenizer::END],
        traits: Traits::default(),
    }
}

impl fmt::Display for KnownModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A name that no known model has.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no model is known by the name `{0}`")]
pub struct UnknownModel(String);

impl FromStr for KnownModel {
    type Err = UnknownModel;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::ALL.into_iter().find(|model| model.name() == name).ok_or_else(|| UnknownModel(name.to_owned()))
    }
}
