//! A served matrix on its way to a device: both directions, each `[outer][pitch]`, so that a product finds what it sums
//! over in one run of memory.

use std::ops::Range;

use protocol::ids::{Direction, LinearShape};
use rayon::prelude::*;

use super::base::Base;
use super::buffers::{Uploader, allocate_zeros};
use super::fault::Fault;
use super::geometry::{padded_outer, pitch};
use super::launch::Side;

/// Edge of the blocks in which a matrix is transposed: a cache line of bytes.
const BLOCK: usize = 64;

/// Copies the matrix of a direction to the device.
pub(crate) fn upload(
    base: &Base,
    uploader: &mut Uploader,
    shape: LinearShape,
    values: &[i8],
    direction: Direction,
) -> Result<Side, Fault> {
    let (inner, outer) = shape.along(direction);
    let row_bytes = pitch(inner);
    let mut weights = allocate_zeros(&base.up, padded_outer(outer) * row_bytes)?;
    let sums = allocate_zeros(&base.up, padded_outer(outer) * size_of::<i32>())?;
    if inner == 0 || outer == 0 {
        return Ok(Side { weights, sums, inner, outer });
    }
    uploader.copy(&base.up, &mut weights, outer, row_bytes, |rows, out| match direction {
        Direction::Forward => transposed_rows(values, shape, rows, out),
        Direction::Backward => plain_rows(values, shape, rows, out),
    })?;
    let mut side = Side { weights, sums, inner, outer };
    base.functions.column_sums(&base.compute, &mut side)?;
    Ok(side)
}

/// Rows of the transpose of `values`, `d_in × d_out`, each filled up with zeros to `pitch(d_in)`.
fn transposed_rows(values: &[i8], shape: LinearShape, rows: Range<usize>, out: &mut [u8]) {
    let LinearShape { d_in, d_out } = shape;
    let row_bytes = pitch(d_in);
    out.par_chunks_mut(BLOCK * row_bytes).enumerate().for_each(|(block, out)| {
        let first = rows.start + block * BLOCK;
        for row in out.chunks_exact_mut(row_bytes) {
            row[d_in..].fill(0);
        }
        for start in (0..d_in).step_by(BLOCK) {
            for i in start..(start + BLOCK).min(d_in) {
                let values = &values[i * d_out + first..];
                for (row, &value) in out.chunks_exact_mut(row_bytes).zip(values) {
                    row[i] = value as u8;
                }
            }
        }
    });
}

/// Rows of `values`, `d_in × d_out`, each filled up with zeros to `pitch(d_out)`.
fn plain_rows(values: &[i8], shape: LinearShape, rows: Range<usize>, out: &mut [u8]) {
    let d_out = shape.d_out;
    let values = values[rows.start * d_out..].par_chunks_exact(d_out);
    out.par_chunks_exact_mut(pitch(d_out)).zip(values).for_each(|(row, values)| {
        let (row, padding) = row.split_at_mut(d_out);
        row.copy_from_slice(bytemuck::cast_slice(values));
        padding.fill(0);
    });
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn rows_are_those_of_the_matrix_and_of_its_transpose(
            d_in in 1usize..200,
            d_out in 1usize..200,
            start in 0usize..200,
            count in 1usize..100,
        ) {
            let shape = LinearShape { d_in, d_out };
            let values: Vec<i8> = (0..d_in * d_out).map(|i| (i * 31 + i / 7) as i8).collect();
            for direction in [Direction::Forward, Direction::Backward] {
                let (inner, outer) = shape.along(direction);
                let rows = start.min(outer - 1)..(start + count).min(outer);
                let mut out = vec![0xee; rows.len() * pitch(inner)];
                match direction {
                    Direction::Forward => transposed_rows(&values, shape, rows.clone(), &mut out),
                    Direction::Backward => plain_rows(&values, shape, rows.clone(), &mut out),
                }
                for (row, out) in rows.zip(out.chunks_exact(pitch(inner))) {
                    for (i, &byte) in out.iter().enumerate() {
                        let expected = match direction {
                            _ if i >= inner => 0,
                            Direction::Forward => values[i * d_out + row],
                            Direction::Backward => values[row * d_out + i],
                        };
                        prop_assert_eq!(byte as i8, expected);
                    }
                }
            }
        }
    }
}
