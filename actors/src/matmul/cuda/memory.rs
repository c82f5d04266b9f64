//! What a GPU's memory is for, and into which pieces a product is cut so that it gets by with its share.
//!
//! Three things lie in a GPU's memory: the matrices, for good; the buffers of the product that is being computed; and
//! what the driver and others take. The second and third are set aside before layers are accepted, so that a product
//! does not fail for want of memory once they are served. All of it is arithmetic, without a GPU.

use protocol::ids::{Direction, LinearShape};

use super::geometry::{padded_outer, pitch};

/// Outputs that are in the making at once: one is computed, one is on its way back, one is taken apart by the processor.
pub const SLOTS: usize = 3;
/// Columns of a tile are a multiple of this.
pub const COLUMN_STEP: usize = 32;
/// Rows of output columns are filled up to this where an engine's products come from cuBLASLt.
pub const WIDTH_STEP: usize = 16;
/// Rows of a piece are a multiple of this where there are more: a block of every kernel.
const ROW_STEP: usize = 128;
/// Columns that a piece of many rows should have room for.
const FEWEST_COLUMNS: usize = 512;
/// Operations of a launch below which its own cost would count: about 0.1 ms of an H100.
const LAUNCH_OPERATIONS: u128 = 100_000_000_000;
/// Left to the driver, the compiled kernels, cuBLASLt and the display, bytes; and the part of all memory, if more.
const MARGIN_BYTES: u64 = 512 << 20;
const MARGIN_PART: u64 = 32;
/// Set aside for products: at most so many bytes, and at most this part of all memory.
const SCRATCH_BYTES: u64 = 2 << 30;
const SCRATCH_PART: u64 = 8;
/// Most bytes of an output in the making: as much is page-locked in the computer's memory.
const OUTPUT_BYTES: u64 = 64 << 20;

/// Most bytes of the buffers of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The rows that are multiplied, `[limb][row][pitch]`.
    pub rows: u64,
    /// Sums of 32 bits, `[limb][row][column]`, where an engine keeps them in memory.
    pub sums: u64,
    /// Each of [`SLOTS`] outputs, `[output limb][row][column]`.
    pub output: u64,
}

impl Limits {
    /// The limits on a GPU of `total` bytes.
    pub fn new(total: u64) -> Self {
        let scratch = SCRATCH_BYTES.min(total / SCRATCH_PART);
        Self { rows: scratch / 2, sums: scratch / 4, output: OUTPUT_BYTES.min(scratch / 4 / SLOTS as u64) }
    }

    /// All buffers together.
    pub fn bytes(&self) -> u64 {
        self.rows + self.sums + SLOTS as u64 * self.output
    }
}

/// The bytes that are set aside on a GPU of `total` bytes, for products and for others.
pub fn set_aside(total: u64) -> u64 {
    MARGIN_BYTES.max(total / MARGIN_PART) + Limits::new(total).bytes()
}

/// The bytes that are left to matrices on a GPU of `total` bytes of which `free` are free.
pub fn for_matrices(free: u64, total: u64) -> u64 {
    free.saturating_sub(set_aside(total))
}

/// Bytes of the matrix of one direction: int8 weights and the sum of each column.
pub fn side_bytes(inner: usize, outer: usize) -> u64 {
    let row = pitch(inner) as u64 + size_of::<i32>() as u64;
    row.saturating_mul(padded_outer(outer) as u64)
}

/// Bytes of a held matrix, both directions.
pub fn matrix_bytes(shape: LinearShape) -> u64 {
    [Direction::Forward, Direction::Backward]
        .into_iter()
        .map(|direction| {
            let (inner, outer) = shape.along(direction);
            side_bytes(inner, outer)
        })
        .fold(0, u64::saturating_add)
}

/// Sizes of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Rows of the left operand.
    pub rows: usize,
    /// What is summed over.
    pub inner: usize,
    /// Output columns.
    pub outer: usize,
    /// Bytes of a value.
    pub limbs: usize,
    /// Bytes in which an output value has room.
    pub output_limbs: usize,
}

/// What is multiplied at once: some rows by some columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Most rows.
    pub rows: usize,
    /// Most columns, a multiple of the engine's step.
    pub columns: usize,
}

impl Piece {
    /// The pieces of a product whose tiles have `tile_columns` columns. Rows are cut only where they `may_be_cut`, which
    /// masks may not: they are expanded whole.
    ///
    /// A launch takes as many columns as keep a GPU busy: a multiple of `step`, the columns of an engine's block, and some
    /// whole tiles if these are a multiple of it, too.
    pub fn of(sizes: Sizes, tile_columns: usize, step: usize, may_be_cut: bool, limits: Limits) -> Self {
        let Sizes { rows, inner, outer, limbs, output_limbs } = sizes;
        let outer = outer.max(1).next_multiple_of(step);
        let tile_columns = tile_columns.max(1).next_multiple_of(COLUMN_STEP).min(outer);
        // Rows and columns, whose product may be this.
        let (output, sums) = (limits.output / output_limbs as u64, limits.sums / (size_of::<i32>() * limbs) as u64);
        let room = usize::try_from(output.min(sums)).unwrap_or(usize::MAX);

        let piece_rows = if may_be_cut {
            let held = usize::try_from(limits.rows / (limbs * pitch(inner).max(1)) as u64).unwrap_or(usize::MAX);
            let most = held.min(room / outer.min(FEWEST_COLUMNS)).max(1);
            if most >= rows {
                rows
            } else if most > ROW_STEP {
                most / ROW_STEP * ROW_STEP
            } else {
                most
            }
        } else {
            rows
        };

        let column_operations = 2 * (limbs * piece_rows.max(1)) as u128 * inner.max(1) as u128;
        let busy = usize::try_from(LAUNCH_OPERATIONS.div_ceil(column_operations)).unwrap_or(usize::MAX);
        let busy = busy.min(outer).next_multiple_of(tile_columns).next_multiple_of(step);
        let columns = busy.min(outer);
        let columns = columns.min(room / piece_rows.max(1));
        let by_tiles = tile_columns.is_multiple_of(step) && columns >= tile_columns && columns < outer;
        let whole = if by_tiles { tile_columns } else { step };
        Self { rows: piece_rows, columns: (columns / whole * whole).max(step) }
    }

    /// Bytes of the buffers: the rows, sums if an engine keeps them, one output.
    pub fn buffers(self, sizes: Sizes) -> Limits {
        let rows = self.rows.min(sizes.rows);
        let width = self.columns.min(sizes.outer.next_multiple_of(WIDTH_STEP));
        let cells = (rows * width) as u64;
        Limits {
            rows: (sizes.limbs * rows) as u64 * pitch(sizes.inner) as u64,
            sums: (size_of::<i32>() * sizes.limbs) as u64 * cells,
            output: sizes.output_limbs as u64 * cells,
        }
    }
}

/// `0..whole` in parts of `part`.
pub fn parts(whole: usize, part: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    let part = part.max(1);
    (0..whole.div_ceil(part)).map(move |index| index * part..((index + 1) * part).min(whole))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn matrices_get_what_products_and_the_driver_leave() {
        let h100 = 80 * GIB;
        let limits = Limits::new(h100);
        assert_eq!(limits.bytes(), GIB + GIB / 2 + 3 * (64 << 20));
        let left = for_matrices(h100 - GIB, h100);
        assert!(left > 74 * GIB && left + limits.bytes() < h100 - GIB, "{left}");
        assert_eq!(for_matrices(GIB, 8 * GIB), 0);
        // Llama-3.2-1B, all layers, both ways.
        let shapes = [(2048, 3072), (2048, 2048), (2048, 16384), (8192, 2048)];
        let layer: u64 = shapes.map(|(d_in, d_out)| matrix_bytes(LinearShape { d_in, d_out })).iter().sum();
        assert!(16 * layer < 2 * GIB && 16 * layer > GIB + GIB / 2, "{layer}");
    }

    #[test]
    fn a_usual_product_is_one_piece_of_rows_and_some_tiles_to_a_launch() {
        let limits = Limits::new(80 * GIB);
        let sizes = Sizes { rows: 2048, inner: 2048, outer: 16384, limbs: 3, output_limbs: 2 };
        assert_eq!(Piece::of(sizes, 2048, 128, true, limits), Piece { rows: 2048, columns: 4096 });
        assert_eq!(Piece::of(sizes, 2048, 192, true, limits), Piece { rows: 2048, columns: 4224 });
        let small = Sizes { rows: 64, inner: 576, outer: 960, ..sizes };
        assert_eq!(Piece::of(small, 128, 256, true, limits), Piece { rows: 64, columns: 1024 });
    }

    #[test]
    fn a_matrix_takes_what_its_padded_sides_take() {
        let shape = LinearShape { d_in: 100, d_out: 130 };
        assert_eq!(matrix_bytes(shape), 256 * (128 + 4) + 128 * (192 + 4));
    }

    proptest! {
        #[test]
        fn parts_cover_the_whole(whole in 0usize..1000, part in 0usize..300) {
            let mut next = 0;
            for range in parts(whole, part) {
                prop_assert_eq!(range.start, next);
                prop_assert!(!range.is_empty() && range.len() <= part.max(1));
                next = range.end;
            }
            prop_assert_eq!(next, whole);
        }

        #[test]
        fn pieces_stay_within_their_limits(
            gibibytes in 4u64..200,
            rows in 0usize..40_000,
            inner in 1usize..=65_000,
            outer in 1usize..=65_000,
            limbs in 1usize..=6,
            dropped in 0usize..6,
            tile_columns in 1usize..=70_000,
            mask_rows in prop::sample::select(vec![1024usize, 1280, 2048]),
            step in prop::sample::select(vec![128usize, 192, 256]),
        ) {
            let limits = Limits::new(gibibytes * GIB);
            let sizes = Sizes { rows, inner, outer, limbs, output_limbs: limbs - dropped.min(limbs - 1) };
            let piece = Piece::of(sizes, tile_columns, step, true, limits);
            prop_assert!(piece.columns > 0 && piece.columns.is_multiple_of(step));
            prop_assert!(piece.rows <= rows && (piece.rows > 0 || rows == 0));
            let buffers = piece.buffers(sizes);
            prop_assert!(buffers.rows <= limits.rows && buffers.sums <= limits.sums);
            prop_assert!(buffers.output <= limits.output, "{:?} {:?}", piece, buffers);

            let masks = Sizes { rows: mask_rows, ..sizes };
            let piece = Piece::of(masks, tile_columns, step, false, limits);
            prop_assert_eq!(piece.rows, mask_rows);
            let buffers = piece.buffers(masks);
            prop_assert!(buffers.sums <= limits.sums && buffers.output <= limits.output);
            // Only the very widest masks need more than their share, and only on small GPUs.
            prop_assert!(buffers.rows <= limits.rows || gibibytes < 16);
        }
    }
}
