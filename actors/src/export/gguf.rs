//! A GGUF file of a model with an adapter merged into its weights, for llama.cpp and what is built on it.
//!
//! Rows are fetched from the base, merged, stored and forgotten, a few at a time. The file is read again before it gets its
//! name, by the reader of files of other tools: every tensor must be as near to what was meant as its number format allows,
//! the changed ones different from what they were, and the tokenizer must split text as the base's does.

use std::io::{BufWriter, Write};
use std::path::Path;

use protocol::model::{GgufNumbers, GgufPlan, GgufTensor, Model, ModelError};
use rayon::prelude::*;

use super::changes::{Change, Changes};
use super::numbers::Numbers;
use super::output::{Existing, OutputFile, keep};
use super::tally::{Merged, Tally, Tensor};
use super::{ExportError, wrong};
use crate::files::{FileError, Readers};
use crate::lora::LoraAdapters;

/// Numbers of the rows that are merged at a time.
const AT_ONCE: usize = 1 << 20;

/// Texts that a tokenizer must split as it did: words, numbers, runs of space and lines, other scripts.
const SAMPLES: [&str; 4] = [
    "The quick brown fox isn't 1234567 years old; it's 12.5, or so THEY'LL say.",
    "fn main() {\n\tlet x = [1, 2, 3];\r\n\n    println!(\"{x:?}\");   \n}\n",
    "Größe, naïve café, Ελληνικά, русский, 東京都, 한국어, हिन्दी, 👩‍💻🙂",
    "   leading,  double  and trailing spaces   ",
];

/// Writes `model` with adapters merged into it to a file, its matrices stored in `numbers`.
///
/// # Errors
/// When llama.cpp has no form of the model or of its tokenizer, there is a file that must be kept, the disk refuses, or the
/// merge changes nothing, or loses more than rounding explains.
pub fn write(
    model: &Model,
    adapters: &LoraAdapters,
    numbers: GgufNumbers,
    out: &Path,
    existing: Existing,
) -> Result<Merged, ExportError> {
    keep([model.path()], out)?;
    let changes = Changes::of(adapters, model.config())?;
    let plan = model.gguf_plan(numbers)?;
    let mut file = OutputFile::new(out, Readers::Usual, existing)?;
    let path = file.path().to_owned();
    let mut to = BufWriter::with_capacity(1 << 20, file.file());
    let failed = |source| ExportError::File(FileError::Io { path: path.clone(), action: "written", source });
    to.write_all(&plan.head).map_err(failed)?;
    for tensor in &plan.tensors {
        let change = tensor.of_model().and_then(|name| changes.get(name));
        write_tensor(model, tensor, change, &mut |bytes| to.write_all(bytes).map_err(failed))?;
    }
    to.flush().map_err(failed)?;
    drop(to);
    let merged = check(model, &plan, &path, &changes)?;
    file.done()?;
    Ok(merged)
}

/// Stores a tensor, and the zeros behind it.
fn write_tensor(
    model: &Model,
    tensor: &GgufTensor,
    change: Option<&Change>,
    write: &mut dyn FnMut(&[u8]) -> Result<(), ExportError>,
) -> Result<(), ExportError> {
    let (rows, columns) = tensor.dimensions();
    let numbers = Numbers::from(tensor.numbers());
    let row_bytes = numbers.row_bytes(columns);
    if let Some(values) = tensor.values() {
        let mut bytes = vec![0; row_bytes];
        numbers.encode(&values.iter().map(|&value| value.into()).collect::<Vec<_>>(), &mut bytes);
        write(&bytes)?;
    }
    if let Some(name) = tensor.of_model() {
        let base = model.rows(name)?;
        let together = (AT_ONCE / columns.max(1)).max(1);
        let mut bytes = vec![0; together * row_bytes];
        for first in (0..rows).step_by(together) {
            let bytes = &mut bytes[..together.min(rows - first) * row_bytes];
            bytes.par_chunks_exact_mut(row_bytes).enumerate().try_for_each(|(row, bytes)| {
                let row = tensor.model_row(first + row);
                let mut values = vec![0.0_f32; columns];
                base.row(row, &mut values)?;
                let mut merged: Vec<f64> = values.iter().map(|&value| value.into()).collect();
                if let Some(change) = change {
                    change.apply(row, &mut merged);
                } else {
                    tensor.order(&mut values);
                    merged = values.iter().map(|&value| value.into()).collect();
                }
                numbers.encode(&merged, bytes);
                Ok::<_, ModelError>(())
            })?;
            write(bytes)?;
        }
        base.release();
    }
    write(&vec![0; tensor.bytes().1 as usize])
}

/// Reads the file again.
pub(super) fn check(model: &Model, plan: &GgufPlan, path: &Path, changes: &Changes) -> Result<Merged, ExportError> {
    let again = Model::open(path)?;
    let (mut tally, mut copied) = (Tally::default(), Tally::default());
    for tensor in &plan.tensors {
        let Some(name) = tensor.of_model() else { continue };
        let change = changes.get(name);
        let compared = compare(model, &again, name, change, tensor.numbers().into())?;
        if change.is_some() { tally.take(name, &compared) } else { copied.take(name, &compared) }
    }
    copied.only_right()?;
    check_tokenizer(model, &again, path)?;
    tally.finish(changes.iter().count())
}

fn compare(
    model: &Model,
    again: &Model,
    name: &str,
    change: Option<&Change>,
    numbers: Numbers,
) -> Result<Tensor, ExportError> {
    let (before, after) = (model.rows(name)?, again.rows(name)?);
    let (rows, columns) = before.dimensions();
    let mut tensor = Tensor::new(numbers, columns);
    let together = (AT_ONCE / columns.max(1)).max(1);
    for first in (0..rows).step_by(together) {
        let read = |row: usize| {
            let (mut base, mut found) = (vec![0.0; columns], vec![0.0; columns]);
            before.row(row, &mut base)?;
            after.row(row, &mut found)?;
            let wide = |row: Vec<f32>| row.into_iter().map(f64::from).collect::<Vec<_>>();
            let (base, found) = (wide(base), wide(found));
            let mut meant = base.clone();
            if let Some(change) = change {
                change.apply(row, &mut meant);
            }
            Ok::<_, ModelError>((base, meant, found))
        };
        let read = (first..rows.min(first + together)).into_par_iter().map(read).collect::<Result<Vec<_>, _>>()?;
        read.iter().for_each(|(base, meant, found)| tensor.row(base, meant, found));
    }
    before.release();
    after.release();
    Ok(tensor)
}

/// A file that was copied says of its tokenizer what its base says; one that was written anew is tried.
fn check_tokenizer(model: &Model, again: &Model, path: &Path) -> Result<(), ExportError> {
    if model.shards()?.is_none() {
        return Ok(());
    }
    let (before, after) = (model.tokenizer()?, again.tokenizer()?);
    for text in SAMPLES {
        if before.encode(text, true)? != after.encode(text, true)? {
            return Err(wrong(
                path,
                format!(
                    "the tokenizer of the file splits {text:?} otherwise than the model's; `node export merged` writes a Hugging \
                 Face folder, which llama.cpp's own converter reads"
                ),
            ));
        }
    }
    Ok(())
}
