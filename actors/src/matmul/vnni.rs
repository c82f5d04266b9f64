//! The register block for AVX-512 with VNNI.

use std::arch::asm;
use std::arch::x86_64::*;

use super::digits::Quads;
use super::lines::Line;
use super::micro::{Loops, Micro, checked_lines};
use super::weights::{HALF, PANEL};

/// Twelve limb rows by thirty-two columns: 24 accumulators of the 32 registers. A step is four inner elements of one
/// limb, `vpdpbusd` of broadcast unsigned limbs and signed weights.
pub(crate) struct Vnni(());

impl Vnni {
    /// The kernel, if this CPU can run it.
    pub(crate) fn detect() -> Option<Self> {
        let has_all = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vnni");
        has_all.then_some(Self(()))
    }
}

impl Micro for Vnni {
    type Encoding = Quads;
    const LANES: usize = 12;
    const COLUMNS: usize = PANEL;
    const INNER_BLOCKS: usize = 8;

    fn prepare<'a>(&self, packed: &'a [Line], _half: usize, _scratch: &'a mut Vec<Line>) -> &'a [Line] {
        packed
    }

    fn multiply(&self, digits: &[Line], weights: &[Line], _rows: usize, sums: &mut [Line]) {
        let lines = checked_lines::<Self>(digits, weights, sums);
        // SAFETY: `self` exists only where AVX-512F and VNNI were detected; `checked_lines` has seen that the slices
        // hold `lines` times 12 and 32 lines, and 24 lines of sums.
        unsafe { multiply(digits.as_ptr().cast(), weights.as_ptr().cast(), lines, sums.as_mut_ptr().cast()) }
    }

    fn few_lanes(&self) -> usize {
        // The weights of a panel stay in the second-level cache while one group of lanes after the other meets them.
        3 * FEW
    }

    fn multiply_few(&self, digits: &[&[Line]], packed: &[Line], _half: usize, rows: usize, sums: &mut [Line]) {
        self.few(Self::LANES, digits, packed, rows, sums);
    }

    fn vectorised<W: Loops>(&self, loops: W) -> W::Output {
        // SAFETY: `self` exists only where AVX-512F and BW were detected.
        unsafe { with_avx512(loops) }
    }

    fn register_loop(&self, passes: u64) -> Option<u64> {
        // SAFETY: `self` exists only where AVX-512F and VNNI were detected.
        unsafe { register_loop(passes) };
        // Twenty-four instructions on sixty-four limbs.
        Some(2 * 24 * 64 * passes)
    }
}

/// Most digits of rows that are multiplied at once: two registers of sums for each.
const FEW: usize = 12;

impl Vnni {
    /// [`Micro::multiply_few`] for a block of `lanes` rows, whose digits are bytes: each digit of each row is a lane here.
    pub(crate) fn few(&self, lanes: usize, digits: &[&[Line]], packed: &[Line], rows: usize, sums: &mut [Line]) {
        let lines = packed.len() / PANEL;
        assert!((1..=lanes).contains(&rows), "rows of the block");
        assert!(digits.iter().all(|digits| digits.len() == lines * lanes), "whole lines of digits");
        assert_eq!((packed.len(), sums.len()), (lines * PANEL, 2 * lanes * digits.len()), "weights and sums of these");
        if lines == 0 {
            return sums.fill(Line::ZERO);
        }
        let count = digits.len() * rows;
        let (weights, sums, stride) = (packed.as_ptr().cast(), sums.as_mut_ptr().cast(), 16 * lanes);
        for first in (0..count).step_by(FEW) {
            // The lane of a digit of a row: its first word, and where its sums go.
            let lane = |at: usize| {
                let (digit, row) = (at / rows, at % rows);
                (digits[digit][row..].as_ptr().cast::<i32>(), 2 * (digit * lanes + row))
            };
            let group: [_; FEW] = std::array::from_fn(|at| lane(if first + at < count { first + at } else { first }));
            // SAFETY: `self` exists only where AVX-512F and VNNI were detected. A lane's words stand `stride` apart, one line
            // for each of `lines`, the last of which is inside of its slice, whose length was checked, since `row < rows <=
            // lanes`; there are `lines` times 32 lines of weights; and two lines of sums from each lane's place, which is
            // below `2 · lanes · digits`.
            unsafe {
                match count - first {
                    1 => multiply_few::<1>(&group, stride, weights, lines, sums),
                    2 => multiply_few::<2>(&group, stride, weights, lines, sums),
                    3 => multiply_few::<3>(&group, stride, weights, lines, sums),
                    4 => multiply_few::<4>(&group, stride, weights, lines, sums),
                    5 | 6 => multiply_few::<6>(&group, stride, weights, lines, sums),
                    7..=9 => multiply_few::<9>(&group, stride, weights, lines, sums),
                    _ => multiply_few::<FEW>(&group, stride, weights, lines, sums),
                }
            }
        }
    }
}

/// Sums of `N` lanes, each with its words and the place of its sums. Those that there are not are copies of the first one, which is
/// written last.
///
/// # Safety
/// The CPU has AVX-512F and AVX-512 VNNI. Of each lane sixteen words may be read from every multiple of `stride` below `lines · stride`, and two
/// lines of `sums` written from its place on; `weights` may be read for `32·lines` lines.
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn multiply_few<const N: usize>(
    lanes: &[(*const i32, usize); FEW],
    stride: usize,
    weights: *const __m512i,
    lines: usize,
    sums: *mut __m512i,
) {
    let mut acc = [[_mm512_setzero_si512(); 2]; N];
    for line in 0..lines {
        for step in 0..16 {
            // SAFETY: the caller's: words and weights of this line.
            unsafe {
                let weights = weights.add(PANEL * line + step);
                let (low, high) = (_mm512_load_si512(weights), _mm512_load_si512(weights.add(HALF)));
                for (acc, (words, _)) in acc.iter_mut().zip(lanes) {
                    let limbs = _mm512_set1_epi32(words.add(stride * line + step).read());
                    acc[0] = _mm512_dpbusd_epi32(acc[0], limbs, low);
                    acc[1] = _mm512_dpbusd_epi32(acc[1], limbs, high);
                }
            }
        }
    }
    for (acc, (_, place)) in acc.iter().zip(lanes).rev() {
        // SAFETY: the caller's: two lines of sums from there on.
        unsafe {
            _mm512_store_si512(sums.add(*place), acc[0]);
            _mm512_store_si512(sums.add(place + 1), acc[1]);
        }
    }
}

/// Runs loops in a function for which AVX-512 is enabled.
#[target_feature(enable = "avx512f,avx512bw")]
pub(crate) fn with_avx512<W: Loops>(loops: W) -> W::Output {
    loops.run()
}

/// # Safety
/// The CPU has AVX-512F and AVX-512 VNNI; `digits` may be read for `12·lines` lines, `weights` for `32·lines`, `sums`
/// written for 24.
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn multiply(mut digits: *const i32, mut weights: *const __m512i, lines: usize, sums: *mut __m512i) {
    let mut acc = [[_mm512_setzero_si512(); 2]; 12];
    for _ in 0..lines {
        for step in 0..16 {
            // SAFETY: the limbs of a line of twelve lanes are 12 × 16 words, its weights two halves of 16 lines, and
            // there are `lines` of both; lines are aligned to 64 bytes.
            unsafe {
                let low = _mm512_load_si512(weights.add(step));
                let high = _mm512_load_si512(weights.add(HALF + step));
                for (lane, acc) in acc.iter_mut().enumerate() {
                    let limbs = _mm512_set1_epi32(digits.add(16 * lane + step).read());
                    acc[0] = _mm512_dpbusd_epi32(acc[0], limbs, low);
                    acc[1] = _mm512_dpbusd_epi32(acc[1], limbs, high);
                }
            }
        }
        // SAFETY: as above; after the last line both point one past the end.
        unsafe {
            digits = digits.add(12 * 16);
            weights = weights.add(PANEL);
        }
    }
    for (lane, acc) in acc.iter().enumerate() {
        // SAFETY: lane < 12, and a lane's sums are two lines.
        unsafe {
            _mm512_store_si512(sums.add(2 * lane), acc[0]);
            _mm512_store_si512(sums.add(2 * lane + 1), acc[1]);
        }
    }
}

/// # Safety
/// The CPU has AVX-512F and AVX-512 VNNI.
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn register_loop(passes: u64) {
    // SAFETY: the instructions are AVX-512 VNNI's; the loop touches nothing but registers that it names, and ends
    // since its counter begins above zero.
    unsafe {
        asm!(
            "2:",
            "vpdpbusd zmm0, zmm30, zmm31", "vpdpbusd zmm1, zmm30, zmm31", "vpdpbusd zmm2, zmm30, zmm31",
            "vpdpbusd zmm3, zmm30, zmm31", "vpdpbusd zmm4, zmm30, zmm31", "vpdpbusd zmm5, zmm30, zmm31",
            "vpdpbusd zmm6, zmm30, zmm31", "vpdpbusd zmm7, zmm30, zmm31", "vpdpbusd zmm8, zmm30, zmm31",
            "vpdpbusd zmm9, zmm30, zmm31", "vpdpbusd zmm10, zmm30, zmm31", "vpdpbusd zmm11, zmm30, zmm31",
            "vpdpbusd zmm12, zmm30, zmm31", "vpdpbusd zmm13, zmm30, zmm31", "vpdpbusd zmm14, zmm30, zmm31",
            "vpdpbusd zmm15, zmm30, zmm31", "vpdpbusd zmm16, zmm30, zmm31", "vpdpbusd zmm17, zmm30, zmm31",
            "vpdpbusd zmm18, zmm30, zmm31", "vpdpbusd zmm19, zmm30, zmm31", "vpdpbusd zmm20, zmm30, zmm31",
            "vpdpbusd zmm21, zmm30, zmm31", "vpdpbusd zmm22, zmm30, zmm31", "vpdpbusd zmm23, zmm30, zmm31",
            "dec {passes}",
            "jnz 2b",
            passes = inout(reg) passes.max(1) => _,
            out("zmm0") _, out("zmm1") _, out("zmm2") _, out("zmm3") _, out("zmm4") _, out("zmm5") _,
            out("zmm6") _, out("zmm7") _, out("zmm8") _, out("zmm9") _, out("zmm10") _, out("zmm11") _,
            out("zmm12") _, out("zmm13") _, out("zmm14") _, out("zmm15") _, out("zmm16") _, out("zmm17") _,
            out("zmm18") _, out("zmm19") _, out("zmm20") _, out("zmm21") _, out("zmm22") _, out("zmm23") _,
            options(nomem, nostack),
        );
    }
}
