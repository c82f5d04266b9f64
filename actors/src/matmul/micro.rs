//! What a CPU kernel is made of, and the portable one.

use std::ops::Range;

use super::digits::{Encoding, Pairs};
use super::weights::{PANEL, PackedMatrix, QUAD};

/// A register block: `LANES` rows of digits times `COLUMNS` columns of weights.
///
/// A value of an implementing type is proof that the CPU has the instructions that it uses.
pub(crate) trait Micro: Send + Sync + 'static {
    /// How limbs are split into digits.
    type Encoding: Encoding;
    /// Digit rows of the block: a multiple of every set's digit count.
    const LANES: usize;
    /// Columns of the block: a multiple of [`PANEL`].
    const COLUMNS: usize;

    /// Writes the weights of [`Self::COLUMNS`] columns from panel `panel` on as `[step][column]` words, zero where
    /// the matrix has no such column.
    fn prepare(&self, weights: &PackedMatrix, panel: usize, quads: Range<usize>, words: &mut [u32]);

    /// `sums[lane][column] = Σ_step digits[step][lane] · weights[step][column]`, as wrapping 32-bit integers.
    ///
    /// # Panics
    /// If the slices do not hold the same number of steps, or `sums` is not `LANES × COLUMNS`.
    fn multiply(&self, digits: &[u32], weights: &[u32], sums: &mut [i32]);

    /// Runs `work`, compiled for the instructions of this block where it can be inlined: the plain loops around the
    /// block are vectorised as widely as the block itself.
    fn vectorised<R>(&self, work: impl FnOnce() -> R) -> R {
        work()
    }
}

/// Checks the lengths on which a micro-kernel's pointers rely; returns the number of steps.
#[inline(always)]
pub(crate) fn checked_steps<M: Micro>(digits: &[u32], weights: &[u32], sums: &[i32]) -> usize {
    let steps = digits.len() / M::LANES;
    assert_eq!(digits.len(), steps * M::LANES, "whole steps of digits");
    assert_eq!(weights.len(), steps * M::COLUMNS, "as many steps of weights");
    assert_eq!(sums.len(), M::LANES * M::COLUMNS, "one sum for each lane and column");
    steps
}

/// Sixteen-bit multiply-adds in plain Rust, for every CPU.
pub(crate) struct Portable;

impl Micro for Portable {
    type Encoding = Pairs;
    const LANES: usize = 6;
    const COLUMNS: usize = PANEL;

    fn prepare(&self, weights: &PackedMatrix, panel: usize, quads: Range<usize>, words: &mut [u32]) {
        widen(weights.panel(panel, quads), words);
    }

    fn multiply(&self, digits: &[u32], weights: &[u32], sums: &mut [i32]) {
        checked_steps::<Self>(digits, weights, sums);
        sums.fill(0);
        for (digits, weights) in digits.chunks_exact(Self::LANES).zip(weights.chunks_exact(Self::COLUMNS)) {
            for (&digit, sums) in digits.iter().zip(sums.chunks_exact_mut(Self::COLUMNS)) {
                let (low, high) = (i32::from(digit as i16), i32::from((digit >> 16) as i16));
                for (sum, &weight) in sums.iter_mut().zip(weights) {
                    let product = low * i32::from(weight as i16) + high * i32::from((weight >> 16) as i16);
                    *sum = sum.wrapping_add(product);
                }
            }
        }
    }
}

/// `[quad][column][4]` bytes to `[pair][column]` words of two 16-bit weights.
pub(crate) fn widen(panel: &[i8], words: &mut [u32]) {
    let word = |low: i8, high: i8| u32::from(i16::from(low) as u16) | u32::from(i16::from(high) as u16) << 16;
    for (quad, words) in panel.chunks_exact(QUAD * PANEL).zip(words.chunks_exact_mut(2 * PANEL)) {
        let (first, second) = words.split_at_mut(PANEL);
        for ((bytes, first), second) in quad.chunks_exact(QUAD).zip(first).zip(second) {
            *first = word(bytes[0], bytes[1]);
            *second = word(bytes[2], bytes[3]);
        }
    }
}

/// Two neighbouring panels, `[quad][column][4]` bytes each, to `[quad][32 columns]` words of four weights; the second
/// may lie beyond the matrix.
pub(crate) fn interleave(weights: &PackedMatrix, panel: usize, quads: Range<usize>, words: &mut [u32]) {
    assert_eq!(words.len(), quads.len() * 2 * PANEL, "a word for each quad and column");
    for half in 0..2 {
        let mut source = weights.panel(panel + half, quads.clone()).chunks_exact(QUAD);
        for step in words.chunks_exact_mut(2 * PANEL) {
            for word in &mut step[half * PANEL..(half + 1) * PANEL] {
                *word = source
                    .next()
                    .map_or(0, |quad| u32::from_le_bytes([quad[0] as u8, quad[1] as u8, quad[2] as u8, quad[3] as u8]));
            }
        }
    }
}
