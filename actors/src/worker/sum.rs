//! Ciphertexts added: the partial products of a matrix that is cut along the inner dimension, as numbers mod
//! `2^(8·limbs)`, and the sum rounded to the bits that go back.
//!
//! Parts come as tiles, in any order, and not necessarily cut alike. The sum is kept in cells of some columns; a cell
//! is given away as soon as every part of it has come. What is kept is at most the sum of the whole product.

use std::ops::Range;

use protocol::columns::{ColumnError, ColumnLedger};
use protocol::he::{Planes, ProductTile};
use rayon::prelude::*;

/// Bytes of a plane that one task adds to at once: those of both planes and what they carry are in the first-level cache.
const TASK_BYTES: usize = 1 << 13;

/// A partial product that is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PartError {
    /// Tiles of another shape than the product's.
    #[error("a part of a product has other dimensions than the product")]
    Shape,
    /// A column that came before.
    #[error("column {0} of a part came twice")]
    Twice(usize),
    /// A part that there is not.
    #[error("there is no part {0}")]
    Unknown(usize),
}

/// What is added up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SumShape {
    /// How many partial products there are.
    pub parts: usize,
    /// Bytes of a value of them.
    pub limbs: usize,
    /// Most significant bits of the sum that are given away, rounded to the nearest: some that planes can have, at most
    /// `8·limbs`.
    pub output_bits: u32,
    /// Rows of each.
    pub rows: usize,
    /// Columns of each.
    pub outer: usize,
    /// Columns of a cell, and so of a tile of the sum.
    pub cell_columns: usize,
}

/// A sum under way.
pub struct CiphertextSum {
    shape: SumShape,
    /// Of each part.
    came: Vec<ColumnLedger>,
    cells: Vec<Cell>,
    /// Cells that are not given away yet.
    left: usize,
}

/// Neighbouring columns of the sum.
struct Cell {
    columns: Range<usize>,
    sum: Option<Planes>,
    /// Columns still to come, of all parts together.
    missing: usize,
}

impl CiphertextSum {
    /// A sum to which nothing has been added.
    pub fn new(shape: SumShape) -> Self {
        let cell = |start: usize| {
            let columns = start..shape.outer.min(start + shape.cell_columns);
            Cell { missing: shape.parts * columns.len(), columns, sum: None }
        };
        let cells: Vec<Cell> = (0..shape.outer).step_by(shape.cell_columns.max(1)).map(cell).collect();
        Self { shape, came: vec![ColumnLedger::new(shape.outer); shape.parts], left: cells.len(), cells }
    }

    /// Adds a tile of a part, and returns the tiles of the sum that are complete with it.
    ///
    /// # Errors
    /// When the tile does not belong here; then nothing is added.
    pub fn add(&mut self, part: usize, tile: ProductTile) -> Result<Vec<ProductTile>, PartError> {
        let SumShape { limbs, output_bits, rows, .. } = self.shape;
        let ProductTile { first_column, rows: tile } = tile;
        let came = self.came.get_mut(part).ok_or(PartError::Unknown(part))?;
        if (tile.bits(), tile.rows()) != (8 * limbs as u32, rows) {
            return Err(PartError::Shape);
        }
        let columns = came.enter(first_column, tile.columns()).map_err(|error| match error {
            ColumnError::OutOfRange => PartError::Shape,
            ColumnError::Twice(column) => PartError::Twice(column),
        })?;

        let touched = |cell: &&mut Cell| cell.columns.start < columns.end && columns.start < cell.columns.end;
        let mut tile = Some(tile);
        let mut complete = Vec::new();
        for cell in self.cells.iter_mut().filter(touched) {
            let common = columns.start.max(cell.columns.start)..columns.end.min(cell.columns.end);
            match (&mut cell.sum, &tile) {
                (None, Some(_)) if cell.columns == columns => cell.sum = tile.take(),
                (sum, Some(tile)) => {
                    let sum = sum.get_or_insert_with(|| Planes::zeros(limbs, rows, cell.columns.len()));
                    let at = common.start - cell.columns.start;
                    let from = common.start - columns.start..common.end - columns.start;
                    add_columns(sum, at, tile, from);
                }
                // A tile that was taken as it is covers no other cell.
                (_, None) => {}
            }
            cell.missing -= common.len();
            if cell.missing == 0
                && let Some(sum) = cell.sum.take()
            {
                complete.push(ProductTile { first_column: cell.columns.start, rows: rounded(sum, output_bits) });
            }
        }
        self.left -= complete.len();
        Ok(complete)
    }

    /// Whether every tile of the sum was given away.
    pub fn is_complete(&self) -> bool {
        self.left == 0
    }
}

/// Adds columns `from` of `part` to as many columns of `sum` from `at` on.
fn add_columns(sum: &mut Planes, at: usize, part: &Planes, from: Range<usize>) {
    let (sum_columns, part_columns, width) = (sum.columns(), part.columns(), from.len());
    if width == sum_columns && width == part_columns {
        for_runs(sum, TASK_BYTES, |offset, limbs, carries| {
            for (limb, sums) in limbs.iter_mut().enumerate() {
                add_limb(sums, &part.plane(limb)[offset..][..sums.len()], carries);
            }
        });
    } else {
        for_runs(sum, sum_columns, |offset, limbs, carries| {
            let first = offset / sum_columns * part_columns + from.start;
            for (limb, sums) in limbs.iter_mut().enumerate() {
                add_limb(&mut sums[at..at + width], &part.plane(limb)[first..][..width], &mut carries[..width]);
            }
        });
    }
}

/// Adds bytes and what was carried from the limb below; `carries` become those to the limb above.
fn add_limb(sums: &mut [u8], parts: &[u8], carries: &mut [u8]) {
    for ((sum, &part), carry) in sums.iter_mut().zip(parts).zip(carries) {
        let (once, first) = sum.overflowing_add(part);
        let (twice, second) = once.overflowing_add(*carry);
        *sum = twice;
        *carry = u8::from(first | second);
    }
}

/// The most significant `bits` of each value, rounded to the nearest; the largest values round to 0, as numbers mod q do.
fn rounded(sum: Planes, bits: u32) -> Planes {
    let limbs = bits.div_ceil(8) as usize;
    // Whole bytes that are dropped, and bits of the lowest one that is kept.
    let (dropped, dropped_bits) = (sum.limbs() - limbs, 8 * limbs as u32 - bits);
    if dropped == 0 && dropped_bits == 0 {
        return sum;
    }
    let mut out = Planes::scratch(limbs, sum.rows(), sum.columns());
    for_runs(&mut out, TASK_BYTES, |offset, limbs, carries| {
        if dropped_bits > 0 {
            carries.fill(1 << (dropped_bits - 1));
        } else {
            // Half of the last byte that is kept is the highest bit of the one below.
            let below = &sum.plane(dropped - 1)[offset..];
            carries.iter_mut().zip(below).for_each(|(carry, below)| *carry = below >> 7);
        }
        for (limb, out) in limbs.iter_mut().enumerate() {
            out.copy_from_slice(&sum.plane(dropped + limb)[offset..][..out.len()]);
            for (byte, carry) in out.iter_mut().zip(carries.iter_mut()) {
                let (next, over) = byte.overflowing_add(*carry);
                *byte = next;
                *carry = u8::from(over);
            }
        }
    });
    // What is left of the dropped bits is not packed.
    out.pack(bits)
}

/// Cuts every plane into runs of `run` bytes, of which the last may be shorter, and calls `work` on the rayon pool for
/// each: with its offset in the plane, the run in each limb's plane, and zeros of its length.
fn for_runs(planes: &mut Planes, run: usize, work: impl Fn(usize, &mut [&mut [u8]], &mut [u8]) + Sync) {
    let (limbs, plane) = (planes.limbs(), planes.rows() * planes.columns());
    if plane == 0 {
        return;
    }
    let mut runs: Vec<Vec<&mut [u8]>> = (0..plane.div_ceil(run)).map(|_| Vec::with_capacity(limbs)).collect();
    for plane in planes.bytes_mut().chunks_exact_mut(plane) {
        runs.iter_mut().zip(plane.chunks_mut(run)).for_each(|(limbs, run)| limbs.push(run));
    }
    let runs = runs.into_par_iter().enumerate().with_min_len((TASK_BYTES / run).max(1));
    runs.for_each_init(Vec::new, |carries, (index, mut limbs)| {
        carries.clear();
        carries.resize(limbs.first().map_or(0, |run| run.len()), 0);
        work(index * run, &mut limbs, carries);
    });
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;
    use rand::seq::SliceRandom as _;
    use rand::{Rng as _, SeedableRng as _};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    fn columns_of(planes: &Planes, columns: Range<usize>) -> ProductTile {
        let mut rows = Planes::zeros(planes.limbs(), planes.rows(), columns.len());
        for (row, column) in (0..planes.rows()).flat_map(|row| columns.clone().map(move |column| (row, column))) {
            rows.set_value(row, column - columns.start, planes.value(row, column));
        }
        ProductTile { first_column: columns.start, rows }
    }

    proptest! {
        /// Against sums in 64 bits, with parts that are cut differently and come in any order.
        #[test]
        fn sums_are_those_of_integers(
            parts in 1_usize..4,
            (limbs, output_bits) in (1_usize..=6)
                .prop_flat_map(|limbs| (Just(limbs), (4..=4 * limbs as u32).prop_map(|bits| 2 * bits))),
            // Planes of one run, and of several.
            rows in prop_oneof![4 => 1_usize..5, 1 => 200_usize..220],
            outer in 1_usize..90,
            cell_columns in 1_usize..100,
            uncut: bool,
            seed: u64,
        ) {
            let mut random = ChaCha8Rng::seed_from_u64(seed);
            let fill = |random: &mut ChaCha8Rng| {
                // Bytes that carry often.
                let byte = |random: &mut ChaCha8Rng| *[0xff, 0x80, 0x7f, 0, random.random()].get(random.random_range(0..5)).unwrap();
                let bytes = (0..limbs * rows * outer).map(|_| byte(random)).collect();
                Planes::from_bytes(limbs, rows, outer, bytes).unwrap()
            };
            let planes: Vec<Planes> = (0..parts).map(|_| fill(&mut random)).collect();
            let mut tiles = Vec::new();
            for (part, planes) in planes.iter().enumerate() {
                let width = if uncut { cell_columns } else { random.random_range(1..=outer) };
                for start in (0..outer).step_by(width) {
                    tiles.push((part, columns_of(planes, start..outer.min(start + width))));
                }
            }
            tiles.shuffle(&mut random);
            let mut sum = CiphertextSum::new(SumShape { parts, limbs, output_bits, rows, outer, cell_columns });
            let mut came = vec![false; outer];
            for (part, tile) in tiles {
                prop_assert!(!sum.is_complete());
                for tile in sum.add(part, tile).unwrap() {
                    for column in 0..tile.rows.columns() {
                        let at = tile.first_column + column;
                        prop_assert!(!std::mem::replace(&mut came[at], true));
                        for row in 0..rows {
                            let q = 1_u128 << (8 * limbs);
                            let dropped = 8 * limbs as u32 - output_bits;
                            let total: u128 = planes.iter().map(|part| u128::from(part.value(row, at))).sum();
                            let half = (1_u128 << dropped) >> 1;
                            let expected = ((total + half) % q) >> dropped;
                            prop_assert_eq!(u128::from(tile.rows.value(row, column)), expected);
                        }
                    }
                }
            }
            prop_assert!(sum.is_complete() && came.into_iter().all(|came| came));
        }
    }

    #[test]
    fn what_is_no_part_is_refused() {
        let shape = SumShape { parts: 2, limbs: 3, output_bits: 16, rows: 2, outer: 10, cell_columns: 4 };
        let mut sum = CiphertextSum::new(shape);
        let tile = |first_column, limbs, rows, columns| ProductTile {
            first_column,
            rows: Planes::zeros(limbs, rows, columns),
        };
        for wrong in [tile(0, 2, 2, 4), tile(0, 3, 1, 4), tile(7, 3, 2, 4), tile(usize::MAX, 3, 2, 4), tile(0, 3, 2, 0)]
        {
            assert_eq!(sum.add(0, wrong), Err(PartError::Shape));
        }
        assert_eq!(sum.add(2, tile(0, 3, 2, 4)), Err(PartError::Unknown(2)));
        assert_eq!(sum.add(0, tile(2, 3, 2, 4)), Ok(Vec::new()));
        assert_eq!(sum.add(0, tile(5, 3, 2, 4)), Err(PartError::Twice(5)));
        assert_eq!(sum.add(1, tile(4, 3, 2, 4)), Ok(Vec::new()));
        assert!(!sum.is_complete());
    }
}
