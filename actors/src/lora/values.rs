//! Reading a parameter's values where they lie.

use std::ops::{Deref, Range};

use candle_core::{CpuStorage, Error, Result, Storage, Tensor};

/// The values of a tensor in row-major order, locked against change while they are read.
pub(crate) struct Values<'a> {
    /// candle's guard, whose type it does not name.
    storage: Box<dyn Deref<Target = Storage> + Sync + 'a>,
    range: Range<usize>,
}

impl<'a> Values<'a> {
    /// Of a contiguous f32 tensor on the CPU.
    ///
    /// # Errors
    /// When it is another one.
    pub(crate) fn of(tensor: &'a Tensor) -> Result<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        let Some((start, end)) = layout.contiguous_offsets() else {
            return Err(Error::RequiresContiguous { op: "reading a parameter" }.bt());
        };
        if f32_values(&storage).is_none() {
            return Err(Error::Msg("parameters are f32 and on the CPU".into()).bt());
        }
        Ok(Self { storage: Box::new(storage), range: start..end })
    }
}

impl Deref for Values<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &f32_values(&self.storage).unwrap_or_default()[self.range.clone()]
    }
}

fn f32_values(storage: &Storage) -> Option<&[f32]> {
    match storage {
        Storage::Cpu(CpuStorage::F32(values)) => Some(values),
        _ => None,
    }
}
