//! Matrix products by cuBLASLt: `out = rows · weightsᵀ`, both operands with the inner dimension contiguous, which is the
//! one layout in which cuBLASLt multiplies int8 on tensor cores.
//!
//! cudarc wraps products of floating point only; this is the same, from its thin layer, for int8 too. The library knows
//! column-major matrices: `rows`, `[row][inner]` to us, is to it the right operand, `inner × rows`; `weights`,
//! `[column][inner]`, is the left one, transposed; `out`, `[row][column]`, comes out as `columns × rows`.

use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;
use cudarc::driver::{CudaSlice, CudaStream, CudaView, DevicePtr as _, DevicePtrMut as _};

use super::buffers::allocate;
use super::compile::panic_text;
use super::fault::Fault;

/// NVIDIA's advice for Hopper; plenty elsewhere.
const WORKSPACE_BYTES: usize = 32 << 20;
/// `CUBLAS_OP_T`.
const TRANSPOSED: i32 = 1;

/// Numbers of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Numbers {
    /// int8 by int8 into int32.
    Int8,
    /// bf16 by bf16 into bf16, summed in f32.
    Bf16,
}

impl Numbers {
    /// Bytes of an operand's element, and of an output's.
    pub(crate) fn bytes(self) -> (usize, usize) {
        match self {
            Self::Int8 => (1, 4),
            Self::Bf16 => (2, 2),
        }
    }
}

/// Dimensions of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Dimensions {
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) inner: usize,
}

/// The library on one stream.
pub(crate) struct Blas {
    handle: sys::cublasLtHandle_t,
    stream: Arc<CudaStream>,
    workspace: Mutex<CudaSlice<u8>>,
}

// SAFETY: the handle may be used from any thread, and by several at once, as cuBLASLt documents.
unsafe impl Send for Blas {}
// SAFETY: as above.
unsafe impl Sync for Blas {}

impl Drop for Blas {
    fn drop(&mut self) {
        // SAFETY: the handle was created in `open` and is destroyed nowhere else. A failure leaks it.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

impl Blas {
    /// The library, if this machine has it.
    pub(crate) fn open(stream: &Arc<CudaStream>) -> Result<Option<Self>, Fault> {
        // SAFETY: this only opens a library that the system's loader finds under cuBLASLt's own name; its initialisers are
        // trusted as every CUDA program trusts them.
        if !unsafe { sys::is_culib_present() } {
            return Ok(None);
        }
        let workspace = Mutex::new(allocate(stream, WORKSPACE_BYTES)?);
        stream.context().bind_to_thread()?;
        // cudarc panics where a library lacks a function.
        let handle = catch_unwind(AssertUnwindSafe(result::create_handle));
        let handle = handle.map_err(|panic| Fault::Failed(format!("cuBLASLt: {}", panic_text(panic.as_ref()))))??;
        Ok(Some(Self { handle, stream: Arc::clone(stream), workspace }))
    }

    /// Begins a product by one of the plan's algorithms.
    ///
    /// `weights` are `columns × inner`, `rows` are `rows × inner`, `out` is `rows × columns`.
    pub(crate) fn multiply(
        &self,
        plan: &Plan,
        algorithm: usize,
        weights: &CudaView<'_, u8>,
        rows: &CudaSlice<u8>,
        out: &mut CudaSlice<u8>,
    ) -> Result<(), Fault> {
        let Dimensions { rows: row_count, columns, inner } = plan.dimensions;
        let (element, output) = plan.numbers.bytes();
        let fits = columns * inner * element <= weights.len()
            && row_count * inner * element <= rows.len()
            && row_count * columns * output <= out.len();
        let found = plan.algorithms.get(algorithm).filter(|_| fits);
        let found = found.ok_or_else(|| Fault::text("a product's buffers are too small; this is a bug"))?;
        let (one, zero) = plan.scalars();
        let mut workspace = self.workspace.lock().unwrap_or_else(PoisonError::into_inner);
        self.stream.context().bind_to_thread()?;
        let (weights, _read_weights) = weights.device_ptr(&self.stream);
        let (rows, _read_rows) = rows.device_ptr(&self.stream);
        let (out, _written) = out.device_ptr_mut(&self.stream);
        let workspace_bytes = workspace.len();
        let (workspace, _used) = workspace.device_ptr_mut(&self.stream);
        // SAFETY: handle, descriptors and layouts live; the layouts describe buffers that were just found large enough, and
        // whose events order this use on the stream; the scalars are of the descriptor's scale type and are read before the
        // call returns; the algorithm was found for these descriptors, layouts and workspace.
        unsafe {
            result::matmul(
                self.handle,
                plan.description.0,
                one.as_ptr().cast(),
                zero.as_ptr().cast(),
                weights as *const c_void,
                plan.weights.0,
                rows as *const c_void,
                plan.rows.0,
                out as *const c_void,
                plan.out.0,
                out as *mut c_void,
                plan.out.0,
                &raw const found.algo,
                workspace as *mut c_void,
                workspace_bytes,
                self.stream.cu_stream().cast(),
            )
        }?;
        Ok(())
    }
}

/// A product's descriptors, and the algorithms that cuBLASLt proposes for it, the likely fastest first.
pub(crate) struct Plan {
    dimensions: Dimensions,
    numbers: Numbers,
    description: Description,
    weights: Layout,
    rows: Layout,
    out: Layout,
    algorithms: Vec<sys::cublasLtMatmulHeuristicResult_t>,
}

// SAFETY: descriptors are plain memory of the library's, which nothing writes after `new`.
unsafe impl Send for Plan {}
// SAFETY: as above.
unsafe impl Sync for Plan {}

impl Plan {
    /// Asks for at most so many algorithms.
    ///
    /// # Errors
    /// When cuBLASLt has none for the product.
    pub(crate) fn new(blas: &Blas, numbers: Numbers, dimensions: Dimensions, most: usize) -> Result<Self, Fault> {
        let Dimensions { rows, columns, inner } = dimensions;
        let (compute, scale, element, output) = match numbers {
            Numbers::Int8 => (
                sys::cublasComputeType_t::CUBLAS_COMPUTE_32I,
                sys::cudaDataType_t::CUDA_R_32I,
                sys::cudaDataType_t::CUDA_R_8I,
                sys::cudaDataType_t::CUDA_R_32I,
            ),
            Numbers::Bf16 => (
                sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                sys::cudaDataType_t::CUDA_R_32F,
                sys::cudaDataType_t::CUDA_R_16BF,
                sys::cudaDataType_t::CUDA_R_16BF,
            ),
        };
        blas.stream.context().bind_to_thread()?;
        let description = Description(result::create_matmul_desc(compute, scale)?);
        let transposed = TRANSPOSED;
        // SAFETY: the descriptor lives, and the attribute is of the type and size that it has.
        unsafe {
            result::set_matmul_desc_attribute(
                description.0,
                sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA,
                (&raw const transposed).cast(),
                size_of_val(&transposed),
            )
        }?;
        let layout = |numbers, height: usize, width: usize| {
            let step = i64::try_from(height).map_err(|_| Fault::text("a matrix that is too high"))?;
            Ok::<_, Fault>(Layout(result::create_matrix_layout(numbers, height as u64, width as u64, step)?))
        };
        let weights = layout(element, inner, columns)?;
        let rows_layout = layout(element, inner, rows)?;
        let out = layout(output, columns, rows)?;
        let preference = Preference(result::create_matmul_pref()?);
        let workspace_bytes = WORKSPACE_BYTES as u64;
        // SAFETY: the preference lives, and the attribute is of the type and size that it has.
        unsafe {
            result::set_matmul_pref_attribute(
                preference.0,
                sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                (&raw const workspace_bytes).cast(),
                size_of_val(&workspace_bytes),
            )
        }?;
        let mut found: Vec<MaybeUninit<sys::cublasLtMatmulHeuristicResult_t>> = vec![MaybeUninit::uninit(); most];
        let mut count = 0;
        // SAFETY: all descriptors live, and there is room for as many results as are asked for.
        unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                blas.handle,
                description.0,
                weights.0,
                rows_layout.0,
                out.0,
                out.0,
                preference.0,
                i32::try_from(most).unwrap_or(i32::MAX),
                found.as_mut_ptr().cast(),
                &raw mut count,
            )
        }
        .result()?;
        found.truncate(usize::try_from(count).unwrap_or(0));
        // SAFETY: the library has written as many results as it says.
        let found = found.into_iter().map(|result| unsafe { result.assume_init() });
        let usable = |result: &sys::cublasLtMatmulHeuristicResult_t| result.state.result().is_ok();
        let algorithms: Vec<sys::cublasLtMatmulHeuristicResult_t> = found.filter(usable).collect();
        if algorithms.is_empty() {
            return Err(CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED).into());
        }
        Ok(Self { dimensions, numbers, description, weights, rows: rows_layout, out, algorithms })
    }

    /// How many algorithms there are.
    pub(crate) fn algorithms(&self) -> usize {
        self.algorithms.len()
    }

    /// One and zero in the descriptor's scale type.
    fn scalars(&self) -> ([u8; 4], [u8; 4]) {
        match self.numbers {
            Numbers::Int8 => (1_i32.to_ne_bytes(), 0_i32.to_ne_bytes()),
            Numbers::Bf16 => (1_f32.to_ne_bytes(), 0_f32.to_ne_bytes()),
        }
    }
}

struct Description(sys::cublasLtMatmulDesc_t);

impl Drop for Description {
    fn drop(&mut self) {
        // SAFETY: it was created for this value and is destroyed nowhere else. A failure leaks it.
        let _ = unsafe { result::destroy_matmul_desc(self.0) };
    }
}

struct Layout(sys::cublasLtMatrixLayout_t);

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: it was created for this value and is destroyed nowhere else. A failure leaks it.
        let _ = unsafe { result::destroy_matrix_layout(self.0) };
    }
}

struct Preference(sys::cublasLtMatmulPreference_t);

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: it was created for this value and is destroyed nowhere else. A failure leaks it.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}
