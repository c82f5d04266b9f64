//! The matrix times secret columns: `W·R` forward, `Wᵀ·R` backward, streamed once over the int8 values.

use rayon::prelude::*;

use super::COLUMNS;
use super::kernel::multiply;
use crate::ids::{Direction, LinearShape};

/// Rows that a task takes at a time.
const ROWS: usize = 16;

/// A served matrix in the direction in which it is multiplied, `inner × outer`.
pub(super) struct Weights<'a> {
    /// `d_in × d_out`, row-major.
    pub(super) values: &'a [i8],
    pub(super) shape: LinearShape,
    pub(super) direction: Direction,
}

impl Weights<'_> {
    /// `(inner, outer)`.
    pub(super) fn dimensions(&self) -> (usize, usize) {
        self.shape.along(self.direction)
    }

    /// The matrix times some groups of sixteen columns, `[group][outer]`: `[inner][group]`. Exact.
    pub(super) fn times<const GROUPS: usize, T: Send + Copy + Default>(
        &self,
        groups: [&[[i8; COLUMNS]]; GROUPS],
        entry: impl Fn([[f64; COLUMNS]; GROUPS]) -> T + Sync,
    ) -> Vec<T> {
        let (inner, outer) = self.dimensions();
        let mut out = vec![T::default(); inner];
        let scratch = || (vec![0.0_f32; ROWS * outer], vec![[0.0; COLUMNS]; ROWS]);
        out.par_chunks_mut(ROWS).enumerate().for_each_init(scratch, |(rows, sums), (task, out)| {
            let rows = &mut rows[..out.len() * outer];
            self.rows(task * ROWS, rows);
            let mut entries = [[[0.0; COLUMNS]; GROUPS]; ROWS];
            for (group, columns) in groups.iter().enumerate() {
                let sums = &mut sums[..out.len()];
                multiply(rows, columns, sums);
                entries.iter_mut().zip(sums.iter()).for_each(|(entry, sum)| entry[group] = *sum);
            }
            out.iter_mut().zip(entries).for_each(|(out, sums)| *out = entry(sums));
        });
        out
    }

    /// Some rows of the matrix in its direction, as many as `to` holds.
    fn rows(&self, first: usize, to: &mut [f32]) {
        let (LinearShape { d_out, .. }, (_, outer)) = (self.shape, self.dimensions());
        let count = to.len() / outer;
        match self.direction {
            Direction::Forward => {
                let from = &self.values[first * d_out..][..to.len()];
                to.iter_mut().zip(from).for_each(|(to, &from)| *to = f32::from(from));
            }
            Direction::Backward => {
                for (at, from) in self.values.chunks_exact(d_out).enumerate() {
                    for (row, &value) in from[first..first + count].iter().enumerate() {
                        to[row * outer + at] = f32::from(value);
                    }
                }
            }
        }
    }
}
