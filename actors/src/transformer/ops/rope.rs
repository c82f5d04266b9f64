//! Rotary positions (Su et al., 2021) in Hugging Face's layout: feature `i` of a head turns with the one so many behind it
//! as there are frequencies; what lies behind these two halves stays as it is.

use std::collections::BTreeMap;
use std::ops::Range;

use protocol::model::Rope;

use crate::transformer::vector::vectorised;

/// Cosine and sine of every position and frequency.
pub(crate) struct RopeTable {
    half: usize,
    cosines: Vec<f32>,
    sines: Vec<f32>,
}

/// Tables for the texts of a micro-batch, each of which turns by its own length where frequencies depend on it.
pub(crate) struct RopeTables {
    /// For all texts that are not too long for it.
    usual: RopeTable,
    /// Texts of more tokens have tables of their own.
    up_to: usize,
    /// Those, by the number of tokens.
    longer: BTreeMap<usize, RopeTable>,
}

impl RopeTables {
    /// For texts of these lengths.
    pub(crate) fn new(rope: &Rope, lengths: &[usize]) -> Self {
        let up_to = rope.one_for_up_to().unwrap_or(usize::MAX);
        let factor = rope.attention_factor() as f32;
        let usual = lengths.iter().copied().filter(|&length| length <= up_to).max().unwrap_or(0);
        let longer = lengths.iter().copied().filter(|&length| length > up_to);
        Self {
            usual: RopeTable::new(&rope.frequencies(usual), factor, usual),
            up_to,
            longer: longer.map(|length| (length, RopeTable::new(&rope.frequencies(length), factor, length))).collect(),
        }
    }

    /// That of a text of one of the lengths that it was made for.
    pub(crate) fn of(&self, length: usize) -> &RopeTable {
        if length <= self.up_to { &self.usual } else { &self.longer[&length] }
    }
}

/// Rotations of some rows, each at a position of its own and by frequencies of its own.
pub(crate) struct RopeRows(RopeTable);

impl RopeRows {
    /// Nothing yet: of so many frequencies a row.
    pub(crate) fn new(half: usize) -> Self {
        Self(RopeTable { half, cosines: Vec::new(), sines: Vec::new() })
    }

    /// Adds rows for the positions from `first` on, from frequencies in radians a position.
    pub(crate) fn extend(&mut self, frequencies: &[f32], factor: f32, first: usize, rows: usize) {
        let added = RopeTable::at(frequencies, factor, first..first + rows);
        self.0.cosines.extend(added.cosines);
        self.0.sines.extend(added.sines);
    }

    /// Turns one head's features of a row. Rows that were not added stay as they are.
    pub(crate) fn turn(&self, row: usize, head: &mut [f32]) {
        if (row + 1) * self.0.half <= self.0.cosines.len() {
            self.0.turn(row, head);
        }
    }
}

impl RopeTable {
    /// For positions `0 .. length`, from frequencies in radians a position; what turns is multiplied by `factor`.
    pub(crate) fn new(frequencies: &[f32], factor: f32, length: usize) -> Self {
        Self::at(frequencies, factor, 0..length)
    }

    /// For some positions, of which the first is called 0 from then on.
    fn at(frequencies: &[f32], factor: f32, positions: Range<usize>) -> Self {
        let angles = positions.flat_map(|position| frequencies.iter().map(move |f| position as f32 * f));
        let (sines, cosines) = angles.map(f32::sin_cos).map(|(sine, cosine)| (sine * factor, cosine * factor)).unzip();
        Self { half: frequencies.len(), cosines, sines }
    }

    /// Turns one head's features at a position.
    pub(crate) fn turn(&self, position: usize, head: &mut [f32]) {
        self.rotate(position, head, 1.0);
    }

    /// What the gradient of turned features goes through: it is turned back, and multiplied by the same factor.
    pub(crate) fn turn_back(&self, position: usize, head: &mut [f32]) {
        self.rotate(position, head, -1.0);
    }

    fn rotate(&self, position: usize, head: &mut [f32], sign: f32) {
        let row = position * self.half..(position + 1) * self.half;
        let (low, high) = head.split_at_mut(self.half);
        rotate(low, high, &self.cosines[row.clone()], &self.sines[row], sign);
    }
}

vectorised! {
    fn rotate(low: &mut [f32], high: &mut [f32], cosines: &[f32], sines: &[f32], sign: f32) {
        for ((low, high), (cos, sin)) in low.iter_mut().zip(high).zip(cosines.iter().zip(sines)) {
            let sin = sin * sign;
            (*low, *high) = (*low * cos - *high * sin, *high * cos + *low * sin);
        }
    }
}
