//! What is written appears under its name when it is whole and was read again, and not before. What is there already is left
//! alone unless its owner says otherwise.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use tempfile::{NamedTempFile, TempDir};

use super::ExportError;
use crate::files::{FileError, Readers, folder_of, temporary};

/// Whether what is there already may be replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existing {
    /// It is left alone.
    Keep,
    /// It is replaced once the new one is whole.
    Replace,
}

fn failed(path: &Path, action: &'static str, source: std::io::Error) -> ExportError {
    FileError::Io { path: path.to_owned(), action, source }.into()
}

fn refused(path: &Path, what: &str) -> ExportError {
    ExportError::Unsupported(format!("{} {what}", path.display()))
}

/// Refuses to replace what is read from.
///
/// # Errors
/// When `to` is one of these files or folders, or one of them lies within.
pub(super) fn keep<'a>(read: impl IntoIterator<Item = &'a Path>, to: &Path) -> Result<(), ExportError> {
    // What is not there yet is nobody's.
    let Ok(out) = fs::canonicalize(to) else { return Ok(()) };
    match read.into_iter().find(|read| fs::canonicalize(read).is_ok_and(|read| read.starts_with(&out))) {
        Some(read) => {
            Err(refused(to, &format!("is, or holds, what is exported ({}); choose another name", read.display())))
        }
        None => Ok(()),
    }
}

/// A file on its way.
pub(super) struct OutputFile {
    temporary: NamedTempFile,
    to: PathBuf,
}

impl OutputFile {
    /// # Errors
    /// When there is a file of this name that must be kept, or the disk refuses.
    pub(super) fn new(to: &Path, readers: Readers, existing: Existing) -> Result<Self, ExportError> {
        if to.is_dir() {
            return Err(refused(to, "is a folder; give the name of a file"));
        }
        if to.exists() && existing == Existing::Keep {
            return Err(refused(to, "is there already; choose another name, or replace it (--force)"));
        }
        let temporary = temporary(readers).suffix(".gguf").tempfile_in(folder_of(to));
        let temporary = temporary.map_err(|source| failed(to, "written", source))?;
        Ok(Self { temporary, to: to.to_owned() })
    }

    /// Where it is until it is done.
    pub(super) fn path(&self) -> &Path {
        self.temporary.path()
    }

    pub(super) fn file(&mut self) -> &mut File {
        self.temporary.as_file_mut()
    }

    /// Gives it its name.
    pub(super) fn done(self) -> Result<(), ExportError> {
        let Self { temporary, to } = self;
        let finish = || {
            temporary.as_file().sync_all()?;
            temporary.persist(&to)?;
            File::open(folder_of(&to))?.sync_all()
        };
        finish().map_err(|source| failed(&to, "written", source))
    }
}

fn temporary_folder(parent: &Path) -> std::io::Result<TempDir> {
    temporary(Readers::Owner).permissions(fs::Permissions::from_mode(0o700)).tempdir_in(parent)
}

/// A folder on its way.
pub(super) struct OutputFolder {
    /// Its owner's alone, while the folder within is as any other.
    _temporary: TempDir,
    path: PathBuf,
    to: PathBuf,
    existing: Existing,
}

impl OutputFolder {
    /// A folder that may replace an earlier one if that has a file called `mark`, by which it is known to be one.
    ///
    /// # Errors
    /// When there is something of this name that must be kept, or the disk refuses.
    pub(super) fn new(to: &Path, mark: &str, existing: Existing) -> Result<Self, ExportError> {
        if to.exists() && !to.is_dir() {
            return Err(refused(to, "is a file; give the name of a folder"));
        }
        let empty = || fs::read_dir(to).is_ok_and(|mut entries| entries.next().is_none());
        if to.exists() && !empty() {
            match existing {
                Existing::Keep => {
                    return Err(refused(to, "is not empty; choose another folder, or replace it (--force)"));
                }
                Existing::Replace if !to.join(mark).is_file() => {
                    let what = format!("has no {mark}, so that it is no earlier export; remove it yourself");
                    return Err(refused(to, &what));
                }
                Existing::Replace => {}
            }
        }
        let parent = folder_of(to);
        crate::files::create_folder(parent)?;
        let temporary = temporary_folder(parent).map_err(|source| failed(to, "written", source))?;
        let path = temporary.path().join("export");
        fs::create_dir(&path).map_err(|source| failed(to, "written", source))?;
        Ok(Self { _temporary: temporary, path, to: to.to_owned(), existing })
    }

    /// Where it is until it is done.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Gives it its name.
    pub(super) fn done(self) -> Result<(), ExportError> {
        let Self { _temporary, path, to, existing } = self;
        let finish = || {
            for entry in fs::read_dir(&path)? {
                File::open(entry?.path())?.sync_all()?;
            }
            let old = match to.exists() && existing == Existing::Replace {
                true => Some(temporary_folder(folder_of(&to))?),
                false => None,
            };
            if let Some(old) = &old {
                fs::rename(&to, old.path().join("replaced"))?;
            }
            if let Err(error) = fs::rename(&path, &to) {
                if let Some(old) = old {
                    // It is put back, or stays where it is if that fails too.
                    fs::rename(old.keep().join("replaced"), &to)?;
                }
                return Err(error);
            }
            File::open(folder_of(&to))?.sync_all()
        };
        finish().map_err(|source| failed(&to, "written", source))
    }
}
