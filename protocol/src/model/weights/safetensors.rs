//! Weights of a Hugging Face folder: one `model.safetensors`, or shards named by `model.safetensors.index.json`.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;
use std::path::{Path, PathBuf};

use candle_core::quantized::GgmlDType;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;

use super::stored::{Format, Rows, Scales, Stored};
use super::{MappedFile, ModelError};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// What a checkpoint of the model without a head leaves off its names.
const PREFIX: &str = "model.";
/// What the names of a text model's tensors begin with in a larger model's files, old and new, and what they begin with elsewhere.
const OF_LARGER: [(&str, &str); 3] =
    [("language_model.model.", PREFIX), ("model.language_model.", PREFIX), ("language_model.lm_head.", "lm_head.")];
/// What stands behind the name of a tensor in 8-bit floats in the name of its scales. Values are multiplied by either.
const SCALES: [&str; 2] = ["_scale_inv", "_scale"];
/// Weights of other tools, which are not read.
const OTHERS: [(&str, &str); 3] = [
    ("pytorch_model.bin", "convert it to safetensors, or fetch the model's safetensors release"),
    ("pytorch_model.bin.index.json", "convert it to safetensors, or fetch the model's safetensors release"),
    ("adapter_model.safetensors", "this is an adapter: give the folder of the model that it was trained on"),
];

/// The mapped files and where each tensor lies in them.
pub(crate) struct SafetensorsFiles {
    folder: PathBuf,
    files: Vec<MappedFile>,
    tensors: HashMap<String, Entry>,
}

#[derive(Clone)]
struct Entry {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Range<usize>,
}

/// One of a folder's files of weights.
pub struct Shard<'a> {
    /// Its path.
    pub path: &'a Path,
    /// Its tensors by their names in the file.
    pub tensors: SafeTensors<'a>,
    /// What else its head says.
    pub metadata: Option<HashMap<String, String>>,
}

impl<'a> Shard<'a> {
    /// A tensor by its usual name, which a checkpoint of the model without a head shortens and that of a larger model lengthens.
    pub fn find(&self, name: &str) -> Option<TensorView<'a>> {
        let bare = || self.tensors.tensor(name.strip_prefix(PREFIX)?).ok();
        let of_larger =
            |(larger, own): &(&str, &str)| self.tensors.tensor(&format!("{larger}{}", name.strip_prefix(own)?)).ok();
        self.tensors.tensor(name).ok().or_else(bare).or_else(|| OF_LARGER.iter().find_map(of_larger))
    }

    /// The usual name of a tensor of a file.
    pub fn usual_name(name: &str) -> Cow<'_, str> {
        if let Some(own) = without_larger(name) {
            return own.into();
        }
        match name.starts_with("layers.") || name.starts_with("embed_tokens.") || name.starts_with("norm.") {
            true => format!("{PREFIX}{name}").into(),
            false => name.into(),
        }
    }
}

/// The usual name of a text model's tensor that has a larger model's name.
fn without_larger(name: &str) -> Option<String> {
    OF_LARGER.iter().find_map(|(larger, own)| Some(format!("{own}{}", name.strip_prefix(larger)?)))
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl SafetensorsFiles {
    /// Maps the files of a folder and checks their headers: every tensor lies within its file and has as many bytes
    /// as its shape says. Where a folder has both a single file and an index, the file is read and `notes` say so.
    pub(crate) fn open(folder: &Path, notes: &mut Vec<String>) -> Result<Self, ModelError> {
        let mut opened = Self { folder: folder.to_owned(), files: Vec::new(), tensors: HashMap::new() };
        let (single, index) = (folder.join(SINGLE), folder.join(INDEX));
        if single.exists() {
            if index.exists() {
                notes.push(format!("{SINGLE} lies beside {INDEX}: the single file is read, as Hugging Face does"));
            }
            opened.add(&single)?;
            return Ok(opened);
        }
        if !index.is_file() {
            let other = OTHERS.iter().find(|(name, _)| folder.join(name).exists());
            let other = other.map(|(name, remedy)| format!(", only {name} ({remedy})")).unwrap_or_default();
            let what = format!("the folder has neither {SINGLE} nor {INDEX}{other}");
            return Err(ModelError::NotAModel { path: folder.to_owned(), what });
        }
        let text = super::read_text(&index)?;
        let parsed: Index =
            serde_json::from_str(&text).map_err(|error| ModelError::corrupt(&index, error.to_string()))?;
        let mut shards: BTreeMap<&str, &str> = BTreeMap::new();
        for (tensor, shard) in &parsed.weight_map {
            shards.entry(shard).or_insert(tensor);
        }
        for (&shard, &tensor) in &shards {
            if Path::new(shard).file_name().is_none_or(|name| name != shard) {
                return Err(ModelError::corrupt(&index, format!("`{shard}` is not the name of a file beside it")));
            }
            let path = folder.join(shard);
            if !path.exists() {
                let (shard, of) = (shard.to_owned(), shards.len());
                return Err(ModelError::MissingShard { index, shard, of, tensor: tensor.to_owned() });
            }
            opened.add(&path)?;
        }
        if let Some((name, shard)) = parsed.weight_map.iter().find(|(name, _)| !opened.tensors.contains_key(*name)) {
            notes.push(format!("{}: it says that `{name}` is in {shard}, where it is not", index.display()));
        }
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

    /// The files as they are.
    pub(crate) fn shards(&self) -> Result<Vec<Shard<'_>>, ModelError> {
        let shards = self.files.iter().map(|file| {
            let failed = |error: safetensors::SafeTensorError| ModelError::corrupt(&file.path, error.to_string());
            let (_, head) = SafeTensors::read_metadata(&file.bytes).map_err(failed)?;
            let tensors = SafeTensors::deserialize(&file.bytes).map_err(failed)?;
            Ok(Shard { path: &file.path, tensors, metadata: head.metadata().clone() })
        });
        shards.collect()
    }

    /// Gives a tensor, if it is there, a second name.
    pub(crate) fn also_call(&mut self, name: &str, second: &str) {
        if let Some(entry) = self.entry(name).cloned() {
            self.tensors.insert(second.to_owned(), entry);
        }
    }

    /// Gives the tensors of the text's model in a larger one their usual names.
    pub(crate) fn unwrap_text(&mut self) {
        let usual = |(name, entry): (String, Entry)| (without_larger(&name).unwrap_or(name), entry);
        self.tensors = std::mem::take(&mut self.tensors).into_iter().map(usual).collect();
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.entry(name).is_some()
    }

    /// The names in the files of tensors that are not among those `asked` for, nor scales of one, with each one's file.
    pub(crate) fn others<'a>(&'a self, asked: &'a HashSet<&str>) -> impl Iterator<Item = (&'a str, &'a Path)> {
        let known = |name: &str| asked.contains(name) || asked.contains(format!("{PREFIX}{name}").as_str());
        // Beside an 8-bit matrix lie its own scales, and those of activations that are 8-bit floats elsewhere.
        let scales = move |name: &str| {
            let (of, part) = name.rsplit_once('.').unwrap_or(("", name));
            part.contains("_scale") && known(&format!("{of}.weight"))
        };
        let others = self.tensors.iter().filter(move |(name, _)| !known(name) && !scales(name));
        others.map(|(name, entry)| (name.as_str(), self.files[entry.file].path.as_path()))
    }

    fn entry(&self, name: &str) -> Option<&Entry> {
        let bare = || name.strip_prefix(PREFIX).and_then(|bare| self.tensors.get(bare));
        self.tensors.get(name).or_else(bare)
    }

    pub(crate) fn tensor(&self, name: &str) -> Result<Stored<'_>, ModelError> {
        let entry = self
            .entry(name)
            .ok_or_else(|| ModelError::MissingTensor { path: self.folder.clone(), name: name.to_owned() })?;
        let file = &self.files[entry.file];
        let format = match entry.dtype {
            Dtype::F32 => Format::Ggml(GgmlDType::F32),
            Dtype::F16 => Format::Ggml(GgmlDType::F16),
            Dtype::BF16 => Format::Ggml(GgmlDType::BF16),
            Dtype::F64 => Format::F64,
            Dtype::F8_E4M3 => Format::F8E4M3,
            Dtype::F8_E5M2 => Format::F8E5M2,
            other => {
                let dtype = format!("{other:?}");
                return Err(ModelError::Dtype { path: file.path.clone(), name: name.to_owned(), dtype });
            }
        };
        let bytes = &file.bytes[entry.bytes.clone()];
        let scales = match format {
            Format::F8E4M3 | Format::F8E5M2 => self.scales(name, &entry.shape)?,
            _ => None,
        };
        Ok(Stored { file, name: name.to_owned(), shape: &entry.shape, format, bytes, rows: Rows::Plain, scales })
    }

    /// The scales beside a tensor in 8-bit floats, if there are any.
    fn scales(&self, name: &str, shape: &[usize]) -> Result<Option<Scales>, ModelError> {
        let names = SCALES.map(|end| format!("{name}{end}"));
        let Some(scales) = names.iter().find(|name| self.has(name)) else { return Ok(None) };
        let stored = self.tensor(scales)?;
        let found = stored.shape.to_vec();
        let fitting = Scales::new(stored.to_f32()?, &found, shape);
        fitting.map(Some).ok_or_else(|| {
            let what = format!("the scales `{scales}` are {found:?}, which does not divide {shape:?} into blocks");
            ModelError::corrupt(&stored.file.path, what)
        })
    }
}
