//! Models made of random numbers, for tests and for measurements: any dimensions, real file formats, and a small
//! tokenizer with a chat template, without a download.

mod gguf;
mod tokenizer;

use std::borrow::Cow;
use std::path::Path;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use safetensors::{Dtype, View};
use serde_json::{Value as Json, json};

use super::{EMBEDDINGS, LlamaConfig, ModelError, RopeScaling, expected};

pub use tokenizer::{CHAT_TEMPLATE, VOCABULARY};

/// Numbers drawn from one generator; each run of them has its own, so that all cores draw.
const RUN: usize = 1 << 16;

/// How a folder's weights are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoredAs {
    /// 32-bit floats.
    F32,
    /// 16-bit brain floats.
    Bf16,
}

/// A random Llama.
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
    /// Two layers of 64 features, 4 query heads over 2 key heads, tied embeddings: small enough for any test.
    pub fn tiny(seed: u64) -> Self {
        let config = LlamaConfig {
            hidden_size: 64,
            intermediate_size: 96,
            layers: 2,
            heads: 4,
            kv_heads: 2,
            head_dim: 16,
            vocabulary: VOCABULARY,
            rms_norm_eps: 1e-5,
            rope_theta: 10_000.0,
            rope_scaling: None,
            tie_word_embeddings: true,
            max_positions: 512,
            bos: Some(tokenizer::TURN),
            eos: vec![tokenizer::END],
        };
        Self { config, seed }
    }

    /// The numbers of a tensor, by its Hugging Face name, row-major.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Vec<f32> {
        let numbers: usize = shape.iter().product();
        let (centre, deviation) = match shape {
            [_] => (1.0, 0.05),
            _ if name == EMBEDDINGS => (0.0, 0.5),
            [.., d_in] => (0.0, (*d_in as f32).sqrt().recip()),
            [] => (0.0, 1.0),
        };
        let key = blake3::derive_key("velum synthetic tensor 1", &[&self.seed.to_le_bytes(), name.as_bytes()].concat());
        let mut values = vec![0.0f32; numbers];
        values.par_chunks_mut(RUN).enumerate().for_each(|(run, values)| {
            let mut random = ChaCha8Rng::from_seed(key);
            random.set_stream(run as u64);
            for pair in values.chunks_mut(2) {
                // Box and Muller: two uniform numbers make two normal ones.
                let radius = (-2.0 * (1.0 - random.random::<f32>()).ln()).sqrt();
                let (sine, cosine) = (std::f32::consts::TAU * random.random::<f32>()).sin_cos();
                for (value, side) in pair.iter_mut().zip([cosine, sine]) {
                    *value = centre + deviation * radius * side;
                }
            }
        });
        values
    }

    /// Writes a Hugging Face folder: `config.json`, `model.safetensors`, `tokenizer.json`, `tokenizer_config.json`.
    /// Holds one tensor at a time.
    ///
    /// # Errors
    /// When the configuration is impossible or the disk refuses.
    pub fn write_folder(&self, folder: impl AsRef<Path>, stored_as: StoredAs) -> Result<(), ModelError> {
        let folder = folder.as_ref();
        self.check(folder)?;
        std::fs::create_dir_all(folder).map_err(|source| ModelError::io(folder, source))?;
        let write = |name: &str, json: &Json| {
            let path = folder.join(name);
            std::fs::write(&path, format!("{json:#}\n")).map_err(|source| ModelError::io(&path, source))
        };
        write("config.json", &self.config_json())?;
        write("tokenizer.json", &tokenizer::description())?;
        write("tokenizer_config.json", &tokenizer::settings())?;
        let path = folder.join("model.safetensors");
        let tensors = expected(&self.config).into_iter();
        let tensors = tensors.map(|(name, shape)| (name.clone(), Drawn { model: self, name, shape, stored_as }));
        safetensors::serialize_to_file(tensors, None, &path)
            .map_err(|error| ModelError::Io { path: path.clone(), source: std::io::Error::other(error.to_string()) })
    }

    fn check(&self, path: &Path) -> Result<(), ModelError> {
        if self.config.vocabulary < VOCABULARY {
            let what = format!("the vocabulary is {}; the tokenizer needs {VOCABULARY}", self.config.vocabulary);
            return Err(ModelError::config(path, what));
        }
        self.config.validate(path)
    }

    fn config_json(&self) -> Json {
        let config = &self.config;
        let scaling = match &config.rope_scaling {
            None | Some(RopeScaling::Factors(_)) => Json::Null,
            Some(RopeScaling::Linear { factor }) => json!({"rope_type": "linear", "factor": factor}),
            Some(RopeScaling::Llama3(s)) => json!({
                "rope_type": "llama3", "factor": s.factor, "low_freq_factor": s.low_freq_factor,
                "high_freq_factor": s.high_freq_factor,
                "original_max_position_embeddings": s.original_max_position_embeddings,
            }),
        };
        json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.layers, "num_attention_heads": config.heads,
            "num_key_value_heads": config.kv_heads, "head_dim": config.head_dim, "vocab_size": config.vocabulary,
            "rms_norm_eps": config.rms_norm_eps, "rope_theta": config.rope_theta, "rope_scaling": scaling,
            "tie_word_embeddings": config.tie_word_embeddings, "max_position_embeddings": config.max_positions,
            "bos_token_id": tokenizer::TURN, "eos_token_id": tokenizer::END,
            "attention_bias": false, "mlp_bias": false, "torch_dtype": "float32",
        })
    }
}

/// A tensor that is drawn when it is written.
struct Drawn<'a> {
    model: &'a SyntheticLlama,
    name: String,
    shape: Vec<usize>,
    stored_as: StoredAs,
}

impl View for Drawn<'_> {
    fn dtype(&self) -> Dtype {
        match self.stored_as {
            StoredAs::F32 => Dtype::F32,
            StoredAs::Bf16 => Dtype::BF16,
        }
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let values = self.model.tensor(&self.name, &self.shape);
        let mut bytes = vec![0; self.data_len()];
        match self.stored_as {
            StoredAs::F32 => {
                let places = bytes.par_chunks_exact_mut(4).zip(&values);
                places.for_each(|(place, value)| place.copy_from_slice(&value.to_le_bytes()));
            }
            StoredAs::Bf16 => {
                let places = bytes.par_chunks_exact_mut(2).zip(&values);
                places.for_each(|(place, &value)| place.copy_from_slice(&half::bf16::from_f32(value).to_le_bytes()));
            }
        }
        Cow::Owned(bytes)
    }

    fn data_len(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype().bitsize() / 8
    }
}
