//! Files that appear whole or not at all: a reader, or whoever looks after a crash, sees the old content or the new one
//! and never a part.
//!
//! 1. The bytes go to a temporary file beside the target, so that the rename stays within one file system.
//! 2. They are flushed to the disk before the rename: otherwise a name could outlive a crash that its content did not.
//! 3. The temporary file takes the target's name.
//! 4. The folder is flushed too: that is where the name is.

use std::fs::{self, File, Permissions};
use std::io::{self, BufWriter, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

/// What names of temporary files begin with.
const TEMPORARY: &str = ".velum-";

/// Why a file could not be written or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FileError {
    /// The file system refused.
    #[error("{} cannot be {action}: {source}", path.display())]
    Io {
        /// File or folder.
        path: PathBuf,
        /// What was tried with it, as a participle.
        action: &'static str,
        /// What the system says.
        source: io::Error,
    },
    /// It is larger than such a file can be.
    #[error("{} has {bytes} bytes, more than the {limit} that such a file can have", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its length.
        bytes: u64,
        /// The most that would have been read.
        limit: u64,
    },
}

impl FileError {
    /// Whether there simply was no such file.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}

/// Who may read a file that is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Readers {
    /// Its owner alone (mode 0600): what tells of private data.
    Owner,
    /// Whom the process's umask lets, as with any other file.
    Usual,
}

/// Writes `bytes` to `path`, whole or not at all; what was there before stays until then. Blocks until they are on the
/// disk.
///
/// # Errors
/// When the folder is missing or full, or cannot be written; no temporary file is left then.
pub fn write_atomically(path: &Path, bytes: &[u8], readers: Readers) -> Result<(), FileError> {
    write_atomically_with(path, readers, |out| out.write_all(bytes))
}

/// The same with what `content` writes, for files that are too large to be in memory twice.
///
/// # Errors
/// The same, and whatever stops `content`.
pub fn write_atomically_with(
    path: &Path,
    readers: Readers,
    content: impl FnOnce(&mut dyn io::Write) -> io::Result<()>,
) -> Result<(), FileError> {
    let write = || -> io::Result<()> {
        let folder = folder_of(path);
        let mut file = temporary(readers).tempfile_in(folder)?;
        let mut out = BufWriter::new(file.as_file_mut());
        content(&mut out)?;
        out.flush()?;
        drop(out);
        file.as_file().sync_all()?;
        file.persist(path)?;
        File::open(folder)?.sync_all()
    };
    write().map_err(|source| FileError::Io { path: path.to_owned(), action: "written", source })
}

/// Reads a file of at most `limit` bytes.
///
/// # Errors
/// When it cannot be read or is larger.
pub fn read_bounded(path: &Path, limit: u64) -> Result<Vec<u8>, FileError> {
    let fail = |source| FileError::Io { path: path.to_owned(), action: "read", source };
    let bytes = fs::metadata(path).map_err(fail)?.len();
    if bytes > limit {
        return Err(FileError::TooLarge { path: path.to_owned(), bytes, limit });
    }
    fs::read(path).map_err(fail)
}

/// Makes a folder and those above it where they are missing.
///
/// # Errors
/// When it cannot be made.
pub fn create_folder(folder: &Path) -> Result<(), FileError> {
    fs::create_dir_all(folder).map_err(|source| FileError::Io { path: folder.to_owned(), action: "created", source })
}

/// Removes what a process that was killed while it wrote has left in a folder, as far as it can. No other process may be
/// writing there.
pub fn sweep(folder: &Path) {
    let left = |entry: &fs::DirEntry| entry.file_name().to_string_lossy().starts_with(TEMPORARY);
    for entry in fs::read_dir(folder).into_iter().flatten().flatten().filter(left) {
        if fs::remove_file(entry.path()).is_ok() {
            tracing::debug!("removed {}, left by a process that was killed", entry.path().display());
        }
    }
}

/// What temporary files are made by.
pub(crate) fn temporary<'a, 'b>(readers: Readers) -> tempfile::Builder<'a, 'b> {
    let mode = match readers {
        Readers::Owner => 0o600,
        Readers::Usual => 0o666,
    };
    let mut builder = tempfile::Builder::new();
    builder.prefix(TEMPORARY).permissions(Permissions::from_mode(mode));
    builder
}

/// The folder that a file is in.
pub(crate) fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_file_is_replaced_whole_and_nothing_else_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        for (text, readers) in [("first", Readers::Usual), ("second", Readers::Owner)] {
            write_atomically(&path, text.as_bytes(), readers).unwrap();
            assert_eq!(read_bounded(&path, 6).unwrap(), text.as_bytes());
        }
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_refusal_names_the_file_and_leaves_what_was_there() {
        let folder = tempfile::tempdir().unwrap();
        let taken = folder.path().join("taken");
        fs::create_dir(&taken).unwrap();
        let error = write_atomically(&taken, b"x", Readers::Usual).unwrap_err().to_string();
        assert!(error.contains("taken cannot be written"), "{error}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "a temporary file was left");
        assert!(write_atomically(&folder.path().join("missing/file"), b"x", Readers::Usual).is_err());
        let error = read_bounded(&folder.path().join("missing"), 1).unwrap_err();
        assert!(error.is_not_found() && error.to_string().contains("missing cannot be read"), "{error}");
        let long = folder.path().join("long");
        fs::write(&long, b"12345").unwrap();
        let error = read_bounded(&long, 4).unwrap_err().to_string();
        assert!(error.contains("long has 5 bytes, more than the 4"), "{error}");
    }

    #[test]
    fn what_a_killed_process_left_is_swept() {
        let folder = tempfile::tempdir().unwrap();
        for name in [".velum-abc", "kept", ".hidden"] {
            fs::write(folder.path().join(name), b"x").unwrap();
        }
        sweep(folder.path());
        sweep(&folder.path().join("missing"));
        assert!(!folder.path().join(".velum-abc").exists());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    }
}
