//! Puts the tiles of an answer together from the pieces that come back from a GPU.
//!
//! What suits a GPU (many columns at once, as many rows as fit its buffers) is not what suits the network (tiles of some
//! columns, all rows of them, their bits packed). A piece is any range of rows by any range of columns; a tile is given away when the last
//! piece of it is there.

use std::ops::{ControlFlow, Range};

use protocol::he::{Planes, ProductTile};
use rayon::prelude::*;

use super::memory::COLUMN_STEP;
use crate::matmul::TileSink;

/// Rows that a task copies at least.
const TASK_ROWS: usize = 128;

/// The tiles of an answer that are not whole yet.
pub(crate) struct Tiles {
    rows: usize,
    outer: usize,
    output_bits: u32,
    width: usize,
    open: Vec<Tile>,
}

/// One of them.
enum Tile {
    Untouched,
    Open { planes: Planes, missing: usize },
    Given,
}

/// A part of an answer, `[output limb][row][stride]`.
pub(crate) struct Part<'a> {
    pub(crate) rows: Range<usize>,
    pub(crate) columns: Range<usize>,
    /// Bytes from row to row, the first of which are the columns'.
    pub(crate) stride: usize,
    pub(crate) bytes: &'a [u8],
}

/// Columns of a tile where a caller wants about `tile_columns` of `outer`: as the CPU's kernels have them.
pub(crate) fn tile_width(outer: usize, tile_columns: usize) -> usize {
    tile_columns.clamp(1, outer.max(1)).next_multiple_of(COLUMN_STEP)
}

impl Tiles {
    pub(crate) fn new(rows: usize, outer: usize, output_bits: u32, width: usize) -> Self {
        let mut open = Vec::new();
        open.resize_with(outer.div_ceil(width.max(1)), || Tile::Untouched);
        Self { rows, outer, output_bits, width, open }
    }

    /// All tiles, filled with zeros: the answer where there is nothing to sum, or no row.
    pub(crate) fn zeros(mut self, sink: TileSink<'_>) -> ControlFlow<()> {
        for index in 0..self.open.len() {
            let columns = self.columns(index);
            let rows = Planes::zeros_of_bits(self.output_bits, self.rows, columns.len());
            self.open[index] = Tile::Given;
            sink(ProductTile { first_column: columns.start, rows })?;
        }
        ControlFlow::Continue(())
    }

    fn columns(&self, index: usize) -> Range<usize> {
        index * self.width..((index + 1) * self.width).min(self.outer)
    }

    /// Copies a part into its tiles, each of which is given away when it is whole. No two parts may overlap.
    pub(crate) fn write(&mut self, part: &Part<'_>, sink: TileSink<'_>) -> ControlFlow<()> {
        if part.columns.is_empty() || part.rows.is_empty() {
            return ControlFlow::Continue(());
        }
        for index in part.columns.start / self.width..part.columns.end.div_ceil(self.width) {
            let columns = self.columns(index);
            let (all_rows, output_bits, width) = (self.rows, self.output_bits, columns.len());
            let tile = &mut self.open[index];
            if matches!(tile, Tile::Untouched) {
                let planes = Planes::scratch(output_bits.div_ceil(8) as usize, all_rows, width);
                *tile = Tile::Open { planes, missing: all_rows * width };
            }
            let Tile::Open { planes, missing } = tile else { continue };
            let shared = part.columns.start.max(columns.start)..part.columns.end.min(columns.end);
            let to = shared.start - columns.start..shared.end - columns.start;
            let from = shared.start - part.columns.start..shared.end - part.columns.start;
            for (limb, plane) in planes.bytes_mut().chunks_exact_mut(all_rows * width).enumerate() {
                let plane = &mut plane[part.rows.start * width..part.rows.end * width];
                plane.par_chunks_mut(width).enumerate().with_min_len(TASK_ROWS).for_each(|(row, out)| {
                    let start = (limb * part.rows.len() + row) * part.stride;
                    out[to.clone()].copy_from_slice(&part.bytes[start..][from.clone()]);
                });
            }
            *missing = missing.saturating_sub(part.rows.len() * shared.len());
            if *missing == 0
                && let Tile::Open { planes, .. } = std::mem::replace(tile, Tile::Given)
            {
                sink(ProductTile { first_column: columns.start, rows: planes.pack(output_bits) })?;
            }
        }
        ControlFlow::Continue(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use proptest::prelude::*;

    use super::super::memory::parts;
    use super::*;

    /// The byte at a place of an answer.
    fn byte(limb: usize, row: usize, column: usize) -> u8 {
        (limb * 101 + row * 17 + column * 3 + row * column) as u8
    }

    fn part_bytes(limbs: usize, rows: &Range<usize>, columns: &Range<usize>, stride: usize) -> Vec<u8> {
        let mut bytes = vec![0xee; limbs * rows.len() * stride];
        for limb in 0..limbs {
            for (i, row) in rows.clone().enumerate() {
                for (j, column) in columns.clone().enumerate() {
                    bytes[(limb * rows.len() + i) * stride + j] = byte(limb, row, column);
                }
            }
        }
        bytes
    }

    fn expected(bits: u32, rows: usize, columns: Range<usize>) -> Planes {
        let limbs = bits.div_ceil(8) as usize;
        let bytes = part_bytes(limbs, &(0..rows), &columns, columns.len());
        Planes::from_bytes(limbs, rows, columns.len(), bytes).expect("as many bytes").pack(bits)
    }

    proptest! {
        #[test]
        fn whatever_the_pieces_the_tiles_are_the_same(
            rows in 1usize..40,
            outer in 1usize..300,
            half_bits in 4u32..=24,
            tile_columns in 1usize..200,
            piece_rows in 1usize..50,
            piece_steps in 1usize..8,
            padding in 0usize..20,
            reversed: bool,
        ) {
            let width = tile_width(outer, tile_columns);
            let given = Mutex::new(Vec::new());
            let sink = |tile: ProductTile| {
                given.lock().expect("no panic").push(tile);
                ControlFlow::Continue(())
            };
            let bits = 2 * half_bits;
            let mut tiles = Tiles::new(rows, outer, bits, width);
            let mut pieces: Vec<_> = parts(rows, piece_rows)
                .flat_map(|rows| parts(outer, piece_steps * COLUMN_STEP).map(move |columns| (rows.clone(), columns)))
                .collect();
            if reversed {
                pieces.reverse();
            }
            for (rows, columns) in pieces {
                let stride = columns.len() + padding;
                let bytes = part_bytes(bits.div_ceil(8) as usize, &rows, &columns, stride);
                let written = tiles.write(&Part { rows, columns, stride, bytes: &bytes }, &sink);
                prop_assert!(written.is_continue());
            }
            let mut given = given.into_inner().expect("no panic");
            given.sort_by_key(|tile| tile.first_column);
            let ranges: Vec<_> = parts(outer, width).collect();
            prop_assert_eq!(given.len(), ranges.len());
            for (tile, columns) in given.iter().zip(ranges) {
                prop_assert_eq!(tile.first_column, columns.start);
                let wanted = expected(bits, rows, columns);
                prop_assert_eq!(&tile.rows, &wanted);
            }
        }
    }

    #[test]
    fn a_reader_that_goes_away_ends_the_writing() {
        let mut tiles = Tiles::new(2, 64, 8, 32);
        let bytes = part_bytes(1, &(0..2), &(0..64), 64);
        let given = Mutex::new(0);
        let sink = |_| {
            *given.lock().expect("no panic") += 1;
            ControlFlow::Break(())
        };
        let part = Part { rows: 0..2, columns: 0..64, stride: 64, bytes: &bytes };
        assert!(tiles.write(&part, &sink).is_break());
        assert_eq!(*given.lock().expect("no panic"), 1);
    }

    #[test]
    fn nothing_to_sum_is_zeros_in_the_same_tiles() {
        let given = Mutex::new(Vec::new());
        let sink = |tile: ProductTile| {
            given.lock().expect("no panic").push(tile);
            ControlFlow::Continue(())
        };
        assert!(Tiles::new(3, 70, 10, 64).zeros(&sink).is_continue());
        let given = given.into_inner().expect("no panic");
        assert_eq!(
            given.iter().map(|tile| (tile.first_column, tile.rows.columns())).collect::<Vec<_>>(),
            [(0, 64), (64, 6)]
        );
        assert!(given.iter().all(|tile| tile.rows == Planes::zeros_of_bits(10, 3, tile.rows.columns())));
    }
}
