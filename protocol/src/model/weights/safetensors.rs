//! Weights of a Hugging Face folder: one `model.safetensors`, or shards named by `model.safetensors.index.json`.

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};

use candle_core::quantized::GgmlDType;
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;

use super::stored::{Rows, Stored};
use super::{MappedFile, ModelError};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The mapped files and where each tensor lies in them.
pub(crate) struct SafetensorsFiles {
    folder: PathBuf,
    files: Vec<MappedFile>,
    tensors: HashMap<String, Entry>,
}

struct Entry {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Range<usize>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: HashMap<String, String>,
}

impl SafetensorsFiles {
    /// Maps the files of a folder and checks their headers: every tensor lies within its file and has as many bytes
    /// as its shape says.
    pub(crate) fn open(folder: &Path) -> Result<Self, ModelError> {
        let mut opened = Self { folder: folder.to_owned(), files: Vec::new(), tensors: HashMap::new() };
        let index = folder.join(INDEX);
        if index.is_file() {
            let text = std::fs::read_to_string(&index).map_err(|source| ModelError::io(&index, source))?;
            let parsed: Index =
                serde_json::from_str(&text).map_err(|error| ModelError::corrupt(&index, error.to_string()))?;
            let shards: BTreeSet<&str> = parsed.weight_map.values().map(String::as_str).collect();
            for shard in shards {
                if Path::new(shard).file_name().is_none_or(|name| name != shard) {
                    return Err(ModelError::corrupt(&index, format!("`{shard}` is not the name of a file beside it")));
                }
                opened.add(&folder.join(shard))?;
            }
            return Ok(opened);
        }
        let single = folder.join(SINGLE);
        if !single.is_file() {
            let what = format!("the folder has neither {SINGLE} nor {INDEX}");
            return Err(ModelError::NotAModel { path: folder.to_owned(), what });
        }
        opened.add(&single)?;
        Ok(opened)
    }

    fn add(&mut self, path: &Path) -> Result<(), ModelError> {
        let mapped = MappedFile::open(path)?;
        let start = mapped.bytes.as_ptr().addr();
        let parsed =
            SafeTensors::deserialize(&mapped.bytes).map_err(|error| ModelError::corrupt(path, error.to_string()))?;
        for (name, view) in parsed.iter() {
            let offset = view.data().as_ptr().addr() - start;
            let bytes = offset..offset + view.data().len();
            let entry = Entry { file: self.files.len(), dtype: view.dtype(), shape: view.shape().to_vec(), bytes };
            self.tensors.insert(name.to_owned(), entry);
        }
        self.files.push(mapped);
        Ok(())
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    pub(crate) fn tensor(&self, name: &str) -> Result<Stored<'_>, ModelError> {
        let entry = self
            .tensors
            .get(name)
            .ok_or_else(|| ModelError::MissingTensor { path: self.folder.clone(), name: name.to_owned() })?;
        let file = &self.files[entry.file];
        let dtype = match entry.dtype {
            Dtype::F32 => GgmlDType::F32,
            Dtype::F16 => GgmlDType::F16,
            Dtype::BF16 => GgmlDType::BF16,
            other => {
                let dtype = format!("{other:?}");
                return Err(ModelError::Dtype { path: file.path.clone(), name: name.to_owned(), dtype });
            }
        };
        let bytes = &file.bytes[entry.bytes.clone()];
        Ok(Stored { file, name: name.to_owned(), shape: &entry.shape, dtype, bytes, rows: Rows::Plain })
    }
}
