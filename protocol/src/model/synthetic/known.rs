//! Configurations of published models, by name, so that shapes, memory and speed can be measured without a download.

use std::fmt;
use std::str::FromStr;

use super::{SyntheticLlama, tokenizer};
use crate::model::{Llama3RopeScaling, LlamaConfig, RopeScaling};

/// A published model whose configuration is known here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KnownModel {
    /// Two layers of 64 features; nobody's model, but small enough for any test.
    Tiny,
    /// SmolLM2-135M.
    SmolLm2_135m,
    /// Llama-3.2-1B.
    Llama32_1b,
    /// Llama-3.2-3B.
    Llama32_3b,
    /// Llama-3.1-8B.
    Llama31_8b,
    /// Llama-3.3-70B.
    Llama33_70b,
}

impl KnownModel {
    /// All of them, smallest first.
    pub const ALL: [Self; 6] =
        [Self::Tiny, Self::SmolLm2_135m, Self::Llama32_1b, Self::Llama32_3b, Self::Llama31_8b, Self::Llama33_70b];

    /// Its name on a command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tiny => "tiny",
            Self::SmolLm2_135m => "smollm2-135m",
            Self::Llama32_1b => "llama-3.2-1b",
            Self::Llama32_3b => "llama-3.2-3b",
            Self::Llama31_8b => "llama-3.1-8b",
            Self::Llama33_70b => "llama-3.3-70b",
        }
    }

    /// Its dimensions and constants. The special tokens are those of the synthetic tokenizer.
    pub fn config(self) -> LlamaConfig {
        match self {
            Self::Tiny => SyntheticLlama::tiny(0).config,
            Self::SmolLm2_135m => LlamaConfig {
                hidden_size: 576,
                intermediate_size: 1536,
                layers: 30,
                heads: 9,
                kv_heads: 3,
                head_dim: 64,
                vocabulary: 49_152,
                rms_norm_eps: 1e-5,
                rope_theta: 100_000.0,
                rope_scaling: None,
                tie_word_embeddings: true,
                max_positions: 8_192,
                bos: Some(tokenizer::TURN),
                eos: vec![tokenizer::END],
            },
            Self::Llama32_1b => llama_3(2048, 8_192, 16, 32),
            Self::Llama32_3b => LlamaConfig { head_dim: 128, ..llama_3(3072, 8_192, 28, 24) },
            Self::Llama31_8b => llama_3_large(4096, 14_336, 32, 32),
            Self::Llama33_70b => llama_3_large(8192, 28_672, 80, 64),
        }
    }
}

/// What the large models of Llama 3 share.
fn llama_3_large(hidden_size: usize, intermediate_size: usize, layers: usize, heads: usize) -> LlamaConfig {
    LlamaConfig {
        head_dim: 128,
        rope_scaling: Some(RopeScaling::Llama3(scaling(8.0))),
        tie_word_embeddings: false,
        ..llama_3(hidden_size, intermediate_size, layers, heads)
    }
}

fn scaling(factor: f64) -> Llama3RopeScaling {
    Llama3RopeScaling { factor, low_freq_factor: 1.0, high_freq_factor: 4.0, original_max_position_embeddings: 8_192 }
}

/// What all models of Llama 3 share, with what the two small ones of Llama 3.2 have of their own.
fn llama_3(hidden_size: usize, intermediate_size: usize, layers: usize, heads: usize) -> LlamaConfig {
    LlamaConfig {
        hidden_size,
        intermediate_size,
        layers,
        heads,
        kv_heads: 8,
        head_dim: 64,
        vocabulary: 128_256,
        rms_norm_eps: 1e-5,
        rope_theta: 500_000.0,
        rope_scaling: Some(RopeScaling::Llama3(scaling(32.0))),
        tie_word_embeddings: true,
        max_positions: 131_072,
        bos: Some(tokenizer::TURN),
        eos: vec![tokenizer::END],
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
