//! Byte limbs rewritten as the digits that a kernel multiplies, in the order in which it reads them.
//!
//! A packed operand is `[row panel][step][lane]` of 32-bit words. A word holds the digits of the inner elements of
//! one step: two 16-bit digits ([`Pairs`]) or four bytes ([`Quads`]). The lanes of a panel are its rows, and the
//! digits of each row after one another, so that a micro-kernel has all digits of a value in its registers.

use std::marker::PhantomData;
use std::ops::Range;

use protocol::he::{ParameterSet, Planes};
use rayon::prelude::*;

use super::micro::Micro;
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

    /// Words `[row][digit]` of one step, from `[element][limb]` slices of a byte per row; fewer than
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
    let words = words.as_chunks_mut::<D>().0;
    let rows = words.len();
    let limbs = |element: usize| -> [&[u8]; L] { std::array::from_fn(|l| &columns[element][l][..rows]) };
    let first = limbs(0);
    if columns.len() == 1 {
        for (row, words) in words.iter_mut().enumerate() {
            *words = split(std::array::from_fn(|l| first[l][row])).map(u32::from);
        }
        return;
    }
    let second = limbs(1);
    for (row, words) in words.iter_mut().enumerate() {
        let low = split(std::array::from_fn(|l| first[l][row]));
        let high = split(std::array::from_fn(|l| second[l][row]));
        *words = std::array::from_fn(|d| u32::from(low[d]) | u32::from(high[d]) << 16);
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

    #[inline(always)]
    fn row_words(set: ParameterSet, limbs: &[&[u8]], words: &mut [u32]) {
        match set {
            ParameterSet::P24 => pair_row(limbs, words, split24),
            ParameterSet::P32 => pair_row(limbs, words, split32),
            ParameterSet::P48 => pair_row(limbs, words, split48),
        }
    }

    #[inline(always)]
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

    #[inline(always)]
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

    #[inline(always)]
    fn column_words(set: ParameterSet, columns: &[[&[u8]; MAX_LIMBS]], words: &mut [u32]) {
        for limb in 0..set.limbs() {
            for (row, words) in words.chunks_exact_mut(set.limbs()).enumerate() {
                let bytes =
                    columns.iter().enumerate().map(|(element, column)| u32::from(column[limb][row]) << (8 * element));
                words[limb] = bytes.sum();
            }
        }
    }
}

/// Rows of a product's left operand, packed for the register block `M`.
pub(crate) struct Operand<M> {
    rows: usize,
    steps: usize,
    words: Vec<u32>,
    micro: PhantomData<M>,
}

impl<M: Micro> Operand<M> {
    /// Packs a body: planes `[limb][row][feature]`.
    pub(crate) fn from_body(micro: &M, set: ParameterSet, body: &Planes) -> Self {
        let mut operand = Self::zeros(set, body.rows(), body.columns());
        let (steps, digits) = (operand.steps, M::Encoding::digits(set));
        operand.tasks().for_each_init(
            || vec![0; digits * steps],
            |row_words, (task, words)| {
                micro.vectorised(|| body_panels::<M>(set, body, task * PANELS_PER_TASK, steps, row_words, words));
            },
        );
        operand
    }

    /// Packs a mask: keystream `[feature][limb][row]` with `rows` bytes for each limb of a feature.
    pub(crate) fn from_mask(micro: &M, set: ParameterSet, keystream: &[u8], rows: usize) -> Self {
        let mut operand = Self::zeros(set, rows, keystream.len() / (set.limbs() * rows));
        let steps = operand.steps;
        operand.tasks().for_each_init(
            || vec![0; M::LANES * PANELS_PER_TASK],
            |column_words, (task, words)| {
                let first = task * PANELS_PER_TASK;
                micro.vectorised(|| mask_panels::<M>(set, keystream, rows, first, steps, column_words, words));
            },
        );
        operand
    }

    fn zeros(set: ParameterSet, rows: usize, inner: usize) -> Self {
        let steps = inner.div_ceil(QUAD) * QUAD / M::Encoding::STEP;
        let panels = rows.div_ceil(rows_per_panel::<M>(set));
        Self { rows, steps, words: vec![0; panels * steps * M::LANES], micro: PhantomData }
    }

    fn tasks(&mut self) -> impl IndexedParallelIterator<Item = (usize, &mut [u32])> {
        let panel = (self.steps * M::LANES).max(1);
        self.words.par_chunks_mut(panel * PANELS_PER_TASK).enumerate()
    }

    /// Rows of the operand, without those that fill up the last panel.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// `[step][lane]` words of one row panel, for some of its steps.
    pub(crate) fn panel(&self, panel: usize, steps: Range<usize>) -> &[u32] {
        let base = panel * self.steps * M::LANES;
        &self.words[base + steps.start * M::LANES..base + steps.end * M::LANES]
    }
}

/// Rows of a row panel.
pub(crate) fn rows_per_panel<M: Micro>(set: ParameterSet) -> usize {
    M::LANES / M::Encoding::digits(set)
}

/// Packs some row panels of a body, from panel `first` on; `row_words` is scratch for one row.
#[inline(always)]
fn body_panels<M: Micro>(
    set: ParameterSet,
    body: &Planes,
    first: usize,
    steps: usize,
    row_words: &mut [u32],
    words: &mut [u32],
) {
    let (inner, digits) = (body.columns(), M::Encoding::digits(set));
    let rows_per_panel = rows_per_panel::<M>(set);
    for (panel, words) in words.chunks_exact_mut(steps * M::LANES).enumerate() {
        let first = (first + panel) * rows_per_panel;
        for row in first..(first + rows_per_panel).min(body.rows()) {
            let limbs: [&[u8]; MAX_LIMBS] = std::array::from_fn(|limb| {
                if limb < set.limbs() { &body.plane(limb)[row * inner..(row + 1) * inner] } else { &[] }
            });
            M::Encoding::row_words(set, &limbs[..set.limbs()], row_words);
            for (digit, source) in row_words.chunks_exact(steps).enumerate() {
                let lane = (row - first) * digits + digit;
                for (step, &word) in words.chunks_exact_mut(M::LANES).zip(source) {
                    step[lane] = word;
                }
            }
        }
    }
}

/// Packs some row panels of a mask, from panel `first` on; `column_words` is scratch for one step of them.
#[inline(always)]
fn mask_panels<M: Micro>(
    set: ParameterSet,
    keystream: &[u8],
    rows: usize,
    first: usize,
    steps: usize,
    column_words: &mut [u32],
    words: &mut [u32],
) {
    let (limbs, step_size) = (set.limbs(), M::Encoding::STEP);
    let inner = keystream.len() / (limbs * rows);
    let first = first * rows_per_panel::<M>(set);
    let count = (words.len() / (steps * M::LANES) * rows_per_panel::<M>(set)).min(rows - first);
    for step in 0..inner.div_ceil(step_size) {
        let elements = (inner - step * step_size).min(step_size);
        let columns: [[&[u8]; MAX_LIMBS]; QUAD] = std::array::from_fn(|element| {
            std::array::from_fn(|limb| {
                if element >= elements || limb >= limbs {
                    return &[][..];
                }
                let start = ((step * step_size + element) * limbs + limb) * rows + first;
                &keystream[start..start + count]
            })
        });
        // Rows beyond the matrix are never written, so they stay zero.
        M::Encoding::column_words(set, &columns[..elements], &mut column_words[..count * M::Encoding::digits(set)]);
        for (panel, source) in words.chunks_exact_mut(steps * M::LANES).zip(column_words.chunks_exact(M::LANES)) {
            panel[step * M::LANES..(step + 1) * M::LANES].copy_from_slice(source);
        }
    }
}
