//! The processor as a device: weights packed for its kernels, masks expanded and bodies spread in the worker's memory, tiles
//! packed while they are in its cache.

use std::ops::Range;
use std::sync::Arc;

use protocol::he::mask::expand;
use protocol::he::{MaskDomain, MaskSeed, ProductTile};
use protocol::ids::LinearShape;
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
        let &ProductTask { direction, limbs, output_bits, ref rows } = task;
        let weights = self.weights.along(direction);
        let (keystream, spread);
        let rows = match rows {
            Multiplicand::Masks { seed, domain, first_feature } => {
                let features = *first_feature..*first_feature + weights.inner();
                keystream = expand_masks(seed, domain, features);
                Rows::Masks { keystream: &keystream, rows: domain.set.mask_rows() }
            }
            Multiplicand::Body(body) if body.is_whole() => Rows::Body(body),
            Multiplicand::Body(body) => {
                spread = body.spread();
                Rows::Body(&spread)
            }
        };
        let pack = |ProductTile { first_column, rows }: ProductTile| {
            sink(ProductTile { first_column, rows: rows.pack(output_bits) })
        };
        self.kernel.multiply(&Product { weights, limbs, output_bits, rows }, tile_columns, &pack)?;
        Ok(())
    }
}

/// The mask columns of some features, as the kernels take them ([`Rows::Masks`]).
pub fn expand_masks(seed: &MaskSeed, domain: &MaskDomain, features: Range<usize>) -> Vec<u8> {
    let span =
        tracing::info_span!(target: WORK, "expand masks", linear = %domain.product.linear, features = features.len());
    let _span = span.entered();
    let mut keystream = vec![0; features.len() * domain.column_bytes()];
    keystream.par_chunks_mut(COLUMNS_PER_TASK * domain.column_bytes()).enumerate().for_each(|(task, bytes)| {
        let first = features.start + task * COLUMNS_PER_TASK;
        expand(seed, domain, first..first + bytes.len() / domain.column_bytes(), bytes);
    });
    keystream
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::ops::ControlFlow;

    use protocol::he::{ParameterSet, Planes};
    use protocol::ids::{Direction, Group, LinearId};

    use super::*;
    use crate::matmul::{ProductError, best_kernel};

    #[test]
    fn a_matrix_takes_what_was_said_and_refuses_what_does_not_fit_it() {
        let device = CpuDevice::new(best_kernel());
        assert!(device.name().starts_with("cpu (") && device.own_memory().is_none());
        let shape = LinearShape { d_in: 70, d_out: 33 };
        let values = vec![1; 70 * 33];
        let short = device.hold(shape, &values[1..]).err().unwrap();
        assert_eq!(short, DeviceError::Values { count: 70 * 33 - 1, shape });
        let matrix = device.hold(shape, &values).unwrap();
        assert_eq!((matrix.shape(), matrix.memory_bytes()), (shape, device.memory_for(shape)));

        let refused = |limbs: usize, rows: Multiplicand| {
            let task = ProductTask { direction: Direction::Backward, limbs, output_bits: 16, rows };
            let nothing = |_| -> ControlFlow<()> { panic!("no tile may come from refused operands") };
            matrix.multiply(&task, 64, &nothing).unwrap_err()
        };
        let body = Multiplicand::Body(Arc::new(Planes::zeros(3, 2, 70)));
        assert!(matches!(refused(3, body), DeviceError::Product(ProductError::Body { columns: 70, inner: 33, .. })));
        let linear = LinearId { layer: 0, group: Group::O };
        let domain = MaskDomain { set: ParameterSet::P32, product: linear.along(Direction::Backward) };
        let masks = Multiplicand::Masks { seed: MaskSeed::from_bytes([0; 32]), domain, first_feature: 5 };
        assert_eq!(masks.count(), ParameterSet::P32.mask_rows());
        assert!(matches!(refused(3, masks), DeviceError::Product(ProductError::Masks { limbs: 3, inner: 33, .. })));
    }
}
