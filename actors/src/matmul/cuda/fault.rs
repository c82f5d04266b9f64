//! What can go wrong on a GPU, before it has the device's name.

use cudarc::cublaslt::result::CublasError;
use cudarc::driver::DriverError;
use cudarc::driver::sys::CUresult;

/// A failure of the driver or of a library.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Fault {
    #[error("{needed} bytes could not be allocated")]
    OutOfMemory { needed: u64 },
    #[error("{0}")]
    Failed(String),
}

impl Fault {
    pub(crate) fn text(what: &str) -> Self {
        Self::Failed(what.to_owned())
    }

    /// Of an allocation of so many bytes.
    pub(crate) fn of_allocation(error: DriverError, bytes: usize) -> Self {
        match error.0 {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => Self::OutOfMemory { needed: bytes as u64 },
            _ => error.into(),
        }
    }
}

impl From<DriverError> for Fault {
    fn from(error: DriverError) -> Self {
        let text = error.error_string().ok().map(|text| text.to_string_lossy().into_owned());
        Self::Failed(format!("the CUDA driver says {:?}: {}", error.0, text.unwrap_or_default()))
    }
}

impl From<CublasError> for Fault {
    fn from(error: CublasError) -> Self {
        Self::Failed(format!("cuBLASLt says {:?}", error.0))
    }
}
