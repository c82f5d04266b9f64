//! The product on one core with AVX2 and FMA, for the shapes of an owner: few rows, operands that lie anywhere.
//!
//! The right operand's columns are gathered into panels of sixteen, which the second-level cache holds. Past them go
//! the left operand's rows, a few at a time, read where they lie: whatever their strides, one number of each row is
//! spread over a register. Where there are few rows, a right operand with contiguous rows is not gathered either.

use std::arch::x86_64::{
    __m256, _mm256_add_ps, _mm256_broadcast_ss, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_mul_ps,
    _mm256_permute2f128_ps, _mm256_set1_ps, _mm256_setzero_ps, _mm256_shuffle_ps, _mm256_storeu_ps, _mm256_unpackhi_ps,
    _mm256_unpacklo_ps,
};
use std::cell::RefCell;

use super::{Matrix, MatrixMut};

/// Columns of a panel: two registers.
const COLUMNS: usize = 16;
/// Rows of a panel, 16 KiB of it.
const DEPTH: usize = 256;
/// Panels that wait in the second-level cache, a quarter of a MiB of them.
const PANELS_AT_ONCE: usize = 16;
/// Rows of the left operand that meet all of these while they are in the first-level cache.
const ROWS: usize = 24;
/// Up to so many rows of the left operand, gathering a panel takes longer than it saves, if the right operand is dense.
const FEW: usize = 48;
/// From a row to the next of what is dense. Rows farther apart each lie on a page of their own, and often compete for
/// the same places in the cache: they are better visited once.
const DENSE: usize = 128;
/// Rows of a tile that is two registers wide: with no more, nothing is visited twice.
const TILE: usize = 6;

/// One row of a panel.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; COLUMNS]);

thread_local! {
    static PANELS: RefCell<Vec<Line>> = RefCell::new(vec![Line([0.0; COLUMNS]); PANELS_AT_ONCE * DEPTH]);
}

/// Whether this processor can do it.
pub(super) fn available() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")
}

/// `out = scale · left·right`, plus what `out` held if `keep`. The dimensions agree, and the processor can do it.
pub(super) fn multiply(out: MatrixMut<'_>, keep: bool, scale: f32, left: Matrix<'_>, right: Matrix<'_>) {
    assert!(available(), "the processor has AVX2 and FMA");
    PANELS.with_borrow_mut(|panels| {
        // A sum over nothing is one block, too: it writes zeros.
        for first in (0..left.columns.max(1)).step_by(DEPTH) {
            let depth = DEPTH.min(left.columns - first);
            for first_column in (0..out.columns).step_by(PANELS_AT_ONCE * COLUMNS) {
                let end = out.columns.min(first_column + PANELS_AT_ONCE * COLUMNS);
                let most = if right.row_stride <= DENSE { FEW } else { TILE };
                let few = right.column_stride == 1 && out.rows <= most;
                for (column, panel) in (first_column..end).step_by(COLUMNS).zip(panels.chunks_exact_mut(DEPTH)) {
                    let columns = COLUMNS.min(end - column);
                    if !few || columns < COLUMNS {
                        // SAFETY: AVX2 is there; `column .. column + columns` and `first .. first + depth` are inside
                        // `right`, and `depth` is at most the panel's.
                        unsafe { gather(&mut panel[..depth], right, first, column, columns) };
                    }
                }
                for row in (0..out.rows).step_by(ROWS) {
                    for (column, panel) in (first_column..end).step_by(COLUMNS).zip(panels.chunks_exact(DEPTH)) {
                        let columns = COLUMNS.min(end - column);
                        let (b, b_step) = if few && columns == COLUMNS {
                            (right.data[first * right.row_stride + column..].as_ptr(), right.row_stride)
                        } else {
                            (panel.as_ptr().cast(), COLUMNS)
                        };
                        let strip = Strip {
                            a: left.data[row * left.row_stride + first * left.column_stride..].as_ptr(),
                            a_row: left.row_stride,
                            a_step: left.column_stride,
                            b,
                            b_step,
                            depth,
                            out: out.data[row * out.row_stride + column..].as_mut_ptr(),
                            out_row: out.row_stride,
                            columns,
                            keep: keep || first > 0,
                            scale,
                        };
                        // SAFETY: AVX2 and FMA are there. `a` begins `depth` numbers of each of the rows left, by
                        // `left`'s strides; `b` begins `depth` rows of 16 numbers: a panel, or rows of `right` with
                        // 16 columns left; `out` begins `columns` numbers of each of these rows, ours alone. All
                        // were checked to lie inside their slices when the matrices were made. Were one wrong,
                        // memory beside them would be read or written.
                        unsafe { strip.run(ROWS.min(out.rows - row)) };
                    }
                }
            }
        }
    });
}

/// Copies columns of `right` side by side; columns that a panel has too many are zero.
///
/// # Safety
/// The processor has AVX2, and `right` has the rows `first .. first + panel.len()` and the columns
/// `column .. column + columns`, at most 16.
#[target_feature(enable = "avx2")]
unsafe fn gather(panel: &mut [Line], right: Matrix<'_>, first: usize, column: usize, columns: usize) {
    let (row_stride, column_stride) = (right.row_stride, right.column_stride);
    let start = first * row_stride + column * column_stride;
    if column_stride == 1 {
        for (line, from) in panel.iter_mut().zip((start..).step_by(row_stride)) {
            let from = &right.data[from..from + columns];
            match from.first_chunk() {
                Some(whole) => line.0 = *whole,
                None => {
                    line.0 = [0.0; COLUMNS];
                    line.0[..columns].copy_from_slice(from);
                }
            }
        }
        return;
    }
    let mut done = 0;
    if row_stride == 1 && columns.is_multiple_of(8) {
        let (eights, _) = panel.as_chunks_mut::<8>();
        done = 8 * eights.len();
        for (lines, k) in eights.iter_mut().zip((start..).step_by(8)) {
            for half in (0..columns).step_by(8) {
                let rows: [__m256; 8] = std::array::from_fn(|j| {
                    let from = &right.data[k + (half + j) * column_stride..][..8];
                    // SAFETY: `from` has eight numbers.
                    unsafe { _mm256_loadu_ps(from.as_ptr()) }
                });
                for (line, values) in lines.iter_mut().zip(transposed(rows)) {
                    let to = &mut line.0[half..half + 8];
                    // SAFETY: `to` has eight numbers.
                    unsafe { _mm256_storeu_ps(to.as_mut_ptr(), values) };
                }
            }
            if columns < COLUMNS {
                lines.iter_mut().for_each(|line| line.0[columns..].fill(0.0));
            }
        }
    }
    for (line, k) in panel[done..].iter_mut().zip(done..) {
        line.0 = [0.0; COLUMNS];
        for (j, to) in line.0[..columns].iter_mut().enumerate() {
            *to = right.data[start + k * row_stride + j * column_stride];
        }
    }
}

/// Rows of an 8 × 8 matrix from its columns.
#[inline]
#[target_feature(enable = "avx2")]
fn transposed(r: [__m256; 8]) -> [__m256; 8] {
    let (a0, a1) = (_mm256_unpacklo_ps(r[0], r[1]), _mm256_unpackhi_ps(r[0], r[1]));
    let (a2, a3) = (_mm256_unpacklo_ps(r[2], r[3]), _mm256_unpackhi_ps(r[2], r[3]));
    let (a4, a5) = (_mm256_unpacklo_ps(r[4], r[5]), _mm256_unpackhi_ps(r[4], r[5]));
    let (a6, a7) = (_mm256_unpacklo_ps(r[6], r[7]), _mm256_unpackhi_ps(r[6], r[7]));
    let (b0, b1) = (_mm256_shuffle_ps::<0x44>(a0, a2), _mm256_shuffle_ps::<0xee>(a0, a2));
    let (b2, b3) = (_mm256_shuffle_ps::<0x44>(a1, a3), _mm256_shuffle_ps::<0xee>(a1, a3));
    let (b4, b5) = (_mm256_shuffle_ps::<0x44>(a4, a6), _mm256_shuffle_ps::<0xee>(a4, a6));
    let (b6, b7) = (_mm256_shuffle_ps::<0x44>(a5, a7), _mm256_shuffle_ps::<0xee>(a5, a7));
    [
        _mm256_permute2f128_ps::<0x20>(b0, b4),
        _mm256_permute2f128_ps::<0x20>(b1, b5),
        _mm256_permute2f128_ps::<0x20>(b2, b6),
        _mm256_permute2f128_ps::<0x20>(b3, b7),
        _mm256_permute2f128_ps::<0x31>(b0, b4),
        _mm256_permute2f128_ps::<0x31>(b1, b5),
        _mm256_permute2f128_ps::<0x31>(b2, b6),
        _mm256_permute2f128_ps::<0x31>(b3, b7),
    ]
}

/// A panel, the rows that it is multiplied by, and where the results go.
#[derive(Clone, Copy)]
struct Strip {
    a: *const f32,
    /// From a row to the next.
    a_row: usize,
    /// From a column to the next.
    a_step: usize,
    b: *const f32,
    /// From a row to the next.
    b_step: usize,
    /// Rows of `b`, columns of `a`.
    depth: usize,
    out: *mut f32,
    out_row: usize,
    /// Columns of `out`, at most 16.
    columns: usize,
    keep: bool,
    scale: f32,
}

impl Strip {
    /// # Safety
    /// The processor has AVX2 and FMA; `a` points to `rows × depth` numbers by its strides, `b` to `depth` rows of 16
    /// numbers, `out` to `rows × columns` that nobody else has.
    #[target_feature(enable = "avx2,fma")]
    unsafe fn run(mut self, rows: usize) {
        let mut left = rows;
        if self.columns > 8 {
            while left >= TILE {
                // SAFETY: as this function's; there are so many rows more.
                unsafe { self.tile::<TILE, 2>() };
                left -= TILE;
            }
            // SAFETY: as this function's; there are `left` rows more.
            unsafe {
                match left {
                    5 => self.tile::<5, 2>(),
                    4 => self.tile::<4, 2>(),
                    3 => self.tile::<3, 2>(),
                    2 => self.tile::<2, 2>(),
                    1 => self.tile::<1, 2>(),
                    _ => {}
                }
            }
            return;
        }
        while left >= 8 {
            // SAFETY: as this function's; there are eight rows more.
            unsafe { self.tile::<8, 1>() };
            left -= 8;
        }
        // SAFETY: as this function's; there are `left` rows more.
        unsafe {
            match left {
                7 => self.tile::<7, 1>(),
                6 => self.tile::<6, 1>(),
                5 => self.tile::<5, 1>(),
                4 => self.tile::<4, 1>(),
                3 => self.tile::<3, 1>(),
                2 => self.tile::<2, 1>(),
                1 => self.tile::<1, 1>(),
                _ => {}
            }
        }
    }

    /// `R` rows by `V` registers of columns; then on to the next rows.
    ///
    /// # Safety
    /// As of [`Self::run`], with `R` rows left; `8·V` is at least `columns`.
    #[target_feature(enable = "avx2,fma")]
    unsafe fn tile<const R: usize, const V: usize>(&mut self) {
        let mut sums = [[_mm256_setzero_ps(); V]; R];
        let (mut a, mut b) = (self.a, self.b);
        for _ in 0..self.depth {
            let mut columns = [_mm256_setzero_ps(); V];
            for (v, columns) in columns.iter_mut().enumerate() {
                // SAFETY: `b` has a row of 16 numbers here, and `V` is at most 2.
                *columns = unsafe { _mm256_loadu_ps(b.add(8 * v)) };
            }
            for (row, sums) in sums.iter_mut().enumerate() {
                // SAFETY: row `row` of `a` has a number in this column.
                let x = unsafe { _mm256_broadcast_ss(&*a.add(row * self.a_row)) };
                for (sum, column) in sums.iter_mut().zip(columns) {
                    *sum = _mm256_fmadd_ps(x, column, *sum);
                }
            }
            // After the last pass these point behind the operands, and are not read.
            a = a.wrapping_add(self.a_step);
            b = b.wrapping_add(self.b_step);
        }
        let scale = _mm256_set1_ps(self.scale);
        for (row, sums) in sums.iter().enumerate() {
            let out = self.out.wrapping_add(row * self.out_row);
            if self.columns == 8 * V {
                for (v, sum) in sums.iter().enumerate() {
                    // SAFETY: `out` has `8·V` columns in this row.
                    unsafe {
                        let out = out.add(8 * v);
                        let product = _mm256_mul_ps(*sum, scale);
                        let all = if self.keep { _mm256_add_ps(_mm256_loadu_ps(out), product) } else { product };
                        _mm256_storeu_ps(out, all);
                    }
                }
                continue;
            }
            let mut products = [0.0f32; COLUMNS];
            for (products, sum) in products.as_chunks_mut::<8>().0.iter_mut().zip(sums) {
                // SAFETY: `products` has eight numbers.
                unsafe { _mm256_storeu_ps(products.as_mut_ptr(), _mm256_mul_ps(*sum, scale)) };
            }
            for (column, product) in products[..self.columns].iter().enumerate() {
                // SAFETY: `out` has `columns` columns in this row.
                unsafe {
                    let out = out.add(column);
                    *out = if self.keep { *out + product } else { *product };
                }
            }
        }
        self.a = self.a.wrapping_add(R * self.a_row);
        self.out = self.out.wrapping_add(R * self.out_row);
    }
}
