//! Ways to a product, of which a device uses the one that is fastest on it.
//!
//! - *fused*: a kernel of ours multiplies unsigned digits by signed weights on the tensor cores and recombines and rounds
//!   in registers.
//! - *hopper*: the same with the instructions that compute capability 9.0 alone has.
//! - *cublaslt*: one int8 product of all limbs' rows, made signed, into 32-bit sums in memory; a kernel of ours recombines
//!   and rounds these. cuBLASLt multiplies faster than most, but writes and reads four bytes for each digit's sum.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::{CudaSlice, CudaStream};

use super::blas::{Blas, Dimensions, Numbers, Plan};
use super::fault::Fault;
use super::geometry::{hopper_tile, tile};
use super::launch::{Functions, Job, Operand};
use super::memory::WIDTH_STEP;

/// Plans that are kept: bodies come in many lengths.
const PLANS: usize = 256;
/// Columns of cuBLASLt's larger blocks.
const COLUMN_STEP: usize = 256;

/// What an engine computes with.
#[derive(Clone, Copy)]
pub(crate) struct Compute<'a> {
    pub(crate) stream: &'a CudaStream,
    pub(crate) functions: &'a Functions,
}

/// A way to compute products whose operands are on the device.
pub(crate) trait Engine: Send + Sync {
    /// As it is logged and reported.
    fn name(&self) -> &'static str;

    /// Whether it needs room for sums.
    fn keeps_sums(&self) -> bool;

    /// Columns of its blocks, of which a launch's are best a multiple: itself a multiple of [`WIDTH_STEP`].
    fn column_step(&self, limbs: usize) -> usize;

    /// Bytes from row to row of its output where so many columns are computed.
    fn width(&self, columns: usize) -> usize;

    /// Makes rows ready to be multiplied; once for all columns.
    fn prepare(&self, compute: Compute<'_>, operand: &mut Operand<'_>) -> Result<(), Fault>;

    /// Multiplies some columns: `out` becomes `[output limb][row][width]`.
    fn product(
        &self,
        compute: Compute<'_>,
        operand: &Operand<'_>,
        job: &Job<'_>,
        sums: &mut CudaSlice<u8>,
        out: &mut CudaSlice<u8>,
    ) -> Result<(), Fault>;
}

/// A kernel of ours.
pub(crate) enum Fused {
    /// On every device.
    Everywhere,
    /// On compute capability 9.0.
    Hopper,
}

impl Engine for Fused {
    fn name(&self) -> &'static str {
        match self {
            Self::Everywhere => "fused",
            Self::Hopper => "hopper",
        }
    }

    fn column_step(&self, limbs: usize) -> usize {
        match self {
            Self::Everywhere => tile(limbs).columns,
            Self::Hopper => hopper_tile(limbs).columns,
        }
    }

    fn keeps_sums(&self) -> bool {
        false
    }

    fn width(&self, columns: usize) -> usize {
        columns
    }

    fn prepare(&self, _compute: Compute<'_>, _operand: &mut Operand<'_>) -> Result<(), Fault> {
        Ok(())
    }

    fn product(
        &self,
        compute: Compute<'_>,
        operand: &Operand<'_>,
        job: &Job<'_>,
        _sums: &mut CudaSlice<u8>,
        out: &mut CudaSlice<u8>,
    ) -> Result<(), Fault> {
        match self {
            Self::Everywhere => compute.functions.product(compute.stream, operand, job, out),
            Self::Hopper => compute.functions.hopper_product(compute.stream, operand, job, out),
        }
    }
}

/// See the module's documentation.
pub(crate) struct CublasLt {
    blas: Arc<Blas>,
    plans: Mutex<HashMap<Dimensions, Arc<Plan>>>,
}

impl CublasLt {
    pub(crate) fn new(blas: Arc<Blas>) -> Self {
        Self { blas, plans: Mutex::new(HashMap::new()) }
    }

    fn plan(&self, dimensions: Dimensions) -> Result<Arc<Plan>, Fault> {
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(plan) = plans.get(&dimensions) {
            return Ok(Arc::clone(plan));
        }
        if plans.len() >= PLANS {
            plans.clear();
        }
        let plan = Arc::new(Plan::new(&self.blas, Numbers::Int8, dimensions, 1)?);
        plans.insert(dimensions, Arc::clone(&plan));
        Ok(plan)
    }
}

impl Engine for CublasLt {
    fn name(&self) -> &'static str {
        "cublaslt"
    }

    fn column_step(&self, _limbs: usize) -> usize {
        COLUMN_STEP
    }

    fn keeps_sums(&self) -> bool {
        true
    }

    fn width(&self, columns: usize) -> usize {
        columns.next_multiple_of(WIDTH_STEP)
    }

    fn prepare(&self, compute: Compute<'_>, operand: &mut Operand<'_>) -> Result<(), Fault> {
        compute.functions.bias(compute.stream, operand)
    }

    fn product(
        &self,
        compute: Compute<'_>,
        operand: &Operand<'_>,
        job: &Job<'_>,
        sums: &mut CudaSlice<u8>,
        out: &mut CudaSlice<u8>,
    ) -> Result<(), Fault> {
        // The columns behind the last are of the weights' padding: zeros.
        let columns = job.columns.start..job.columns.start + self.width(job.columns.len());
        let job = Job { columns, ..job.clone() };
        let dimensions =
            Dimensions { rows: operand.limbs * operand.rows, columns: job.columns.len(), inner: operand.pitch };
        let plan = self.plan(dimensions)?;
        let weights = job.side.weights_from(job.columns.start)?;
        self.blas.multiply(&plan, 0, &weights, operand.planes, sums)?;
        compute.functions.finish(compute.stream, operand, &job, sums, out)
    }
}
