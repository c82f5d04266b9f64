//! Weights of a GGUF file, as llama.cpp writes them for the Llama architecture.
//!
//! Two things differ from Hugging Face's layout: the tensors' names, and the order of the query and key rows, which
//! llama.cpp interleaves for its own rotary positions. Both are undone here, so that everything downstream knows
//! one layout. Numbers are decoded by candle's block formats.

use std::collections::HashMap;
use std::path::Path;

use super::gguf_header::{self, Header, TensorEntry, Value};
use super::stored::{Rows, Stored};
use super::{MappedFile, ModelError};
use crate::model::config::{LlamaConfig, RopeScaling, divided_heads};

/// Name of the tensor with Llama 3's divisors of the rotary frequencies.
const ROPE_FREQUENCIES: &str = "rope_freqs.weight";

/// A mapped GGUF file and where each tensor lies in it.
pub(crate) struct GgufFile {
    file: MappedFile,
    tensors: HashMap<String, TensorEntry>,
    data_offset: u64,
    /// Set once the configuration is known.
    head_dim: usize,
}

impl GgufFile {
    /// Maps a file and reads its head and its configuration.
    pub(crate) fn open(path: &Path) -> Result<(Self, LlamaConfig), ModelError> {
        let file = MappedFile::open(path)?;
        let header = gguf_header::read(&file.bytes).map_err(|what| ModelError::corrupt(path, what))?;
        let mut config = configuration(path, &header)?;
        let data_offset = header.data_offset;
        let tensors = header.tensors.into_iter().map(|(name, entry)| (name.to_owned(), entry)).collect();
        let mut opened = Self { file, tensors, data_offset, head_dim: config.head_dim };
        config.tie_word_embeddings = !opened.has("lm_head.weight");
        if opened.tensors.contains_key(ROPE_FREQUENCIES) {
            let factors = opened.stored(ROPE_FREQUENCIES, Rows::Plain)?.to_f32()?;
            config.rope_scaling = Some(RopeScaling::Factors(factors));
        }
        config.validate(path)?;
        opened.head_dim = config.head_dim;
        Ok((opened, config))
    }

    /// The metadata, read anew: it is needed once or twice in a run, and its texts are the file's own bytes.
    pub(crate) fn metadata(&self) -> Result<HashMap<&str, Value<'_>>, ModelError> {
        let header = gguf_header::read(&self.file.bytes).map_err(|what| ModelError::corrupt(&self.file.path, what))?;
        Ok(header.metadata)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.file.path
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        gguf_name(name).is_some_and(|(name, _)| self.tensors.contains_key(&name))
    }

    /// Looks a tensor up by its Hugging Face name.
    pub(crate) fn tensor(&self, name: &str) -> Result<Stored<'_>, ModelError> {
        let missing = || ModelError::MissingTensor { path: self.file.path.clone(), name: name.to_owned() };
        let (name, interleaved) = gguf_name(name).ok_or_else(missing)?;
        let rows = if interleaved { Rows::Interleaved { head_dim: self.head_dim } } else { Rows::Plain };
        self.stored(&name, rows)
    }

    fn stored(&self, name: &str, rows: Rows) -> Result<Stored<'_>, ModelError> {
        let path = self.file.path.as_path();
        let Some(entry) = self.tensors.get(name) else {
            return Err(ModelError::MissingTensor { path: path.to_owned(), name: name.to_owned() });
        };
        let Some(dtype) = gguf_header::number_format(entry.dtype) else {
            let dtype = format!("GGUF's number format {}", entry.dtype);
            return Err(ModelError::Dtype { path: path.to_owned(), name: name.to_owned(), dtype });
        };
        let columns = entry.shape.last().copied().unwrap_or(1);
        if columns == 0 || !columns.is_multiple_of(dtype.block_size()) {
            let what = format!("rows of `{name}` hold {columns} numbers, which {dtype:?} cannot store");
            return Err(ModelError::corrupt(path, what));
        }
        let numbers = entry.shape.iter().try_fold(1usize, |product, &side| product.checked_mul(side));
        let length = numbers.and_then(|numbers| (numbers / dtype.block_size()).checked_mul(dtype.type_size()));
        let start = self.data_offset.checked_add(entry.offset).and_then(|start| usize::try_from(start).ok());
        let bytes =
            start.zip(length).and_then(|(start, length)| self.file.bytes.get(start..start.checked_add(length)?));
        let bytes =
            bytes.ok_or_else(|| ModelError::corrupt(path, format!("`{name}` reaches beyond the file's end")))?;
        Ok(Stored { file: &self.file, name: name.to_owned(), shape: &entry.shape, dtype, bytes, rows })
    }
}

/// llama.cpp's name of a tensor, and whether its rows are interleaved.
pub(crate) fn gguf_name(name: &str) -> Option<(String, bool)> {
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
    let (part, interleaved) = match part.strip_suffix(".weight")? {
        "input_layernorm" => ("attn_norm", false),
        "post_attention_layernorm" => ("ffn_norm", false),
        "self_attn.q_proj" => ("attn_q", true),
        "self_attn.k_proj" => ("attn_k", true),
        "self_attn.v_proj" => ("attn_v", false),
        "self_attn.o_proj" => ("attn_output", false),
        "mlp.gate_proj" => ("ffn_gate", false),
        "mlp.up_proj" => ("ffn_up", false),
        "mlp.down_proj" => ("ffn_down", false),
        _ => return None,
    };
    Some((format!("blk.{layer}.{part}.weight"), interleaved))
}

/// The configuration in the metadata, before the tensors are looked at.
fn configuration(path: &Path, header: &Header<'_>) -> Result<LlamaConfig, ModelError> {
    let text = |key: &str| header.metadata.get(key).and_then(Value::text);
    match text("general.architecture") {
        Some("llama") => {}
        found => {
            let found = found.unwrap_or("not given (general.architecture)").to_owned();
            return Err(ModelError::Architecture { path: path.to_owned(), found });
        }
    }
    let get = |key: &str| header.metadata.get(format!("llama.{key}").as_str());
    let need = |key: &str| {
        let value = get(key).and_then(Value::count);
        value.ok_or_else(|| ModelError::config(path, format!("the metadata llama.{key} is missing or not a count")))
    };
    let need_float = |key: &str| {
        let value = get(key).and_then(Value::float);
        value.ok_or_else(|| ModelError::config(path, format!("the metadata llama.{key} is missing or not a number")))
    };
    if get("expert_count").and_then(Value::count).is_some_and(|experts| experts > 0) {
        return Err(ModelError::config(path, "the model is a mixture of experts, which cannot be served"));
    }
    if let Some(name) = header.tensors.keys().find(|name| name.starts_with("blk.") && name.ends_with(".bias")) {
        return Err(ModelError::config(path, format!("it has `{name}`; projections with a bias cannot be served")));
    }
    let (hidden_size, heads) = (need("embedding_length")?, need("attention.head_count")?);
    let head_dim = match get("attention.key_length").and_then(Value::count) {
        Some(head_dim) => head_dim,
        None => divided_heads(path, hidden_size, heads)?,
    };
    for key in ["rope.dimension_count", "attention.value_length"] {
        if let Some(found) = get(key).and_then(Value::count).filter(|&found| found != head_dim) {
            return Err(ModelError::config(
                path,
                format!("llama.{key} is {found} where a head has {head_dim} features"),
            ));
        }
    }
    let tokens = header.metadata.get("tokenizer.ggml.tokens").and_then(Value::array).map(<[_]>::len);
    let embedded = header.tensors.get("token_embd.weight").and_then(|entry| entry.shape.first().copied());
    let vocabulary = embedded.or(tokens).or(get("vocab_size").and_then(Value::count));
    let token = |key: &str| header.metadata.get(key).and_then(Value::count).and_then(|id| u32::try_from(id).ok());
    let rope_scaling = match get("rope.scaling.type").and_then(Value::text) {
        None | Some("none") => None,
        Some("linear") => Some(RopeScaling::Linear { factor: need_float("rope.scaling.factor")? }),
        Some(other) => {
            return Err(ModelError::config(
                path,
                format!("llama.rope.scaling.type is `{other}`; `linear` is supported"),
            ));
        }
    };
    Ok(LlamaConfig {
        hidden_size,
        intermediate_size: need("feed_forward_length")?,
        layers: need("block_count")?,
        heads,
        kv_heads: get("attention.head_count_kv").and_then(Value::count).unwrap_or(heads),
        head_dim,
        vocabulary: vocabulary.unwrap_or(0),
        rms_norm_eps: need_float("attention.layer_norm_rms_epsilon")?,
        rope_theta: get("rope.freq_base").and_then(Value::float).unwrap_or(10_000.0),
        rope_scaling,
        tie_word_embeddings: true,
        max_positions: need("context_length")?,
        bos: token("tokenizer.ggml.bos_token_id"),
        eos: token("tokenizer.ggml.eos_token_id").into_iter().collect(),
    })
}
