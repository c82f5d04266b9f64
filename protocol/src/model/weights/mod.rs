//! Weights on disk behind memory maps, whatever their format: tensors by their Hugging Face names, read row by
//! row in f32.

mod gguf;
mod gguf_header;
mod safetensors;
mod stored;

use std::collections::HashSet;
use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

pub(crate) use self::gguf::GgufFile;
pub(crate) use self::gguf_header::{Header, Value, read as read_gguf_header};
pub(crate) use self::safetensors::SafetensorsFiles;
pub use self::safetensors::Shard;
pub(crate) use self::stored::{Rows, Stored, transpose_into};

use super::error::ModelError;

/// A model's tensors.
pub(crate) enum Weights {
    /// A Hugging Face folder.
    Safetensors(SafetensorsFiles),
    /// A GGUF file.
    Gguf(GgufFile),
}

impl Weights {
    /// Looks a tensor up by its Hugging Face name.
    ///
    /// # Errors
    /// [`ModelError::MissingTensor`], or [`ModelError::Dtype`] when its number format cannot be read.
    pub(crate) fn tensor(&self, name: &str) -> Result<Stored<'_>, ModelError> {
        match self {
            Self::Safetensors(files) => files.tensor(name),
            Self::Gguf(file) => file.tensor(name),
        }
    }

    /// Whether a tensor is there.
    pub(crate) fn has(&self, name: &str) -> bool {
        match self {
            Self::Safetensors(files) => files.has(name),
            Self::Gguf(file) => file.has(name),
        }
    }

    /// The names in the files of tensors that are not among those `asked` for, in their order, with each one's file.
    pub(crate) fn others(&self, asked: &HashSet<&str>) -> Vec<(String, PathBuf)> {
        let owned = |(name, path): (&str, &Path)| (name.to_owned(), path.to_owned());
        let mut others: Vec<_> = match self {
            Self::Safetensors(files) => files.others(asked).map(owned).collect(),
            Self::Gguf(file) => file.others(asked).map(owned).collect(),
        };
        others.sort_unstable();
        others
    }

    /// Gives a tensor of a folder a second name. A GGUF file ties nothing: it has a head or it has none.
    pub(crate) fn also_call(&mut self, name: &str, second: &str) {
        if let Self::Safetensors(files) = self {
            files.also_call(name, second);
        }
    }

    /// Whether norms' scales are stored as they are, whatever the family does in Hugging Face's files.
    pub(crate) fn whole_norms(&self) -> bool {
        matches!(self, Self::Gguf(_))
    }

    /// Name of the format, as it goes into the digest.
    pub(crate) fn format(&self) -> &'static str {
        match self {
            Self::Safetensors(_) => "safetensors",
            Self::Gguf(_) => "gguf",
        }
    }
}

/// How a file begins that Git LFS has left in place of the real one.
const LFS_POINTER: &[u8] = b"version https://git-lfs.github.com/spec/";

/// Whether a file is only a pointer to the real one.
pub(crate) fn is_lfs_pointer(bytes: &[u8]) -> bool {
    bytes.starts_with(LFS_POINTER)
}

/// A small file's text.
pub(crate) fn read_text(path: &Path) -> Result<String, ModelError> {
    let text = std::fs::read_to_string(path).map_err(|source| ModelError::io(path, source))?;
    if is_lfs_pointer(text.as_bytes()) {
        return Err(ModelError::LfsPointer { path: path.to_owned() });
    }
    Ok(text)
}

/// A file in memory, by its path.
pub(crate) struct MappedFile {
    pub(crate) path: PathBuf,
    pub(crate) bytes: Mmap,
}

impl MappedFile {
    pub(crate) fn open(path: &Path) -> Result<Self, ModelError> {
        let file = File::open(path).map_err(|source| ModelError::io(path, source))?;
        // SAFETY: the map is read-only and private to this process's reading. Should another process shorten the
        // file while it is mapped, a read beyond its new end raises SIGBUS: a crash, no read of foreign memory.
        // Should it rewrite the file, other bytes are read, which the numeric decoders accept whatever they are.
        let bytes = unsafe { Mmap::map(&file) }.map_err(|source| ModelError::io(path, source))?;
        if is_lfs_pointer(&bytes) {
            return Err(ModelError::LfsPointer { path: path.to_owned() });
        }
        Ok(Self { path: path.to_owned(), bytes })
    }

    /// Lets the operating system take back the memory of `part`, a slice of [`bytes`](Self::bytes).
    pub(crate) fn release(&self, part: &[u8]) {
        let offset = part.as_ptr().addr().wrapping_sub(self.bytes.as_ptr().addr());
        if offset > self.bytes.len() || part.len() > self.bytes.len() - offset || part.is_empty() {
            return;
        }
        #[cfg(unix)]
        // SAFETY: the part was just checked to lie in the map. The map is of a file, shared and never written to, so
        // pages that are dropped come back with the same bytes when they are read again: no slice of the map changes.
        // The worst case is the one of the map itself: a file that somebody else changes.
        let released =
            unsafe { self.bytes.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, offset, part.len()) };
        // Memory that is not taken back costs memory and nothing else.
        #[cfg(unix)]
        let _ = released;
    }
}
