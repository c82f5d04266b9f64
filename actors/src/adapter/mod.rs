//! Adapters on disk in Hugging Face PEFT's format, so that any tool which knows PEFT can use what was trained here.
//!
//! A folder holds `adapter_config.json` and `adapter_model.safetensors`. Each appears whole or not at all.

mod config;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use protocol::model::{LlamaConfig, Projection};
use safetensors::tensor::{Dtype, TensorView};

use self::config::PeftConfig;
use crate::files::{FileError, Readers, create_folder, read_bounded, write_atomically};
use crate::lora::{LoraAdapters, SavedNorm, Slot, TokenRows};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
/// What PEFT calls trained rows of the embeddings. They are the rows themselves, and no differences.
const TOKENS: &str = "model.embed_tokens.token_adapter.trainable_tokens_delta";
/// A configuration is a page of text; anything much larger is something else.
const MAX_CONFIG_BYTES: u64 = 1 << 20;
/// Room for names and padding in a weights file beyond its numbers.
const MAX_HEADER_BYTES: u64 = 16 << 20;

/// Why an adapter cannot be written or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdapterError {
    /// The file system refused, or a file is larger than an adapter's can be.
    #[error(transparent)]
    File(#[from] FileError),
    /// A file does not hold what it should.
    #[error("{}: {what}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// The tensors cannot be made or read.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// Writes adapters to a folder, which is created where it does not exist.
///
/// `base_model` is the name or path that PEFT will look for the base model under.
///
/// # Errors
/// When the folder cannot be written to; files that were there before are whole then.
pub fn save(folder: &Path, adapters: &LoraAdapters, base_model: &str) -> Result<(), AdapterError> {
    create_folder(folder)?;
    let larger = adapters.of_larger();
    let mut tensors: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
    adapters.for_each(|layer, projection, a, b| {
        for (side, tensor) in [("A", a), ("B", b)] {
            let values = tensor.flatten_all()?.to_vec1::<f32>()?;
            let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            tensors.push((key(larger, layer, projection, side), tensor.dims().to_vec(), bytes));
        }
        Ok::<_, AdapterError>(())
    })?;
    for SavedNorm { module, factors, .. } in adapters.norms() {
        let bytes = factors.to_vec1::<f32>()?.iter().flat_map(|value| value.to_le_bytes()).collect();
        tensors.push((norm_key(larger, module), factors.dims().to_vec(), bytes));
    }
    if let Some(TokenRows { rows, .. }) = adapters.token_rows() {
        let values = rows.flatten_all()?.to_vec1::<f32>()?;
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        tensors.push((named(larger, TOKENS), rows.dims().to_vec(), bytes));
    }
    let weights = folder.join(WEIGHTS);
    let unwritable = |what: String| AdapterError::Content { path: weights.clone(), what };
    let views =
        tensors.iter().map(|(name, shape, bytes)| Ok((name, TensorView::new(Dtype::F32, shape.clone(), bytes)?)));
    let views: Vec<_> =
        views.collect::<Result<_, safetensors::SafeTensorError>>().map_err(|e| unwritable(e.to_string()))?;
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let bytes = safetensors::serialize(views, Some(metadata)).map_err(|error| unwritable(error.to_string()))?;
    write_atomically(&weights, &bytes, Readers::Owner)?;

    let config = folder.join(CONFIG);
    let adapted = (!adapters.config().layers.is_all()).then(|| adapters.layers());
    let json = PeftConfig::new(adapters.config(), adapters.modules(), adapted, base_model).of_larger(larger);
    let json = serde_json::to_vec_pretty(&json)
        .map_err(|error| AdapterError::Content { path: config.clone(), what: error.to_string() })?;
    Ok(write_atomically(&config, &json, Readers::Owner)?)
}

/// Reads adapters for a model from a folder.
///
/// # Errors
/// When a file is missing, damaged, too large, not finite, for another model, or uses a kind of adapter that is not
/// known here.
pub fn load(folder: &Path, model: &LlamaConfig) -> Result<LoraAdapters, AdapterError> {
    let path = folder.join(CONFIG);
    let bytes = read_bounded(&path, MAX_CONFIG_BYTES)?;
    let content = |what: String| AdapterError::Content { path: path.clone(), what };
    let config: PeftConfig = serde_json::from_slice(&bytes).map_err(|error| content(error.to_string()))?;
    let larger = model.traits.of_larger;
    let config = config.into_lora(larger).map_err(content)?;
    config.values(model).map_err(|invalid| content(invalid.to_string()))?;
    let adapters = LoraAdapters::new(model, &config, 0)?;

    let path = folder.join(WEIGHTS);
    let bytes = read_bounded(&path, (adapters.values() as u64).saturating_mul(4).saturating_add(MAX_HEADER_BYTES))?;
    let content = |what: String| AdapterError::Content { path: path.clone(), what };
    let mut tensors = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu)
        .map_err(|error| content(format!("not a safetensors file: {error}")))?;
    drop(bytes);
    let mut take = |name: String, expected: &[usize]| -> Result<Tensor, AdapterError> {
        let tensor = tensors.remove(&name).ok_or_else(|| content(format!("{name} is missing")))?;
        if tensor.dims() != expected {
            return Err(content(format!("{name} is {:?}, not {expected:?}", tensor.dims())));
        }
        let tensor = tensor.to_dtype(DType::F32)?;
        if !tensor.abs()?.sum_all()?.to_scalar::<f32>()?.is_finite() {
            return Err(content(format!("{name} holds numbers that are not finite")));
        }
        Ok(tensor)
    };
    adapters.set_norms(|_, module| {
        Ok::<_, AdapterError>(take(norm_key(larger, module), &[model.hidden_size])?.to_vec1()?)
    })?;
    adapters.set_tokens(|tokens| {
        let rows = take(named(larger, TOKENS), &[tokens.len(), model.hidden_size])?;
        Ok::<_, AdapterError>(rows.flatten_all()?.to_vec1()?)
    })?;
    adapters.replace(|layer, &Slot { projection, rank, .. }| {
        let mut take = |side, expected: [usize; 2]| take(key(larger, layer, projection, side), &expected);
        let shape = projection.shape(model);
        Ok::<_, AdapterError>((take("A", [rank, shape.d_in])?, take("B", [shape.d_out, rank])?))
    })?;
    match tensors.into_keys().next() {
        Some(name) => Err(content(format!("{name} belongs to no adapter that {CONFIG} describes"))),
        None => Ok(adapters),
    }
}

fn norm_key(larger: bool, module: &str) -> String {
    named(larger, &format!("{module}.weight"))
}

fn key(larger: bool, layer: u16, projection: Projection, side: &str) -> String {
    named(larger, &format!("model.layers.{layer}.{}.lora_{side}.weight", projection.name()))
}

/// What PEFT calls a tensor of the model, or of the part of a larger one that reads text.
fn named(larger: bool, tensor: &str) -> String {
    match tensor.strip_prefix("model.").filter(|_| larger) {
        Some(tensor) => format!("base_model.model.model.language_model.{tensor}"),
        None => format!("base_model.model.{tensor}"),
    }
}
