//! Synthetic models as GGUF files, written as llama.cpp's converter would: its names, its order of query and key rows.

use std::fs::File;
use std::io::BufWriter;
use std::path::Path;

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};

use super::{SyntheticLlama, tokenizer};
use crate::model::family::{WindowRule, gguf_name};
use crate::model::weights::Rows;
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

    /// Writes the same in several files as llama.cpp splits them: `name-00001-of-00003.gguf` and so on.
    ///
    /// # Errors
    /// As [`write_gguf`](Self::write_gguf).
    pub fn write_split_gguf(
        &self,
        folder: impl AsRef<Path>,
        name: &str,
        parts: usize,
        format: GgmlDType,
    ) -> Result<(), ModelError> {
        let folder = folder.as_ref();
        self.check(folder)?;
        self.try_write_split(folder, name, parts.max(1), format).map_err(|error| ModelError::Io {
            path: folder.to_owned(),
            source: std::io::Error::other(error.to_string()),
        })
    }

    fn try_write_split(&self, folder: &Path, name: &str, parts: usize, format: GgmlDType) -> candle_core::Result<()> {
        let tensors = self.tensors_in(format)?;
        let each = tensors.len().div_ceil(parts).max(1);
        for (number, tensors) in tensors.chunks(each).enumerate() {
            let mut metadata = if number == 0 { self.metadata() } else { Vec::new() };
            metadata.push(("split.no".to_owned(), Value::U16(number as u16)));
            metadata.push(("split.count".to_owned(), Value::U16(parts as u16)));
            write(&folder.join(format!("{name}-{:05}-of-{parts:05}.gguf", number + 1)), &metadata, tensors)?;
        }
        Ok(())
    }

    fn try_write(&self, path: &Path, format: GgmlDType) -> candle_core::Result<()> {
        write(path, &self.metadata(), &self.tensors_in(format)?)
    }

    /// Every tensor by llama.cpp's name.
    fn tensors_in(&self, format: GgmlDType) -> candle_core::Result<Vec<(String, QTensor)>> {
        let mut tensors = Vec::new();
        for (name, shape) in expected(&self.config) {
            let mut values = self.tensor(&name, &shape);
            if self.config.family.centred_norms && shape.len() == 1 {
                values.iter_mut().for_each(|scale| *scale += 1.0);
            }
            let Some((name, interleaved)) = gguf_name(self.config.family, &name) else { continue };
            let rows = if interleaved { Rows::Interleaved { head_dim: self.config.head_dim } } else { Rows::Plain };
            // The numbers of a bias lie as the rows do that it is added to.
            let columns = if shape.len() == 1 { 1 } else { shape.last().copied().unwrap_or(1) };
            let mut in_file = vec![0.0; values.len()];
            for (row, values) in values.chunks_exact(columns).enumerate() {
                in_file[rows.in_file(row) * columns..][..columns].copy_from_slice(values);
            }
            let format = if shape.len() == 1 { GgmlDType::F32 } else { format };
            tensors.push((name, QTensor::quantize(&Tensor::from_vec(in_file, shape, &Device::Cpu)?, format)?));
        }
        let single = |factors: &[f64]| factors.iter().map(|&factor| factor as f32).collect();
        let factors = match &self.config.rope.scaling {
            Some(RopeScaling::Factors(factors)) => vec![("rope_freqs.weight", factors.clone())],
            Some(RopeScaling::LongRope(scaling)) => vec![
                ("rope_factors_short.weight", single(&scaling.short)),
                ("rope_factors_long.weight", single(&scaling.long)),
            ],
            _ => Vec::new(),
        };
        for (name, factors) in factors {
            let factors = Tensor::from_slice(&factors, factors.len(), &Device::Cpu)?;
            tensors.push((name.to_owned(), QTensor::quantize(&factors, GgmlDType::F32)?));
        }
        Ok(tensors)
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
            ("rope.dimension_count", config.rope.features),
            ("vocab_size", config.vocabulary),
        ];
        let architecture = config.family.gguf.architecture;
        let mut metadata = vec![("general.architecture".to_owned(), text(architecture))];
        let mut set = |key: &str, value: Value| metadata.push((format!("{architecture}.{key}"), value));
        counts.into_iter().for_each(|(key, count)| set(key, Value::U32(count as u32)));
        set("attention.layer_norm_rms_epsilon", Value::F32(config.rms_norm_eps as f32));
        set("rope.freq_base", Value::F32(config.rope.theta as f32));
        match &config.rope.scaling {
            Some(RopeScaling::Linear { factor }) => {
                set("rope.scaling.type", text("linear"));
                set("rope.scaling.factor", Value::F32(*factor as f32));
            }
            Some(RopeScaling::Yarn(scaling)) => {
                set("rope.scaling.type", text("yarn"));
                set("rope.scaling.factor", Value::F32(scaling.factor as f32));
                set("rope.scaling.original_context_length", Value::U32(scaling.context as u32));
            }
            Some(RopeScaling::LongRope(scaling)) => {
                set("rope.scaling.attn_factor", Value::F32(scaling.attention_factor as f32));
                set("rope.scaling.original_context_length", Value::U32(scaling.context as u32));
            }
            _ => {}
        }
        if let Some(window) = config.traits.window.as_ref().filter(|_| config.family.windows != WindowRule::Never) {
            set("attention.sliding_window", Value::U32(window.keys as u32));
        }
        for (key, cap) in
            [("attn_logit_softcapping", config.traits.score_cap), ("final_logit_softcapping", config.traits.logit_cap)]
        {
            if let Some(cap) = cap {
                set(key, Value::F32(cap as f32));
            }
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

fn write(path: &Path, metadata: &[(String, Value)], tensors: &[(String, QTensor)]) -> candle_core::Result<()> {
    let metadata: Vec<(&str, &Value)> = metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
    let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    gguf_file::write(&mut BufWriter::new(File::create(path)?), &metadata, &tensors)
}
