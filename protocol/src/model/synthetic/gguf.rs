//! Synthetic models as GGUF files, written as llama.cpp's converter would: its names, its order of query and key rows.

use std::fs::File;
use std::io::BufWriter;
use std::path::Path;

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};

use super::{SyntheticLlama, tokenizer};
use crate::model::weights::{Rows, gguf_name};
use crate::model::{ModelError, RopeScaling, expected};

impl SyntheticLlama {
    /// Writes a GGUF file whose matrices are stored in `format` and whose vectors in F32. Holds the whole model in
    /// that format, so this is for small ones.
    ///
    /// # Errors
    /// When the configuration is impossible, a row does not fill the format's blocks, or the disk refuses.
    pub fn write_gguf(&self, path: impl AsRef<Path>, format: GgmlDType) -> Result<(), ModelError> {
        let path = path.as_ref();
        self.check(path)?;
        self.try_write(path, format)
            .map_err(|error| ModelError::Io { path: path.to_owned(), source: std::io::Error::other(error.to_string()) })
    }

    fn try_write(&self, path: &Path, format: GgmlDType) -> candle_core::Result<()> {
        let mut tensors = Vec::new();
        for (name, shape) in expected(&self.config) {
            let values = self.tensor(&name, &shape);
            let Some((name, interleaved)) = gguf_name(&name) else { continue };
            let rows = if interleaved { Rows::Interleaved { head_dim: self.config.head_dim } } else { Rows::Plain };
            let columns = shape.last().copied().unwrap_or(1);
            let mut in_file = vec![0.0; values.len()];
            for (row, values) in values.chunks_exact(columns).enumerate() {
                in_file[rows.in_file(row) * columns..][..columns].copy_from_slice(values);
            }
            let format = if shape.len() == 1 { GgmlDType::F32 } else { format };
            tensors.push((name, QTensor::quantize(&Tensor::from_vec(in_file, shape, &Device::Cpu)?, format)?));
        }
        if let Some(RopeScaling::Factors(factors)) = &self.config.rope_scaling {
            let factors = Tensor::from_slice(factors, factors.len(), &Device::Cpu)?;
            tensors.push(("rope_freqs.weight".to_owned(), QTensor::quantize(&factors, GgmlDType::F32)?));
        }
        let metadata = self.metadata();
        let metadata: Vec<(&str, &Value)> = metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
        let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        gguf_file::write(&mut BufWriter::new(File::create(path)?), &metadata, &tensors)
    }

    fn metadata(&self) -> Vec<(String, Value)> {
        let config = &self.config;
        let text = |text: &str| Value::String(text.to_owned());
        let counts = [
            ("block_count", config.layers),
            ("context_length", config.max_positions),
            ("embedding_length", config.hidden_size),
            ("feed_forward_length", config.intermediate_size),
            ("attention.head_count", config.heads),
            ("attention.head_count_kv", config.kv_heads),
            ("attention.key_length", config.head_dim),
            ("attention.value_length", config.head_dim),
            ("rope.dimension_count", config.head_dim),
            ("vocab_size", config.vocabulary),
        ];
        let mut metadata = vec![("general.architecture".to_owned(), text("llama"))];
        metadata.extend(counts.map(|(key, count)| (format!("llama.{key}"), Value::U32(count as u32))));
        for (key, value) in
            [("attention.layer_norm_rms_epsilon", config.rms_norm_eps), ("rope.freq_base", config.rope_theta)]
        {
            metadata.push((format!("llama.{key}"), Value::F32(value as f32)));
        }
        let tokens = tokenizer::tokens();
        let types = (0..tokens.len()).map(|id| Value::I32(if tokenizer::is_special(id) { 3 } else { 1 })).collect();
        let texts = |texts: Vec<String>| Value::Array(texts.into_iter().map(Value::String).collect());
        for (key, value) in [
            ("model", text("gpt2")),
            ("pre", text("gpt-2")),
            ("tokens", texts(tokens)),
            ("token_type", Value::Array(types)),
            ("merges", texts(tokenizer::merges())),
            ("bos_token_id", Value::U32(tokenizer::TURN)),
            ("eos_token_id", Value::U32(tokenizer::END)),
            ("add_bos_token", Value::Bool(false)),
        ] {
            metadata.push((format!("tokenizer.ggml.{key}"), value));
        }
        metadata.push(("tokenizer.chat_template".to_owned(), text(tokenizer::CHAT_TEMPLATE)));
        metadata
    }
}
