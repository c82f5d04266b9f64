//! Compiled kernels on disk, so that only a worker's first start waits for the compiler.
//!
//! A cache may lose anything at any time: what cannot be read, or is not what was written, is compiled again, and what
//! cannot be written is compiled the next time.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

/// Begins every file; changes with its layout.
const MAGIC: &[u8; 16] = b"velum kernels 1\n";
const HASH_BYTES: usize = blake3::OUT_LEN;

/// A folder of compiled kernels.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cache<'a> {
    folder: &'a Path,
}

/// What a compilation depends on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Key<'a> {
    pub(crate) source: &'a str,
    pub(crate) options: &'a [String],
    pub(crate) compiler: (i32, i32),
    pub(crate) architecture: &'a str,
}

impl Key<'_> {
    fn file_name(&self) -> String {
        let mut hash = blake3::Hasher::new_derive_key("velum compiled kernels");
        let (major, minor) = self.compiler;
        let compiler = format!("{major}.{minor}");
        // Each with its length, so that no two keys are one text.
        let parts = [self.source, &compiler, self.architecture].into_iter();
        for part in parts.chain(self.options.iter().map(String::as_str)) {
            hash.update(&(part.len() as u64).to_le_bytes());
            hash.update(part.as_bytes());
        }
        format!("{}-{}.kernels", self.architecture, &hash.finalize().to_hex()[..32])
    }
}

impl<'a> Cache<'a> {
    pub(crate) fn new(folder: &'a Path) -> Self {
        Self { folder }
    }

    fn path(&self, key: &Key<'_>) -> PathBuf {
        self.folder.join(key.file_name())
    }

    /// The image of a key, if it is there and whole.
    pub(crate) fn read(&self, key: &Key<'_>) -> Option<Vec<u8>> {
        let mut bytes = fs::read(self.path(key)).ok()?;
        let (head, image) = bytes.split_at_checked(MAGIC.len() + HASH_BYTES)?;
        let hash = blake3::hash(image);
        if head[..MAGIC.len()] != MAGIC[..] || head[MAGIC.len()..] != hash.as_bytes()[..] {
            tracing::warn!(path = %self.path(key).display(), "compiled kernels are damaged and are compiled again");
            return None;
        }
        Some(bytes.split_off(MAGIC.len() + HASH_BYTES))
    }

    /// Writes the image of a key, in one step.
    pub(crate) fn write(&self, key: &Key<'_>, image: &[u8]) {
        let path = self.path(key);
        let write = || {
            fs::create_dir_all(self.folder)?;
            let mut file = tempfile::NamedTempFile::new_in(self.folder)?;
            file.write_all(MAGIC)?;
            file.write_all(blake3::hash(image).as_bytes())?;
            file.write_all(image)?;
            file.persist(&path).map_err(|error| error.error)?;
            Ok::<_, std::io::Error>(())
        };
        if let Err(error) = write() {
            tracing::warn!(path = %path.display(), %error, "compiled kernels are not kept and are compiled at each start");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: Key<'_> = Key { source: "kernel", options: &[], compiler: (12, 9), architecture: "sm_90" };

    #[test]
    fn what_is_written_is_read_and_nothing_else() {
        let folder = tempfile::tempdir().expect("a folder");
        let inner = folder.path().join("kernels");
        let cache = Cache::new(&inner);
        assert_eq!(cache.read(&KEY), None);
        cache.write(&KEY, b"image");
        cache.write(&KEY, b"image");
        assert_eq!(cache.read(&KEY).as_deref(), Some(&b"image"[..]));
        let options = ["-G".to_owned()];
        let others = [
            Key { source: "kernel ", ..KEY },
            Key { options: &options, ..KEY },
            Key { compiler: (12, 8), ..KEY },
            Key { architecture: "sm_80", ..KEY },
        ];
        assert!(others.iter().all(|other| cache.read(other).is_none()));
        assert_eq!(fs::read_dir(&inner).expect("the folder").count(), 1, "nothing temporary is left");
    }

    #[test]
    fn a_damaged_file_is_no_image() {
        let folder = tempfile::tempdir().expect("a folder");
        let cache = Cache::new(folder.path());
        cache.write(&KEY, b"image");
        let path = cache.path(&KEY);
        let whole = fs::read(&path).expect("the file");
        for length in [0, 10, MAGIC.len() + HASH_BYTES - 1, whole.len() - 1] {
            fs::write(&path, &whole[..length]).expect("written");
            assert_eq!(cache.read(&KEY), None, "{length} bytes");
        }
        for place in [0, MAGIC.len(), whole.len() - 1] {
            let mut damaged = whole.clone();
            damaged[place] ^= 1;
            fs::write(&path, damaged).expect("written");
            assert_eq!(cache.read(&KEY), None, "byte {place}");
        }
    }

    #[test]
    fn a_folder_that_cannot_be_written_costs_only_time() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("file");
        fs::write(&file, b"").expect("written");
        let cache = Cache::new(&file);
        cache.write(&KEY, b"image");
        assert_eq!(cache.read(&KEY), None);
    }
}
