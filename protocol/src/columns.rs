//! The book of which columns of a matrix have come, whoever sends them in whatever pieces: each once, and all in the end.

use std::ops::Range;

/// Why columns cannot be entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ColumnError {
    /// There are none, or not all of them are columns of the matrix.
    OutOfRange,
    /// One that came before: the first of them.
    Twice(usize),
}

/// Which columns have come.
#[derive(Clone, Debug)]
pub struct ColumnLedger {
    came: Vec<bool>,
    left: usize,
}

impl ColumnLedger {
    /// None of `outer` columns.
    pub fn new(outer: usize) -> Self {
        Self { came: vec![false; outer], left: outer }
    }

    /// Columns of the matrix.
    pub fn outer(&self) -> usize {
        self.came.len()
    }

    /// Columns still to come.
    pub fn left(&self) -> usize {
        self.left
    }

    /// The first column that has not come.
    pub fn first_missing(&self) -> Option<usize> {
        self.came.iter().position(|came| !came)
    }

    /// Whether `count` columns from `first` on may come next; says which these are.
    ///
    /// # Errors
    /// Where they are not columns of the matrix, or one has come.
    pub fn check(&self, first: usize, count: usize) -> Result<Range<usize>, ColumnError> {
        let end = first.checked_add(count).filter(|&end| count > 0 && end <= self.came.len());
        let columns = first..end.ok_or(ColumnError::OutOfRange)?;
        match self.came[columns.clone()].iter().position(|&came| came) {
            Some(twice) => Err(ColumnError::Twice(first + twice)),
            None => Ok(columns),
        }
    }

    /// Enters columns.
    ///
    /// # Errors
    /// Those of [`Self::check`]; the ledger is as before then.
    pub fn enter(&mut self, first: usize, count: usize) -> Result<Range<usize>, ColumnError> {
        let columns = self.check(first, count)?;
        self.came[columns.clone()].fill(true);
        self.left -= count;
        Ok(columns)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_ledger_agrees_with_a_set(
            outer in 0_usize..40,
            pieces in prop::collection::vec((prop_oneof![0_usize..45, Just(usize::MAX)], 0_usize..12), 0..30),
        ) {
            let (mut ledger, mut set) = (ColumnLedger::new(outer), BTreeSet::new());
            for (first, count) in pieces {
                let end = first.saturating_add(count);
                let expected = if count == 0 || end > outer || first == usize::MAX {
                    Err(ColumnError::OutOfRange)
                } else if let Some(twice) = (first..end).find(|column| set.contains(column)) {
                    Err(ColumnError::Twice(twice))
                } else {
                    set.extend(first..end);
                    Ok(first..end)
                };
                prop_assert_eq!(ledger.enter(first, count), expected);
                prop_assert_eq!(ledger.left(), outer - set.len());
                prop_assert_eq!(ledger.first_missing(), (0..outer).find(|column| !set.contains(column)));
            }
        }
    }
}
