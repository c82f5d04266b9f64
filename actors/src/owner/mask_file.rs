//! Products of masks that memory has no room for, in a file of the run, where none are kept from run to run.
//!
//! A product that is not kept would be asked of a worker in every step, which costs the worker more than the product of a
//! body, and the network all of its bytes; reading it from a disk costs neither, and what the system has memory for it
//! keeps there. The file has no name: it is gone with the process, however that ends, and nobody else can open it.
//! Nothing in it is secret.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use protocol::he::{MaskProduct, Precision};

use super::mask_store::MaskStore;

/// Where the products of masks may be kept.
pub struct MaskRoom {
    /// In memory, bytes.
    pub memory_bytes: usize,
    /// On a disk.
    pub disk: Option<MaskDisk>,
}

/// What is on a disk.
pub enum MaskDisk {
    /// What memory has no room for, as long as the run lasts.
    Run(MaskFile),
    /// Everything, for later runs too.
    Kept(MaskStore),
}

impl MaskRoom {
    /// So many bytes of memory, and no disk.
    pub const fn memory(memory_bytes: usize) -> Self {
        Self { memory_bytes, disk: None }
    }

    /// What is kept from run to run.
    pub(super) fn store(&self) -> Option<&MaskStore> {
        match &self.disk {
            Some(MaskDisk::Kept(store)) => Some(store),
            _ => None,
        }
    }
}

/// See the module's documentation.
pub struct MaskFile {
    file: File,
    end: AtomicU64,
    /// Most bytes; none any more, once some could not be written.
    limit: AtomicU64,
}

/// Where a product is in the file.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Extent {
    start: u64,
    precision: Precision,
    outer: usize,
}

impl MaskFile {
    /// An empty file of at most `limit_bytes` on the disk of `folder`.
    ///
    /// # Errors
    /// When no file can be made there.
    pub fn create(folder: &Path, limit_bytes: u64) -> io::Result<Self> {
        Ok(Self::of(tempfile::tempfile_in(folder)?, limit_bytes))
    }

    pub(super) fn of(file: File, limit_bytes: u64) -> Self {
        Self { file, end: AtomicU64::new(0), limit: AtomicU64::new(limit_bytes) }
    }

    /// Writes a product, if there is room. Blocks.
    ///
    /// # Errors
    /// When it cannot be written, perhaps since the disk is full. There is no room any more then.
    pub(super) fn write(&self, product: &MaskProduct) -> io::Result<Option<Extent>> {
        let (bytes, limit) = (product.bytes(), self.limit.load(Ordering::Relaxed));
        let reserve = |end: u64| end.checked_add(bytes.len() as u64).filter(|&end| end <= limit);
        let Ok(start) = self.end.fetch_update(Ordering::Relaxed, Ordering::Relaxed, reserve) else { return Ok(None) };
        if let Err(error) = self.file.write_all_at(bytes, start) {
            self.limit.store(0, Ordering::Relaxed);
            return Err(error);
        }
        Ok(Some(Extent { start, precision: product.precision(), outer: product.outer() }))
    }

    /// Reads what was written. Blocks.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(super) fn read(&self, extent: Extent) -> io::Result<MaskProduct> {
        let Extent { start, precision, outer } = extent;
        MaskProduct::mapped(precision, outer, &self.file, start)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use protocol::he::ParameterSet;

    use super::*;

    fn product(outer: usize, byte: u8) -> MaskProduct {
        let precision = Precision::standard(ParameterSet::P24);
        let size = MaskProduct::memory_for(precision, outer);
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&(0..size).map(|index| (index as u8).wrapping_mul(byte)).collect::<Vec<_>>(), 0).unwrap();
        MaskProduct::mapped(precision, outer, &file, 0).unwrap()
    }

    #[test]
    fn products_come_back_and_a_full_file_takes_no_more() {
        let folder = tempfile::tempdir().unwrap();
        let size = product(1, 0).bytes().len() as u64;
        let file = MaskFile::create(folder.path(), 8 * size).unwrap();
        let products = [product(3, 5), product(1, 7), product(4, 11)];
        let extents = products.each_ref().map(|product| file.write(product).unwrap().unwrap());
        assert_eq!(file.write(&product(1, 1)).unwrap(), None);
        for (extent, product) in extents.into_iter().zip(&products).rev() {
            let back = file.read(extent).unwrap();
            assert_eq!((back.outer(), back.precision()), (product.outer(), product.precision()));
            assert_eq!(back.bytes(), product.bytes());
        }
        let names = std::fs::read_dir(folder.path()).unwrap().count();
        assert_eq!(names, 0, "the file has no name");
        assert!(MaskFile::create(&folder.path().join("missing"), 1).is_err());
    }

    #[test]
    fn what_cannot_be_written_or_read_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("masks");
        std::fs::write(&path, []).unwrap();
        let file = MaskFile::of(File::open(&path).unwrap(), u64::MAX);
        assert!(file.write(&product(2, 3)).is_err(), "it was not opened to be written");
        assert_eq!(file.write(&product(2, 3)).unwrap(), None, "and is not tried again");
        let extent = Extent { start: 0, precision: Precision::standard(ParameterSet::P24), outer: 1 };
        assert!(file.read(extent).is_err(), "it is empty");
    }
}
