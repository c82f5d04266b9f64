//! Blocks of rows as parallel tasks: small enough that what one operation writes is still in the processor's cache
//! when the next one reads it. One block alone is no task: waking a thread takes longer than a few rows.

use protocol::parts::Part;
use rayon::prelude::*;

/// Rows of a task.
pub(crate) const ROWS: usize = 64;

/// Cuts a matrix into blocks of [`ROWS`] rows of `width` values; a width of 0 gives empty blocks.
pub(crate) fn blocks_mut<T>(values: &mut [T], width: usize, rows: usize) -> Vec<&mut [T]> {
    let mut rest = values;
    let cut = |first: usize| {
        let (block, others) = std::mem::take(&mut rest).split_at_mut(ROWS.min(rows - first) * width);
        rest = others;
        block
    };
    (0..rows).step_by(ROWS).map(cut).collect()
}

/// The block of [`ROWS`] rows that begins with row `first`, or what there is of it.
pub(crate) fn block<T>(values: &[T], width: usize, first: usize) -> &[T] {
    let (start, end) = (first * width, (first + ROWS) * width);
    &values[start..end.min(values.len())]
}

/// Runs `work` on each block of a matrix, with the number of its first row.
pub(crate) fn for_each_block<A: Send>(rows: usize, a: (&mut [A], usize), work: impl Fn(usize, &mut [A]) + Sync) {
    for_each_block2::<A, f32>(rows, a, (&mut [], 0), |first, a, _| work(first, a));
}

/// The same with two matrices of as many rows. A matrix of width 0 is empty.
pub(crate) fn for_each_block2<A: Send, B: Send>(
    rows: usize,
    a: (&mut [A], usize),
    b: (&mut [B], usize),
    work: impl Fn(usize, &mut [A], &mut [B]) + Sync,
) {
    for_each_block3::<A, B, f32>(rows, a, b, (&mut [], 0), |first, a, b, _| work(first, a, b));
}

/// The same with three matrices.
pub(crate) fn for_each_block3<A: Send, B: Send, C: Send>(
    rows: usize,
    a: (&mut [A], usize),
    b: (&mut [B], usize),
    c: (&mut [C], usize),
    work: impl Fn(usize, &mut [A], &mut [B], &mut [C]) + Sync,
) {
    for_each_block4::<A, B, C, f32>(rows, a, b, c, (&mut [], 0), |first, a, b, c, _| work(first, a, b, c));
}

/// The same with four matrices.
pub(crate) fn for_each_block4<A: Send, B: Send, C: Send, D: Send>(
    rows: usize,
    a: (&mut [A], usize),
    b: (&mut [B], usize),
    c: (&mut [C], usize),
    d: (&mut [D], usize),
    work: impl Fn(usize, &mut [A], &mut [B], &mut [C], &mut [D]) + Sync,
) {
    if rows <= ROWS {
        let _part = Part::Own.mark();
        return work(0, a.0, b.0, c.0, d.0);
    }
    let (a, b) = (blocks_mut(a.0, a.1, rows), blocks_mut(b.0, b.1, rows));
    let (c, d) = (blocks_mut(c.0, c.1, rows), blocks_mut(d.0, d.1, rows));
    let all = a.into_par_iter().zip(b).zip(c).zip(d).enumerate();
    all.for_each(|(block, (((a, b), c), d))| {
        let _part = Part::Own.mark();
        work(block * ROWS, a, b, c, d);
    });
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn blocks_cover_each_row_once() {
        for rows in [1, ROWS - 1, ROWS, ROWS + 1, 3 * ROWS + 7] {
            let (mut a, mut b, mut c) = (vec![0.0; rows * 2], vec![0.0; rows * 3], Vec::<f32>::new());
            let empty = AtomicUsize::new(0);
            for_each_block3(rows, (&mut a, 2), (&mut b, 3), (&mut c, 0), |first, a, b, c| {
                empty.fetch_add(usize::from(c.is_empty()), Ordering::Relaxed);
                a.chunks_mut(2).zip(first..).for_each(|(a, row)| a.fill(row as f32));
                b.chunks_mut(3).zip(first..).for_each(|(b, row)| b.fill(row as f32));
            });
            assert_eq!(empty.into_inner(), rows.div_ceil(ROWS));
            assert!(a.iter().enumerate().all(|(i, &x)| x == (i / 2) as f32));
            assert!(b.iter().enumerate().all(|(i, &x)| x == (i / 3) as f32));
            let last = (rows - 1) / ROWS * ROWS;
            assert_eq!(block(&a, 2, last), &a[2 * last..]);
            assert_eq!(block(&a, 2, 0), &a[..2 * rows.min(ROWS)]);
        }
    }
}
