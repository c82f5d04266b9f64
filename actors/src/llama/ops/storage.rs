//! Reading candle's storage as plain slices.

use candle_core::{CpuStorage, DType, Device, Error, Layout, Result, Shape, Storage, Tensor};

/// The values behind an operation's argument.
///
/// # Errors
/// When they are not f32 or not contiguous.
pub(super) fn values<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let CpuStorage::F32(values) = storage else {
        return Err(Error::UnsupportedDTypeForOp(storage_dtype(storage), "velum").bt());
    };
    let Some((start, end)) = layout.contiguous_offsets() else {
        return Err(Error::RequiresContiguous { op: "velum" }.bt());
    };
    Ok(&values[start..end])
}

/// Hands a tensor's values to `work`, in row-major order.
///
/// # Errors
/// When the tensor isn't f32 on the CPU, and what `work` returns.
pub(super) fn with_values<R>(tensor: &Tensor, work: impl FnOnce(&[f32]) -> Result<R>) -> Result<R> {
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => work(values(storage, layout)?),
        _ => Err(Error::Msg("the owner's arithmetic runs on the CPU".into()).bt()),
    }
}

/// A CPU tensor around values.
pub(super) fn tensor(values: Vec<f32>, shape: impl Into<Shape>) -> Result<Tensor> {
    Tensor::from_vec(values, shape.into(), &Device::Cpu)
}

fn storage_dtype(storage: &CpuStorage) -> DType {
    use candle_core::backend::BackendStorage;
    storage.dtype()
}
