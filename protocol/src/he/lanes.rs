//! Matrices cut into disjoint column tiles, so that many threads can fill one row-major matrix without staging
//! copies; and the small transposes between columns (polynomials) and rows (tokens).

use std::marker::PhantomData;
use std::ops::Range;

/// Most columns of a tile. Rows are a page or more apart, so that what a tile costs in memory is mostly the number of
/// rows that it visits, whatever it does there: a wide tile visits fewer for each of its columns.
pub(crate) const TILE: usize = 128;

/// Fewest columns of a tile: a run of bytes that is still worth a visit.
const NARROWEST: usize = 32;

/// Rows that are transposed at a time: those of a cache line of words.
pub(crate) const STRIP: usize = 16;

/// Rows between the one that is worked on and the one that is fetched.
pub(crate) const AHEAD: usize = STRIP;

/// Fetches what will be read soon. Rows of a matrix are a page or more apart, where the processor's own
/// prefetching ends.
#[inline(always)]
pub(crate) fn prefetch<T>(values: &[T]) {
    fetch_bytes(values.as_ptr(), values.len());
}

#[inline(always)]
fn fetch_bytes<T>(first: *const T, count: usize) {
    #[cfg(target_arch = "x86_64")]
    for line in 0..(count * size_of::<T>()).div_ceil(64) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: the instruction is part of SSE, which every x86-64 has, and a hint that accesses nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(first.cast::<i8>().wrapping_add(64 * line)) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (first, count);
}

/// Exclusive access to some columns of a row-major matrix.
pub(crate) struct ColumnTile<'a, T> {
    base: *mut T,
    rows: usize,
    stride: usize,
    columns: Range<usize>,
    matrix: PhantomData<&'a mut [T]>,
}

// SAFETY: a tile is an exclusive borrow of its elements (see `tiles_of`), like `&mut [T]`, which is `Send` when
// `T` is.
unsafe impl<T: Send> Send for ColumnTile<'_, T> {}

impl<T> ColumnTile<'_, T> {
    /// Which columns of the matrix these are.
    pub(crate) fn columns(&self) -> Range<usize> {
        self.columns.clone()
    }

    /// Fetches the tile's part of a row that will be written soon; nothing where there is no such row.
    #[inline(always)]
    pub(crate) fn fetch(&self, row: usize) {
        if row < self.rows {
            // SAFETY: as in `row_mut`; nothing is accessed.
            unsafe { fetch_bytes(self.base.add(row * self.stride + self.columns.start), self.columns.len()) };
        }
    }

    /// The tile's parts of the rows `first + i·step` for `i < count`; nothing for the others.
    #[inline(always)]
    pub(crate) fn rows_mut<const N: usize>(&mut self, first: usize, step: usize, count: usize) -> [&mut [T]; N] {
        assert!(count == 0 || (step > 0 && first + (count - 1) * step < self.rows));
        std::array::from_fn(|i| {
            if i >= count {
                return &mut [][..];
            }
            let start = (first + i * step) * self.stride + self.columns.start;
            // SAFETY: as in `row_mut`, since the last of the rows was just checked; no two of them are the same, and
            // `&mut self` lasts as long as all of them.
            unsafe { std::slice::from_raw_parts_mut(self.base.add(start), self.columns.len()) }
        })
    }

    /// The tile's part of a row of the matrix.
    #[inline(always)]
    pub(crate) fn row_mut(&mut self, row: usize) -> &mut [T] {
        assert!(row < self.rows);
        // SAFETY: `tiles_of` checked that the matrix has `rows · stride` elements and that
        // `columns.end <= stride`, so with `row < rows` the run lies inside of the borrowed slice; tiles of one call
        // have disjoint columns and `&mut self` excludes a second borrow through this tile.
        unsafe {
            std::slice::from_raw_parts_mut(self.base.add(row * self.stride + self.columns.start), self.columns.len())
        }
    }
}

/// Columns of each tile but the last where so many are cut: a multiple of [`NARROWEST`], at most [`TILE`], and such that there
/// are two tiles for each thread where there are columns enough.
pub(crate) fn tile_width(columns: usize) -> usize {
    let fair = columns.div_ceil(2 * rayon::current_num_threads());
    fair.next_multiple_of(NARROWEST).clamp(NARROWEST, TILE)
}

/// Cuts `columns` of a row-major matrix of `stride` columns into disjoint tiles of [`tile_width`].
///
/// Panics if `columns` are not columns of the matrix or the matrix is not a whole number of rows.
pub(crate) fn column_tiles<T>(matrix: &mut [T], stride: usize, columns: Range<usize>) -> Vec<ColumnTile<'_, T>> {
    let width = tile_width(columns.len());
    let tiles = columns.clone().step_by(width).map(|first| first..(first + width).min(columns.end));
    tiles_of(matrix, stride, tiles)
}

/// Cuts a row-major matrix of `stride` columns into tiles of these columns.
///
/// Panics if they are not columns of the matrix, or not one behind the other, or the matrix is not a whole number of rows.
pub(super) fn tiles_of<T>(
    matrix: &mut [T],
    stride: usize,
    tiles: impl Iterator<Item = Range<usize>>,
) -> Vec<ColumnTile<'_, T>> {
    assert!(stride > 0 && matrix.len().is_multiple_of(stride));
    let (base, rows) = (matrix.as_mut_ptr(), matrix.len() / stride);
    let mut free = 0;
    tiles
        .map(|columns| {
            assert!(free <= columns.start && columns.start <= columns.end && columns.end <= stride);
            free = columns.end;
            ColumnTile { base, rows, stride, columns, matrix: PhantomData }
        })
        .collect()
}

/// Transposes an 8 × 8 matrix, element by element: row `i` is `from[i·from_stride..][..8]`, row `i` of the transpose goes
/// to `to[i·to_stride..][..8]`.
#[inline(always)]
pub(crate) fn transpose_any<T: Copy>(from: &[T], from_stride: usize, to: &mut [T], to_stride: usize) {
    for i in 0..8 {
        let row = &from[i * from_stride..][..8];
        for (j, &value) in row.iter().enumerate() {
            to[j * to_stride + i] = value;
        }
    }
}

/// [`transpose_any`] for words of 32 bits, in vector registers where the processor has them.
#[inline(always)]
pub(crate) fn transpose_words(from: &[u32], from_stride: usize, to: &mut [u32], to_stride: usize) {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        assert!(7 * from_stride + 8 <= from.len() && 7 * to_stride + 8 <= to.len());
        // SAFETY: the function needs AVX2, which was just detected, and eight words from each multiple of a stride up
        // to the seventh, which the slices have.
        return unsafe { x86::transpose_words(from.as_ptr(), from_stride, to.as_mut_ptr(), to_stride) };
    }
    transpose_any(from, from_stride, to, to_stride);
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m256i, _mm256_loadu_si256, _mm256_permute2x128_si256, _mm256_storeu_si256, _mm256_unpackhi_epi32,
        _mm256_unpackhi_epi64, _mm256_unpacklo_epi32, _mm256_unpacklo_epi64,
    };

    /// Transposes 8 × 8 words by exchanging ever larger blocks.
    ///
    /// # Safety
    /// `from` must be valid for reading, and `to` for writing, eight words at `i · stride` for every `i` below 8, and
    /// they must not overlap.
    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn transpose_words(from: *const u32, from_stride: usize, to: *mut u32, to_stride: usize) {
        // SAFETY: the caller vouches for eight words there.
        let load = |i: usize| unsafe { _mm256_loadu_si256(from.add(i * from_stride).cast::<__m256i>()) };
        let r: [__m256i; 8] = [load(0), load(1), load(2), load(3), load(4), load(5), load(6), load(7)];
        let low = |i: usize, j: usize| _mm256_unpacklo_epi32(r[i], r[j]);
        let high = |i: usize, j: usize| _mm256_unpackhi_epi32(r[i], r[j]);
        let pairs = [low(0, 1), high(0, 1), low(2, 3), high(2, 3), low(4, 5), high(4, 5), low(6, 7), high(6, 7)];
        let low = |i: usize| _mm256_unpacklo_epi64(pairs[i], pairs[i + 2]);
        let high = |i: usize| _mm256_unpackhi_epi64(pairs[i], pairs[i + 2]);
        // Words 0 to 3 of rows 0 to 3, then of rows 4 to 7, in the lower halves; words 4 to 7 in the upper ones.
        let (first, second) = ([low(0), high(0), low(1), high(1)], [low(4), high(4), low(5), high(5)]);
        for (i, (&first, &second)) in first.iter().zip(&second).enumerate() {
            let lower = _mm256_permute2x128_si256::<0x20>(first, second);
            let upper = _mm256_permute2x128_si256::<0x31>(first, second);
            // SAFETY: the caller vouches for eight words there.
            unsafe {
                _mm256_storeu_si256(to.add(i * to_stride).cast::<__m256i>(), lower);
                _mm256_storeu_si256(to.add((i + 4) * to_stride).cast::<__m256i>(), upper);
            }
        }
    }
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

/// Whether the processor has the AVX-512 extensions that [`vectorised`] uses: those of words and bytes
/// beside those of numbers, and BMI2.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) fn widest_vectors() -> bool {
    std::arch::is_x86_feature_detected!("avx512f")
        && std::arch::is_x86_feature_detected!("avx512bw")
        && std::arch::is_x86_feature_detected!("avx512dq")
        && std::arch::is_x86_feature_detected!("avx512vl")
        && std::arch::is_x86_feature_detected!("bmi2")
}

/// Runs `$body` (an `#[inline(always)]` function call) compiled for AVX-512 or AVX2 where the processor has it, so that its
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
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,bmi2")]
                fn widest<$($generic: $bound),*>($($argument: $type),*) $(-> $result)? {
                    $body($($argument),*)
                }
                if $crate::he::widest_vectors() {
                    // SAFETY: the function needs what `widest_vectors` has just detected.
                    return unsafe { widest::<$($generic),*>($($argument),*) };
                }
                if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("bmi2") {
                    // SAFETY: the function needs AVX2 and BMI2, which were just detected.
                    return unsafe { wide::<$($generic),*>($($argument),*) };
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
    fn words_are_transposed() {
        let from: Vec<u32> = (0..200).map(|i| i * 0x0101_0101).collect();
        let (mut words, mut any) = (vec![7; 100], vec![7; 100]);
        transpose_words(&from[3..], 27, &mut words[1..], 13);
        transpose_any(&from[3..], 27, &mut any[1..], 13);
        assert_eq!(words, any);
        assert!((0..64).all(|i| words[1 + 13 * (i / 8) + i % 8] == from[3 + 27 * (i % 8) + i / 8]));
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
