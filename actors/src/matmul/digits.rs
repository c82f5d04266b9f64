//! Byte limbs rewritten as the digits that a kernel multiplies, in the order in which it reads them.
//!
//! A packed operand is `[row panel][digit][line][lane]` of cache lines: the lanes of a panel are its rows, and a line
//! holds one digit of consecutive inner elements of one row, as 16-bit integers ([`Pairs`]) or bytes ([`Quads`]).
//! What a micro-kernel multiplies over an inner range is one run of memory, and a run of a plane is a run of a line.

use std::marker::PhantomData;
use std::ops::Range;

use protocol::he::Planes;
use rayon::prelude::*;

use super::lines::{LINE_WORDS, Line, Pool, Pooled, at_least};
use super::micro::{Loops, Micro};
use super::weights::BLOCK;
use super::{MAX_LIMBS, Rows};

/// Rows that are transposed together: a cache line of the keystream.
const STRIP: usize = 64;

/// Side of the squares that are transposed: bytes of the narrowest vector.
const SQUARE: usize = 16;

/// One limb of the values of a row's block.
type LimbBlock = [u8; BLOCK];

/// How limbs become digits.
pub(crate) trait Encoding: Send + Sync + 'static {
    /// Lines in which a digit of a block's elements is held.
    const LINES: usize;
    /// Digit `d` weighs `2^(d · DIGIT_BITS)`.
    const DIGIT_BITS: u32;

    /// Digits of a value of `limbs` bytes.
    fn digits(limbs: usize) -> usize;

    /// Inner blocks after which a 32-bit accumulator must be read out: up to there it is exact, or wraps only in bits
    /// that are above the modulus.
    fn exact_blocks(limbs: usize) -> usize;

    /// The digits of one row's block; `put` takes digit, line and content.
    fn encode(limbs: &[LimbBlock], put: impl FnMut(usize, usize, Line));
}

/// 16-bit digits, for 16-bit multiply-adds. They are signed: a low digit carries into the next, and the carry out of
/// the top is a multiple of the modulus. A last single byte is a digit of its own.
pub(crate) struct Pairs;

/// Bytes, for unsigned-by-signed byte dot products: a limb is a digit.
pub(crate) struct Quads;

impl Encoding for Pairs {
    const LINES: usize = 2;
    const DIGIT_BITS: u32 = 16;

    fn digits(limbs: usize) -> usize {
        limbs.div_ceil(2)
    }

    fn exact_blocks(limbs: usize) -> usize {
        // Up to four limbs the modulus divides 2^32, so accumulators may wrap; above, 7 · 64 · 2^15 · 2^7 < 2^31.
        if limbs <= 4 { usize::MAX } else { 7 }
    }

    #[inline(always)]
    fn encode(limbs: &[LimbBlock], mut put: impl FnMut(usize, usize, Line)) {
        let mut carries = [0u16; BLOCK];
        for (d, pair) in limbs.chunks(2).enumerate() {
            let mut digits = [0u16; BLOCK];
            for (i, (digit, carry)) in digits.iter_mut().zip(&mut carries).enumerate() {
                let raw = u16::from(pair[0][i]) | pair.get(1).map_or(0, |high| u16::from(high[i]) << 8);
                let (sum, wrapped) = raw.overflowing_add(*carry);
                *digit = sum;
                *carry = (sum >> 15) | u16::from(wrapped);
            }
            for (line, digits) in digits.chunks_exact(2 * LINE_WORDS).enumerate() {
                let mut words = Line::ZERO;
                bytemuck::cast_slice_mut(&mut words.0).copy_from_slice(digits);
                put(d, line, words);
            }
        }
    }
}

impl Encoding for Quads {
    const LINES: usize = 1;
    const DIGIT_BITS: u32 = 8;

    fn digits(limbs: usize) -> usize {
        limbs
    }

    fn exact_blocks(_limbs: usize) -> usize {
        // 1,015 · 64 · 255 · 128 < 2^31.
        1_015
    }

    #[inline(always)]
    fn encode(limbs: &[LimbBlock], mut put: impl FnMut(usize, usize, Line)) {
        for (digit, bytes) in limbs.iter().enumerate() {
            put(digit, 0, bytemuck::cast(*bytes));
        }
    }
}

/// Rows of a product's left operand, packed for the register block `M`.
pub(crate) struct Operand<'a, M> {
    rows: usize,
    digits: usize,
    blocks: usize,
    lines: Pooled<'a, Vec<Line>>,
    micro: PhantomData<M>,
}

impl<'a, M: Micro> Operand<'a, M> {
    /// Packs `rows`, `inner` values of `limbs` bytes each, in a buffer of `pool`.
    ///
    /// What fills up the last block and the last panel is whatever the buffer held: it meets weights of zero, or its
    /// sums are not read.
    pub(crate) fn pack(micro: &M, pool: &'a Pool<Vec<Line>>, limbs: usize, inner: usize, rows: Rows<'_>) -> Self {
        let (digits, blocks) = (M::Encoding::digits(limbs), inner.div_ceil(BLOCK));
        let panel_lines = digits * blocks * M::Encoding::LINES * M::LANES;
        let mut lines = pool.take();
        let used = at_least(&mut lines, rows.count().div_ceil(M::LANES) * panel_lines, Line::ZERO);
        match rows {
            Rows::Body(body) => used.par_chunks_mut(panel_lines.max(1)).enumerate().for_each(|(panel, lines)| {
                micro.vectorised(BodyPanel::<M> { body, panel, lines, micro: PhantomData });
            }),
            Rows::Masks { keystream, rows } => {
                // Whole panels that fill whole strips, so that a cache line of the keystream is read once.
                let panels = lcm(M::LANES, STRIP) / M::LANES;
                let mask = Mask { keystream, limbs, rows, inner };
                used.par_chunks_mut((panels * panel_lines).max(1)).enumerate().for_each(|(task, lines)| {
                    let first = task * panels * M::LANES;
                    micro.vectorised(MaskPanels::<M> { mask: &mask, first, lines, micro: PhantomData });
                });
            }
        }
        Self { rows: rows.count(), digits, blocks, lines, micro: PhantomData }
    }

    /// Rows of the operand, without those that fill up the last panel.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// `[line][lane]` of one digit of a row panel, for some inner blocks.
    pub(crate) fn group(&self, panel: usize, digit: usize, blocks: Range<usize>) -> &[Line] {
        let base = (panel * self.digits + digit) * self.blocks;
        let size = M::Encoding::LINES * M::LANES;
        &self.lines[(base + blocks.start) * size..(base + blocks.end) * size]
    }
}

const fn lcm(a: usize, b: usize) -> usize {
    let (mut x, mut y) = (a, b);
    while y != 0 {
        (x, y) = (y, x % y);
    }
    a / x * b
}

/// Writes the digits of one row's block into its panel of `blocks` blocks.
#[inline(always)]
fn put_row<M: Micro>(limbs: &[LimbBlock], blocks: usize, block: usize, lane: usize, lines: &mut [Line]) {
    M::Encoding::encode(limbs, |digit, line, content| {
        lines[((digit * blocks + block) * M::Encoding::LINES + line) * M::LANES + lane] = content;
    });
}

/// Packs one row panel of a body.
struct BodyPanel<'a, M> {
    body: &'a Planes,
    panel: usize,
    lines: &'a mut [Line],
    micro: PhantomData<M>,
}

impl<M: Micro> Loops for BodyPanel<'_, M> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { body, panel, lines, .. } = self;
        let (limbs, inner) = (body.limbs(), body.columns());
        let blocks = inner.div_ceil(BLOCK);
        let first = panel * M::LANES;
        let mut bytes = [[0; BLOCK]; MAX_LIMBS];
        for row in first..(first + M::LANES).min(body.rows()) {
            for block in 0..blocks {
                let run = row * inner + block * BLOCK..row * inner + ((block + 1) * BLOCK).min(inner);
                for (limb, bytes) in bytes[..limbs].iter_mut().enumerate() {
                    let run = &body.plane(limb)[run.clone()];
                    match <&LimbBlock>::try_from(run) {
                        Ok(whole) => *bytes = *whole,
                        Err(_) => bytes[..run.len()].copy_from_slice(run),
                    }
                }
                put_row::<M>(&bytes[..limbs], blocks, block, row - first, lines);
            }
        }
    }
}

/// A keystream `[feature][limb][row]` and its dimensions.
struct Mask<'a> {
    keystream: &'a [u8],
    limbs: usize,
    rows: usize,
    inner: usize,
}

impl Mask<'_> {
    /// A run of rows of one limb of a feature; zeros beyond the mask.
    #[inline(always)]
    fn run(&self, feature: usize, limb: usize, first: usize) -> [u8; SQUARE] {
        let base = (feature * self.limbs + limb) * self.rows;
        let last = (first + SQUARE).min(self.rows);
        let mut bytes = [0; SQUARE];
        match self.keystream.get(base + first..base + last) {
            Some(run) if run.len() == SQUARE => bytes.copy_from_slice(run),
            Some(run) => bytes[..run.len()].copy_from_slice(run),
            None => {}
        }
        bytes
    }
}

/// Packs some row panels of a mask, from row `first` on.
struct MaskPanels<'a, M> {
    mask: &'a Mask<'a>,
    first: usize,
    lines: &'a mut [Line],
    micro: PhantomData<M>,
}

impl<M: Micro> Loops for MaskPanels<'_, M> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { mask, first, lines, .. } = self;
        let blocks = mask.inner.div_ceil(BLOCK);
        let panel_lines = M::Encoding::digits(mask.limbs) * blocks * M::Encoding::LINES * M::LANES;
        let last = (first + lines.len() / panel_lines * M::LANES).min(mask.rows);
        // Limbs of a strip's rows, as they would stand in planes.
        let mut strip = [[[0; BLOCK]; MAX_LIMBS]; STRIP];
        for block in 0..blocks {
            for start in (first..last).step_by(STRIP) {
                let count = (last - start).min(STRIP);
                for limb in 0..mask.limbs {
                    for feature in (0..BLOCK).step_by(SQUARE) {
                        for row in (0..count).step_by(SQUARE) {
                            let square =
                                std::array::from_fn(|i| mask.run(block * BLOCK + feature + i, limb, start + row));
                            for (bytes, row) in transpose(square).iter().zip(&mut strip[row..row + SQUARE]) {
                                row[limb][feature..feature + SQUARE].copy_from_slice(bytes);
                            }
                        }
                    }
                }
                for (row, bytes) in (start - first..).zip(&strip[..count]) {
                    let panel = &mut lines[row / M::LANES * panel_lines..][..panel_lines];
                    put_row::<M>(&bytes[..mask.limbs], blocks, block, row % M::LANES, panel);
                }
            }
        }
    }
}

/// Transposes a square of bytes: four times, the rows of its halves are interleaved.
#[inline(always)]
fn transpose(mut square: [[u8; SQUARE]; SQUARE]) -> [[u8; SQUARE]; SQUARE] {
    for _ in 0..SQUARE.ilog2() {
        square = std::array::from_fn(|row| {
            let (upper, lower) = (&square[row / 2], &square[row / 2 + SQUARE / 2]);
            let start = row % 2 * (SQUARE / 2);
            std::array::from_fn(|i| if i % 2 == 0 { upper[start + i / 2] } else { lower[start + i / 2] })
        });
    }
    square
}
