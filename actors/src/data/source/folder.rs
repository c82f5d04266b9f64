//! A folder of data: files for training, and where there are any for evaluation.

use std::path::{Path, PathBuf};

use crate::data::DataError;

/// The files of a data set by what they are for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in crate::data) struct Split {
    /// To train on.
    pub(in crate::data) training: Vec<PathBuf>,
    /// Held out; empty where the training data are to be split.
    pub(in crate::data) held_out: Vec<PathBuf>,
    /// For tests after the training: not used.
    pub(in crate::data) unused: Vec<PathBuf>,
}

/// What files of data end in, compressed ones aside.
const KINDS: [&str; 6] = ["jsonl", "ndjson", "json", "csv", "tsv", "parquet"];

/// The files that a path means: itself, or what is in the folder. Files are told by how their names begin (`train`, `valid`,
/// `test`, in the ways that data sets write them), shards of one split are taken in the order of their names.
///
/// # Errors
/// When the folder cannot be read, or has no data to train on.
pub(in crate::data) fn split(path: &Path) -> Result<Split, DataError> {
    if !path.is_dir() {
        return Ok(Split { training: vec![path.to_owned()], ..Split::default() });
    }
    let mut files = Vec::new();
    // Hugging Face's own folders have theirs in `data`.
    for folder in [path.to_owned(), path.join("data")] {
        if !folder.is_dir() {
            continue;
        }
        let entries = std::fs::read_dir(&folder).and_then(Iterator::collect::<std::io::Result<Vec<_>>>);
        let entries = entries.map_err(|source| DataError::Io { path: folder.clone(), source })?;
        files.extend(entries.into_iter().map(|entry| entry.path()).filter(|file| file.is_file() && is_data(file)));
    }
    files.sort();
    let mut split = Split::default();
    for file in files {
        let name = file.file_name().map(|name| name.to_string_lossy().to_ascii_lowercase()).unwrap_or_default();
        let begins = |names: &[&str]| names.iter().any(|begin| name.starts_with(begin));
        if begins(&["train"]) {
            split.training.push(file);
        } else if begins(&["valid", "val.", "val-", "val_", "dev", "eval"]) {
            split.held_out.push(file);
        } else {
            split.unused.push(file);
        }
    }
    if split.training.is_empty() {
        let found: Vec<String> =
            split.unused.iter().chain(&split.held_out).map(|file| file.display().to_string()).collect();
        let found = if found.is_empty() { "no files of data".to_owned() } else { found.join(", ") };
        let what = format!("the folder has no file train.* to train on ({found} is there); name one file instead");
        return Err(DataError::Nothing { path: path.to_owned(), what });
    }
    Ok(split)
}

fn is_data(file: &Path) -> bool {
    let name = file.file_name().map(|name| name.to_string_lossy().to_ascii_lowercase()).unwrap_or_default();
    let name = name.trim_end_matches(".gz").trim_end_matches(".zst");
    KINDS.iter().any(|kind| name.strip_suffix(kind).is_some_and(|stem| stem.ends_with('.')))
}
