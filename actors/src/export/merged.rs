//! A Hugging Face folder with an adapter merged into its weights, in the base's own number format.
//!
//! Tensors are merged one at a time while the file is written, so that memory does not grow with the model. Tensors without
//! an adapter are copied bit for bit. The folder is read again before it gets its name: each changed tensor must be as near to
//! what was meant as its number format allows, and different from what it was.

use std::borrow::Cow;
use std::fs;
use std::path::Path;

use protocol::model::{Model, Shard};
use safetensors::tensor::{Dtype, TensorView, View};

use super::changes::{Change, Changes, HEAD};
use super::numbers::Numbers;
use super::output::{Existing, OutputFolder, keep};
use super::tally::{Merged, Tally, Tensor};
use super::{ExportError, wrong};
use crate::files::FileError;
use crate::lora::LoraAdapters;

/// Ends of the names of files that hold weights: these are written anew, or are of other tools.
const WEIGHTS: [&str; 8] = [".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".msgpack", ".h5"];

/// Writes `model`, which was opened from a Hugging Face folder, with adapters merged into it to the folder `out`.
///
/// # Errors
/// When the model is no such folder or in a number format that cannot be written, there is something that must be kept, the
/// disk refuses, or the merge changes nothing, or loses more than rounding explains.
pub fn write(model: &Model, adapters: &LoraAdapters, out: &Path, existing: Existing) -> Result<Merged, ExportError> {
    let Some(shards) = model.shards()? else {
        return Err(ExportError::Unsupported(format!(
            "{} is no Hugging Face folder, into whose files an adapter can be merged; write a merged GGUF file (`node export \
             gguf`), or give the folder that the file was made of",
            model.path().display()
        )));
    };
    let mut changes = Changes::of(adapters, model.config())?;
    if model.config().tie_word_embeddings && shards.iter().any(|shard| shard.find(HEAD).is_some()) {
        changes = changes.with_copied_head();
    }
    for (name, change) in changes.iter() {
        check_shape(&shards, name, change)?;
    }
    keep([model.path()], out)?;
    let folder = OutputFolder::new(out, "config.json", existing)?;
    for shard in &shards {
        write_file(&folder.path().join(shard.path.file_name().unwrap_or_default()), shard, &changes)?;
    }
    copy_others(model.path(), folder.path())?;
    let merged = check(&shards, folder.path(), &changes)?;
    folder.done()?;
    Ok(merged)
}

/// Checks that a tensor is there and can be written.
fn check_shape(shards: &[Shard<'_>], name: &str, change: &Change) -> Result<(), ExportError> {
    let found = shards.iter().find_map(|shard| Some((shard.path, shard.find(name)?)));
    let Some((path, view)) = found else {
        let folder = shards.first().map(|shard| shard.path).unwrap_or(Path::new(""));
        return Err(wrong(folder, format!("{name} is in none of the model's files")));
    };
    if Numbers::of(view.dtype()).is_none() {
        return Err(ExportError::Unsupported(format!(
            "{name} is stored as {:?}, which merged weights cannot be written as; give the model in BF16, F16 or F32, or write \
             a GGUF file (`node export gguf`)",
            view.dtype()
        )));
    }
    if view.shape() != change.shape() {
        return Err(wrong(path, format!("{name} is {:?}, not {:?}", view.shape(), change.shape())));
    }
    Ok(())
}

/// A tensor on its way to the file.
struct Outgoing<'a> {
    view: TensorView<'a>,
    change: Option<(&'a Change, Numbers)>,
}

impl View for Outgoing<'_> {
    fn dtype(&self) -> Dtype {
        self.view.dtype()
    }

    fn shape(&self) -> &[usize] {
        self.view.shape()
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let Some((change, numbers)) = self.change else { return self.view.data().into() };
        let mut merged = self.view.data().to_vec();
        let columns = self.view.shape().last().copied().unwrap_or(1);
        let mut values = vec![0.0; columns];
        for (row, bytes) in merged.chunks_exact_mut(numbers.row_bytes(columns)).enumerate() {
            numbers.decode(bytes, &mut values);
            change.apply(row, &mut values);
            numbers.encode(&values, bytes);
        }
        merged.into()
    }

    fn data_len(&self) -> usize {
        self.view.data().len()
    }
}

fn write_file(to: &Path, shard: &Shard<'_>, changes: &Changes) -> Result<(), ExportError> {
    let outgoing = shard.tensors.iter().map(|(name, view)| {
        let change = changes.get(&Shard::usual_name(name));
        let change = change.and_then(|change| Some((change, Numbers::of(view.dtype())?)));
        (name.to_owned(), Outgoing { view, change })
    });
    safetensors::serialize_to_file(outgoing, shard.metadata.clone(), to).map_err(|error| wrong(to, error.to_string()))
}

/// Copies what is no weights: configuration, tokenizer, templates, the index of the shards.
fn copy_others(base: &Path, out: &Path) -> Result<(), ExportError> {
    let failed = |path: &Path, action, source| FileError::Io { path: path.to_owned(), action, source };
    for entry in fs::read_dir(base).map_err(|source| failed(base, "read", source))? {
        let path = entry.map_err(|source| failed(base, "read", source))?.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
        if path.is_file() && !WEIGHTS.iter().any(|end| name.ends_with(end)) {
            fs::copy(&path, out.join(name)).map_err(|source| failed(&out.join(name), "written", source))?;
        }
    }
    Ok(())
}

/// Compares what was written with what should have been.
pub(super) fn check(shards: &[Shard<'_>], out: &Path, changes: &Changes) -> Result<Merged, ExportError> {
    let again = Model::open(out)?;
    let written = again.shards()?.unwrap_or_default();
    let mut tally = Tally::default();
    for (name, before) in shards.iter().flat_map(|shard| shard.tensors.iter()) {
        let usual = Shard::usual_name(name);
        let after = || written.iter().find_map(|shard| shard.tensors.tensor(name).ok());
        if changes.get(&usual).is_none() && after().is_none_or(|after| after.data() != before.data()) {
            return Err(wrong(out, format!("{name} was to be copied, and is not what the base has")));
        }
    }
    for (name, change) in changes.iter() {
        let before = shards.iter().find_map(|shard| shard.find(name));
        let after = written.iter().find_map(|shard| shard.find(name));
        let (Some(before), Some(after)) = (before, after) else { continue };
        let Some(numbers) = Numbers::of(before.dtype()) else { continue };
        if after.dtype() != before.dtype() || after.shape() != before.shape() {
            return Err(wrong(out, format!("{name} is of another format or shape than the base's")));
        }
        let columns = before.shape().last().copied().unwrap_or(1);
        let bytes = numbers.row_bytes(columns).max(1);
        let mut tensor = Tensor::new(numbers, columns);
        let (mut base, mut found) = (vec![0.0; columns], vec![0.0; columns]);
        let rows = before.data().chunks_exact(bytes).zip(after.data().chunks_exact(bytes));
        for (row, (before, after)) in rows.enumerate() {
            numbers.decode(before, &mut base);
            numbers.decode(after, &mut found);
            let mut meant = base.clone();
            change.apply(row, &mut meant);
            tensor.row(&base, &meant, &found);
        }
        tally.take(name, &tensor);
    }
    tally.finish(changes.iter().count())
}
