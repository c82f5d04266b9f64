//! Weights of a GGUF file, or of several that one model was split into, as llama.cpp writes them.
//!
//! Two things differ from Hugging Face's layout: the tensors' names, and in some families the order of the query and key
//! rows, which llama.cpp interleaves for its own rotary positions. Both are undone here, so that everything downstream knows
//! one layout. Numbers are decoded by candle's block formats.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use super::gguf_header::{self, Header, TensorEntry, Value};
use super::stored::{Format, Rows, Stored};
use super::{MappedFile, ModelError};
use crate::model::config::LlamaConfig;
use crate::model::family::{Family, GgufSource, gguf_name};

/// Tensors that the configuration was made of.
const OF_CONFIGURATION: [&str; 3] = ["rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"];
/// Most files that a model is split into.
const MAX_PARTS: usize = 4096;

/// Mapped GGUF files and where each tensor lies in them.
pub(crate) struct GgufFile {
    /// The one with the metadata first.
    parts: Vec<Part>,
    tensors: HashMap<String, (usize, TensorEntry)>,
    family: &'static Family,
    head_dim: usize,
}

struct Part {
    file: MappedFile,
    data_offset: u64,
}

impl GgufFile {
    /// Maps a file, and the others where it is one of several, and reads the configuration.
    pub(crate) fn open(path: &Path) -> Result<(Self, LlamaConfig), ModelError> {
        let mut opened = Self { parts: Vec::new(), tensors: HashMap::new(), family: Family::LLAMA, head_dim: 0 };
        let asked = MappedFile::open(path)?;
        let of = split_into(&asked)?;
        if of == 1 {
            opened.add(asked)?;
        } else {
            drop(asked);
            for path in parts_of(path, of)? {
                opened.add(MappedFile::open(&path)?)?;
            }
        }
        let first = &opened.parts[0].file;
        let header = header(first)?;
        let config = LlamaConfig::from_gguf(&GgufSource {
            path: &first.path,
            metadata: &header.metadata,
            shape: &|name| opened.tensors.get(name).map(|(_, entry)| entry.shape.as_slice()),
            vector: &|name| match opened.tensors.contains_key(name) {
                true => opened.stored(name, Rows::Plain)?.to_f32().map(Some),
                false => Ok(None),
            },
        })?;
        config.validate(&first.path)?;
        (opened.family, opened.head_dim) = (config.family, config.head_dim);
        Ok((opened, config))
    }

    fn add(&mut self, file: MappedFile) -> Result<(), ModelError> {
        let Header { tensors, data_offset, .. } = header(&file)?;
        let part = self.parts.len();
        self.tensors.extend(tensors.into_iter().map(|(name, entry)| (name.to_owned(), (part, entry))));
        self.parts.push(Part { file, data_offset });
        Ok(())
    }

    /// The metadata, read anew: it is needed once or twice in a run, and its texts are the file's own bytes.
    pub(crate) fn metadata(&self) -> Result<HashMap<&str, Value<'_>>, ModelError> {
        Ok(header(&self.parts[0].file)?.metadata)
    }

    /// The same as they lie in the file.
    pub(crate) fn entries(&self) -> Result<Vec<gguf_header::RawEntry<'_>>, ModelError> {
        let file = &self.parts[0].file;
        gguf_header::entries(&file.bytes).map_err(|what| ModelError::corrupt(&file.path, what))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.parts[0].file.path
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        gguf_name(self.family, name).is_some_and(|(name, _)| self.tensors.contains_key(&name))
    }

    /// The names in the files of tensors that are not among those `asked` for, with each one's file.
    pub(crate) fn others(&self, asked: &HashSet<&str>) -> impl Iterator<Item = (&str, &Path)> {
        let asked = asked.iter().filter_map(|name| gguf_name(self.family, name)).map(|(name, _)| name);
        let known: HashSet<String> = asked.chain(OF_CONFIGURATION.map(str::to_owned)).collect();
        let others = self.tensors.iter().filter(move |(name, _)| !known.contains(*name));
        others.map(|(name, (part, _))| (name.as_str(), self.parts[*part].file.path.as_path()))
    }

    /// Looks a tensor up by its Hugging Face name.
    pub(crate) fn tensor(&self, name: &str) -> Result<Stored<'_>, ModelError> {
        let missing = || ModelError::MissingTensor { path: self.path().to_owned(), name: name.to_owned() };
        let (name, interleaved) = gguf_name(self.family, name).ok_or_else(missing)?;
        let rows = if interleaved { Rows::Interleaved { head_dim: self.head_dim } } else { Rows::Plain };
        self.stored(&name, rows)
    }

    fn stored(&self, name: &str, rows: Rows) -> Result<Stored<'_>, ModelError> {
        let Some((part, entry)) = self.tensors.get(name) else {
            return Err(ModelError::MissingTensor { path: self.path().to_owned(), name: name.to_owned() });
        };
        let Part { file, data_offset } = &self.parts[*part];
        let path = file.path.as_path();
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
        let start = data_offset.checked_add(entry.offset).and_then(|start| usize::try_from(start).ok());
        let bytes = start.zip(length).and_then(|(start, length)| file.bytes.get(start..start.checked_add(length)?));
        let bytes =
            bytes.ok_or_else(|| ModelError::corrupt(path, format!("`{name}` reaches beyond the file's end")))?;
        let (name, format) = (name.to_owned(), Format::Ggml(dtype));
        Ok(Stored { file, name, shape: &entry.shape, format, bytes, rows, scales: None })
    }
}

fn header(file: &MappedFile) -> Result<Header<'_>, ModelError> {
    gguf_header::read(&file.bytes).map_err(|what| ModelError::corrupt(&file.path, what))
}

/// How many files a model is split into.
fn split_into(file: &MappedFile) -> Result<usize, ModelError> {
    let of = header(file)?.metadata.get("split.count").and_then(Value::count).unwrap_or(1);
    if of > MAX_PARTS {
        return Err(ModelError::corrupt(&file.path, format!("split.count is {of}")));
    }
    Ok(of.max(1))
}

/// The paths of all parts, by the name of one: `name-00001-of-00003.gguf`.
fn parts_of(path: &Path, of: usize) -> Result<Vec<PathBuf>, ModelError> {
    let name = path.file_stem().and_then(|name| name.to_str()).unwrap_or_default();
    let end = format!("-of-{of:05}");
    let start = name.strip_suffix(end.as_str()).and_then(|rest| rest.rsplit_once('-'));
    let Some((start, _)) = start.filter(|(_, number)| number.len() == 5) else {
        let what = format!(
            "it is one of {of} files that a model was split into, so its name should end in -00001{end}.gguf; give all of \
             them their names again"
        );
        return Err(ModelError::config(path, what));
    };
    let part = |number: usize| path.with_file_name(format!("{start}-{number:05}{end}.gguf"));
    let parts: Vec<PathBuf> = (1..=of).map(part).collect();
    if let Some(missing) = parts.iter().find(|part| !part.exists()) {
        let missing = missing.file_name().unwrap_or_default().display();
        let what = format!(
            "it is one of {of} files that a model was split into, and {missing} is not beside it; fetch that file too"
        );
        return Err(ModelError::config(path, what));
    }
    Ok(parts)
}
