//! Byte limbs rewritten as the digits that a kernel multiplies, in the order in which it reads them.
//!
//! A packed operand is `[row panel][step][lane]` of 32-bit words. A word holds the digits of the inner elements of
//! one step: two 16-bit digits ([`Pairs`]) or four bytes ([`Quads`]). The lanes of a panel are its rows, and the
//! digits of each row after one another, so that a micro-kernel has all digits of a value in its registers.

use protocol::he::{ParameterSet, Planes};
use rayon::prelude::*;

use super::weights::QUAD;

/// Most byte limbs that a parameter set has.
const MAX_LIMBS: usize = 6;
/// Row panels packed by one task: enough rows for vector loads, few enough that the write streams stay in L1.
const PANELS_PER_TASK: usize = 16;

/// How limbs become digits.
pub(crate) trait Encoding: Send + Sync + 'static {
    /// Inner elements in a word.
    const STEP: usize;

    /// Digits of a value.
    fn digits(set: ParameterSet) -> usize;

    /// Weight of digit `d` is `2^(d · digit_bits)`.
    fn digit_bits(set: ParameterSet) -> u32;

    /// Inner elements after which a 32-bit accumulator must be read out: up to there it is exact, or wraps only
    /// in bits that are above the modulus.
    fn inner_limit(set: ParameterSet) -> usize;

    /// Words `[digit][step]` of one row, whose limbs are `inner` bytes each.
    fn row_words(set: ParameterSet, limbs: &[&[u8]], words: &mut [u32]);

    /// Words `[digit][row]` of one step, from `[element][limb]` slices of a byte per row; fewer than
    /// [`Self::STEP`] elements at the end of the matrix.
    fn column_words(set: ParameterSet, columns: &[[&[u8]; MAX_LIMBS]], words: &mut [u32]);
}

/// Two 16-bit digits to a word, for 16-bit multiply-adds: P24 as two non-negative digits of 12 bits, P32 and P48 as
/// two and three signed digits of 16 bits (the low ones carry into the next; the carry out of the top is a
/// multiple of the modulus).
pub(crate) struct Pairs;

/// Four limbs to a word, for unsigned-by-signed byte dot products: a limb is a digit.
pub(crate) struct Quads;

#[inline(always)]
fn split24(b: [u8; 3]) -> [u16; 2] {
    [u16::from(b[0]) | u16::from(b[1] & 15) << 8, u16::from(b[1] >> 4) | u16::from(b[2]) << 4]
}

#[inline(always)]
fn split32(b: [u8; 4]) -> [u16; 2] {
    let low = u16::from_le_bytes([b[0], b[1]]);
    [low, u16::from_le_bytes([b[2], b[3]]).wrapping_add(low >> 15)]
}

#[inline(always)]
fn split48(b: [u8; 6]) -> [u16; 3] {
    let low = u16::from_le_bytes([b[0], b[1]]);
    let (middle, wrapped) = u16::from_le_bytes([b[2], b[3]]).overflowing_add(low >> 15);
    let high = u16::from_le_bytes([b[4], b[5]]);
    [low, middle, high.wrapping_add((middle >> 15) | u16::from(wrapped))]
}

/// [`Encoding::row_words`] of [`Pairs`] for a set of `L` limbs and `D` digits.
#[inline(always)]
fn pair_row<const L: usize, const D: usize>(limbs: &[&[u8]], words: &mut [u32], split: impl Fn([u8; L]) -> [u16; D]) {
    let limbs: [&[u8]; L] = std::array::from_fn(|l| limbs[l]);
    let inner = limbs[0].len();
    let steps = words.len() / D;
    for step in 0..inner / 2 {
        let low = split(std::array::from_fn(|l| limbs[l][2 * step]));
        let high = split(std::array::from_fn(|l| limbs[l][2 * step + 1]));
        for d in 0..D {
            words[d * steps + step] = u32::from(low[d]) | u32::from(high[d]) << 16;
        }
    }
    if inner % 2 == 1 {
        let low = split(std::array::from_fn(|l| limbs[l][inner - 1]));
        for d in 0..D {
            words[d * steps + inner / 2] = u32::from(low[d]);
        }
    }
}

/// [`Encoding::column_words`] of [`Pairs`].
#[inline(always)]
fn pair_columns<const L: usize, const D: usize>(
    columns: &[[&[u8]; MAX_LIMBS]],
    words: &mut [u32],
    split: impl Fn([u8; L]) -> [u16; D],
) {
    let rows = words.len() / D;
    let digits: [&mut [u32]; D] = {
        let mut chunks = words.chunks_exact_mut(rows);
        std::array::from_fn(|_| chunks.next().expect("D chunks of rows words"))
    };
    for (element, column) in columns.iter().enumerate() {
        let limbs: [&[u8]; L] = std::array::from_fn(|l| &column[l][..rows]);
        for row in 0..rows {
            let value = split(std::array::from_fn(|l| limbs[l][row]));
            for d in 0..D {
                let digit = u32::from(value[d]);
                digits[d][row] = if element == 0 { digit } else { digits[d][row] | digit << 16 };
            }
        }
    }
}

impl Encoding for Pairs {
    const STEP: usize = 2;

    fn digits(set: ParameterSet) -> usize {
        match set {
            ParameterSet::P24 | ParameterSet::P32 => 2,
            ParameterSet::P48 => 3,
        }
    }

    fn digit_bits(set: ParameterSet) -> u32 {
        match set {
            ParameterSet::P24 => 12,
            ParameterSet::P32 | ParameterSet::P48 => 16,
        }
    }

    fn inner_limit(set: ParameterSet) -> usize {
        match set {
            // The modulus divides 2^32, so accumulators may wrap.
            ParameterSet::P24 | ParameterSet::P32 => usize::MAX,
            // 508 · 2^15 · 2^7 < 2^31, and a whole number of quads.
            ParameterSet::P48 => 508,
        }
    }

    fn row_words(set: ParameterSet, limbs: &[&[u8]], words: &mut [u32]) {
        match set {
            ParameterSet::P24 => pair_row(limbs, words, split24),
            ParameterSet::P32 => pair_row(limbs, words, split32),
            ParameterSet::P48 => pair_row(limbs, words, split48),
        }
    }

    fn column_words(set: ParameterSet, columns: &[[&[u8]; MAX_LIMBS]], words: &mut [u32]) {
        match set {
            ParameterSet::P24 => pair_columns(columns, words, split24),
            ParameterSet::P32 => pair_columns(columns, words, split32),
            ParameterSet::P48 => pair_columns(columns, words, split48),
        }
    }
}

impl Encoding for Quads {
    const STEP: usize = 4;

    fn digits(set: ParameterSet) -> usize {
        set.limbs()
    }

    fn digit_bits(_set: ParameterSet) -> u32 {
        8
    }

    fn inner_limit(_set: ParameterSet) -> usize {
        // 65,000 · 255 · 128 < 2^31.
        65_000
    }

    fn row_words(set: ParameterSet, limbs: &[&[u8]], words: &mut [u32]) {
        let steps = words.len() / set.limbs();
        for (bytes, words) in limbs.iter().zip(words.chunks_exact_mut(steps)) {
            for (word, bytes) in words.iter_mut().zip(bytes.chunks(Self::STEP)) {
                let mut quad = [0; 4];
                quad[..bytes.len()].copy_from_slice(bytes);
                *word = u32::from_le_bytes(quad);
            }
        }
    }

    fn column_words(set: ParameterSet, columns: &[[&[u8]; MAX_LIMBS]], words: &mut [u32]) {
        let rows = words.len() / set.limbs();
        for (limb, words) in words.chunks_exact_mut(rows).enumerate() {
            words.fill(0);
            for (element, column) in columns.iter().enumerate() {
                for (word, &byte) in words.iter_mut().zip(column[limb]) {
                    *word |= u32::from(byte) << (8 * element);
                }
            }
        }
    }
}

/// Rows of a product's left operand, packed for one kernel.
pub(crate) struct Operand {
    rows: usize,
    steps: usize,
    lanes: usize,
    words: Vec<u32>,
}

impl Operand {
    /// Packs a body: planes `[limb][row][feature]`.
    pub(crate) fn from_body<E: Encoding>(set: ParameterSet, lanes: usize, body: &Planes) -> Self {
        let (digits, inner) = (E::digits(set), body.columns());
        let mut operand = Self::zeros::<E>(set, lanes, body.rows(), inner);
        let (steps, rows_per_panel) = (operand.steps, lanes / digits);
        operand.tasks().for_each_init(
            || vec![0; digits * steps],
            |row_words, (task, words)| {
                for (panel, words) in words.chunks_exact_mut(steps * lanes).enumerate() {
                    let first = (task * PANELS_PER_TASK + panel) * rows_per_panel;
                    for row in first..(first + rows_per_panel).min(body.rows()) {
                        let limbs: [&[u8]; MAX_LIMBS] = std::array::from_fn(|limb| {
                            if limb < set.limbs() { &body.plane(limb)[row * inner..(row + 1) * inner] } else { &[] }
                        });
                        E::row_words(set, &limbs[..set.limbs()], row_words);
                        for (digit, source) in row_words.chunks_exact(steps).enumerate() {
                            let lane = (row - first) * digits + digit;
                            for (step, &word) in words.chunks_exact_mut(lanes).zip(source) {
                                step[lane] = word;
                            }
                        }
                    }
                }
            },
        );
        operand
    }

    /// Packs a mask: keystream `[feature][limb][row]` with `rows` bytes for each limb of a feature.
    pub(crate) fn from_mask<E: Encoding>(set: ParameterSet, lanes: usize, keystream: &[u8], rows: usize) -> Self {
        let (digits, limbs) = (E::digits(set), set.limbs());
        let inner = keystream.len() / (limbs * rows);
        let mut operand = Self::zeros::<E>(set, lanes, rows, inner);
        let (steps, rows_per_panel) = (operand.steps, lanes / digits);
        operand.tasks().for_each_init(
            || vec![0; digits * PANELS_PER_TASK * rows_per_panel],
            |column_words, (task, words)| {
                let first = task * PANELS_PER_TASK * rows_per_panel;
                let count = (PANELS_PER_TASK * rows_per_panel).min(rows - first);
                let column_words = &mut column_words[..digits * count];
                for step in 0..inner.div_ceil(E::STEP) {
                    let elements = (inner - step * E::STEP).min(E::STEP);
                    let columns: [[&[u8]; MAX_LIMBS]; 4] = std::array::from_fn(|element| {
                        std::array::from_fn(|limb| {
                            if element >= elements || limb >= limbs {
                                return &[][..];
                            }
                            let start = ((step * E::STEP + element) * limbs + limb) * rows + first;
                            &keystream[start..start + count]
                        })
                    });
                    E::column_words(set, &columns[..elements], column_words);
                    scatter(words, column_words, step, steps, lanes, digits);
                }
            },
        );
        operand
    }

    fn zeros<E: Encoding>(set: ParameterSet, lanes: usize, rows: usize, inner: usize) -> Self {
        let steps = inner.div_ceil(QUAD) * QUAD / E::STEP;
        let panels = rows.div_ceil(lanes / E::digits(set));
        Self { rows, steps, lanes, words: vec![0; panels * steps * lanes] }
    }

    fn tasks(&mut self) -> impl IndexedParallelIterator<Item = (usize, &mut [u32])> {
        let panel = (self.steps * self.lanes).max(1);
        self.words.par_chunks_mut(panel * PANELS_PER_TASK).enumerate()
    }

    /// Rows of the operand, without those that fill up the last panel.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// `[step][lane]` words of one row panel, for some of its steps.
    pub(crate) fn panel(&self, panel: usize, steps: std::ops::Range<usize>) -> &[u32] {
        let base = panel * self.steps * self.lanes;
        &self.words[base + steps.start * self.lanes..base + steps.end * self.lanes]
    }
}

/// Brings the words `[digit][row]` of one step to their lanes.
#[inline(always)]
fn scatter(words: &mut [u32], source: &[u32], step: usize, steps: usize, lanes: usize, digits: usize) {
    let rows = source.len() / digits;
    for (digit, source) in source.chunks_exact(rows).enumerate() {
        let rows_per_panel = lanes / digits;
        for (panel, source) in words.chunks_exact_mut(steps * lanes).zip(source.chunks(rows_per_panel)) {
            let lane = &mut panel[step * lanes..(step + 1) * lanes];
            for (row, &word) in source.iter().enumerate() {
                lane[row * digits + digit] = word;
            }
        }
    }
}
