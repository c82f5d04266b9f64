//! The register block for AVX2.

use std::arch::asm;
use std::arch::x86_64::*;

use super::digits::{Encoding as _, Pairs};
use super::lines::Line;
use super::micro::{Loops, Micro, checked_lines, widen_half};
use super::weights::{BLOCK_LINES, HALF};

/// Six rows by sixteen columns: twelve accumulators of the sixteen registers. A step is two inner elements,
/// `vpmaddwd` of broadcast digits and widened weights; `vpmaddubsw` would saturate.
pub(crate) struct Avx2(());

impl Avx2 {
    /// The kernel, if this CPU can run it.
    pub(crate) fn detect() -> Option<Self> {
        is_x86_feature_detected!("avx2").then_some(Self(()))
    }
}

impl Micro for Avx2 {
    type Encoding = Pairs;
    const LANES: usize = 6;
    const COLUMNS: usize = HALF;
    // 24 KiB of widened weights.
    const INNER_BLOCKS: usize = 12;

    fn prepare<'a>(&self, packed: &'a [Line], half: usize, scratch: &'a mut Vec<Line>) -> &'a [Line] {
        // SAFETY: `self` exists only where AVX2 was detected.
        unsafe { widen(packed, half, scratch) }
    }

    fn multiply(&self, digits: &[Line], weights: &[Line], _rows: usize, sums: &mut [Line]) {
        let lines = checked_lines::<Self>(digits, weights, sums);
        // SAFETY: `self` exists only where AVX2 was detected; `checked_lines` has seen that the slices hold `lines`
        // times 6 and 16 lines, and 6 lines of sums.
        unsafe { multiply(digits.as_ptr().cast(), weights.as_ptr().cast(), lines, sums.as_mut_ptr().cast()) }
    }

    fn few_lanes(&self) -> usize {
        // The weights of a panel stay in the second-level cache while one group of lanes after the other meets them.
        2 * FEW
    }

    fn multiply_few(&self, digits: &[&[Line]], packed: &[Line], half: usize, rows: usize, sums: &mut [Line]) {
        let blocks = packed.len() / BLOCK_LINES;
        let lines = blocks * Pairs::LINES;
        assert!((1..=Self::LANES).contains(&rows) && half < 2, "rows of the block, and one of two halves");
        assert!(digits.iter().all(|digits| digits.len() == lines * Self::LANES), "whole lines of digits");
        let sizes = (blocks * BLOCK_LINES, Self::LANES * digits.len());
        assert_eq!((packed.len(), sums.len()), sizes, "weights and sums of these");
        if blocks == 0 {
            return sums.fill(Line::ZERO);
        }
        let count = digits.len() * rows;
        let (weights, sums) = (packed[half * HALF..].as_ptr().cast(), sums.as_mut_ptr().cast());
        for first in (0..count).step_by(FEW) {
            // The lane of a digit of a row: its first word, and where its sums go.
            let lane = |at: usize| {
                let (digit, row) = (at / rows, at % rows);
                (digits[digit][row..].as_ptr().cast::<i32>(), digit * Self::LANES + row)
            };
            let group: [_; FEW] = std::array::from_fn(|at| lane(if first + at < count { first + at } else { first }));
            // SAFETY: `self` exists only where AVX2 was detected. A lane's words stand six lines apart, two lines for each of
            // `blocks`, the last of which is inside of its slice, whose length was checked, since `row < rows <= 6`; half of
            // each block's lines of weights are sixteen from `half` on; and a line of sums from each lane's place, which is
            // below `6 · digits`.
            unsafe {
                match count - first {
                    1 => multiply_few::<1>(&group, weights, blocks, sums),
                    2 => multiply_few::<2>(&group, weights, blocks, sums),
                    3 => multiply_few::<3>(&group, weights, blocks, sums),
                    4 => multiply_few::<4>(&group, weights, blocks, sums),
                    _ => multiply_few::<FEW>(&group, weights, blocks, sums),
                }
            }
        }
    }

    fn vectorised<W: Loops>(&self, loops: W) -> W::Output {
        // SAFETY: `self` exists only where AVX2 was detected.
        unsafe { with_avx2(loops) }
    }

    fn register_loop(&self, passes: u64) -> Option<u64> {
        // SAFETY: `self` exists only where AVX2 was detected.
        unsafe { register_loop(passes) };
        // Twelve instructions on sixteen digits.
        Some(2 * 12 * 16 * passes)
    }
}

/// Runs loops in a function for which AVX2 is enabled.
#[target_feature(enable = "avx2")]
fn with_avx2<W: Loops>(loops: W) -> W::Output {
    loops.run()
}

/// # Safety
/// The CPU has AVX2; `digits` may be read for `6·lines` lines, `weights` for `16·lines`, `sums` written for 6.
#[target_feature(enable = "avx2")]
unsafe fn multiply(mut digits: *const i32, mut weights: *const __m256i, lines: usize, sums: *mut __m256i) {
    let mut acc = [[_mm256_setzero_si256(); 2]; 6];
    for _ in 0..lines {
        // Four steps are unrolled: the loop's own instructions would take decoding slots that are all needed.
        for _ in 0..4 {
            for step in 0..4 {
                // SAFETY: the digits of a line of six lanes are 6 × 16 words, its weights 16 lines of two vectors, and
                // there are `lines` of both, of which the pointers have passed what was read; lines are aligned to
                // 64 bytes.
                unsafe {
                    let low = _mm256_load_si256(weights.add(2 * step));
                    let high = _mm256_load_si256(weights.add(2 * step + 1));
                    for (lane, acc) in acc.iter_mut().enumerate() {
                        let digit = _mm256_set1_epi32(digits.add(16 * lane + step).read());
                        acc[0] = _mm256_add_epi32(acc[0], _mm256_madd_epi16(digit, low));
                        acc[1] = _mm256_add_epi32(acc[1], _mm256_madd_epi16(digit, high));
                    }
                }
            }
            // SAFETY: four words of the sixteen of each lane, and four lines of weights, have been read.
            unsafe {
                digits = digits.add(4);
                weights = weights.add(8);
            }
        }
        // SAFETY: the pointer stands at the second lane; the other five are behind it. After the last line both
        // pointers are one past the end.
        digits = unsafe { digits.add(5 * 16) };
    }
    for (lane, acc) in acc.iter().enumerate() {
        // SAFETY: lane < 6, and a lane's sums are one line.
        unsafe {
            _mm256_store_si256(sums.add(2 * lane), acc[0]);
            _mm256_store_si256(sums.add(2 * lane + 1), acc[1]);
        }
    }
}

/// Most digits of rows that are multiplied at once: two registers of sums for each.
const FEW: usize = 6;

/// Sums of `N` lanes, each with its words and the place of its sums, by weights that are widened in registers. Lanes that there are not are copies of the
/// first one, which is written last.
///
/// # Safety
/// The CPU has AVX2. Of each lane sixteen words may be read from every sixth line on for `2·blocks` lines, and a line of `sums` written at
/// its place; `weights` may be read for sixteen lines from every thirty-second line on for `blocks` of them.
#[target_feature(enable = "avx2")]
unsafe fn multiply_few<const N: usize>(
    lanes: &[(*const i32, usize); FEW],
    weights: *const __m256i,
    blocks: usize,
    sums: *mut __m256i,
) {
    let picks = picks();
    let mut acc = [[_mm256_setzero_si256(); 2]; N];
    for block in 0..blocks {
        for quad in 0..HALF {
            // Four inner elements: two words of digits, in one of the block's two lines.
            let word = (2 * block + quad / 8) * Avx2::LANES * 16 + quad % 8 * 2;
            for part in 0..2 {
                // SAFETY: the caller's: half a line of this block's weights, and two words of its digits.
                unsafe {
                    let bytes = _mm256_load_si256(weights.add(2 * (BLOCK_LINES * block + quad) + part));
                    let [first, second] = picks.map(|pick| _mm256_srai_epi16::<8>(_mm256_shuffle_epi8(bytes, pick)));
                    for (acc, (words, _)) in acc.iter_mut().zip(lanes) {
                        let low = _mm256_set1_epi32(words.add(word).read());
                        let high = _mm256_set1_epi32(words.add(word + 1).read());
                        let sum = _mm256_add_epi32(_mm256_madd_epi16(low, first), _mm256_madd_epi16(high, second));
                        acc[part] = _mm256_add_epi32(acc[part], sum);
                    }
                }
            }
        }
    }
    for (acc, (_, place)) in acc.iter().zip(lanes).rev() {
        // SAFETY: the caller's: a line of sums, two vectors.
        unsafe {
            _mm256_store_si256(sums.add(2 * place), acc[0]);
            _mm256_store_si256(sums.add(2 * place + 1), acc[1]);
        }
    }
}

/// The shuffles that bring the first two bytes of each of four columns, and the last two, to the upper halves of 16-bit places.
#[target_feature(enable = "avx2")]
fn picks() -> [__m256i; 2] {
    /// The shuffle that picks bytes `first` and `first + 1` of each of four columns.
    const fn pick(first: i8) -> [i8; 32] {
        let mut bytes = [-128; 32];
        let mut word = 0;
        while word < 16 {
            let column = (word / 2 % 4) as i8;
            bytes[2 * word + 1] = 4 * column + first + (word % 2) as i8;
            word += 1;
        }
        bytes
    }
    // SAFETY: an array of 32 bytes is what the load reads.
    [pick(0), pick(2)].map(|bytes| unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) })
}

/// [`widen_half`], eight columns at a time: a shuffle brings each byte to the upper half of its 16-bit place, an
/// arithmetic shift extends its sign.
#[target_feature(enable = "avx2")]
fn widen<'a>(packed: &[Line], half: usize, scratch: &'a mut Vec<Line>) -> &'a [Line] {
    let picks = picks();
    widen_half(packed, half, scratch, |quad, words| {
        assert_eq!(words.len(), 2, "a line for each pair of a quad");
        for part in 0..2 {
            // SAFETY: a line is two vectors, and part < 2.
            let bytes = unsafe { _mm256_load_si256(quad.0.as_ptr().cast::<__m256i>().add(part)) };
            for (words, pick) in words.iter_mut().zip(picks) {
                let pair = _mm256_srai_epi16::<8>(_mm256_shuffle_epi8(bytes, pick));
                // SAFETY: as above.
                unsafe { _mm256_store_si256(words.0.as_mut_ptr().cast::<__m256i>().add(part), pair) };
            }
        }
    })
}

/// # Safety
/// The CPU has AVX2.
#[target_feature(enable = "avx2")]
unsafe fn register_loop(passes: u64) {
    // SAFETY: the instructions are AVX2's; the loop touches nothing but registers that it names, and ends since its
    // counter begins above zero.
    unsafe {
        asm!(
            "2:",
            // Product into a renamed register, then into one of twelve sums: what the kernel does.
            "vpmaddwd ymm12, ymm14, ymm15", "vpaddd ymm0, ymm0, ymm12",
            "vpmaddwd ymm13, ymm14, ymm15", "vpaddd ymm1, ymm1, ymm13",
            "vpmaddwd ymm12, ymm14, ymm15", "vpaddd ymm2, ymm2, ymm12",
            "vpmaddwd ymm13, ymm14, ymm15", "vpaddd ymm3, ymm3, ymm13",
            "vpmaddwd ymm12, ymm14, ymm15", "vpaddd ymm4, ymm4, ymm12",
            "vpmaddwd ymm13, ymm14, ymm15", "vpaddd ymm5, ymm5, ymm13",
            "vpmaddwd ymm12, ymm14, ymm15", "vpaddd ymm6, ymm6, ymm12",
            "vpmaddwd ymm13, ymm14, ymm15", "vpaddd ymm7, ymm7, ymm13",
            "vpmaddwd ymm12, ymm14, ymm15", "vpaddd ymm8, ymm8, ymm12",
            "vpmaddwd ymm13, ymm14, ymm15", "vpaddd ymm9, ymm9, ymm13",
            "vpmaddwd ymm12, ymm14, ymm15", "vpaddd ymm10, ymm10, ymm12",
            "vpmaddwd ymm13, ymm14, ymm15", "vpaddd ymm11, ymm11, ymm13",
            "dec {passes}",
            "jnz 2b",
            passes = inout(reg) passes.max(1) => _,
            out("ymm0") _, out("ymm1") _, out("ymm2") _, out("ymm3") _, out("ymm4") _, out("ymm5") _,
            out("ymm6") _, out("ymm7") _, out("ymm8") _, out("ymm9") _, out("ymm10") _, out("ymm11") _,
            out("ymm12") _, out("ymm13") _, out("ymm14") _, out("ymm15") _,
            options(nomem, nostack),
        );
    }
}
