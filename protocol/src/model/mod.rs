//! The model: its configuration, its weights on disk, its tokenizer, and the table of linear layers that
//! workers serve.
//!
//! A [`Model`] is a view of files: opening it maps them and checks every tensor that the configuration asks for
//! against the files' sizes, and reading copies one matrix at a time out of the map. Whatever the format, names and
//! layouts are Hugging Face's.

pub mod config;
mod digest;
mod error;
pub mod family;
mod gguf;
mod inventory;
mod served;
pub mod synthetic;
#[cfg(test)]
mod tests;
mod tokenizer;
mod weights;

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use serde::{Deserialize, Serialize};

pub use config::LlamaConfig;
pub use error::ModelError;
pub use family::{Activation, Family, GgufPlace, LayerSet, QkNorm, Rope, RopeScaling, Traits};
pub use gguf::{GgufNumbers, GgufPlan, GgufTensor, ModelRows, Q8_0_BLOCK, UnknownNumbers};
pub use tokenizer::{Chat, ChatMessage, ChatTemplate, NoDay, PlacedToken, Rendered, TemplateDay, TextTokenizer};
pub use weights::Shard;

use self::weights::{GgufFile, SafetensorsFiles, Stored, Weights, transpose_into};
use crate::ids::{Group, LinearId, LinearShape, ModelDigest};

/// A model on disk, of Llama or another family.
pub struct Model {
    path: PathBuf,
    config: LlamaConfig,
    weights: Weights,
    digest: OnceLock<ModelDigest>,
    notes: Vec<String>,
}

/// One linear layer of a transformer layer, as the checkpoint stores it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Projection {
    /// `self_attn.q_proj`.
    #[serde(rename = "q_proj")]
    Q,
    /// `self_attn.k_proj`.
    #[serde(rename = "k_proj")]
    K,
    /// `self_attn.v_proj`.
    #[serde(rename = "v_proj")]
    V,
    /// `self_attn.o_proj`.
    #[serde(rename = "o_proj")]
    O,
    /// `mlp.gate_proj`.
    #[serde(rename = "gate_proj")]
    Gate,
    /// `mlp.up_proj`.
    #[serde(rename = "up_proj")]
    Up,
    /// `mlp.down_proj`.
    #[serde(rename = "down_proj")]
    Down,
    /// `self_attn.qkv_proj`, where a family has the first three as one.
    #[serde(rename = "qkv_proj")]
    Qkv,
    /// `mlp.gate_up_proj`, where a family has these two as one.
    #[serde(rename = "gate_up_proj")]
    GateUp,
}

impl Projection {
    /// Those of a layer whose family has each on its own, in the order of the forward pass.
    pub const SEPARATE: [Self; 7] = [Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::Down];
    /// Those that a layer of any family may have.
    pub const ALL: [Self; 9] =
        [Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::Down, Self::Qkv, Self::GateUp];

    /// Its name within a layer, e.g. `self_attn.q_proj`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Q => "self_attn.q_proj",
            Self::K => "self_attn.k_proj",
            Self::V => "self_attn.v_proj",
            Self::O => "self_attn.o_proj",
            Self::Gate => "mlp.gate_proj",
            Self::Up => "mlp.up_proj",
            Self::Down => "mlp.down_proj",
            Self::Qkv => "self_attn.qkv_proj",
            Self::GateUp => "mlp.gate_up_proj",
        }
    }

    /// Its name in configurations, e.g. `q_proj`.
    pub fn module(self) -> &'static str {
        match self {
            Self::Q => "q_proj",
            Self::K => "k_proj",
            Self::V => "v_proj",
            Self::O => "o_proj",
            Self::Gate => "gate_proj",
            Self::Up => "up_proj",
            Self::Down => "down_proj",
            Self::Qkv => "qkv_proj",
            Self::GateUp => "gate_up_proj",
        }
    }

    /// Its dimensions, `d_in × d_out`.
    pub fn shape(self, config: &LlamaConfig) -> LinearShape {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let (queries, keys) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let (d_in, d_out) = match self {
            Self::Q => (hidden, queries),
            Self::K | Self::V => (hidden, keys),
            Self::O => (queries, hidden),
            Self::Gate | Self::Up => (hidden, inner),
            Self::Down => (inner, hidden),
            Self::Qkv => (hidden, queries + 2 * keys),
            Self::GateUp => (hidden, 2 * inner),
        };
        LinearShape { d_in, d_out }
    }
}

/// One of the RMS norms, by what it stands before or after.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Norm {
    /// Of what a layer's attention reads.
    BeforeAttention(usize),
    /// Of a layer's queries, before they are turned.
    Query(usize),
    /// Of its keys.
    Key(usize),
    /// Of what attention adds to the stream.
    AfterAttention(usize),
    /// Of what a layer's feed-forward block reads.
    BeforeFeedForward(usize),
    /// Of what it adds to the stream.
    AfterFeedForward(usize),
    /// The norm before the head.
    Final,
}

impl Norm {
    fn layer(self) -> Option<usize> {
        match self {
            Self::BeforeAttention(layer)
            | Self::Query(layer)
            | Self::Key(layer)
            | Self::AfterAttention(layer)
            | Self::BeforeFeedForward(layer)
            | Self::AfterFeedForward(layer) => Some(layer),
            Self::Final => None,
        }
    }
}

const EMBEDDINGS: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

impl Model {
    /// Opens a Hugging Face folder (`config.json` and safetensors) or a `.gguf` file: maps it and checks that each
    /// tensor of the configuration is there, whole, and of the right shape. Reads no weights.
    ///
    /// # Errors
    /// What is missing, damaged or not supported, by file.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, ModelError> {
        let path = path.as_ref();
        let metadata = std::fs::metadata(path).map_err(|source| ModelError::io(path, source))?;
        let mut notes = Vec::new();
        let (mut config, mut weights) = if metadata.is_dir() {
            let file = path.join("config.json");
            if !file.is_file() {
                return Err(ModelError::NotAModel {
                    path: path.to_owned(),
                    what: "the folder has no config.json".into(),
                });
            }
            let config = LlamaConfig::from_json(&file, &weights::read_text(&file)?, &mut notes)?;
            let mut files = SafetensorsFiles::open(path, &mut notes)?;
            if config.traits.of_larger {
                files.unwrap_text();
            }
            (config, Weights::Safetensors(files))
        } else if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf")) {
            let (file, config) = GgufFile::open(path)?;
            (config, Weights::Gguf(file))
        } else {
            return Err(ModelError::NotAModel {
                path: path.to_owned(),
                what: "it is neither a folder nor a .gguf file".into(),
            });
        };
        inventory::settle_head(&mut config, &mut weights, &mut notes)?;
        let model = Self { path: path.to_owned(), config, weights, digest: OnceLock::new(), notes };
        for (name, shape) in expected(&model.config) {
            model.checked(&name, &shape)?;
        }
        let others = inventory::others(&model.config, &model.weights)?;
        Ok(Self { notes: [model.notes, others].concat(), ..model })
    }

    /// What in the model's files contradicts itself or is not used, a line for each, with what was made of it.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// The folder or file that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Dimensions and constants.
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// Names the model: its weights and all that changes the served matrices. The first call reads every weight,
    /// later ones remember.
    ///
    /// # Errors
    /// None that [`open`](Self::open) would not have found.
    pub fn digest(&self) -> Result<ModelDigest, ModelError> {
        if let Some(&digest) = self.digest.get() {
            return Ok(digest);
        }
        let digest = digest::of(self)?;
        Ok(*self.digest.get_or_init(|| digest))
    }

    /// A served matrix in f32: `d_in × d_out`, row-major, its projections side by side along `d_out`.
    ///
    /// # Errors
    /// When the model has no such matrix.
    pub fn linear(&self, id: LinearId) -> Result<Vec<f32>, ModelError> {
        if !self.config.has(id) {
            return Err(ModelError::OutOfRange { what: id.to_string() });
        }
        let LinearShape { d_in, d_out } = self.config.shape(id.group);
        let mut fused = vec![0.0; d_in * d_out];
        if id.group == Group::Head {
            let entries = self.config.head_entries(usize::from(id.layer) - self.config.layers);
            let mut stored = vec![0.0; entries.len() * d_in];
            self.head_rows(entries.start, &mut stored)?;
            transpose_into(&stored, d_in, &mut fused, d_out, 0);
            return Ok(fused);
        }
        let mut first = 0;
        for &projection in self.config.projections(id.group) {
            let stored = self.projection(id.layer.into(), projection)?;
            transpose_into(&stored, d_in, &mut fused, d_out, first);
            first += stored.len() / d_in;
        }
        Ok(fused)
    }

    /// One projection in f32 as the checkpoint lays it out: `d_out × d_in`, row-major.
    ///
    /// # Errors
    /// When the model has no such layer.
    pub fn projection(&self, layer: usize, projection: Projection) -> Result<Vec<f32>, ModelError> {
        self.check_layer(layer)?;
        let stored = self.weights.tensor(&projection_name(layer, projection))?;
        let values = stored.to_f32()?;
        stored.release();
        Ok(values)
    }

    /// What a group's projections add to its product, side by side; `None` where they add nothing.
    ///
    /// # Errors
    /// When the model has no such layer.
    pub fn bias(&self, layer: usize, group: Group) -> Result<Option<Vec<f32>>, ModelError> {
        self.check_layer(layer)?;
        if !self.config.traits.biases.of(group) {
            return Ok(None);
        }
        let biases = self.config.projections(group).iter();
        let biases = biases.map(|&projection| self.weights.tensor(&bias_name(layer, projection))?.to_f32());
        Ok(Some(biases.collect::<Result<Vec<_>, _>>()?.concat()))
    }

    /// The scales of a norm, by which features are multiplied; `None` where the family has no such norm.
    ///
    /// # Errors
    /// When the model has no such layer.
    pub fn norm(&self, norm: Norm) -> Result<Option<Vec<f32>>, ModelError> {
        if let Some(layer) = norm.layer() {
            self.check_layer(layer)?;
        }
        let Some(name) = self.config.family.norm_name(norm) else { return Ok(None) };
        let mut scales = self.weights.tensor(&name)?.to_f32()?;
        if self.config.family.centred_norms && !self.weights.whole_norms() {
            scales.iter_mut().for_each(|scale| *scale += 1.0);
        }
        Ok(Some(scales))
    }

    /// The embedding matrix, `vocabulary × hidden_size`, row-major.
    ///
    /// # Errors
    /// None that [`open`](Self::open) would not have found.
    pub fn embeddings(&self) -> Result<Vec<f32>, ModelError> {
        self.weights.tensor(EMBEDDINGS)?.to_f32()
    }

    /// Embeddings of some tokens, `ids.len() × hidden_size`, row-major, read from the map without the rest.
    ///
    /// # Errors
    /// When a token is outside the vocabulary.
    pub fn embed(&self, ids: &[u32]) -> Result<Vec<f32>, ModelError> {
        let stored = self.weights.tensor(EMBEDDINGS)?;
        let mut rows = vec![0.0; ids.len() * self.config.hidden_size];
        for (&id, row) in ids.iter().zip(rows.chunks_exact_mut(self.config.hidden_size)) {
            if id as usize >= self.config.vocabulary {
                let what = format!("token {id}; its vocabulary has {}", self.config.vocabulary);
                return Err(ModelError::OutOfRange { what });
            }
            stored.row(id as usize, row)?;
        }
        // Around each row the operating system has mapped pages that nobody asked for.
        stored.release();
        Ok(rows)
    }

    /// The head, `vocabulary × hidden_size`, row-major: the embeddings where they are tied.
    ///
    /// # Errors
    /// None that [`open`](Self::open) would not have found.
    pub fn head(&self) -> Result<Vec<f32>, ModelError> {
        self.weights.tensor(self.head_name())?.to_f32()
    }

    /// Rows of the head from `first` on, as many as `out` holds, read from the map without the rest.
    ///
    /// # Errors
    /// When the vocabulary ends before `out` does.
    pub fn head_rows(&self, first: usize, out: &mut [f32]) -> Result<(), ModelError> {
        let (hidden, vocabulary) = (self.config.hidden_size, self.config.vocabulary);
        let rows = out.len() / hidden;
        if first > vocabulary || rows > vocabulary - first {
            let what = format!("rows {first} to {} of the head; it has {vocabulary}", first.saturating_add(rows));
            return Err(ModelError::OutOfRange { what });
        }
        let stored = self.weights.tensor(self.head_name())?;
        out.chunks_exact_mut(hidden).zip(first..).try_for_each(|(out, row)| stored.row(row, out))?;
        if rows > 1 {
            stored.release_rows(first, rows);
        }
        Ok(())
    }

    /// The files of weights of a Hugging Face folder as they are; `None` of a GGUF file.
    ///
    /// # Errors
    /// None that [`open`](Self::open) would not have found.
    pub fn shards(&self) -> Result<Option<Vec<Shard<'_>>>, ModelError> {
        match &self.weights {
            Weights::Safetensors(files) => files.shards().map(Some),
            Weights::Gguf(_) => Ok(None),
        }
    }

    /// The tokenizer that comes with the weights.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] when there is none, or none that is known.
    pub fn tokenizer(&self) -> Result<TextTokenizer, ModelError> {
        match &self.weights {
            Weights::Safetensors(_) => {
                inventory::check_tokenizer(&self.path)?;
                TextTokenizer::from_folder(&self.path, &self.config)
            }
            Weights::Gguf(file) => tokenizer::from_gguf(file, &self.config),
        }
    }

    fn head_name(&self) -> &'static str {
        let own = self.weights.has(HEAD) && !self.config.tie_word_embeddings;
        if own { HEAD } else { EMBEDDINGS }
    }

    fn check_layer(&self, layer: usize) -> Result<(), ModelError> {
        if layer >= self.config.layers {
            return Err(ModelError::OutOfRange { what: format!("layer {layer}; it has {}", self.config.layers) });
        }
        Ok(())
    }

    fn checked(&self, name: &str, shape: &[usize]) -> Result<Stored<'_>, ModelError> {
        let stored = self.weights.tensor(name)?;
        if stored.shape != shape {
            let (found, expected) = (stored.shape.to_vec(), shape.to_vec());
            return Err(ModelError::Shape { path: stored.file.path.clone(), name: stored.name, found, expected });
        }
        Ok(stored)
    }
}

fn projection_name(layer: usize, projection: Projection) -> String {
    format!("model.layers.{layer}.{}.weight", projection.name())
}

fn bias_name(layer: usize, projection: Projection) -> String {
    format!("model.layers.{layer}.{}.bias", projection.name())
}

/// Every tensor that is used, by its Hugging Face name, with the shape that the configuration gives it.
fn expected(config: &LlamaConfig) -> Vec<(String, Vec<usize>)> {
    let (hidden, vocabulary) = (config.hidden_size, config.vocabulary);
    let mut expected = vec![(EMBEDDINGS.to_owned(), vec![vocabulary, hidden])];
    let norm = |expected: &mut Vec<_>, norm: Norm| {
        expected.extend(config.family.norm_name(norm).map(|name| (name, vec![config.norm_width(norm)])));
    };
    norm(&mut expected, Norm::Final);
    if !config.tie_word_embeddings {
        expected.push((HEAD.to_owned(), vec![vocabulary, hidden]));
    }
    for layer in 0..config.layers {
        config.family.layer_norms(layer).for_each(|of_layer| norm(&mut expected, of_layer));
        for group in Group::ALL {
            for &projection in config.projections(group) {
                let LinearShape { d_in, d_out } = projection.shape(config);
                expected.push((projection_name(layer, projection), vec![d_out, d_in]));
                if config.traits.biases.of(group) {
                    expected.push((bias_name(layer, projection), vec![d_out]));
                }
            }
        }
    }
    expected
}
