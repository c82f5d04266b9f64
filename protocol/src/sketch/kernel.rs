//! Products of rows by sixteen columns at a time: `x·V`, `u·R`, and the columns of `W·R` themselves.

use super::COLUMNS;

/// Rows that share what is loaded of the columns where a vector register holds eight sums: two registers each, which leaves one
/// for a value and two for the columns.
const ROWS: usize = 6;

/// The same where it holds sixteen: a register each. For more rows than these there are no registers for their addresses.
const WIDE_ROWS: usize = 12;

/// Terms that are added up in f32 before the sum goes to f64.
const BLOCK: usize = 256;

/// What sixteen columns are kept as.
pub(super) trait Entry: Copy + Sync {
    /// Its value.
    fn value(self) -> f32;
}

impl Entry for f32 {
    #[inline(always)]
    fn value(self) -> f32 {
        self
    }
}

impl Entry for i8 {
    #[inline(always)]
    fn value(self) -> f32 {
        f32::from(self)
    }
}

/// `rows·columns`: `rows` is `out.len() × columns.len()`, row-major. Where all values are integers and sums of 256 products
/// stay below 2^24, the result is exact.
///
/// Takes the same time whatever the values.
pub(super) fn multiply<E: Entry>(rows: &[f32], columns: &[[E; COLUMNS]], out: &mut [[f64; COLUMNS]]) {
    debug_assert_eq!(rows.len(), columns.len() * out.len());
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f")]
        fn widest<E: Entry>(rows: &[f32], columns: &[[E; COLUMNS]], out: &mut [[f64; COLUMNS]]) {
            multiply_body::<E, WIDE_ROWS>(rows, columns, out, f32::mul_add);
        }
        #[target_feature(enable = "avx2,fma")]
        fn wide<E: Entry>(rows: &[f32], columns: &[[E; COLUMNS]], out: &mut [[f64; COLUMNS]]) {
            multiply_body::<E, ROWS>(rows, columns, out, f32::mul_add);
        }
        if std::arch::is_x86_feature_detected!("avx512f") {
            // SAFETY: the function needs AVX-512F, which was just detected.
            return unsafe { widest(rows, columns, out) };
        }
        if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma") {
            // SAFETY: the function needs AVX2 and FMA, which were just detected.
            return unsafe { wide(rows, columns, out) };
        }
    }
    multiply_body::<E, ROWS>(rows, columns, out, |a, b, c| a * b + c);
}

#[inline(always)]
fn multiply_body<E: Entry, const N: usize>(
    rows: &[f32],
    columns: &[[E; COLUMNS]],
    out: &mut [[f64; COLUMNS]],
    multiply_add: impl Fn(f32, f32, f32) -> f32 + Copy,
) {
    let width = columns.len();
    let mut blocks = out.chunks_exact_mut(N);
    let mut first = 0;
    for out in blocks.by_ref() {
        let row: [&[f32]; N] = std::array::from_fn(|row| &rows[(first + row) * width..][..width]);
        multiply_rows(row, columns, out, multiply_add);
        first += N;
    }
    for out in blocks.into_remainder() {
        multiply_rows([&rows[first * width..][..width]], columns, std::slice::from_mut(out), multiply_add);
        first += 1;
    }
}

#[inline(always)]
fn multiply_rows<E: Entry, const N: usize>(
    rows: [&[f32]; N],
    columns: &[[E; COLUMNS]],
    out: &mut [[f64; COLUMNS]],
    multiply_add: impl Fn(f32, f32, f32) -> f32,
) {
    out.fill([0.0; COLUMNS]);
    for first in (0..columns.len()).step_by(BLOCK) {
        let columns = &columns[first..columns.len().min(first + BLOCK)];
        let rows: [&[f32]; N] = std::array::from_fn(|row| &rows[row][first..][..columns.len()]);
        let mut sums = [[0.0_f32; COLUMNS]; N];
        for (at, column) in columns.iter().enumerate() {
            let column: [f32; COLUMNS] = std::array::from_fn(|c| column[c].value());
            for (sums, row) in sums.iter_mut().zip(rows) {
                let x = row[at];
                for (sum, &value) in sums.iter_mut().zip(&column) {
                    *sum = multiply_add(x, value, *sum);
                }
            }
        }
        for (total, sums) in out.iter_mut().zip(&sums) {
            for (total, &sum) in total.iter_mut().zip(sums) {
                *total += f64::from(sum);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng as _, SeedableRng as _};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    #[test]
    fn products_are_those_of_the_definition() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        for (count, width) in [(1, 1), (3, 255), (6, 256), (13, 700)] {
            let rows: Vec<f32> = (0..count * width).map(|_| f32::from(rng.random::<i8>())).collect();
            let columns: Vec<[i8; COLUMNS]> = (0..width).map(|_| std::array::from_fn(|_| rng.random())).collect();
            let wide: Vec<[f32; COLUMNS]> = columns.iter().map(|column| column.map(f32::from)).collect();
            let mut found = [vec![[7.0; COLUMNS]; count], vec![[7.0; COLUMNS]; count]];
            multiply(&rows, &columns, &mut found[0]);
            multiply(&rows, &wide, &mut found[1]);
            for row in 0..count {
                for c in 0..COLUMNS {
                    let product = |at: usize| f64::from(rows[row * width + at]) * f64::from(columns[at][c]);
                    let exact: f64 = (0..width).map(product).sum();
                    assert_eq!([found[0][row][c], found[1][row][c]], [exact; 2]);
                }
            }
        }
    }
}
