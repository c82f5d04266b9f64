//! Matrices cut into disjoint column tiles, so that many threads can fill one row-major matrix without staging
//! copies; and the small transposes between columns (polynomials) and rows (tokens).

use std::marker::PhantomData;
use std::ops::Range;

/// Columns of a tile: a tile's polynomials and their transforms stay in the second-level cache, and each row of it
/// is still a run of bytes worth writing.
pub(crate) const TILE: usize = 32;

/// Rows that are transposed at a time.
pub(crate) const STRIP: usize = 8;

/// Exclusive access to some columns of a row-major matrix.
pub(crate) struct ColumnTile<'a, T> {
    base: *mut T,
    rows: usize,
    stride: usize,
    columns: Range<usize>,
    matrix: PhantomData<&'a mut [T]>,
}

// SAFETY: a tile is an exclusive borrow of its elements (see `column_tiles`), like `&mut [T]`, which is `Send` when
// `T` is.
unsafe impl<T: Send> Send for ColumnTile<'_, T> {}

impl<T> ColumnTile<'_, T> {
    /// Which columns of the matrix these are.
    pub(crate) fn columns(&self) -> Range<usize> {
        self.columns.clone()
    }

    /// The tile's part of a row of the matrix.
    #[inline(always)]
    pub(crate) fn row_mut(&mut self, row: usize) -> &mut [T] {
        assert!(row < self.rows);
        // SAFETY: `column_tiles` checked that the matrix has `rows · stride` elements and that
        // `columns.end <= stride`, so with `row < rows` the run lies inside of the borrowed slice; tiles of one call
        // have disjoint columns and `&mut self` excludes a second borrow through this tile.
        unsafe {
            std::slice::from_raw_parts_mut(self.base.add(row * self.stride + self.columns.start), self.columns.len())
        }
    }
}

/// Cuts `columns` of a row-major matrix of `stride` columns into disjoint tiles of at most [`TILE`] columns.
///
/// Panics if `columns` are not columns of the matrix or the matrix is not a whole number of rows.
pub(crate) fn column_tiles<T>(matrix: &mut [T], stride: usize, columns: Range<usize>) -> Vec<ColumnTile<'_, T>> {
    assert!(columns.start <= columns.end && columns.end <= stride);
    assert!(stride > 0 && matrix.len().is_multiple_of(stride));
    let (base, rows) = (matrix.as_mut_ptr(), matrix.len() / stride);
    columns
        .clone()
        .step_by(TILE)
        .map(|first| ColumnTile {
            base,
            rows,
            stride,
            columns: first..(first + TILE).min(columns.end),
            matrix: PhantomData,
        })
        .collect()
}

/// Transposes an 8 × 8 matrix of bytes, row `i` in the little-endian bytes of `rows[i]`, by exchanging ever smaller
/// off-diagonal blocks.
#[inline(always)]
pub(crate) fn transpose_bytes(rows: &mut [u64; 8]) {
    const STEPS: [(usize, u32, u64); 3] =
        [(4, 32, 0x0000_0000_ffff_ffff), (2, 16, 0x0000_ffff_0000_ffff), (1, 8, 0x00ff_00ff_00ff_00ff)];
    for (distance, shift, low) in STEPS {
        for i in 0..8 {
            if i & distance == 0 {
                let (upper, lower) = (rows[i], rows[i + distance]);
                rows[i] = (upper & low) | ((lower & low) << shift);
                rows[i + distance] = ((upper >> shift) & low) | (lower & !low);
            }
        }
    }
}

/// Runs `$body` (an `#[inline(always)]` function call) compiled for AVX2 where the processor has it, so that its
/// loops over words and bytes become wide vectors whatever the build was targeted at.
macro_rules! vectorised {
    ($(#[$meta:meta])* fn $name:ident<$($generic:ident: $bound:path),*>($($argument:ident: $type:ty),* $(,)?) $(-> $result:ty)? = $body:path) => {
        $(#[$meta])*
        fn $name<$($generic: $bound),*>($($argument: $type),*) $(-> $result)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,bmi2")]
                fn wide<$($generic: $bound),*>($($argument: $type),*) $(-> $result)? {
                    $body($($argument),*)
                }
                if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("bmi2") {
                    // SAFETY: the function needs AVX2 and BMI2, which were just detected.
                    return unsafe { wide($($argument),*) };
                }
            }
            $body($($argument),*)
        }
    };
}
pub(crate) use vectorised;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_cover_their_columns_once() {
        let mut matrix = vec![0u8; 5 * 100];
        let tiles = column_tiles(&mut matrix, 100, 7..93);
        for mut tile in tiles {
            for row in 0..5 {
                tile.row_mut(row).iter_mut().for_each(|value| *value += row as u8 + 1);
            }
        }
        for (index, &value) in matrix.iter().enumerate() {
            let expected = if (7..93).contains(&(index % 100)) { (index / 100 + 1) as u8 } else { 0 };
            assert_eq!(value, expected);
        }
    }

    #[test]
    fn bytes_are_transposed() {
        let mut rows: [u64; 8] =
            std::array::from_fn(|i| u64::from_le_bytes(std::array::from_fn(|j| (8 * i + j) as u8)));
        transpose_bytes(&mut rows);
        for (i, row) in rows.iter().enumerate() {
            assert_eq!(row.to_le_bytes(), std::array::from_fn(|j| (8 * j + i) as u8));
        }
    }
}
