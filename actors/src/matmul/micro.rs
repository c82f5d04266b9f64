//! What a CPU kernel is made of, and the portable one.

use super::digits::{Encoding, Pairs};
use super::lines::Line;
use super::weights::{BLOCK_LINES, HALF, PANEL};

/// Plain loops, to be compiled for the instructions of a register block. A closure would be called, not inlined.
pub(crate) trait Loops {
    /// What they give.
    type Output;

    /// Runs them. To be `#[inline(always)]`, with all that it calls and that is to be compiled so.
    fn run(self) -> Self::Output;
}

/// A register block: `LANES` rows of one digit times `COLUMNS` columns of weights.
///
/// A value of an implementing type is proof that the CPU has the instructions that it uses.
pub(crate) trait Micro: Send + Sync + 'static {
    /// How limbs are split into digits.
    type Encoding: Encoding;
    /// Rows of the block.
    const LANES: usize;
    /// Columns of the block: [`PANEL`] or [`HALF`].
    const COLUMNS: usize;
    /// Most inner blocks that are multiplied before sums are read out: the weights of so many fill about half of a
    /// first-level cache, through which the rows pass.
    const INNER_BLOCKS: usize;

    /// The weights of [`Self::COLUMNS`] columns as [`Self::multiply`] wants them, `[line][COLUMNS]` lines:
    /// `packed` itself where the block takes a whole panel as it is packed, or half `half` of it rewritten in `scratch`.
    fn prepare<'a>(&self, packed: &'a [Line], half: usize, scratch: &'a mut Vec<Line>) -> &'a [Line];

    /// `sums[lane][column] = Σ digits[line][lane] · weights[line][column]`, as wrapping 32-bit integers; of `digits`
    /// each line is a run of inner elements of one row. Lanes from `rows` on may be left out of the sums.
    ///
    /// Called inside of [`Self::task`] only.
    ///
    /// # Panics
    /// If the slices do not hold the same number of lines, or `sums` is not `LANES × COLUMNS`.
    fn multiply(&self, digits: &[Line], weights: &[Line], rows: usize, sums: &mut [Line]);

    /// Digits of rows, of all rows of a panel together, up to which [`Self::multiply_few`] is faster than [`Self::multiply`].
    fn few_lanes(&self) -> usize {
        0
    }

    /// [`Self::multiply`] for all digits of the first rows of a panel at once, `digits` as many runs of lines as there are digits, by
    /// the weights of [`Self::COLUMNS`] columns as they are packed, half `half` of them where a block takes half a panel: each weight
    /// comes from memory once, and no time is spent on rows that there are not. Sums go to `sums`, `[digit][lane and half]`, as they
    /// would digit by digit.
    ///
    /// Called inside of [`Self::task`] only, and for as many digits of rows as [`Self::few_lanes`] says.
    ///
    /// # Panics
    /// If there are more of these, or none, or the slices do not fit each other.
    fn multiply_few(&self, digits: &[&[Line]], _packed: &[Line], _half: usize, rows: usize, _sums: &mut [Line]) {
        assert!(digits.len() * rows <= self.few_lanes(), "as few as the block has a way for");
    }

    /// Runs loops compiled for the instructions of this block: the plain loops around the block are vectorised as widely
    /// as the block itself.
    fn vectorised<W: Loops>(&self, loops: W) -> W::Output {
        loops.run()
    }

    /// [`Self::vectorised`], with the processor's state set up for [`Self::multiply`].
    fn task<W: Loops>(&self, loops: W) -> W::Output {
        self.vectorised(loops)
    }

    /// Runs the multiply instruction `passes` times some number, on registers alone; returns the integer operations
    /// done, two for each multiply-add of a digit and a weight. `None` where the compiler chooses the instructions.
    fn register_loop(&self, _passes: u64) -> Option<u64> {
        None
    }
}

/// Checks the lengths on which a micro-kernel's pointers rely; returns the number of lines of a lane.
#[inline(always)]
pub(crate) fn checked_lines<M: Micro>(digits: &[Line], weights: &[Line], sums: &[Line]) -> usize {
    let lines = digits.len() / M::LANES;
    assert_eq!(digits.len(), lines * M::LANES, "whole lines of digits");
    assert_eq!(weights.len(), lines * M::COLUMNS, "as many lines of weights");
    assert_eq!(sums.len() * HALF, M::LANES * M::COLUMNS, "one sum for each lane and column");
    lines
}

/// Sixteen-bit multiply-adds in plain Rust, for every CPU.
pub(crate) struct Portable;

impl Micro for Portable {
    type Encoding = Pairs;
    const LANES: usize = 6;
    const COLUMNS: usize = HALF;
    const INNER_BLOCKS: usize = 8;

    fn prepare<'a>(&self, packed: &'a [Line], half: usize, scratch: &'a mut Vec<Line>) -> &'a [Line] {
        widen_half(packed, half, scratch, |quad, words| {
            let bytes: &[i8] = bytemuck::cast_slice(&quad.0);
            let words: &mut [i16] = bytemuck::cast_slice_mut(words);
            for (column, bytes) in bytes.chunks_exact(4).enumerate() {
                for (pair, bytes) in bytes.chunks_exact(2).enumerate() {
                    let start = pair * PANEL + 2 * column;
                    words[start] = i16::from(bytes[0]);
                    words[start + 1] = i16::from(bytes[1]);
                }
            }
        })
    }

    fn multiply(&self, digits: &[Line], weights: &[Line], _rows: usize, sums: &mut [Line]) {
        checked_lines::<Self>(digits, weights, sums);
        sums.fill(Line::ZERO);
        for (digits, weights) in digits.chunks_exact(Self::LANES).zip(weights.chunks_exact(Self::COLUMNS)) {
            for (digits, sums) in digits.iter().zip(sums.iter_mut()) {
                let digits: &[i16] = bytemuck::cast_slice(&digits.0);
                let mut lane = sums.0;
                for (digits, weights) in digits.chunks_exact(2).zip(weights) {
                    let (low, high) = (i32::from(digits[0]), i32::from(digits[1]));
                    let weights: &[i16] = bytemuck::cast_slice(&weights.0);
                    for (sum, weights) in lane.iter_mut().zip(weights.chunks_exact(2)) {
                        let product = low * i32::from(weights[0]) + high * i32::from(weights[1]);
                        *sum = sum.wrapping_add(product as u32);
                    }
                }
                sums.0 = lane;
            }
        }
    }
}

/// Half of a packed panel with its weights widened to 16 bits, `[pair of inner elements][16 columns]`; `widen` makes
/// the two lines of a quad.
#[inline(always)]
pub(crate) fn widen_half<'a>(
    packed: &[Line],
    half: usize,
    scratch: &'a mut Vec<Line>,
    mut widen: impl FnMut(&Line, &mut [Line]),
) -> &'a [Line] {
    assert!(half < 2 && packed.len().is_multiple_of(BLOCK_LINES));
    let widened = super::lines::at_least(scratch, packed.len(), Line::ZERO);
    for (block, words) in packed.chunks_exact(BLOCK_LINES).zip(widened.chunks_exact_mut(BLOCK_LINES)) {
        for (quad, words) in block[half * HALF..(half + 1) * HALF].iter().zip(words.chunks_exact_mut(2)) {
            widen(quad, words);
        }
    }
    widened
}
