//! A Hugging Face folder with an adapter merged into its weights, in the base's own number format.
//!
//! Tensors are merged one at a time while the file is written, so that memory does not grow with the model. Tensors without
//! an adapter are copied bit for bit. The merged ones are read again from the folder that was written: each must be as near to
//! `W + s·B·A` as its number format allows, and different from `W`.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use memmap2::Mmap;
use protocol::model::Model;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView, View};

use super::ExportError;
use super::delta::Delta;
use crate::files::{FileError, create_folder};
use crate::lora::LoraAdapters;

/// Ends of the names of files that hold weights: these are written anew, or are of other tools.
const WEIGHTS: [&str; 8] = [".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".msgpack", ".h5"];
/// Where a checkpoint of the model without a head leaves off its names.
const PREFIX: &str = "model.";

/// What came of a merge.
#[derive(Clone, Debug, PartialEq)]
pub struct Merged {
    /// Tensors that were changed.
    pub changed: usize,
    /// Of the tensor that lost most to rounding: its name, and the size of what was lost over that of what was added.
    pub worst: (String, f64),
}

/// Writes `model`, which was opened from a Hugging Face folder, with adapters merged into it to the folder `out`, which must be
/// empty or not be there.
///
/// # Errors
/// When the model is no such folder or in a number format that cannot be written, the disk refuses, or the merge changes
/// nothing, or loses more than rounding explains.
pub fn write(model: &Model, adapters: &LoraAdapters, out: &Path) -> Result<Merged, ExportError> {
    let base = model.path();
    if !base.is_dir() {
        return Err(ExportError::Unsupported(format!(
            "{} is no Hugging Face folder, into whose files an adapter can be merged; export an adapter for llama.cpp \
             (`node export gguf-adapter`), or give the folder that the file was made of",
            base.display()
        )));
    }
    if fs::read_dir(out).is_ok_and(|mut entries| entries.next().is_some()) {
        return Err(ExportError::Unsupported(format!("{} is not empty; choose another folder", out.display())));
    }
    let deltas: HashMap<String, Delta> =
        Delta::all(adapters)?.into_iter().map(|delta| (delta.weight(), delta)).collect();
    create_folder(out)?;
    let mut left: Vec<&str> = deltas.keys().map(String::as_str).collect();
    for file in weights(base)? {
        let mapped = map(&base.join(&file))?;
        let tensors = parsed(&base.join(&file), &mapped)?;
        left.retain(|name| find(&tensors, name).is_none());
        write_file(&out.join(&file), &base.join(&file), &mapped, &deltas)?;
    }
    if let Some(name) = left.first() {
        return Err(ExportError::Wrong { path: base.to_owned(), what: format!("{name} is in none of its files") });
    }
    copy_others(base, out)?;
    check(base, out, &deltas)
}

/// The names of a folder's weight files: the single one, as Hugging Face prefers it, or the shards that its index names.
fn weights(folder: &Path) -> Result<Vec<String>, ExportError> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let (single, index) = ("model.safetensors", folder.join("model.safetensors.index.json"));
    if folder.join(single).exists() {
        return Ok(vec![single.to_owned()]);
    }
    let text = fs::read_to_string(&index).map_err(|source| failed(&index, "read", source))?;
    let index: Index = serde_json::from_str(&text)
        .map_err(|error| ExportError::Wrong { path: index.clone(), what: error.to_string() })?;
    let mut files: Vec<String> = index.weight_map.into_values().collect();
    files.sort_unstable();
    files.dedup();
    Ok(files)
}

fn failed(path: &Path, action: &'static str, source: std::io::Error) -> ExportError {
    FileError::Io { path: path.to_owned(), action, source }.into()
}

fn map(path: &Path) -> Result<Mmap, ExportError> {
    let file = fs::File::open(path).map_err(|source| failed(path, "read", source))?;
    // SAFETY: the map is read-only. Should another process shorten the file meanwhile, a read beyond its new end raises
    // SIGBUS: a crash, no read of foreign memory. Should it rewrite the file, other numbers are read, whatever they are.
    unsafe { Mmap::map(&file) }.map_err(|source| failed(path, "read", source))
}

fn parsed<'a>(path: &Path, mapped: &'a Mmap) -> Result<SafeTensors<'a>, ExportError> {
    SafeTensors::deserialize(mapped)
        .map_err(|error| ExportError::Wrong { path: path.to_owned(), what: error.to_string() })
}

/// A tensor by its usual name.
fn find<'a>(tensors: &'a SafeTensors<'_>, name: &str) -> Option<TensorView<'a>> {
    let bare = || tensors.tensor(name.strip_prefix(PREFIX)?).ok();
    tensors.tensor(name).ok().or_else(bare)
}

/// A tensor on its way to the file.
struct Outgoing<'a> {
    view: TensorView<'a>,
    delta: Option<&'a Delta>,
}

impl View for Outgoing<'_> {
    fn dtype(&self) -> Dtype {
        self.view.dtype()
    }

    fn shape(&self) -> &[usize] {
        self.view.shape()
    }

    fn data(&self) -> Cow<'_, [u8]> {
        match self.delta {
            Some(delta) => merge(&self.view, delta).into(),
            None => self.view.data().into(),
        }
    }

    fn data_len(&self) -> usize {
        self.view.data().len()
    }
}

fn write_file(to: &Path, from: &Path, mapped: &Mmap, deltas: &HashMap<String, Delta>) -> Result<(), ExportError> {
    let tensors = parsed(from, mapped)?;
    let mut outgoing = Vec::new();
    for (name, view) in tensors.iter() {
        let delta = deltas.get(name).or_else(|| deltas.get(&format!("{PREFIX}{name}")));
        if let Some(delta) = delta {
            if number_bytes(view.dtype()).is_none() {
                return Err(ExportError::Unsupported(format!(
                    "{name} is stored as {:?}, which merged weights cannot be written as; give the model in BF16, F16 or F32",
                    view.dtype()
                )));
            }
            if view.shape() != [delta.d_out, delta.d_in] {
                let what = format!("{name} is {:?}, not {:?}", view.shape(), [delta.d_out, delta.d_in]);
                return Err(ExportError::Wrong { path: from.to_owned(), what });
            }
        }
        outgoing.push((name.to_owned(), Outgoing { view, delta }));
    }
    let (_, header) = SafeTensors::read_metadata(mapped)
        .map_err(|error| ExportError::Wrong { path: from.to_owned(), what: error.to_string() })?;
    let partial = to.with_extension("safetensors.part");
    safetensors::serialize_to_file(outgoing, header.metadata().clone(), &partial)
        .map_err(|error| ExportError::Wrong { path: partial.clone(), what: error.to_string() })?;
    fs::rename(&partial, to).map_err(|source| failed(to, "written", source))
}

/// Bytes of a number of the formats that merged weights are written in.
fn number_bytes(dtype: Dtype) -> Option<usize> {
    match dtype {
        Dtype::BF16 | Dtype::F16 => Some(2),
        Dtype::F32 => Some(4),
        Dtype::F64 => Some(8),
        _ => None,
    }
}

/// A number as it is stored.
fn decode(dtype: Dtype, bytes: &[u8]) -> f64 {
    match (dtype, bytes) {
        (Dtype::BF16, &[a, b]) => bf16::from_le_bytes([a, b]).to_f64(),
        (Dtype::F16, &[a, b]) => f16::from_le_bytes([a, b]).to_f64(),
        (Dtype::F32, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]).into(),
        (_, bytes) => bytes.try_into().map_or(f64::NAN, f64::from_le_bytes),
    }
}

fn encode(dtype: Dtype, value: f64, out: &mut [u8]) {
    match dtype {
        Dtype::BF16 => out.copy_from_slice(&bf16::from_f64(value).to_le_bytes()),
        Dtype::F16 => out.copy_from_slice(&f16::from_f64(value).to_le_bytes()),
        Dtype::F32 => out.copy_from_slice(&(value as f32).to_le_bytes()),
        _ => out.copy_from_slice(&value.to_le_bytes()),
    }
}

/// `W + s·B·A` in the tensor's own format.
fn merge(view: &TensorView<'_>, delta: &Delta) -> Vec<u8> {
    let (dtype, mut merged) = (view.dtype(), view.data().to_vec());
    let size = number_bytes(dtype).unwrap_or(1);
    let mut added = vec![0.0; delta.d_in];
    for (row, bytes) in merged.chunks_exact_mut(delta.d_in * size).enumerate() {
        delta.row(row, &mut added);
        for (number, &added) in bytes.chunks_exact_mut(size).zip(&added) {
            let sum = decode(dtype, number) + f64::from(added);
            encode(dtype, sum, number);
        }
    }
    merged
}

/// Copies what is no weights: configuration, tokenizer, templates, the index of the shards.
fn copy_others(base: &Path, out: &Path) -> Result<(), ExportError> {
    let entries = fs::read_dir(base).map_err(|source| failed(base, "read", source))?;
    for entry in entries {
        let path: PathBuf = entry.map_err(|source| failed(base, "read", source))?.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
        if path.is_file() && !WEIGHTS.iter().any(|end| name.ends_with(end)) {
            fs::copy(&path, out.join(name)).map_err(|source| failed(&out.join(name), "written", source))?;
        }
    }
    Ok(())
}

/// Half a step of a number format, relative to a number.
fn rounding(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::BF16 => 1.0 / 256.0,
        Dtype::F16 => 1.0 / 2048.0,
        Dtype::F32 => f64::from(f32::EPSILON) / 2.0,
        _ => f64::EPSILON / 2.0,
    }
}

/// Numbers below this are coarser than [`rounding`] says.
fn smallest(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::F16 => f16::MIN_POSITIVE.to_f64(),
        _ => f64::from(f32::MIN_POSITIVE),
    }
}

/// Compares what was written with what should have been.
fn check(base: &Path, out: &Path, deltas: &HashMap<String, Delta>) -> Result<Merged, ExportError> {
    let (mut changed, mut adds, mut worst) = (0, false, (String::new(), 0.0));
    for file in weights(out)? {
        let (before, after) = (map(&base.join(&file))?, map(&out.join(&file))?);
        let (path, before) = (out.join(&file), parsed(&base.join(&file), &before)?);
        let after = parsed(&path, &after)?;
        let wrong = |what: String| ExportError::Wrong { path: path.clone(), what };
        for (name, delta) in deltas {
            let (Some(before), Some(after)) = (find(&before, name), find(&after, name)) else { continue };
            let lost = compare(&before, &after, delta).map_err(|what| wrong(format!("{name} {what}")))?;
            changed += 1;
            if let Some(lost) = lost.filter(|lost| !adds || *lost > worst.1) {
                (adds, worst) = (true, (name.clone(), lost));
            }
        }
    }
    if changed != deltas.len() {
        let what = format!("{changed} of {} tensors were merged", deltas.len());
        return Err(ExportError::Wrong { path: out.to_owned(), what });
    }
    if !adds {
        let what =
            "the adapter adds nothing to any of the model's weights, so the folder is a copy of the base".to_owned();
        return Err(ExportError::Wrong { path: out.to_owned(), what });
    }
    Ok(Merged { changed, worst })
}

/// The size of what a merged tensor lost to rounding over that of what was added to it; `None` if nothing was.
fn compare(before: &TensorView<'_>, after: &TensorView<'_>, delta: &Delta) -> Result<Option<f64>, String> {
    let dtype = before.dtype();
    let Some(size) = number_bytes(dtype) else { return Err("is in another format".into()) };
    if after.dtype() != dtype || after.shape() != before.shape() {
        return Err("is of another format or shape than the base's".into());
    }
    let (mut added_square, mut lost_square, mut any) = (0.0, 0.0, false);
    let mut added = vec![0.0; delta.d_in];
    let rows = before.data().chunks_exact(delta.d_in * size).zip(after.data().chunks_exact(delta.d_in * size));
    for (row, (before, after)) in rows.enumerate() {
        delta.row(row, &mut added);
        for ((before, after), &added) in before.chunks_exact(size).zip(after.chunks_exact(size)).zip(&added) {
            let (added, merged) = (f64::from(added), decode(dtype, after));
            let expected = decode(dtype, before) + added;
            let lost = (merged - expected).abs();
            let allowed = 1.01 * rounding(dtype) * expected.abs().max(smallest(dtype));
            if lost.is_nan() || lost > allowed {
                return Err(format!("has {merged:e} in row {row} where the merge is {expected:e}"));
            }
            any |= before != after;
            added_square += added * added;
            lost_square += lost * lost;
        }
    }
    match added_square > 0.0 {
        true if !any => {
            Err("is as it was before: rounding takes all that the adapter adds; give the model in F32".into())
        }
        true => Ok(Some((lost_square / added_square).sqrt())),
        false => Ok(None),
    }
}
