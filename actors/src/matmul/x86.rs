//! Register blocks for x86-64: AVX2, and AVX-512 with VNNI.

use std::arch::x86_64::*;
use std::ops::Range;

use super::digits::{Pairs, Quads};
use super::micro::{Micro, checked_steps, interleave};
use super::weights::{PANEL, PackedMatrix, QUAD};

/// Six digit rows by sixteen columns: twelve accumulators of the sixteen registers. A step is two inner elements,
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
    const COLUMNS: usize = PANEL;

    fn prepare(&self, weights: &PackedMatrix, panel: usize, quads: Range<usize>, words: &mut [u32]) {
        let bytes = weights.panel(panel, quads);
        assert_eq!(2 * words.len(), bytes.len(), "a word for two weights");
        // SAFETY: `self` exists only where AVX2 was detected.
        unsafe { widen_avx2(bytes, words) }
    }

    fn multiply(&self, digits: &[u32], weights: &[u32], sums: &mut [i32]) {
        let steps = checked_steps::<Self>(digits, weights, sums);
        // SAFETY: `self` exists only where AVX2 was detected; `checked_steps` has seen that the slices hold
        // `steps` steps of 6 and 16 words, and 6 × 16 sums.
        unsafe { multiply_avx2(digits.as_ptr(), weights.as_ptr(), steps, sums.as_mut_ptr()) }
    }

    fn vectorised<R>(&self, work: impl FnOnce() -> R) -> R {
        // SAFETY: `self` exists only where AVX2 was detected.
        unsafe { with_avx2(work) }
    }
}

/// Calls `work` from a function for which AVX2 is enabled.
#[target_feature(enable = "avx2")]
fn with_avx2<R>(work: impl FnOnce() -> R) -> R {
    work()
}

/// # Safety
/// The CPU has AVX2; `digits` may be read for `6·steps` words, `weights` for `16·steps`, `sums` written for 96.
#[target_feature(enable = "avx2")]
unsafe fn multiply_avx2(mut digits: *const u32, mut weights: *const u32, steps: usize, sums: *mut i32) {
    let mut acc = [[_mm256_setzero_si256(); 2]; 6];
    for _ in 0..steps {
        // SAFETY: each step reads 16 words of weights and 6 of digits, and there are `steps` of both.
        unsafe {
            let low = _mm256_loadu_si256(weights.cast());
            let high = _mm256_loadu_si256(weights.add(8).cast());
            for (lane, acc) in acc.iter_mut().enumerate() {
                let digit = _mm256_set1_epi32(digits.add(lane).read() as i32);
                acc[0] = _mm256_add_epi32(acc[0], _mm256_madd_epi16(digit, low));
                acc[1] = _mm256_add_epi32(acc[1], _mm256_madd_epi16(digit, high));
            }
            digits = digits.add(6);
            weights = weights.add(16);
        }
    }
    for (lane, acc) in acc.iter().enumerate() {
        // SAFETY: lane < 6, so this writes 16 of the 96 sums.
        unsafe {
            _mm256_storeu_si256(sums.add(16 * lane).cast(), acc[0]);
            _mm256_storeu_si256(sums.add(16 * lane + 8).cast(), acc[1]);
        }
    }
}

/// [`super::micro::widen`], eight columns at a time: a shuffle brings each byte to the upper half of its 16-bit place,
/// an arithmetic shift extends its sign.
#[target_feature(enable = "avx2")]
fn widen_avx2(panel: &[i8], words: &mut [u32]) {
    const NONE: i8 = -128;
    let pick = |a: i8, b: i8| {
        _mm256_broadcastsi128_si256(_mm_setr_epi8(
            NONE,
            a,
            NONE,
            b,
            NONE,
            a + 4,
            NONE,
            b + 4,
            NONE,
            a + 8,
            NONE,
            b + 8,
            NONE,
            a + 12,
            NONE,
            b + 12,
        ))
    };
    let (first, second) = (pick(0, 1), pick(2, 3));
    for (quad, words) in panel.chunks_exact(QUAD * PANEL).zip(words.chunks_exact_mut(2 * PANEL)) {
        for half in 0..2 {
            // SAFETY: a quad is 64 bytes and its words are 32, by `chunks_exact`; half < 2.
            unsafe {
                let bytes = _mm256_loadu_si256(quad.as_ptr().add(32 * half).cast());
                let pair = |pick| _mm256_srai_epi16::<8>(_mm256_shuffle_epi8(bytes, pick));
                _mm256_storeu_si256(words.as_mut_ptr().add(8 * half).cast(), pair(first));
                _mm256_storeu_si256(words.as_mut_ptr().add(PANEL + 8 * half).cast(), pair(second));
            }
        }
    }
}

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
    const COLUMNS: usize = 2 * PANEL;

    fn prepare(&self, weights: &PackedMatrix, panel: usize, quads: Range<usize>, words: &mut [u32]) {
        interleave(weights, panel, quads, words);
    }

    fn multiply(&self, digits: &[u32], weights: &[u32], sums: &mut [i32]) {
        let steps = checked_steps::<Self>(digits, weights, sums);
        // SAFETY: `self` exists only where AVX-512F and VNNI were detected; `checked_steps` has seen that the slices
        // hold `steps` steps of 12 and 32 words, and 12 × 32 sums.
        unsafe { multiply_vnni(digits.as_ptr(), weights.as_ptr(), steps, sums.as_mut_ptr()) }
    }

    fn vectorised<R>(&self, work: impl FnOnce() -> R) -> R {
        // SAFETY: `self` exists only where AVX-512F and BW were detected.
        unsafe { with_avx512(work) }
    }
}

/// Calls `work` from a function for which AVX-512 is enabled.
#[target_feature(enable = "avx512f,avx512bw")]
fn with_avx512<R>(work: impl FnOnce() -> R) -> R {
    work()
}

/// # Safety
/// The CPU has AVX-512F and AVX-512 VNNI; `digits` may be read for `12·steps` words, `weights` for `32·steps`, `sums`
/// written for 384.
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn multiply_vnni(mut digits: *const u32, mut weights: *const u32, steps: usize, sums: *mut i32) {
    let mut acc = [[_mm512_setzero_si512(); 2]; 12];
    for _ in 0..steps {
        // SAFETY: each step reads 32 words of weights and 12 of digits, and there are `steps` of both.
        unsafe {
            let low = _mm512_loadu_si512(weights.cast());
            let high = _mm512_loadu_si512(weights.add(16).cast());
            for (lane, acc) in acc.iter_mut().enumerate() {
                let limbs = _mm512_set1_epi32(digits.add(lane).read() as i32);
                acc[0] = _mm512_dpbusd_epi32(acc[0], limbs, low);
                acc[1] = _mm512_dpbusd_epi32(acc[1], limbs, high);
            }
            digits = digits.add(12);
            weights = weights.add(32);
        }
    }
    for (lane, acc) in acc.iter().enumerate() {
        // SAFETY: lane < 12, so this writes 32 of the 384 sums.
        unsafe {
            _mm512_storeu_si512(sums.add(32 * lane).cast(), acc[0]);
            _mm512_storeu_si512(sums.add(32 * lane + 16).cast(), acc[1]);
        }
    }
}
