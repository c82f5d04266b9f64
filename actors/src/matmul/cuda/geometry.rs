//! How each kernel is launched: blocks of threads, threads, shared memory. All of it is arithmetic on sizes.
//!
//! The numbers are those of the kernels' source (tiles in `kernels/tile.cuh` and `hopper.cu`, constants in the other
//! files); a test reads
//! them out of the compiled source and compares.

use super::super::MAX_LIMBS;

/// Rows on the device begin at multiples of this, and end with zeros or with anything that meets weights of zero.
pub const PITCH_STEP: usize = 64;
/// Rows of weights are filled up with zeros to a multiple of this.
pub const OUTER_STEP: usize = 128;
/// Mask rows are a multiple of this: bytes of a block of the keystream.
pub const MASK_ROW_STEP: usize = 64;
/// The longest inner dimension of which the fused product's 32-bit sums are exact, `255 · 128 · inner < 2^31`. Up to four
/// limbs longer ones are right as well.
pub const MAX_INNER: usize = 65_792;
/// Rows of all limbs, and the weights of one launch, may take as many bytes: the fused product counts them in chunks of
/// 16 bytes and 32 bits.
pub const MAX_OPERAND_BYTES: u64 = 1 << 36;
/// Shared memory that a block may have without asking for more, bytes. A launch that takes more needs the function's
/// attribute for the largest dynamic size.
pub const DEFAULT_SHARED_BYTES: u32 = 48 << 10;
/// Shared memory that a block may have on the smallest devices that are served (compute capability 8.6 and 8.9), bytes.
pub const MAX_SHARED_BYTES: u32 = 99 << 10;

/// Shared memory that a block may have on compute capability 9.0, bytes.
pub const MAX_HOPPER_SHARED_BYTES: u32 = 227 << 10;

/// CUDA's limits of a grid.
pub const MAX_GRID: [u32; 3] = [i32::MAX as u32, 65_535, 65_535];

/// Features of a block of the mask expansion, one a thread.
const MASK_FEATURES: usize = 128;
/// Threads of the kernels around a library's product, and of the register loop.
const THREADS: usize = 256;
/// Threads that make a column sum.
const COLUMN_SUM_THREADS: usize = 32;
/// Columns that a thread of the last step finishes.
const FINISHED_COLUMNS: usize = 4;
/// Vectors of bytes that a thread biases, before the grid begins again.
const BIASED_VECTORS: u64 = 4;
/// Most blocks that bias: enough for every device's threads.
const MAX_BIAS_BLOCKS: u64 = 65_536;
/// Blocks of the register loop on a multiprocessor.
const PEAK_BLOCKS: usize = 2;
/// Multiplications of a warp in a pass of the register loop, and operations of one: 16 × 8 × 32 multiply-adds.
const PEAK_FRAGMENTS: usize = 16;
const FRAGMENT_OPERATIONS: usize = 2 * 16 * 8 * 32;
/// Stages of the product's pipeline, but for compute capability 9.0, and bytes of a line in one.
const STAGES: usize = 4;
const STEP: usize = 64;

/// What a kernel is launched with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: [u32; 3],
    /// Dynamic shared memory of a block, bytes: above [`DEFAULT_SHARED_BYTES`] the function must be told before.
    pub shared_bytes: u32,
}

impl Launch {
    /// A grid of `across × down` blocks; sizes that pass CUDA's limits become ones that it refuses.
    fn new(across: usize, down: usize, threads: usize) -> Self {
        let saturated = |size: usize| u32::try_from(size).unwrap_or(u32::MAX);
        Self { grid: [saturated(across), saturated(down), 1], block: [saturated(threads), 1, 1], shared_bytes: 0 }
    }

    /// Whether there is nothing to do: such a grid must not be launched, for CUDA refuses it.
    pub fn is_empty(&self) -> bool {
        self.grid.contains(&0)
    }

    /// Whether CUDA takes the grid. Only sizes that fit no device's memory give one that it does not.
    pub fn is_within_limits(&self) -> bool {
        self.grid.iter().zip(MAX_GRID).all(|(&size, limit)| size <= limit)
    }
}

/// Values that a block of the fused product computes, for values of some limbs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tile {
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub columns: usize,
    /// Threads of the block.
    pub threads: usize,
    /// Shared memory of the block, bytes.
    pub shared_bytes: usize,
}

impl Tile {
    fn new(limbs: usize, (rows, columns): (usize, usize), stages: usize) -> Self {
        Self { rows, columns, threads: THREADS, shared_bytes: stages * (limbs * rows + columns) * STEP }
    }

    /// `row_count` rows times `columns` columns, in tiles of this size.
    fn launch(&self, row_count: usize, columns: usize) -> Launch {
        let tiles = row_count.div_ceil(self.rows).saturating_mul(columns.div_ceil(self.columns));
        let shared_bytes = u32::try_from(self.shared_bytes).unwrap_or(u32::MAX);
        Launch { shared_bytes, ..Launch::new(tiles, 1, self.threads) }
    }
}

/// The fused product's tile for values of `limbs` bytes, 1 to [`MAX_LIMBS`].
pub fn tile(limbs: usize) -> Tile {
    debug_assert!((1..=MAX_LIMBS).contains(&limbs));
    let size = match limbs {
        0 | 1 => (256, 128),
        2 => (128, 128),
        3 => (64, 192),
        4 => (64, 128),
        _ => (32, 128),
    };
    Tile::new(limbs, size, STAGES)
}

/// The same on compute capability 9.0.
pub fn hopper_tile(limbs: usize) -> Tile {
    debug_assert!((1..=MAX_LIMBS).contains(&limbs));
    let (columns, stages) = match limbs {
        0..=2 => (256, 8),
        3 => (256, 7),
        4 => (192, 7),
        5 => (128, 7),
        _ => (128, 6),
    };
    Tile::new(limbs, (64, columns), stages)
}

/// Bytes from one row to the next on the device.
pub fn pitch(inner: usize) -> usize {
    inner.next_multiple_of(PITCH_STEP)
}

/// Rows of a matrix of weights on the device.
pub fn padded_outer(outer: usize) -> usize {
    outer.next_multiple_of(OUTER_STEP)
}

/// `velum_expand_masks`: masks of `features` columns; `rows` is a multiple of [`MASK_ROW_STEP`].
pub fn expand_masks(features: usize, rows: usize, limbs: usize) -> Launch {
    debug_assert!(rows.is_multiple_of(MASK_ROW_STEP));
    Launch::new(limbs * (rows / MASK_ROW_STEP), pitch(features).div_ceil(MASK_FEATURES), MASK_FEATURES)
}

/// `velum_product_l…`: `row_count` rows times `columns` columns.
pub fn product(limbs: usize, row_count: usize, columns: usize) -> Launch {
    tile(limbs).launch(row_count, columns)
}

/// `velum_hopper_product_l…`: the same on compute capability 9.0.
pub fn hopper_product(limbs: usize, row_count: usize, columns: usize) -> Launch {
    hopper_tile(limbs).launch(row_count, columns)
}

/// `velum_bias`: `vectors` runs of 16 bytes.
pub fn bias(vectors: u64) -> Launch {
    let blocks = vectors.div_ceil(THREADS as u64 * BIASED_VECTORS).min(MAX_BIAS_BLOCKS);
    Launch::new(blocks as usize, 1, THREADS)
}

/// `velum_column_sums`.
pub fn column_sums(columns: usize) -> Launch {
    Launch::new(columns.div_ceil(THREADS / COLUMN_SUM_THREADS), 1, THREADS)
}

/// `velum_finish_l…`.
pub fn finish(row_count: usize, columns: usize) -> Launch {
    let across = columns.div_ceil(FINISHED_COLUMNS * THREADS);
    Launch::new(across, row_count.min(MAX_GRID[1] as usize), THREADS)
}

/// `velum_register_loop`, and the operations of one of its passes on all `multiprocessors`. Its output is one integer, to
/// which all sums are added: zero before.
pub fn register_loop(multiprocessors: usize) -> (Launch, u64) {
    let blocks = PEAK_BLOCKS * multiprocessors;
    let operations = blocks * (THREADS / 32) * PEAK_FRAGMENTS * FRAGMENT_OPERATIONS;
    (Launch::new(blocks, 1, THREADS), operations as u64)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Bytes that no device has.
    const MEMORY: u64 = 1 << 39;

    proptest! {
        #[test]
        fn rows_begin_at_multiples(inner in 0usize..70_000) {
            prop_assert!(pitch(inner) >= inner && pitch(inner) < inner + 64 && pitch(inner).is_multiple_of(64));
            prop_assert!(padded_outer(inner) >= inner && padded_outer(inner) < inner + 128);
            prop_assert_eq!(padded_outer(inner) % 128, 0);
        }

        /// What fits the memory of a device can be launched.
        #[test]
        fn grids_are_within_limits(
            limbs in 1usize..=MAX_LIMBS,
            rows in 1usize..1 << 30,
            columns in 1usize..1 << 30,
            inner in 1usize..=MAX_INNER,
        ) {
            if (limbs * rows * pitch(inner)) as u64 <= MEMORY && (rows * columns) as u64 <= MEMORY {
                prop_assert!(product(limbs, rows, columns).is_within_limits());
                prop_assert!(hopper_product(limbs, rows, columns).is_within_limits());
                prop_assert!(finish(rows, columns).is_within_limits());
                prop_assert!(column_sums(columns).is_within_limits());
                let mask_rows = rows.next_multiple_of(MASK_ROW_STEP);
                prop_assert!(expand_masks(inner, mask_rows, limbs).is_within_limits());
            }
            prop_assert!(bias(MEMORY / 16).is_within_limits());
            prop_assert!(register_loop(rows % 1024).0.is_within_limits());
        }

        /// The blocks of the flat kernels reach everything, and no block is without work.
        #[test]
        fn grids_are_as_large_as_needed(count in 1usize..1 << 20, rows in 1usize..1 << 17) {
            let covers = |blocks: u32, size: usize| {
                let blocks = blocks as usize;
                blocks * size >= count && (blocks - 1) * size < count
            };
            prop_assert!(covers(column_sums(count).grid[0], 8));
            let finish = finish(rows, count);
            prop_assert!(covers(finish.grid[0], 1024) && finish.grid[1] as usize == rows.min(65_535));
            let masks = expand_masks(count, 1280, 4);
            prop_assert_eq!(masks.grid[0], 80);
            prop_assert!(masks.grid[1] as usize * 128 >= pitch(count));
            prop_assert!((masks.grid[1] as usize - 1) * 128 < pitch(count));
            prop_assert!(!bias(count as u64).is_empty());
        }
    }

    #[test]
    fn tiles_fit_the_smallest_device() {
        for limbs in 1..=MAX_LIMBS {
            let launch = product(limbs, 1000, 1000);
            assert!(launch.shared_bytes <= MAX_SHARED_BYTES, "{limbs}: {launch:?}");
            assert!(launch.shared_bytes > DEFAULT_SHARED_BYTES, "the caller's attribute is not for nothing");
            assert_eq!(launch.block, [256, 1, 1]);
            assert!(hopper_product(limbs, 1000, 1000).shared_bytes <= MAX_HOPPER_SHARED_BYTES, "{limbs}");
        }
    }

    #[test]
    fn nothing_is_launched_for_nothing() {
        assert!(product(3, 0, 100).is_empty() && product(3, 100, 0).is_empty());
        assert!(hopper_product(3, 0, 100).is_empty() && hopper_product(3, 100, 0).is_empty());
        assert!(expand_masks(0, 1024, 3).is_empty() && bias(0).is_empty());
        assert!(column_sums(0).is_empty() && finish(0, 4).is_empty() && finish(4, 0).is_empty());
    }

    #[test]
    fn the_register_loop_counts_its_operations() {
        let (launch, operations) = register_loop(132);
        assert_eq!(launch.grid, [264, 1, 1]);
        assert_eq!(operations, 264 * 8 * 16 * 8192);
    }
}
