//! Where the sequences of a micro-batch lie among its rows: one after the other, each as long as it is.

use std::ops::Range;

/// See the module's documentation.
pub(crate) struct Sequences {
    /// The first row of each, and behind the last the number of rows.
    starts: Vec<usize>,
    /// The sequence of each row.
    of_row: Vec<u32>,
}

/// One sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sequence {
    /// Its first row.
    pub(crate) first: usize,
    /// Its rows, at least one.
    pub(crate) length: usize,
}

impl Sequence {
    /// What one of several heads has in a buffer of `each` values a row and head, in which sequences, and then the heads of a
    /// sequence, lie one after the other.
    pub(crate) fn head(self, head: usize, heads: usize, each: usize) -> Range<usize> {
        let start = (self.first * heads + head * self.length) * each;
        start..start + self.length * each
    }
}

impl Sequences {
    /// Sequences of these lengths, one after the other.
    pub(crate) fn new(lengths: &[usize]) -> Self {
        let mut starts = vec![0];
        let mut of_row = Vec::new();
        for (number, &length) in lengths.iter().enumerate() {
            of_row.resize(of_row.len() + length, number as u32);
            starts.push(of_row.len());
        }
        Self { starts, of_row }
    }

    /// Rows of all together.
    pub(crate) fn rows(&self) -> usize {
        self.of_row.len()
    }

    /// All of them.
    pub(crate) fn iter(&self) -> impl Iterator<Item = Sequence> + '_ {
        self.starts.windows(2).map(|ends| Sequence { first: ends[0], length: ends[1] - ends[0] })
    }

    /// The sequence of a row, and the row's position in it.
    pub(crate) fn of_row(&self, row: usize) -> (Sequence, usize) {
        let number = self.of_row[row] as usize;
        let first = self.starts[number];
        (Sequence { first, length: self.starts[number + 1] - first }, row - first)
    }

    /// Cuts a buffer as [`Sequence::head`] has it: each sequence and head with its part.
    pub(crate) fn by_head<'a>(
        &self,
        heads: usize,
        each: usize,
        values: &'a mut [f32],
    ) -> Vec<(Sequence, usize, &'a mut [f32])> {
        let mut rest = values;
        let mut parts = Vec::new();
        for sequence in self.iter() {
            for head in 0..heads {
                let (part, others) = std::mem::take(&mut rest).split_at_mut(sequence.length * each);
                rest = others;
                parts.push((sequence, head, part));
            }
        }
        parts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_and_every_part_has_its_place() {
        let lengths = [3, 1, 4];
        let sequences = Sequences::new(&lengths);
        assert_eq!(sequences.rows(), 8);
        assert!(sequences.iter().map(|sequence| sequence.length).eq(lengths));
        let positions = (0..8).map(|row| sequences.of_row(row).1);
        assert!(positions.eq([0, 1, 2, 0, 0, 1, 2, 3]));
        assert_eq!(sequences.of_row(5).0, Sequence { first: 4, length: 4 });
        let (heads, each) = (2, 5);
        let mut values: Vec<f32> = (0..8 * heads * each).map(|i| i as f32).collect();
        let all = values.clone();
        let parts = sequences.by_head(heads, each, &mut values);
        assert_eq!(parts.len(), 6);
        for (sequence, head, part) in parts {
            assert_eq!(part, &all[sequence.head(head, heads, each)]);
            assert_eq!(part.len(), sequence.length * each);
        }
    }
}
