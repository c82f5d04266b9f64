//! The blocked product that all CPU kernels share: which rows, columns and inner elements meet in the caches, how
//! digit sums become values mod q, and how these are switched and written as bytes.
//!
//! 1. The rows are packed once for the call ([`Operand`]), in memory that is kept from call to call.
//! 2. Output columns are cut into tiles, tiles into blocks of rows: both are rayon tasks.
//! 3. A task walks over the inner dimension in blocks, and in each over its columns; the weights of a register
//!    block's columns stay in the first-level cache while all rows of the task pass.
//! 4. Digit sums are shifted and added into values while they are in the first-level cache. After the last inner
//!    block the values are rounded to the output's bits and written; between inner blocks, where there are several,
//!    a strip of them waits in the second-level cache. No sum leaves the task.

use std::ops::{ControlFlow, Range};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use protocol::he::{Planes, ProductTile};
use rayon::prelude::*;

use super::digits::{Encoding, Operand};
use super::lines::{Line, Pool, at_least};
use super::micro::{Loops, Micro};
use super::weights::{HALF, PANEL, PackedMatrix};
use super::{FEW_ROWS, Kernel, MAX_LIMBS, Product, ProductError, TileSink};

/// Rows of a task: a multiple of every kernel's rows to a panel, and enough that fetching and preparing the weights is
/// about 1 % of multiplying by them.
const TASK_ROWS: usize = 192;
/// Weights that a thread multiplies few rows by at least: as many as come from memory in a tenth of a millisecond or two.
const TASK_WEIGHTS: usize = 1 << 20;
/// Columns whose values wait between inner blocks.
const STRIP_COLUMNS: usize = 128;
/// Passes of the register loop in one timing, a few hundred microseconds, and timings of which the best counts.
const PEAK_PASSES: u64 = 50_000;
const PEAK_TIMINGS: usize = 40;

/// A register block as a whole kernel.
pub(crate) struct Cpu<M> {
    name: &'static str,
    micro: M,
    operands: Pool<Vec<Line>>,
    scratch32: Pool<Scratch<u32>>,
    scratch64: Pool<Scratch<u64>>,
}

impl<M: Micro> Cpu<M> {
    pub(crate) const fn new(name: &'static str, micro: M) -> Self {
        Self { name, micro, operands: Pool::new(), scratch32: Pool::new(), scratch64: Pool::new() }
    }
}

impl<M: Micro> Kernel for Cpu<M> {
    fn name(&self) -> &str {
        self.name
    }

    fn multiply(&self, product: &Product<'_>, tile_columns: usize, sink: TileSink<'_>) -> Result<(), ProductError> {
        product.check()?;
        if product.limbs <= 4 {
            self.run(&self.scratch32, product, tile_columns, sink);
        } else {
            self.run(&self.scratch64, product, tile_columns, sink);
        }
        Ok(())
    }

    fn operations(&self, limbs: usize) -> usize {
        2 * M::Encoding::digits(limbs)
    }

    fn peak_ops(&self) -> Option<f64> {
        let time = || {
            let start = Instant::now();
            let operations = self.micro.task(RegisterLoop(&self.micro))?;
            Some(operations as f64 / start.elapsed().as_secs_f64())
        };
        let best = || (0..PEAK_TIMINGS).map(|_| time()).try_fold(0.0, |best: f64, speed| Some(best.max(speed?)));
        rayon::broadcast(|_| best()).into_iter().sum()
    }
}

/// Integers in which values mod q are put together: q divides `2^BITS`, so they may wrap.
trait Value: Copy + Send + Sync + 'static {
    const ZERO: Self;

    /// `self + sum · 2^shift`, `sum` being the bits of a signed integer.
    fn add_shifted(self, sum: u32, shift: u32) -> Self;

    /// `self + half`, without the bits below `shift`, of which the lowest byte is kept.
    fn rounded_byte(self, half: Self, shift: u32) -> u8;

    /// Half of `2^dropped`, and nothing where no bit is dropped.
    fn half(dropped: u32) -> Self;
}

macro_rules! value {
    ($type:ty) => {
        impl Value for $type {
            const ZERO: Self = 0;

            #[inline(always)]
            fn add_shifted(self, sum: u32, shift: u32) -> Self {
                self.wrapping_add((sum as i32 as Self) << shift)
            }

            #[inline(always)]
            fn rounded_byte(self, half: Self, shift: u32) -> u8 {
                (self.wrapping_add(half) >> shift) as u8
            }

            #[inline(always)]
            fn half(dropped: u32) -> Self {
                (1 << dropped) >> 1
            }
        }
    };
}
value!(u32);
value!(u64);

/// Values of neighbouring columns of a row.
type Values<V> = [V; HALF];

/// What one task needs beside its operands, kept from task to task.
struct Scratch<V> {
    weights: Vec<Line>,
    sums: Vec<Line>,
    values: Vec<Values<V>>,
}

impl<V> Default for Scratch<V> {
    fn default() -> Self {
        Self { weights: Vec::new(), sums: Vec::new(), values: Vec::new() }
    }
}

/// What all tasks of a product share.
struct Work<'a, M> {
    operand: Operand<'a, M>,
    weights: &'a PackedMatrix,
    /// Bytes of a value, and bits of it after modulus switching.
    limbs: usize,
    output_bits: u32,
    stopped: AtomicBool,
}

/// A task's part of the output planes, `[row][column]` for each limb: all of it is written.
type Output<'a> = Vec<&'a mut [u8]>;

impl<M: Micro> Cpu<M> {
    fn run<V: Value>(
        &self,
        scratch: &Pool<Scratch<V>>,
        product: &Product<'_>,
        tile_columns: usize,
        sink: TileSink<'_>,
    ) {
        let &Product { weights, limbs, output_bits, rows } = product;
        let operand = Operand::pack(&self.micro, &self.operands, limbs, weights.inner(), rows);
        let work = Work { operand, weights, limbs, output_bits, stopped: AtomicBool::new(false) };
        let outer = weights.outer();
        let tile_columns = tile_columns.clamp(1, outer.max(1)).next_multiple_of(PANEL);
        if work.operand.rows() <= FEW_ROWS && (1..=tile_columns).contains(&outer) {
            self.run_few(scratch, &work, sink);
            return;
        }
        (0..outer.div_ceil(tile_columns)).into_par_iter().for_each(|tile| {
            let columns = tile * tile_columns..((tile + 1) * tile_columns).min(outer);
            let first_column = columns.start;
            let Some(rows) = self.tile(scratch, &work, columns) else { return };
            if let ControlFlow::Break(()) = sink(ProductTile { first_column, rows }) {
                work.stopped.store(true, Ordering::Relaxed);
            }
        });
    }

    /// A product of few rows as one tile. Its weights are shared among threads where they are many, and else multiplied on this one:
    /// another would take as long to wake up.
    fn run_few<V: Value>(&self, scratch: &Pool<Scratch<V>>, work: &Work<'_, M>, sink: TileSink<'_>) {
        let (inner, outer) = (work.weights.inner(), work.weights.outer());
        let columns = (TASK_WEIGHTS / inner.max(1)).max(1).next_multiple_of(PANEL);
        let tile = |first: usize| self.tile(scratch, work, first..(first + columns).min(outer));
        // The sink decides whether all goes on only once there is a tile.
        let rows = if outer <= columns {
            self.tile(scratch, work, 0..outer)
        } else {
            let parts: Option<Vec<Planes>> =
                (0..outer.div_ceil(columns)).into_par_iter().map(|part| tile(part * columns)).collect();
            parts.map(|parts| side_by_side(&parts, outer))
        };
        if let Some(rows) = rows {
            // There is nothing to be stopped any more.
            let _ = sink(ProductTile { first_column: 0, rows });
        }
    }

    /// All rows times some columns, unless the product is stopped meanwhile.
    fn tile<V: Value>(&self, scratch: &Pool<Scratch<V>>, work: &Work<'_, M>, columns: Range<usize>) -> Option<Planes> {
        let rows = work.operand.rows();
        let plane = rows * columns.len();
        let output_limbs = work.output_bits.div_ceil(8) as usize;
        let mut planes = Planes::scratch(output_limbs, rows, columns.len());
        let mut tasks: Vec<Output<'_>> = Vec::new();
        tasks.resize_with(rows.div_ceil(TASK_ROWS), || Vec::with_capacity(output_limbs));
        for plane in planes.bytes_mut().chunks_exact_mut(plane.max(1)) {
            for (task, part) in tasks.iter_mut().zip(plane.chunks_mut(TASK_ROWS * columns.len())) {
                task.push(part);
            }
        }
        tasks.into_par_iter().enumerate().for_each_init(
            || scratch.take(),
            |scratch, (task, mut output)| {
                if !work.stopped.load(Ordering::Relaxed) {
                    let rows = task * TASK_ROWS..((task + 1) * TASK_ROWS).min(rows);
                    let columns = columns.clone();
                    self.micro.task(Task { micro: &self.micro, work, rows, columns, scratch, output: &mut output });
                }
            },
        );
        // What a stopped task did not write is of earlier use.
        (!work.stopped.load(Ordering::Relaxed)).then_some(planes)
    }
}

/// The columns of some planes, one behind the other, `outer` of them.
fn side_by_side(parts: &[Planes], outer: usize) -> Planes {
    let (limbs, rows) = parts.first().map_or((1, 0), |part| (part.limbs(), part.rows()));
    let mut whole = Planes::scratch(limbs, rows, outer);
    for (at, run) in whole.bytes_mut().chunks_exact_mut(outer.max(1)).enumerate() {
        let mut run = run;
        for part in parts {
            let (to, rest) = run.split_at_mut(part.columns());
            to.copy_from_slice(&part.bytes()[at * part.columns()..][..part.columns()]);
            run = rest;
        }
    }
    whole
}

/// The loop that measures a peak.
struct RegisterLoop<'a, M>(&'a M);

impl<M: Micro> Loops for RegisterLoop<'_, M> {
    type Output = Option<u64>;

    fn run(self) -> Self::Output {
        self.0.register_loop(PEAK_PASSES)
    }
}

/// Some rows times some columns, written to the output's planes.
struct Task<'a, 'o, M, V> {
    micro: &'a M,
    work: &'a Work<'a, M>,
    rows: Range<usize>,
    columns: Range<usize>,
    scratch: &'a mut Scratch<V>,
    output: &'a mut Output<'o>,
}

impl<M: Micro, V: Value> Loops for Task<'_, '_, M, V> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { micro, work, rows, columns, scratch, output } = self;
        let digits = M::Encoding::digits(work.limbs);
        let panels = rows.start / M::LANES..rows.end.div_ceil(M::LANES);
        let halves = M::COLUMNS / HALF;
        let sums = at_least(&mut scratch.sums, digits * M::LANES * halves, Line::ZERO);

        // Inner blocks of equal size; one that is empty where there is nothing to sum, so that zeros are written.
        let blocks = work.weights.blocks();
        // Few rows do not wait for weights to come again: they run along them as these lie in memory.
        let few = rows.len() <= FEW_ROWS
            && digits * rows.len().min(M::LANES) <= micro.few_lanes()
            && !rows.is_empty()
            && blocks > 0;
        let most_blocks = if few { blocks } else { M::INNER_BLOCKS };
        let passes = blocks.div_ceil(most_blocks.min(M::Encoding::exact_blocks(work.limbs))).max(1);
        let blocks_per_pass = blocks.div_ceil(passes);

        for strip in columns.clone().step_by(STRIP_COLUMNS) {
            let strip_columns = strip..(strip + STRIP_COLUMNS).min(columns.end);
            let strip_blocks = strip_columns.len().div_ceil(M::COLUMNS);
            // Values of a panel, or, where they wait for the next pass, of all panels and columns of the strip.
            let panel_values = M::LANES * halves;
            let (panel_step, block_step) =
                if passes > 1 { (panel_values, panels.len() * panel_values) } else { (0, 0) };
            let count = panel_values.max(strip_blocks * block_step);
            let values = at_least(&mut scratch.values, count, [V::ZERO; HALF]);
            for pass in 0..passes {
                let inner = (pass * blocks_per_pass).min(blocks)..((pass + 1) * blocks_per_pass).min(blocks);
                for block in 0..strip_blocks {
                    let first = strip + block * M::COLUMNS;
                    let packed = work.weights.panel(first / PANEL, inner.clone());
                    let half = first / HALF % 2;
                    let prepared = if few { packed } else { micro.prepare(packed, half, &mut scratch.weights) };
                    for (index, panel) in panels.clone().enumerate() {
                        let first_row = panel * M::LANES;
                        let panel_rows = (rows.end - first_row).min(M::LANES);
                        let group = |digit| work.operand.group(panel, digit, inner.clone());
                        if few {
                            let groups: [&[Line]; MAX_LIMBS] =
                                std::array::from_fn(|digit| if digit < digits { group(digit) } else { &[] });
                            micro.multiply_few(&groups[..digits], packed, half, panel_rows, sums);
                        } else {
                            for (digit, sums) in sums.chunks_exact_mut(M::LANES * halves).enumerate() {
                                micro.multiply(group(digit), prepared, panel_rows, sums);
                            }
                        }
                        let values = &mut values[block * block_step + index * panel_step..][..panel_rows * halves];
                        if pass == 0 {
                            values.fill([V::ZERO; HALF]);
                        }
                        let bits = M::Encoding::DIGIT_BITS;
                        match digits {
                            1 => recombine::<V, 1>(sums, bits, values),
                            2 => recombine::<V, 2>(sums, bits, values),
                            3 => recombine::<V, 3>(sums, bits, values),
                            4 => recombine::<V, 4>(sums, bits, values),
                            5 => recombine::<V, 5>(sums, bits, values),
                            _ => recombine::<V, MAX_LIMBS>(sums, bits, values),
                        }
                        if pass + 1 == passes {
                            let (dropped, below) =
                                (8 * work.limbs as u32 - work.output_bits, 8 * (work.limbs - output.len()) as u32);
                            let start = (first_row - rows.start) * columns.len() + first - columns.start;
                            let width = (columns.end - first).min(M::COLUMNS);
                            for (limb, plane) in output.iter_mut().enumerate() {
                                let rows = plane[start..].chunks_mut(columns.len());
                                let rows = rows.zip(values.chunks_exact(halves));
                                let shift = below + 8 * limb as u32;
                                // Dropped bits of the byte.
                                let kept = if limb == 0 { u8::MAX << (dropped - below) } else { u8::MAX };
                                rows.for_each(|(row, values)| write(values, dropped, (shift, kept), &mut row[..width]));
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Adds the sums `[digit][row and half]` of a panel, each times its digit's weight, to the panel's values.
#[inline(always)]
fn recombine<V: Value, const D: usize>(sums: &[Line], bits: u32, values: &mut [Values<V>]) {
    let digits: [&[Line]; D] = std::array::from_fn(|digit| &sums[digit * (sums.len() / D)..]);
    for (index, values) in values.iter_mut().enumerate() {
        // The index is hidden, and the values copied to a register: else the compiler may gather and scatter the values of
        // many rows.
        let index = std::hint::black_box(index);
        let mut line = *values;
        for (digit, sums) in digits.iter().enumerate() {
            line = std::array::from_fn(|i| line[i].add_shifted(sums[index].0[i], bits * digit as u32));
        }
        *values = line;
    }
}

/// Writes a byte of each rounded value of a row: of the eight bits from bit `shift` on, those of `kept`.
#[inline(always)]
fn write<V: Value>(values: &[Values<V>], dropped: u32, (shift, kept): (u32, u8), bytes: &mut [u8]) {
    let half = V::half(dropped);
    let (whole, rest) = bytes.as_chunks_mut::<HALF>();
    for (values, bytes) in values.iter().zip(whole.iter_mut()) {
        *bytes = values.map(|value| value.rounded_byte(half, shift) & kept);
    }
    for (value, byte) in values.iter().skip(whole.len()).flatten().zip(rest) {
        *byte = value.rounded_byte(half, shift) & kept;
    }
}
