//! Whether what was written is the model with its adapter: each changed tensor beside what it was and what it should be.

use super::ExportError;
use super::numbers::Numbers;

/// What came of a merge.
#[derive(Clone, Debug, PartialEq)]
pub struct Merged {
    /// Tensors that were changed.
    pub changed: usize,
    /// Of the tensor that lost most to rounding: its name, and the size of what was lost over that of what was changed.
    pub worst: (String, f64),
}

/// One changed tensor, row by row.
pub(super) struct Tensor {
    numbers: Numbers,
    added_square: f64,
    lost_square: f64,
    /// Whether any number differs from what would be stored without the adapter.
    any: bool,
    off: f64,
    stored: (Vec<u8>, Vec<f64>),
}

impl Tensor {
    pub(super) fn new(numbers: Numbers, columns: usize) -> Self {
        let stored = (vec![0; numbers.row_bytes(columns)], vec![0.0; columns]);
        Self { numbers, added_square: 0.0, lost_square: 0.0, any: false, off: 0.0, stored }
    }

    /// Takes a row: as the base has it, as it should be, and as it was found.
    pub(super) fn row(&mut self, base: &[f64], meant: &[f64], found: &[f64]) {
        let square = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum::<f64>();
        self.added_square += square(base, meant);
        self.lost_square += square(meant, found);
        self.off = self.off.max(self.numbers.off(meant, found));
        if !self.any {
            let (bytes, plain) = &mut self.stored;
            self.numbers.encode(base, bytes);
            self.numbers.decode(bytes, plain);
            // What the reader makes of a block is rounded to 32 bits.
            self.any = plain.iter().zip(found).any(|(a, b)| (*a as f32) != (*b as f32));
        }
    }
}

/// All changed tensors.
#[derive(Default)]
pub(super) struct Tally {
    changed: usize,
    worst: Option<(String, f64)>,
    /// The tensor that is furthest off, in parts of what rounding explains.
    off: Option<(String, f64)>,
    /// One that rounding left as it was.
    unchanged: Option<(String, Numbers)>,
}

impl Tally {
    pub(super) fn take(&mut self, name: &str, tensor: &Tensor) {
        self.changed += 1;
        let worse = |known: &Option<(String, f64)>, new: f64| known.as_ref().is_none_or(|(_, known)| new > *known);
        if tensor.off > 1.0 && worse(&self.off, tensor.off) {
            self.off = Some((name.to_owned(), tensor.off));
        }
        if tensor.added_square > 0.0 {
            let lost = (tensor.lost_square / tensor.added_square).sqrt();
            if worse(&self.worst, lost) {
                self.worst = Some((name.to_owned(), lost));
            }
            if !tensor.any && self.unchanged.is_none() {
                self.unchanged = Some((name.to_owned(), tensor.numbers));
            }
        }
    }

    /// Whether every tensor is what it should be, of those that no adapter changes.
    ///
    /// # Errors
    /// Names the one that is furthest off.
    pub(super) fn only_right(self) -> Result<(), ExportError> {
        self.off.map_or(Ok(()), |(name, off)| Err(too_far(&name, off)))
    }

    /// What came of it, of so many tensors that should have changed.
    ///
    /// # Errors
    /// What is wrong, in words, or that nothing was changed.
    pub(super) fn finish(self, expected: usize) -> Result<Merged, ExportError> {
        let wrong = |what: String| Err(ExportError::Merge(what));
        if let Some((name, off)) = self.off {
            return Err(too_far(&name, off));
        }
        if let Some((name, numbers)) = self.unchanged {
            return wrong(format!(
                "{name} is as it was before: rounding to {numbers:?} takes all that the adapter adds; use a format with \
                 more bits"
            ));
        }
        if self.changed != expected {
            return wrong(format!("{} of {expected} tensors were merged", self.changed));
        }
        let worst = self.worst.ok_or_else(super::changes::nothing)?;
        Ok(Merged { changed: self.changed, worst })
    }
}

fn too_far(name: &str, off: f64) -> ExportError {
    ExportError::Merge(format!(
        "{name} was read again, and is off what it should be by {off:.1} times what rounding explains, which is more than any \
         other tensor is"
    ))
}
