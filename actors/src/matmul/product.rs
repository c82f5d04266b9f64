//! The blocked product that all CPU kernels share: which rows, columns and inner elements meet in the caches, how
//! digit sums become values mod q, and how these are switched and written as bytes.
//!
//! 1. Mask and body are packed once for the call ([`Operand`]).
//! 2. Output columns are cut into tiles, tiles into blocks of rows: both are rayon tasks.
//! 3. A task walks over its columns in strips whose weights fit the second-level cache, and over the inner dimension
//!    in blocks; a row panel stays in the first-level cache while it meets all columns of the strip.
//! 4. Digit sums are shifted and added into a small block of values; after the last inner block the values are
//!    rounded to the output's limbs and written. No sum leaves the task.

use std::ops::{ControlFlow, Range};
use std::sync::atomic::{AtomicBool, Ordering};

use protocol::he::{ParameterSet, Planes, Precision, ProductTile};
use rayon::prelude::*;

use super::digits::{Encoding, Operand, rows_per_panel};
use super::micro::Micro;
use super::weights::{PANEL, PackedMatrix, QUAD};
use super::{Kernel, Product, ProductError, TileSink};

/// Rows of a task: a multiple of every kernel's rows to a panel, and enough that preparing the weights of a strip is
/// about 1 % of multiplying by them.
const BLOCK_ROWS: usize = 192;
/// Most inner elements of a block: a row panel of them fills most of a 32 KiB first-level cache.
const BLOCK_INNER: usize = 2048;
/// Prepared weights of a strip, in 32-bit words: half of a 512 KiB second-level cache.
const STRIP_WORDS: usize = 64 * 1024;
/// Most columns of a strip: the values of a task's rows are to fit beside the weights.
const STRIP_COLUMNS: usize = 128;

/// A register block as a whole kernel.
pub(crate) struct Cpu<M> {
    pub(crate) name: &'static str,
    pub(crate) micro: M,
}

impl<M: Micro> Kernel for Cpu<M> {
    fn name(&self) -> &str {
        self.name
    }

    fn multiply(&self, product: &Product<'_>, tile_columns: usize, sink: TileSink<'_>) -> Result<(), ProductError> {
        product.check()?;
        match product.precision.set {
            ParameterSet::P24 | ParameterSet::P32 => self.run::<u32>(product, tile_columns, sink),
            ParameterSet::P48 => self.run::<u64>(product, tile_columns, sink),
        }
        Ok(())
    }
}

/// Integers in which values mod q are put together: q divides `2^BITS`, so they may wrap.
trait Value: Copy + Send + Sync + 'static {
    const ZERO: Self;

    /// `self + sum · 2^shift`.
    fn add_shifted(self, sum: i32, shift: u32) -> Self;

    /// A byte of `self` rounded to a multiple of `2^dropped`: the eight bits from bit `shift` on.
    fn rounded_byte(self, dropped: u32, shift: u32) -> u8;
}

macro_rules! value {
    ($type:ty) => {
        impl Value for $type {
            const ZERO: Self = 0;

            #[inline(always)]
            fn add_shifted(self, sum: i32, shift: u32) -> Self {
                self.wrapping_add((sum as Self) << shift)
            }

            #[inline(always)]
            fn rounded_byte(self, dropped: u32, shift: u32) -> u8 {
                // Half of the step, and nothing where no bit is dropped.
                let half = (1 << dropped) >> 1;
                (self.wrapping_add(half) >> shift) as u8
            }
        }
    };
}
value!(u32);
value!(u64);

/// What one task needs beside its operands, kept from task to task.
struct Scratch<V> {
    weights: Vec<u32>,
    sums: Vec<i32>,
    values: Vec<V>,
}

impl<M: Micro> Cpu<M> {
    fn run<V: Value>(&self, product: &Product<'_>, tile_columns: usize, sink: TileSink<'_>) {
        let set = product.precision.set;
        let (mask, body) = rayon::join(
            || Operand::from_mask(&self.micro, set, product.mask, set.mask_rows()),
            || Operand::from_body(&self.micro, set, product.body),
        );
        let outer = product.weights.outer();
        let tile_columns = tile_columns.clamp(1, outer.max(1)).next_multiple_of(M::COLUMNS);
        let stopped = AtomicBool::new(false);
        (0..outer.div_ceil(tile_columns)).into_par_iter().for_each(|tile| {
            let columns = tile * tile_columns..((tile + 1) * tile_columns).min(outer);
            let rows = |operand: &Operand<M>| {
                self.rows::<V>(operand, product.weights, columns.clone(), product.precision, &stopped)
            };
            let (mask, body) = rayon::join(|| rows(&mask), || rows(&body));
            if stopped.load(Ordering::Relaxed) {
                return;
            }
            if let ControlFlow::Break(()) = sink(ProductTile { first_column: columns.start, mask, body }) {
                stopped.store(true, Ordering::Relaxed);
            }
        });
    }

    /// All rows of an operand times some columns.
    fn rows<V: Value>(
        &self,
        operand: &Operand<M>,
        weights: &PackedMatrix,
        columns: Range<usize>,
        precision: Precision,
        stopped: &AtomicBool,
    ) -> Planes {
        let limbs = usize::from(precision.output_limbs);
        let mut planes = Planes::zeros(limbs, operand.rows(), columns.len());
        let plane_bytes = (operand.rows() * columns.len()).max(1);
        let mut blocks: Vec<Vec<&mut [u8]>> = Vec::new();
        blocks.resize_with(operand.rows().div_ceil(BLOCK_ROWS), || Vec::with_capacity(limbs));
        for plane in planes.bytes_mut().chunks_exact_mut(plane_bytes) {
            for (block, bytes) in blocks.iter_mut().zip(plane.chunks_mut(BLOCK_ROWS * columns.len())) {
                block.push(bytes);
            }
        }
        blocks.into_par_iter().enumerate().for_each_init(
            || Scratch { weights: Vec::new(), sums: vec![0; M::LANES * M::COLUMNS], values: Vec::new() },
            |scratch: &mut Scratch<V>, (block, mut output)| {
                if !stopped.load(Ordering::Relaxed) {
                    let first = block * BLOCK_ROWS;
                    let rows = first..(first + BLOCK_ROWS).min(operand.rows());
                    let columns = columns.clone();
                    self.micro.vectorised(|| {
                        self.block(operand, rows, weights, columns, precision, scratch, &mut output);
                    });
                }
            },
        );
        planes
    }

    /// One task: `rows` of an operand times `columns`, written to the output's planes `[row][column]`.
    #[inline(always)]
    #[expect(clippy::too_many_arguments, reason = "the two operands, the range of each, and where the result goes")]
    fn block<V: Value>(
        &self,
        operand: &Operand<M>,
        rows: Range<usize>,
        weights: &PackedMatrix,
        columns: Range<usize>,
        precision: Precision,
        scratch: &mut Scratch<V>,
        output: &mut [&mut [u8]],
    ) {
        let digits = M::Encoding::digits(precision.set);
        let bits = M::Encoding::digit_bits(precision.set);
        let rows_per_panel = rows_per_panel::<M>(precision.set);
        let panels = rows.start / rows_per_panel..rows.end.div_ceil(rows_per_panel);
        let steps_per_quad = QUAD / M::Encoding::STEP;

        let quads = weights.quads();
        let limit = (M::Encoding::inner_limit(precision.set).min(BLOCK_INNER)) / QUAD;
        let block_quads = quads.div_ceil(quads.div_ceil(limit).max(1)).max(1);
        let strip_words = block_quads * steps_per_quad * M::COLUMNS;
        let strip_blocks = (STRIP_WORDS / strip_words).clamp(1, STRIP_COLUMNS / M::COLUMNS);
        let strip_columns = strip_blocks * M::COLUMNS;

        for strip in (columns.start..columns.end).step_by(strip_columns) {
            let width = (columns.end - strip).min(strip_columns);
            let blocks = width.div_ceil(M::COLUMNS);
            let padded = blocks * M::COLUMNS;
            scratch.values.clear();
            scratch.values.resize(panels.len() * rows_per_panel * padded, V::ZERO);

            for first_quad in (0..quads).step_by(block_quads) {
                let range = first_quad..(first_quad + block_quads).min(quads);
                let steps = range.start * steps_per_quad..range.end * steps_per_quad;
                let block_words = steps.len() * M::COLUMNS;
                scratch.weights.resize(blocks * block_words, 0);
                for (block, words) in scratch.weights.chunks_exact_mut(block_words).enumerate() {
                    let panel = (strip + block * M::COLUMNS) / PANEL;
                    self.micro.prepare(weights, panel, range.clone(), words);
                }
                for (panel, values) in panels.clone().zip(scratch.values.chunks_exact_mut(rows_per_panel * padded)) {
                    let row_digits = operand.panel(panel, steps.clone());
                    for (block, words) in scratch.weights.chunks_exact(block_words).enumerate() {
                        self.micro.multiply(row_digits, words, &mut scratch.sums);
                        for (row, sums) in scratch.sums.chunks_exact(digits * M::COLUMNS).enumerate() {
                            let start = row * padded + block * M::COLUMNS;
                            recombine(&mut values[start..start + M::COLUMNS], sums, bits);
                        }
                    }
                }
            }

            let offset = strip - columns.start;
            for (row, values) in (0..rows.len()).zip(scratch.values.chunks_exact(padded)) {
                let start = row * columns.len() + offset;
                for (limb, plane) in output.iter_mut().enumerate() {
                    let dropped = precision.dropped_bits();
                    let shift = dropped + 8 * limb as u32;
                    for (byte, value) in plane[start..start + width].iter_mut().zip(values) {
                        *byte = value.rounded_byte(dropped, shift);
                    }
                }
            }
        }
    }
}

/// Adds the sums `[digit][column]` of one row, each times its digit's weight, to the row's values.
#[inline(always)]
fn recombine<V: Value>(values: &mut [V], sums: &[i32], bits: u32) {
    for (digit, sums) in sums.chunks_exact(values.len()).enumerate() {
        let shift = bits * digit as u32;
        for (value, &sum) in values.iter_mut().zip(sums) {
            *value = value.add_shifted(sum, shift);
        }
    }
}
