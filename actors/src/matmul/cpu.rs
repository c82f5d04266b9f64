//! The processor as a device: weights packed for its kernels, masks expanded in the worker's memory.

use std::ops::Range;
use std::sync::Arc;

use protocol::he::mask::expand;
use protocol::he::{MaskDomain, MaskSeed};
use protocol::model::LinearShape;
use rayon::prelude::*;

use super::device::{Device, DeviceError, HeldMatrix, Multiplicand, ProductTask};
use super::{Kernel, PackedLinear, Product, Rows, TileSink, measure_speed};
use crate::trace::WORK;

/// Mask columns that one task expands: a few hundred kilobytes of keystream.
const COLUMNS_PER_TASK: usize = 32;

/// All cores of the current rayon pool, by one kernel.
pub struct CpuDevice {
    kernel: Arc<dyn Kernel>,
}

impl CpuDevice {
    /// The processor as this kernel uses it.
    pub fn new(kernel: Arc<dyn Kernel>) -> Self {
        Self { kernel }
    }
}

impl Device for CpuDevice {
    fn name(&self) -> String {
        format!("cpu ({})", self.kernel.name())
    }

    fn own_memory(&self) -> Option<u64> {
        None
    }

    fn memory_for(&self, shape: LinearShape) -> u64 {
        PackedLinear::memory_for(shape)
    }

    fn hold(&self, shape: LinearShape, values: &[i8]) -> Result<Arc<dyn HeldMatrix>, DeviceError> {
        let weights = PackedLinear::new(shape, values).ok_or(DeviceError::Values { count: values.len(), shape })?;
        Ok(Arc::new(CpuMatrix { kernel: Arc::clone(&self.kernel), weights }))
    }

    fn measure_speed(&self) -> Result<f64, DeviceError> {
        Ok(measure_speed(self.kernel.as_ref()))
    }
}

/// A packed matrix and what multiplies by it.
struct CpuMatrix {
    kernel: Arc<dyn Kernel>,
    weights: PackedLinear,
}

impl HeldMatrix for CpuMatrix {
    fn shape(&self) -> LinearShape {
        self.weights.shape()
    }

    fn memory_bytes(&self) -> u64 {
        self.weights.memory_bytes()
    }

    fn multiply(&self, task: &ProductTask, tile_columns: usize, sink: TileSink<'_>) -> Result<(), DeviceError> {
        let &ProductTask { direction, limbs, output_limbs, ref rows } = task;
        let weights = self.weights.along(direction);
        let keystream;
        let rows = match rows {
            Multiplicand::Masks { seed, domain, first_feature } => {
                let features = *first_feature..*first_feature + weights.inner();
                keystream = expand_masks(seed, domain, features);
                Rows::Masks { keystream: &keystream, rows: domain.set.mask_rows() }
            }
            Multiplicand::Body(body) => Rows::Body(body),
        };
        self.kernel.multiply(&Product { weights, limbs, output_limbs, rows }, tile_columns, sink)?;
        Ok(())
    }
}

/// The mask columns of some features, as the kernels take them ([`Rows::Masks`]).
pub fn expand_masks(seed: &MaskSeed, domain: &MaskDomain, features: Range<usize>) -> Vec<u8> {
    let span = tracing::info_span!(target: WORK, "expand masks", linear = %domain.linear, features = features.len());
    let _span = span.entered();
    let mut keystream = vec![0; features.len() * domain.column_bytes()];
    keystream.par_chunks_mut(COLUMNS_PER_TASK * domain.column_bytes()).enumerate().for_each(|(task, bytes)| {
        let first = features.start + task * COLUMNS_PER_TASK;
        expand(seed, domain, first..first + bytes.len() / domain.column_bytes(), bytes);
    });
    keystream
}
