//! What a GPU takes for products whose operands are already in its memory: ours, and cuBLASLt's of plain numbers.
//!
//! Time is the device's own (`timing`); copies to and from it are not in it, as they are not in the times that
//! others publish for plain products. The time with them is that of [`crate::matmul::task_seconds`].

use std::time::Duration;

use protocol::he::{MaskDomain, MaskSeed, ParameterSet};
use protocol::ids::{Direction, Group, LinearId};

use super::base::{Output, Workspace};
use super::blas::{Dimensions, Numbers, Plan};
use super::buffers::{allocate, allocate_zeros};
use super::device::{CudaDevice, CudaMatrix};
use super::fault::Fault;
use super::geometry::pitch;
use super::launch::{Job, MaskStream, Operand};
use super::memory::{Piece, SLOTS, Sizes, parts};
use super::timing::device_seconds;
use crate::matmul::{DeviceError, exactness, tile_columns};

/// Algorithms of cuBLASLt that are tried.
const ALGORITHMS: usize = 16;
/// Passes of the register loop in a run.
const PASSES: u32 = 4096;
/// Time for the peak.
const PEAK_BUDGET: Duration = Duration::from_millis(50);

/// Numbers that nobody encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plain {
    /// bf16 by bf16, summed in f32, into bf16.
    Bf16,
    /// int8 by int8 into int32.
    Int8,
}

impl CudaDevice {
    /// Median seconds of a product of random rows by a matrix.
    ///
    /// # Errors
    /// When there is no room for it, or the device fails.
    pub fn product_seconds(
        &self,
        matrix: &CudaMatrix,
        direction: Direction,
        sizes: Sizes,
        budget: Duration,
    ) -> Result<f64, DeviceError> {
        self.rows_seconds(matrix, direction, sizes, None, budget).map_err(|fault| self.base().error(fault))
    }

    /// Median seconds of expanding the masks of a parameter set and multiplying them by a matrix.
    ///
    /// # Errors
    /// When there is no room for it, or the device fails.
    pub fn mask_seconds(
        &self,
        matrix: &CudaMatrix,
        direction: Direction,
        (set, mask_limbs): (ParameterSet, usize),
        budget: Duration,
    ) -> Result<f64, DeviceError> {
        let side = matrix.side(direction);
        let (inner, outer) = (side.inner, side.outer);
        let sizes = Sizes { rows: set.mask_rows(), inner, outer, limbs: set.limbs(), output_limbs: mask_limbs };
        let domain = MaskDomain { set, product: LinearId { layer: 0, group: Group::Qkv }.along(direction) };
        let stream = MaskStream::new(&MaskSeed::from_bytes([7; 32]), &domain, 0..inner);
        self.rows_seconds(matrix, direction, sizes, stream, budget).map_err(|fault| self.base().error(fault))
    }

    fn rows_seconds(
        &self,
        matrix: &CudaMatrix,
        direction: Direction,
        sizes: Sizes,
        masks: Option<MaskStream>,
        budget: Duration,
    ) -> Result<f64, Fault> {
        let (base, engine, side) = (self.base(), self.serving(), matrix.side(direction));
        let Sizes { rows, inner, outer, limbs, output_limbs } = sizes;
        if !matrix.is_of(base) || (inner, outer) != (side.inner, side.outer) || rows == 0 {
            return Err(Fault::text("these are not rows for a matrix of this GPU"));
        }
        let piece = Piece::of(sizes, tile_columns(outer), engine.column_step(limbs), false, base.limits);
        let buffers = piece.buffers(sizes);
        let size =
            |bytes: u64| usize::try_from(bytes).map_err(|_| Fault::text("a buffer larger than the address space"));
        let mut workspace = base.workspace()?;
        let Workspace { uploader, rows: planes, sums, outputs } = &mut *workspace;
        let planes = planes.at_least(&base.compute, size(buffers.rows)?)?;
        let sums = sums.at_least(&base.compute, if engine.keeps_sums() { size(buffers.sums)? } else { 0 })?;
        for Output { device, .. } in outputs.iter_mut() {
            device.at_least(&base.compute, size(buffers.output)?)?;
        }
        let mut operand = Operand { planes, limbs, rows, pitch: pitch(inner) };
        uploader.copy(&base.up, operand.planes, limbs * rows, pitch(inner), fill)?;
        device_seconds(base, budget, || {
            if let Some(masks) = masks {
                base.functions.expand_masks(&base.compute, masks, inner, &mut operand)?;
            }
            engine.prepare(base.compute(), &mut operand)?;
            for (index, columns) in parts(outer, piece.columns).enumerate() {
                let out = outputs[index % SLOTS].device.at_least(&base.compute, 0)?;
                engine.product(
                    base.compute(),
                    &operand,
                    &Job { side, columns, output_bits: 8 * output_limbs as u32 },
                    sums,
                    out,
                )?;
            }
            Ok(())
        })
    }

    /// Seconds of a plain product of `rows × inner` by `inner × outer` by the fastest of cuBLASLt's algorithms, each
    /// measured; `None` where this machine has no cuBLASLt.
    ///
    /// # Errors
    /// When there is no room for it, cuBLASLt has no algorithm for it, or the device fails.
    pub fn plain_seconds(
        &self,
        plain: Plain,
        (rows, inner, outer): (usize, usize, usize),
        budget: Duration,
    ) -> Result<Option<f64>, DeviceError> {
        self.plain(plain, Dimensions { rows, columns: outer, inner }, budget).map_err(|fault| self.base().error(fault))
    }

    fn plain(&self, plain: Plain, dimensions: Dimensions, budget: Duration) -> Result<Option<f64>, Fault> {
        let Some(blas) = self.blas() else { return Ok(None) };
        let base = self.base();
        let numbers = match plain {
            Plain::Bf16 => Numbers::Bf16,
            Plain::Int8 => Numbers::Int8,
        };
        let Dimensions { rows, columns, inner } = dimensions;
        let (element, output) = numbers.bytes();
        let mut workspace = base.workspace()?;
        let mut operand = |count: usize| {
            let mut buffer = allocate(&base.compute, count * inner * element)?;
            workspace.uploader.copy(&base.up, &mut buffer, count, inner * element, |range, out| {
                fill(range, out);
                if plain == Plain::Bf16 {
                    small_numbers(out);
                }
            })?;
            Ok::<_, Fault>(buffer)
        };
        let (left, right) = (operand(rows)?, operand(columns)?);
        let mut out = allocate(&base.compute, rows * columns * output)?;
        let plan = Plan::new(blas, numbers, dimensions, ALGORITHMS)?;
        let each = budget / u32::try_from(plan.algorithms()).unwrap_or(1).max(1);
        let mut best: Option<f64> = None;
        for algorithm in 0..plan.algorithms() {
            let seconds =
                device_seconds(base, each, || blas.multiply(&plan, algorithm, &right.as_view(), &left, &mut out));
            match seconds {
                Ok(seconds) => best = Some(best.map_or(seconds, |best| best.min(seconds))),
                Err(fault) => tracing::debug!(algorithm, %fault, "cuBLASLt proposes an algorithm that fails"),
            }
        }
        best.map(Some).ok_or_else(|| Fault::text("no algorithm of cuBLASLt works for a plain product"))
    }

    /// Integer operations per second of the tensor cores on registers alone.
    ///
    /// # Errors
    /// When the device fails.
    pub fn peak_ops(&self) -> Result<f64, DeviceError> {
        let base = self.base();
        let measure = || {
            let _workspace = base.workspace()?;
            let mut out = allocate_zeros(&base.compute, size_of::<i32>())?;
            let mut operations = 0;
            let seconds = device_seconds(base, PEAK_BUDGET, || {
                operations = base.functions.register_loop(&base.compute, base.multiprocessors, PASSES, &mut out)?;
                Ok(())
            })?;
            Ok(operations as f64 / seconds)
        };
        measure().map_err(|fault| base.error(fault))
    }
}

/// Bytes that reach all values; what a product takes does depend on its operands, where they let the clock rise.
fn fill(range: std::ops::Range<usize>, out: &mut [u8]) {
    let random = exactness::bytes(out.len() + range.start).skip(range.start);
    out.iter_mut().zip(random).for_each(|(out, byte)| *out = byte);
}

/// Makes bf16 numbers between ±½ and ±1 of any bytes, with seven random bits and a random sign.
fn small_numbers(bytes: &mut [u8]) {
    for number in bytes.chunks_exact_mut(2) {
        let random = u16::from_le_bytes([number[0], number[1]]);
        number.copy_from_slice(&((random & 0x807f) | 0x3f00).to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_small_and_of_both_signs() {
        let mut bytes: Vec<u8> = exactness::bytes(2000).collect();
        small_numbers(&mut bytes);
        let values: Vec<f32> = bytes
            .chunks_exact(2)
            .map(|number| f32::from_bits(u32::from(u16::from_le_bytes([number[0], number[1]])) << 16))
            .collect();
        assert!(values.iter().all(|value| (0.5..1.0).contains(&value.abs())));
        assert!(values.iter().any(|value| *value > 0.0) && values.iter().any(|value| *value < 0.0));
    }
}
