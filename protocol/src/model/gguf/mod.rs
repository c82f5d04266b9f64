//! A model's GGUF file as llama.cpp's own converter would lay it out: which tensors, under which names, in which order of
//! rows, and what the head says. Whoever writes the file fetches row after row, so that memory does not grow with the model.
//!
//! The head of a model that is a GGUF file itself says what that file says, but for how numbers are stored. That of a Hugging
//! Face folder is made of its configuration (`settings`) and of its tokenizer.

mod entries;
mod numbers;
mod settings;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::path::Path;

pub(crate) use self::entries::{Entries, Entry};
pub use self::numbers::{GgufNumbers, Q8_0_BLOCK, UnknownNumbers};
use super::family::{GgufSource, gguf_name};
use super::weights::{Header, Rows, Stored, Weights, read_gguf_header};
use super::{LlamaConfig, Model, ModelError, expected};

/// Keys of a file's metadata that are of its own numbers or parts, and not of the model.
const NOT_COPIED: [&str; 5] =
    ["general.alignment", "general.file_type", "general.quantization_version", "split.", "quantize."];
/// Version of ggml's block formats (`GGML_QNT_VERSION`).
const QUANTISATION_VERSION: u32 = 2;

/// A file that is to be written.
pub struct GgufPlan {
    /// Everything before the data.
    pub head: Vec<u8>,
    /// The tensors, in the order of their data.
    pub tensors: Vec<GgufTensor>,
}

/// A tensor of it.
pub struct GgufTensor {
    name: String,
    numbers: GgufNumbers,
    shape: Vec<usize>,
    source: Source,
}

enum Source {
    /// A tensor of the model, by its Hugging Face name.
    Model { name: String, rows: Rows },
    /// These numbers.
    Values(Vec<f32>),
}

impl GgufTensor {
    /// llama.cpp's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The Hugging Face name of the model's tensor that it is, if it is one.
    pub fn of_model(&self) -> Option<&str> {
        match &self.source {
            Source::Model { name, .. } => Some(name),
            Source::Values(_) => None,
        }
    }

    /// The numbers of a tensor that is none of the model's.
    pub fn values(&self) -> Option<&[f32]> {
        match &self.source {
            Source::Model { .. } => None,
            Source::Values(values) => Some(values),
        }
    }

    /// How it is stored.
    pub fn numbers(&self) -> GgufNumbers {
        self.numbers
    }

    /// Number of rows and numbers in a row; a vector is one row.
    pub fn dimensions(&self) -> (usize, usize) {
        match self.shape[..] {
            [rows, columns] => (rows, columns),
            _ => (1, self.shape.iter().product()),
        }
    }

    /// Which row of the model's tensor lies in row `row` of the file's.
    pub fn model_row(&self, row: usize) -> usize {
        match &self.source {
            Source::Model { rows, .. } if self.shape.len() > 1 => rows.of_file(row),
            _ => row,
        }
    }

    /// Brings the numbers of a vector into the file's order.
    pub fn order(&self, row: &mut [f32]) {
        if let (Source::Model { rows: rows @ Rows::Interleaved { .. }, .. }, 1) = (&self.source, self.shape.len()) {
            let model = row.to_vec();
            row.iter_mut().enumerate().for_each(|(place, value)| *value = model[rows.of_file(place)]);
        }
    }

    /// Bytes of its data, and of the zeros behind them.
    pub fn bytes(&self) -> (u64, u64) {
        let (rows, columns) = self.dimensions();
        let bytes = rows as u64 * self.numbers.row_bytes(columns) as u64;
        (bytes, bytes.next_multiple_of(entries::ALIGNMENT) - bytes)
    }
}

/// A tensor of a model, read row by row in f32. Norms' scales are whole, whatever the files store.
pub struct ModelRows<'a> {
    stored: Stored<'a>,
    add: f32,
}

impl ModelRows<'_> {
    /// Number of rows and numbers in a row; a vector is one row.
    pub fn dimensions(&self) -> (usize, usize) {
        self.stored.dimensions()
    }

    /// One row; `out` holds exactly one.
    ///
    /// # Errors
    /// When it cannot be decoded, or holds a number that is none.
    pub fn row(&self, row: usize, out: &mut [f32]) -> Result<(), ModelError> {
        self.stored.row(row, out)?;
        if self.add != 0.0 {
            out.iter_mut().for_each(|value| *value += self.add);
        }
        Ok(())
    }

    /// Lets the operating system take the tensor's memory back.
    pub fn release(&self) {
        self.stored.release();
    }
}

impl Model {
    /// A tensor by its Hugging Face name.
    ///
    /// # Errors
    /// [`ModelError::MissingTensor`], or [`ModelError::Dtype`] when its number format cannot be read.
    pub fn rows(&self, name: &str) -> Result<ModelRows<'_>, ModelError> {
        let stored = self.weights.tensor(name)?;
        let centred = self.config.family.centred_norms && !self.weights.whole_norms();
        let norm = stored.shape.len() == 1 && !name.ends_with(".bias");
        Ok(ModelRows { stored, add: f32::from(u8::from(centred && norm)) })
    }

    /// How the model is laid out in a GGUF file whose matrices are stored in `numbers`.
    ///
    /// # Errors
    /// When llama.cpp cannot compute the model, or cannot split text into words as its tokenizer does.
    pub fn gguf_plan(&self, numbers: GgufNumbers) -> Result<GgufPlan, ModelError> {
        let mut entries = Entries::default();
        match &self.weights {
            Weights::Gguf(file) => {
                for (key, kind, bytes) in file.entries()? {
                    if !NOT_COPIED.iter().any(|not| key.starts_with(not)) {
                        entries.set(key, Entry::Copied { kind, bytes });
                    }
                }
            }
            Weights::Safetensors(_) => {
                let architecture = self.config.family.gguf_architecture();
                entries.set("general.architecture", Entry::Text(architecture.to_owned()));
                entries.set("general.type", Entry::Text("model".to_owned()));
                entries.set("general.name", Entry::Text(name_of(&self.path)));
                let set = settings::set(&mut entries, &self.config);
                set.map_err(|what| settings::unsaid(&self.path, &what))?;
                self.tokenizer()?.set_gguf(&mut entries)?;
            }
        }
        entries.set("general.file_type", Entry::U32(numbers.file_type()));
        entries.set("general.quantization_version", Entry::U32(QUANTISATION_VERSION));
        let tensors = self.gguf_tensors(numbers)?;
        let mut offset = 0;
        let table = tensors.iter().map(|tensor| {
            let (bytes, behind) = tensor.bytes();
            let row =
                entries::TableRow { name: &tensor.name, shape: &tensor.shape, code: tensor.numbers.code(), offset };
            offset += bytes + behind;
            row
        });
        let head = entries::head(&entries, &table.collect::<Vec<_>>());
        self.check_gguf(&head, &tensors)?;
        Ok(GgufPlan { head, tensors })
    }

    fn gguf_tensors(&self, numbers: GgufNumbers) -> Result<Vec<GgufTensor>, ModelError> {
        let family = self.config.family;
        let values = |(name, values): (&str, Vec<f32>)| GgufTensor {
            name: name.to_owned(),
            numbers: GgufNumbers::F32,
            shape: vec![values.len()],
            source: Source::Values(values),
        };
        let mut tensors: Vec<GgufTensor> = settings::rope_tensors(&self.config).into_iter().map(values).collect();
        for (hf, shape) in expected(&self.config) {
            let Some((name, interleaved)) = gguf_name(family, &hf) else {
                return Err(settings::unsaid(&self.path, &format!("it has no name for {hf}")));
            };
            let rows = if interleaved { Rows::Interleaved { head_dim: self.config.head_dim } } else { Rows::Plain };
            let numbers = match shape[..] {
                [_, columns] => numbers.fitting(columns),
                _ => GgufNumbers::F32,
            };
            tensors.push(GgufTensor { name, numbers, shape, source: Source::Model { name: hf, rows } });
        }
        Ok(tensors)
    }

    /// Reads a head as llama.cpp means it, and looks whether it computes the model.
    fn check_gguf(&self, head: &[u8], tensors: &[GgufTensor]) -> Result<(), ModelError> {
        let Header { metadata, .. } = read_gguf_header(head).map_err(|what| ModelError::corrupt(&self.path, what))?;
        let named: HashMap<&str, &GgufTensor> = tensors.iter().map(|tensor| (tensor.name(), tensor)).collect();
        let read = LlamaConfig::from_gguf(&GgufSource {
            path: &self.path,
            metadata: &metadata,
            shape: &|name| named.get(name).map(|tensor| tensor.shape.as_slice()),
            vector: &|name| Ok(named.get(name).and_then(|tensor| tensor.values()).map(<[f32]>::to_vec)),
        })?;
        settings::differs(&self.config, &read).map_or(Ok(()), |what| Err(settings::unsaid(&self.path, &what)))
    }
}

fn name_of(model: &Path) -> String {
    let whole = model.canonicalize().unwrap_or_else(|_| model.to_owned());
    whole.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}
