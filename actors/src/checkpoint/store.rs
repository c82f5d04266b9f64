//! A folder of checkpoints, `step-00000123.checkpoint` each.

use std::cmp::Reverse;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::format::MAX_HEAD_BYTES;
use super::{Checkpoint, CheckpointError};
use crate::files::{FileError, Readers, create_folder, read_bounded, sweep, write_atomically_with};

const PREFIX: &str = "step-";
const SUFFIX: &str = ".checkpoint";

/// A folder of checkpoints that one run writes to.
#[derive(Clone, Debug)]
pub struct Store {
    folder: PathBuf,
    keep: usize,
}

/// A checkpoint and where it was.
#[derive(Debug)]
pub struct Found<S> {
    /// The file.
    pub path: PathBuf,
    /// What it holds.
    pub checkpoint: Checkpoint<S>,
}

impl Store {
    /// The folder, which need not exist yet, of which the last `keep ≥ 1` checkpoints stay.
    pub fn new(folder: PathBuf, keep: usize) -> Self {
        Self { folder, keep: keep.max(1) }
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Writes the checkpoint of a step; when it is on the disk, those that are not to be kept are removed, and those of
    /// later steps too, which belong to a run that this one does not go on with. Returns the file.
    ///
    /// # Errors
    /// When it cannot be written, perhaps since the disk is full. Every older one is still there then.
    pub fn save<S: Serialize>(&self, step: usize, checkpoint: &Checkpoint<S>) -> Result<PathBuf, CheckpointError> {
        let head = checkpoint.head()?;
        create_folder(&self.folder)?;
        let path = self.folder.join(format!("{PREFIX}{step:08}{SUFFIX}"));
        write_atomically_with(&path, Readers::Owner, |out| checkpoint.write(&head, out))?;
        let (later, kept): (Vec<_>, Vec<_>) = self.list()?.into_iter().partition(|&(other, _)| other > step);
        for (_, old) in later.into_iter().chain(kept.into_iter().skip(self.keep)) {
            if let Err(error) = fs::remove_file(&old) {
                tracing::warn!("the old checkpoint {} cannot be removed: {error}", old.display());
            }
        }
        Ok(path)
    }

    /// Steps and files of all checkpoints, the newest first; none where there is no folder.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn list(&self) -> Result<Vec<(usize, PathBuf)>, CheckpointError> {
        let fail = |source| FileError::Io { path: self.folder.clone(), action: "read", source };
        let entries = match fs::read_dir(&self.folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(fail(error).into()),
        };
        let mut found = Vec::new();
        for entry in entries {
            let entry = entry.map_err(fail)?;
            let name = entry.file_name();
            let name = name.to_string_lossy();
            let step = name.strip_prefix(PREFIX).and_then(|name| name.strip_suffix(SUFFIX));
            if let Some(step) = step.and_then(|step| step.parse().ok()) {
                found.push((step, entry.path()));
            }
        }
        found.sort_by_key(|&(step, _)| Reverse(step));
        Ok(found)
    }

    /// The newest checkpoint that can be read. A damaged one is warned of and the next older one taken. `values` is how
    /// many numbers its tensors have.
    ///
    /// # Errors
    /// When there are checkpoints and none can be read: why not the newest.
    pub fn latest<S: DeserializeOwned>(&self, values: usize) -> Result<Option<Found<S>>, CheckpointError> {
        let mut first = None;
        for (_, path) in self.list()? {
            match read(&path, values) {
                Ok(checkpoint) => return Ok(Some(Found { path, checkpoint })),
                Err(error) => {
                    tracing::warn!("{error}; going back to an older one");
                    first.get_or_insert(error);
                }
            }
        }
        first.map_or(Ok(None), Err)
    }

    /// Removes all checkpoints, and what a killed process left beside them.
    ///
    /// # Errors
    /// When one cannot be removed.
    pub fn clear(&self) -> Result<(), CheckpointError> {
        for (_, path) in self.list()? {
            fs::remove_file(&path).map_err(|source| FileError::Io { path, action: "removed", source })?;
        }
        self.sweep();
        Ok(())
    }

    /// Removes what a killed process left beside the checkpoints.
    pub fn sweep(&self) {
        sweep(&self.folder);
    }
}

/// Reads one checkpoint, whose tensors have so many numbers.
///
/// # Errors
/// When it cannot be read, is too large, or is damaged.
pub(super) fn read<S: DeserializeOwned>(path: &Path, values: usize) -> Result<Checkpoint<S>, CheckpointError> {
    let limit = values.saturating_mul(4).saturating_add(MAX_HEAD_BYTES);
    let bytes = read_bounded(path, limit as u64)?;
    Checkpoint::from_bytes(path, &bytes)
}

impl<S: DeserializeOwned> Found<S> {
    /// Reads one checkpoint, whose tensors have so many numbers.
    ///
    /// # Errors
    /// When it cannot be read, is too large, or is damaged.
    pub fn read(path: &Path, values: usize) -> Result<Self, CheckpointError> {
        Ok(Self { path: path.to_owned(), checkpoint: read(path, values)? })
    }
}
