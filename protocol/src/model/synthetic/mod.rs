//! Models made of random numbers, for tests and for measurements: any dimensions, real file formats, and a small
//! tokenizer with a chat template, without a download.

mod folder;
mod gguf;
mod known;
mod settings;
mod tokenizer;

use std::path::Path;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use super::{EMBEDDINGS, Family, LlamaConfig, ModelError, Rope, Traits};

pub use folder::StoredAs;
pub use known::{KnownModel, UnknownModel};
pub use tokenizer::{CHAT_TEMPLATE, VOCABULARY};

/// Numbers drawn from one generator; each run of them has its own, so that all cores draw.
const RUN: usize = 1 << 16;

/// A random model, of Llama or another family.
///
/// Weights are normal with variance `1 / d_in`, norms' scales close to one, so that activations keep their size
/// through the layers. The same seed and dimensions give the same numbers in every format.
#[derive(Clone, Debug)]
pub struct SyntheticLlama {
    /// Dimensions and constants; at least [`VOCABULARY`] tokens. `bos` and `eos` are set by the tokenizer.
    pub config: LlamaConfig,
    /// Seed of all weights.
    pub seed: u64,
}

impl SyntheticLlama {
    /// Random weights in the dimensions of a published model.
    pub fn known(model: KnownModel, seed: u64) -> Self {
        Self { config: model.config(), seed }
    }

    /// Two layers of 64 features, 4 query heads over 2 key heads, tied embeddings: small enough for any test.
    pub fn tiny(seed: u64) -> Self {
        let config = LlamaConfig {
            family: Family::LLAMA,
            hidden_size: 64,
            intermediate_size: 96,
            layers: 2,
            heads: 4,
            kv_heads: 2,
            head_dim: 16,
            vocabulary: VOCABULARY,
            rms_norm_eps: 1e-5,
            rope: Rope::plain(10_000.0, 16),
            tie_word_embeddings: true,
            max_positions: 512,
            bos: Some(tokenizer::TURN),
            eos: vec![tokenizer::END],
            traits: Traits::default(),
        };
        Self { config, seed }
    }

    /// The numbers of a tensor, by its Hugging Face name, row-major.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Vec<f32> {
        let mut values = vec![0.0f32; shape.iter().product()];
        self.draw(name, shape, 0, &mut values);
        values
    }

    /// The numbers of a tensor from run `first_run` on, as many as fit `values`.
    fn draw(&self, name: &str, shape: &[usize], first_run: usize, values: &mut [f32]) {
        let (centre, deviation) = match shape {
            [_] if name.ends_with(".bias") => (0.0, 0.1),
            [_] if self.config.family.centred_norms => (0.0, 0.05),
            [_] => (1.0, 0.05),
            // A tied head multiplies features of size one: logits stay small in a wide model, too.
            [.., d_in] if name == EMBEDDINGS => (0.0, 32.0 / *d_in as f32),
            [.., d_in] => (0.0, (*d_in as f32).sqrt().recip()),
            [] => (0.0, 1.0),
        };
        let key = blake3::derive_key("velum synthetic tensor 1", &[&self.seed.to_le_bytes(), name.as_bytes()].concat());
        values.par_chunks_mut(RUN).enumerate().for_each(|(run, values)| {
            let mut random = ChaCha8Rng::from_seed(key);
            random.set_stream((first_run + run) as u64);
            for pair in values.chunks_mut(2) {
                // Box and Muller: two uniform numbers make two normal ones.
                let radius = (-2.0 * (1.0 - random.random::<f32>()).ln()).sqrt();
                let (sine, cosine) = (std::f32::consts::TAU * random.random::<f32>()).sin_cos();
                for (value, side) in pair.iter_mut().zip([cosine, sine]) {
                    *value = centre + deviation * radius * side;
                }
            }
        });
    }

    fn check(&self, path: &Path) -> Result<(), ModelError> {
        if self.config.vocabulary < VOCABULARY {
            let what = format!("the vocabulary is {}; the tokenizer needs {VOCABULARY}", self.config.vocabulary);
            return Err(ModelError::config(path, what));
        }
        self.config.validate(path)
    }
}
