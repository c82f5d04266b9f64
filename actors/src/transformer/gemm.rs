//! Products of f32 matrices that lie anywhere in a slice, rows apart by any stride, transposed or not.
//!
//! The operations multiply parts of matrices (one head, one projection of a fused group) and add products to what is
//! already there, without copying either first. Most products are small or thin, and each is one of many tasks: these
//! have a kernel of their own where the processor is one of the usual ones. All others are the `gemm` crate's.

#[cfg(target_arch = "x86_64")]
mod avx2;

use gemm::{Parallelism, gemm};
use protocol::parts::Part;

/// A matrix to read.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a> {
    data: &'a [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a> Matrix<'a> {
    /// `rows × columns` values, row after row.
    pub(crate) fn new(data: &'a [f32], rows: usize, columns: usize) -> Self {
        Self::strided(data, rows, columns, columns)
    }

    /// Rows that begin `row_stride` values apart.
    pub(crate) fn strided(data: &'a [f32], rows: usize, columns: usize, row_stride: usize) -> Self {
        assert_inside(data.len(), rows, columns, row_stride);
        Self { data, rows, columns, row_stride, column_stride: 1 }
    }

    /// The transpose, without moving anything.
    pub(crate) fn transposed(self) -> Self {
        Self {
            data: self.data,
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
        }
    }
}

/// A matrix to write.
pub(crate) struct MatrixMut<'a> {
    data: &'a mut [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
}

impl<'a> MatrixMut<'a> {
    /// `rows × columns` values, row after row.
    pub(crate) fn new(data: &'a mut [f32], rows: usize, columns: usize) -> Self {
        Self::strided(data, rows, columns, columns)
    }

    /// Rows that begin `row_stride` values apart.
    pub(crate) fn strided(data: &'a mut [f32], rows: usize, columns: usize, row_stride: usize) -> Self {
        assert_inside(data.len(), rows, columns, row_stride);
        assert!(row_stride >= columns || rows <= 1, "rows that are written to must not overlap");
        Self { data, rows, columns, row_stride }
    }
}

/// What happens to the values that the output held before.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Before {
    /// They are overwritten.
    Replaced,
    /// The product is added to them.
    Kept,
}

/// How many threads share a product.
#[derive(Clone, Copy)]
pub(crate) enum Threads {
    /// The caller's alone: it is one of many tasks already.
    One,
    /// The rayon pool's.
    All,
}

/// `out = scale · left·right`, or `out += scale · left·right`.
pub(crate) fn multiply(
    out: MatrixMut<'_>,
    before: Before,
    scale: f32,
    left: Matrix<'_>,
    right: Matrix<'_>,
    threads: Threads,
) {
    assert_eq!((out.rows, out.columns, left.columns), (left.rows, right.columns, right.rows), "matrix dimensions");
    // Several threads mark themselves nowhere: that is not the owner's own part, but products that nobody serves.
    let _part = matches!(threads, Threads::One).then(|| Part::Own.mark());
    #[cfg(target_arch = "x86_64")]
    if matches!(threads, Threads::One) && avx2::available() {
        avx2::multiply(out, before == Before::Kept, scale, left, right);
        return;
    }
    let parallelism = match threads {
        Threads::One => Parallelism::None,
        Threads::All => Parallelism::Rayon(0),
    };
    let keep = before == Before::Kept;
    // SAFETY: the constructors checked that the last element of each matrix lies inside its slice; strides are
    // not negative, so every other element lies before it. `out` is borrowed mutably and its rows do not overlap,
    // so no element is written twice or read while it is written. Strides came from slice lengths, which fit
    // isize. The worst case of an error here would be a read or write past a buffer.
    unsafe {
        gemm(
            out.rows,
            out.columns,
            left.columns,
            out.data.as_mut_ptr(),
            1,
            out.row_stride as isize,
            keep,
            left.data.as_ptr(),
            left.column_stride as isize,
            left.row_stride as isize,
            right.data.as_ptr(),
            right.column_stride as isize,
            right.row_stride as isize,
            if keep { 1.0 } else { 0.0 },
            scale,
            false,
            false,
            false,
            parallelism,
        );
    }
}

fn assert_inside(length: usize, rows: usize, columns: usize, row_stride: usize) {
    if rows == 0 || columns == 0 {
        return;
    }
    let end = (rows - 1).checked_mul(row_stride).and_then(|start| start.checked_add(columns));
    assert!(end.is_some_and(|end| end <= length), "a {rows} × {columns} matrix does not fit {length} values");
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn naive(left: &Matrix<'_>, right: &Matrix<'_>, i: usize, j: usize) -> f32 {
        let at = |m: &Matrix<'_>, i: usize, j: usize| m.data[i * m.row_stride + j * m.column_stride];
        (0..left.columns).map(|l| at(left, i, l) * at(right, l, j)).sum()
    }

    #[test]
    fn strides_transposes_and_sums_follow_the_definition() {
        let (m, k, n) = (5, 7, 3);
        let numbers: Vec<f32> = (0..200).map(|i| ((i * 37 % 23) as f32 - 11.0) / 7.0).collect();
        let lefts = [Matrix::strided(&numbers, m, k, 9), Matrix::strided(&numbers[3..], k, m, 8).transposed()];
        let rights = [Matrix::new(&numbers[50..], k, n), Matrix::strided(&numbers[50..], n, k, 11).transposed()];
        for (left, right) in lefts.iter().flat_map(|l| rights.iter().map(move |r| (l, r))) {
            for (before, kept, threads) in [(Before::Replaced, 0.0, Threads::One), (Before::Kept, 1.0, Threads::All)] {
                let mut out = vec![2.0; m * 4];
                multiply(MatrixMut::strided(&mut out, m, n, 4), before, 0.5, *left, *right, threads);
                for i in 0..m {
                    for j in 0..n {
                        let expected = 2.0 * kept + 0.5 * naive(left, right, i, j);
                        assert!((out[i * 4 + j] - expected).abs() < 1e-5);
                    }
                    assert_eq!(out[i * 4 + 3], 2.0, "a value between the rows was touched");
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        #[test]
        fn any_shape_is_the_sum_in_double_precision(
            (m, n, k) in (1usize..70, 1usize..40, 0usize..300),
            (left_turned, right_turned, kept) in any::<(bool, bool, bool)>(),
            gaps in (0usize..5, 0usize..5, 0usize..5),
        ) {
            let numbers: Vec<f32> = (0..30_000).map(|i| ((i * 7919 % 2003) as f32 - 1001.0) / 1001.0).collect();
            let matrix = |from: usize, rows: usize, columns: usize, gap: usize, turned: bool| match turned {
                false => Matrix::strided(&numbers[from..], rows, columns, columns + gap),
                true => Matrix::strided(&numbers[from..], columns, rows, rows + gap).transposed(),
            };
            let (left, right) = (matrix(1, m, k, gaps.0, left_turned), matrix(5, k, n, gaps.1, right_turned));
            let before = if kept { Before::Kept } else { Before::Replaced };
            for threads in [Threads::One, Threads::All] {
                let mut out = vec![2.0; m * (n + gaps.2)];
                multiply(MatrixMut::strided(&mut out, m, n, n + gaps.2), before, 0.5, left, right, threads);
                for (i, row) in out.chunks(n + gaps.2).enumerate() {
                    for (j, found) in row[..n].iter().enumerate() {
                        let at = |m: &Matrix<'_>, i: usize, j: usize| m.data[i * m.row_stride + j * m.column_stride];
                        let exact: f64 = (0..k).map(|l| f64::from(at(&left, i, l)) * f64::from(at(&right, l, j))).sum();
                        let expected = if kept { 2.0 + 0.5 * exact } else { 0.5 * exact };
                        prop_assert!((f64::from(*found) - expected).abs() < 1e-4, "{found} for {expected}");
                    }
                    prop_assert!(row[n..].iter().all(|&x| x == 2.0), "a value between the rows was touched");
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "does not fit")]
    fn a_matrix_larger_than_its_slice_is_refused() {
        Matrix::strided(&[0.0; 20], 4, 6, 5);
    }
}
