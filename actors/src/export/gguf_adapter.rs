//! Adapters as llama.cpp reads them (`llama-cli --lora`, Ollama's ADAPTER): a GGUF file of `lora_a` and `lora_b` for each
//! adapted tensor of the model, under llama.cpp's names and in its order of query and key rows.
//!
//! llama.cpp scales a product by `alpha / rank`, with one alpha for the file and each tensor's own rank. Where an adapter scales
//! one otherwise (rsLoRA, patterns), the rest of the factor is folded into `B`.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::Path;

use candle_core::quantized::gguf_file::{self, Content, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use protocol::model::{LlamaConfig, Model};

use super::changes::{Delta, nothing};
use super::output::{Existing, OutputFile, keep};
use super::{ExportError, wrong};
use crate::files::{FileError, Readers};
use crate::lora::LoraAdapters;

/// Writes an adapter of a model to a file. Returns how many of the model's tensors it changes.
///
/// # Errors
/// When the model's family has no form in llama.cpp, the adapter has norms or embeddings, or adds nothing, there is a file that must be
/// kept, the disk refuses, or the file does not say what it should.
pub fn write(model: &Model, adapters: &LoraAdapters, path: &Path, existing: Existing) -> Result<usize, ExportError> {
    keep([model.path()], path)?;
    let model = model.config();
    let mut file = OutputFile::new(path, Readers::Owner, existing)?;
    let tensors = write_to(file.file(), model, adapters)?;
    check(file.path(), model, adapters)?;
    file.done()?;
    Ok(tensors)
}

/// Writes the file without a look back.
pub(super) fn write_to(file: &mut File, model: &LlamaConfig, adapters: &LoraAdapters) -> Result<usize, ExportError> {
    if let Some(norm) = adapters.norms().next() {
        return Err(ExportError::Unsupported(format!(
            "the adapter has norms that were trained ({}, lora.modules_to_save), which adapters for llama.cpp have no place \
             for; write the merged model (`node export gguf`)",
            norm.module
        )));
    }
    if adapters.token_rows().is_some() {
        return Err(ExportError::Unsupported(
            "the adapter has embeddings that were trained (lora.trainable_token_indices), which adapters for llama.cpp have no \
             place for; write the merged model (`node export gguf`)"
                .to_owned(),
        ));
    }
    let deltas = Delta::all(adapters)?;
    if deltas.iter().all(Delta::is_zero) {
        return Err(nothing());
    }
    let alpha = adapters.config().alpha;
    let architecture = model.family.gguf_architecture();
    let mut tensors = Vec::new();
    for delta in deltas {
        let place = model.gguf_place(delta.layer.into(), delta.projection).ok_or_else(|| {
            ExportError::Unsupported(format!("llama.cpp has no tensor for {} of {architecture}", delta.weight()))
        })?;
        let fold = delta.scaling * delta.rank as f32 / alpha;
        let mut b = vec![0.0; delta.b.len()];
        for (row, values) in delta.b.chunks_exact(delta.rank).enumerate() {
            let to = &mut b[place.row(row) * delta.rank..][..delta.rank];
            to.iter_mut().zip(values).for_each(|(to, value)| *to = fold * value);
        }
        let tensor = |values, shape| QTensor::quantize(&Tensor::from_vec(values, shape, &Device::Cpu)?, GgmlDType::F32);
        tensors.push((format!("{}.lora_a", place.name()), tensor(delta.a, (delta.rank, delta.d_in))?));
        tensors.push((format!("{}.lora_b", place.name()), tensor(b, (delta.d_out, delta.rank))?));
    }
    let text = |text: &str| Value::String(text.to_owned());
    let metadata = [
        ("general.architecture", text(architecture)),
        ("general.type", text("adapter")),
        ("adapter.type", text("lora")),
        ("adapter.lora.alpha", Value::F32(alpha)),
    ];
    let failed = |source| FileError::Io { path: "the adapter".into(), action: "written", source };
    let mut out = BufWriter::new(file);
    let metadata: Vec<(&str, &Value)> = metadata.iter().map(|(key, value)| (*key, value)).collect();
    let named: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    gguf_file::write(&mut out, &metadata, &named)?;
    out.flush().map_err(failed)?;
    Ok(tensors.len() / 2)
}

/// Reads a file back, and finds in it what each of the adapter's products adds.
pub(super) fn check(path: &Path, model: &LlamaConfig, adapters: &LoraAdapters) -> Result<(), ExportError> {
    let wrong = |what: String| wrong(path, what);
    let mut file = File::open(path).map_err(|error| wrong(error.to_string()))?;
    let content = Content::read(&mut file)?;
    let alpha = content.metadata.get("adapter.lora.alpha").ok_or_else(|| wrong("it has no alpha".into()))?.to_f32()?;
    let mut names: HashSet<&str> = content.tensor_infos.keys().map(String::as_str).collect();
    for delta in Delta::all(adapters)? {
        let Some(place) = model.gguf_place(delta.layer.into(), delta.projection) else { continue };
        let mut read = |side: &str| {
            let name = format!("{}.lora_{side}", place.name());
            names.remove(name.as_str());
            content.tensor(&mut file, &name, &Device::Cpu)?.dequantize(&Device::Cpu)
        };
        let (a, b) = (read("a")?, read("b")?);
        let (rank, d_in) = a.dims2()?;
        let product = (b.matmul(&a)? * f64::from(alpha / rank as f32))?;
        if product.dims() != [delta.d_out, delta.d_in] || d_in != delta.d_in {
            return Err(wrong(format!("{} has the shape {:?}", place.name(), product.dims())));
        }
        let (product, mut expected) = (product.flatten_all()?.to_vec1::<f32>()?, vec![0.0; d_in]);
        for row in 0..delta.d_out {
            delta.row(row, &mut expected);
            let found = &product[place.row(row) * d_in..][..d_in];
            let largest = expected.iter().fold(0.0_f32, |largest, x| largest.max(x.abs()));
            let off = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            if off > 1e-5 * largest + f32::MIN_POSITIVE {
                return Err(wrong(format!("row {row} of {} is off by {off:e}", place.name())));
            }
        }
    }
    match names.into_iter().next() {
        Some(name) => Err(wrong(format!("{name} is of no projection that has an adapter"))),
        None => Ok(()),
    }
}
