//! The vectors of [`super`], sixteen words at a time: one register of AVX-512 or two of AVX2.

use std::arch::x86_64::*;

use super::{Decode, Encode};
use crate::he::lanes::widest_vectors;
use crate::he::packing::{GROUP, Row, RowMut};

/// Words that are worked on together: half a group.
const LANES: usize = 16;

/// Sixteen words in vector registers. Arithmetic is mod 2^32, word by word.
///
/// # Safety
/// All functions need the processor's extension that the type is named after, and are to be inlined into functions compiled
/// for it; those with pointers need sixteen elements there.
unsafe trait Sixteen: Copy {
    unsafe fn load(from: *const u32) -> Self;
    unsafe fn splat(word: u32) -> Self;
    unsafe fn of_bytes(bytes: __m128i) -> Self;
    unsafe fn add(self, other: Self) -> Self;
    unsafe fn sub(self, other: Self) -> Self;
    unsafe fn or(self, other: Self) -> Self;
    unsafe fn and(self, other: Self) -> Self;
    /// The larger of two words without sign.
    unsafe fn max(self, other: Self) -> Self;
    unsafe fn left(self, count: __m128i) -> Self;
    unsafe fn right(self, count: __m128i) -> Self;
    /// A shift that keeps the sign.
    unsafe fn right_signed(self, count: __m128i) -> Self;
    /// `x·step`, rounded to the nearest integer, ties to even.
    unsafe fn rounded(from: *const f32, step: f64) -> Self;
    /// Signed words times `unit`, rounded once, from f64.
    unsafe fn write_scaled(self, unit: f64, to: *mut f32);
    /// The lowest byte of each word.
    unsafe fn low_bytes(self) -> __m128i;
    unsafe fn store(self, to: *mut u32);
}

#[derive(Clone, Copy)]
struct Avx512(__m512i);

// SAFETY: every function does what its intrinsics do, and reads or writes no more than sixteen elements.
unsafe impl Sixteen for Avx512 {
    #[inline(always)]
    unsafe fn load(from: *const u32) -> Self {
        // SAFETY: the caller's, as the trait says.
        unsafe { Self(_mm512_loadu_si512(from.cast())) }
    }

    #[inline(always)]
    unsafe fn splat(word: u32) -> Self {
        // SAFETY: the caller's, as the trait says.
        unsafe { Self(_mm512_set1_epi32(word as i32)) }
    }

    #[inline(always)]
    unsafe fn of_bytes(bytes: __m128i) -> Self {
        // SAFETY: the caller's, as the trait says.
        unsafe { Self(_mm512_cvtepu8_epi32(bytes)) }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: the caller's, as the trait says.
        unsafe { Self(_mm512_add_epi32(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        // SAFETY: the caller's, as the trait says.
        unsafe { Self(_mm512_sub_epi32(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn or(self, other: Self) -> Self {
        // SAFETY: the caller's, as the trait says.
        unsafe { Self(_mm512_or_si512(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn and(self, other: Self) -> Self {
        // SAFETY: the caller's, as the trait says.
        unsafe { Self(_mm512_and_si512(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        // SAFETY: the caller's, as the trait says.
        unsafe { Self(_mm512_max_epu32(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn left(self, count: __m128i) -> Self {
        // SAFETY: the caller's, as the trait says.
        unsafe { Self(_mm512_sll_epi32(self.0, count)) }
    }

    #[inline(always)]
    unsafe fn right(self, count: __m128i) -> Self {
        // SAFETY: the caller's, as the trait says.
        unsafe { Self(_mm512_srl_epi32(self.0, count)) }
    }

    #[inline(always)]
    unsafe fn right_signed(self, count: __m128i) -> Self {
        // SAFETY: the caller's, as the trait says.
        unsafe { Self(_mm512_sra_epi32(self.0, count)) }
    }

    #[inline(always)]
    unsafe fn rounded(from: *const f32, step: f64) -> Self {
        // SAFETY: the caller's, as the trait says.
        unsafe {
            let step = _mm512_set1_pd(step);
            let half =
                |at: usize| _mm512_cvtpd_epi32(_mm512_mul_pd(_mm512_cvtps_pd(_mm256_loadu_ps(from.add(at))), step));
            Self(_mm512_inserti64x4::<1>(_mm512_castsi256_si512(half(0)), half(LANES / 2)))
        }
    }

    #[inline(always)]
    unsafe fn write_scaled(self, unit: f64, to: *mut f32) {
        // SAFETY: the caller's, as the trait says.
        unsafe {
            let unit = _mm512_set1_pd(unit);
            let half = |words: __m256i| _mm512_cvtpd_ps(_mm512_mul_pd(_mm512_cvtepi32_pd(words), unit));
            _mm256_storeu_ps(to, half(_mm512_castsi512_si256(self.0)));
            _mm256_storeu_ps(to.add(LANES / 2), half(_mm512_extracti64x4_epi64::<1>(self.0)));
        }
    }

    #[inline(always)]
    unsafe fn low_bytes(self) -> __m128i {
        // SAFETY: the caller's, as the trait says.
        unsafe { _mm512_cvtepi32_epi8(self.0) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut u32) {
        // SAFETY: the caller's, as the trait says.
        unsafe { _mm512_storeu_si512(to.cast(), self.0) }
    }
}

#[derive(Clone, Copy)]
struct Avx2(__m256i, __m256i);

impl Avx2 {
    #[inline(always)]
    fn each(self, act: impl Fn(__m256i) -> __m256i) -> Self {
        Self(act(self.0), act(self.1))
    }

    #[inline(always)]
    fn both(self, other: Self, act: impl Fn(__m256i, __m256i) -> __m256i) -> Self {
        Self(act(self.0, other.0), act(self.1, other.1))
    }
}

// SAFETY: every function does what its intrinsics do, and reads or writes no more than sixteen elements.
unsafe impl Sixteen for Avx2 {
    #[inline(always)]
    unsafe fn load(from: *const u32) -> Self {
        // SAFETY: the caller's, as the trait says.
        unsafe { Self(_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(LANES / 2).cast())) }
    }

    #[inline(always)]
    unsafe fn splat(word: u32) -> Self {
        // SAFETY: the caller's, as the trait says.
        let words = unsafe { _mm256_set1_epi32(word as i32) };
        Self(words, words)
    }

    #[inline(always)]
    unsafe fn of_bytes(bytes: __m128i) -> Self {
        // SAFETY: the caller's, as the trait says.
        unsafe { Self(_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128::<8>(bytes))) }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: the caller's, as the trait says.
        self.both(other, |a, b| unsafe { _mm256_add_epi32(a, b) })
    }

    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        // SAFETY: the caller's, as the trait says.
        self.both(other, |a, b| unsafe { _mm256_sub_epi32(a, b) })
    }

    #[inline(always)]
    unsafe fn or(self, other: Self) -> Self {
        // SAFETY: the caller's, as the trait says.
        self.both(other, |a, b| unsafe { _mm256_or_si256(a, b) })
    }

    #[inline(always)]
    unsafe fn and(self, other: Self) -> Self {
        // SAFETY: the caller's, as the trait says.
        self.both(other, |a, b| unsafe { _mm256_and_si256(a, b) })
    }

    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        // SAFETY: the caller's, as the trait says.
        self.both(other, |a, b| unsafe { _mm256_max_epu32(a, b) })
    }

    #[inline(always)]
    unsafe fn left(self, count: __m128i) -> Self {
        // SAFETY: the caller's, as the trait says.
        self.each(|a| unsafe { _mm256_sll_epi32(a, count) })
    }

    #[inline(always)]
    unsafe fn right(self, count: __m128i) -> Self {
        // SAFETY: the caller's, as the trait says.
        self.each(|a| unsafe { _mm256_srl_epi32(a, count) })
    }

    #[inline(always)]
    unsafe fn right_signed(self, count: __m128i) -> Self {
        // SAFETY: the caller's, as the trait says.
        self.each(|a| unsafe { _mm256_sra_epi32(a, count) })
    }

    #[inline(always)]
    unsafe fn rounded(from: *const f32, step: f64) -> Self {
        // SAFETY: the caller's, as the trait says.
        unsafe {
            let step = _mm256_set1_pd(step);
            let quarter =
                |at: usize| _mm256_cvtpd_epi32(_mm256_mul_pd(_mm256_cvtps_pd(_mm_loadu_ps(from.add(at))), step));
            let half = |at: usize| _mm256_set_m128i(quarter(at + LANES / 4), quarter(at));
            Self(half(0), half(LANES / 2))
        }
    }

    #[inline(always)]
    unsafe fn write_scaled(self, unit: f64, to: *mut f32) {
        // SAFETY: the caller's, as the trait says.
        unsafe {
            let unit = _mm256_set1_pd(unit);
            let quarter = |words: __m128i| _mm256_cvtpd_ps(_mm256_mul_pd(_mm256_cvtepi32_pd(words), unit));
            for (at, words) in [self.0, self.1].into_iter().enumerate() {
                let to = to.add(at * LANES / 2);
                _mm_storeu_ps(to, quarter(_mm256_castsi256_si128(words)));
                _mm_storeu_ps(to.add(LANES / 4), quarter(_mm256_extracti128_si256::<1>(words)));
            }
        }
    }

    #[inline(always)]
    unsafe fn low_bytes(self) -> __m128i {
        // SAFETY: the caller's, as the trait says.
        unsafe {
            let byte = _mm256_set1_epi32(0xff);
            // Within each half of 128 bits: words 0-3 and 8-11, then 4-7 and 12-15.
            let shorts = _mm256_packus_epi32(_mm256_and_si256(self.0, byte), _mm256_and_si256(self.1, byte));
            let bytes = _mm256_packus_epi16(shorts, shorts);
            let ordered = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 0, 4, 1, 5));
            _mm256_castsi256_si128(ordered)
        }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut u32) {
        // SAFETY: the caller's, as the trait says.
        unsafe {
            _mm256_storeu_si256(to.cast(), self.0);
            _mm256_storeu_si256(to.add(LANES / 2).cast(), self.1);
        }
    }
}

/// Whether the processor has what [`Avx2`] needs.
fn has_avx2() -> bool {
    std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("bmi2")
}

/// See [`Encode::row`].
#[inline]
pub(super) fn encode(encode: &Encode, step: f64, words: &[u32], input: &[f32], row: &mut RowMut<'_>) -> (usize, u32) {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,bmi2")]
    unsafe fn widest(
        encode: &Encode,
        step: f64,
        words: &[u32],
        input: &[f32],
        row: &mut RowMut<'_>,
        groups: usize,
    ) -> u32 {
        // SAFETY: the caller's.
        unsafe { encode_body::<Avx512>(encode, step, words, input, row, groups) }
    }
    #[target_feature(enable = "avx2,bmi2")]
    unsafe fn wide(
        encode: &Encode,
        step: f64,
        words: &[u32],
        input: &[f32],
        row: &mut RowMut<'_>,
        groups: usize,
    ) -> u32 {
        // SAFETY: the caller's.
        unsafe { encode_body::<Avx2>(encode, step, words, input, row, groups) }
    }
    let columns = words.len() / GROUP * GROUP;
    let groups = columns / GROUP;
    assert!(input.len() >= columns && encode.planes <= row.high.len());
    assert!(row.high[..encode.planes].iter().all(|plane| plane.len() >= columns));
    assert!(encode.short & 4 == 0 || row.fours.len() >= columns / 2);
    assert!(encode.short & 2 == 0 || row.twos.len() >= columns / 4);
    // SAFETY: the processor has what the functions need, as was just detected, and every slice as many groups as was just
    // checked.
    let largest = unsafe {
        if widest_vectors() {
            widest(encode, step, words, input, row, groups)
        } else if has_avx2() {
            wide(encode, step, words, input, row, groups)
        } else {
            return (0, 0);
        }
    };
    (columns, largest)
}

/// # Safety
/// That of [`Sixteen`], and `groups` groups of columns in all slices that `encode` says are written or read.
#[inline(always)]
unsafe fn encode_body<V: Sixteen>(
    encode: &Encode,
    step: f64,
    words: &[u32],
    input: &[f32],
    row: &mut RowMut<'_>,
    groups: usize,
) -> u32 {
    // SAFETY: the caller vouches for the instructions and for the lengths: a group is two times sixteen columns, half as many
    // bytes of 4 bits and a quarter as many of 2.
    unsafe {
        let (half, shift) = (V::splat(encode.half as u32), _mm_cvtsi32_si128(encode.shift as i32));
        let below = _mm_cvtsi32_si128(8 - encode.short as i32);
        let (magnitude, mut largest) = (V::splat(u32::MAX >> 1), V::splat(0));
        let (fours, twos) = (row.fours.as_mut_ptr(), row.twos.as_mut_ptr());
        let first_limb = u32::from(encode.short != 0);
        for group in 0..groups {
            let start = group * GROUP;
            let mut values = [V::splat(0); 2];
            for (part, value) in values.iter_mut().enumerate() {
                let at = start + part * LANES;
                let x = input.as_ptr().add(at);
                largest = largest.max(V::load(x.cast()).and(magnitude));
                let sum = V::load(words.as_ptr().add(at)).add(V::rounded(x, step));
                *value = sum.add(half).right(shift);
            }
            for (plane, bytes) in row.high[..encode.planes].iter_mut().enumerate() {
                let to = bytes.as_mut_ptr();
                let count = _mm_cvtsi32_si128(8 * (plane as u32 + first_limb) as i32);
                for (part, value) in values.iter().enumerate() {
                    let bytes = value.right(count).low_bytes();
                    _mm_storeu_si128(to.add(start + part * LANES).cast(), bytes);
                }
            }
            if encode.short == 0 {
                continue;
            }
            let [first, second] = values.map(|value| value.low_bytes());
            if encode.short & 4 != 0 {
                let (low, high) = (_mm_set1_epi8(0x0f), _mm_set1_epi8(0xf0_u8 as i8));
                let packed = _mm_or_si128(_mm_and_si128(_mm_srli_epi16::<4>(first), low), _mm_and_si128(second, high));
                _mm_storeu_si128(fours.add(start / 2).cast(), packed);
            }
            if encode.short & 2 != 0 {
                let three = _mm_set1_epi8(3);
                let two = |bytes: __m128i| _mm_and_si128(_mm_srl_epi16(bytes, below), three);
                // Bytes of two bits: no shift below carries any of them into the next byte.
                let four = _mm_or_si128(two(first), _mm_slli_epi16::<4>(two(second)));
                let packed = _mm_or_si128(four, _mm_slli_epi16::<2>(_mm_srli_si128::<8>(four)));
                _mm_storel_epi64(twos.add(start / 4).cast(), packed);
            }
        }
        let mut magnitudes = [0; LANES];
        largest.store(magnitudes.as_mut_ptr());
        magnitudes.into_iter().fold(0, u32::max)
    }
}

/// See [`Decode::row`].
#[inline]
pub(super) fn decode(decode: &Decode, unit: f64, row: &Row<'_>, products: &[u32], out: &mut [f32]) -> usize {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,bmi2")]
    unsafe fn widest(decode: &Decode, unit: f64, row: &Row<'_>, products: &[u32], out: &mut [f32], groups: usize) {
        // SAFETY: the caller's.
        unsafe { decode_body::<Avx512>(decode, unit, row, products, out, groups) }
    }
    #[target_feature(enable = "avx2,bmi2")]
    unsafe fn wide(decode: &Decode, unit: f64, row: &Row<'_>, products: &[u32], out: &mut [f32], groups: usize) {
        // SAFETY: the caller's.
        unsafe { decode_body::<Avx2>(decode, unit, row, products, out, groups) }
    }
    let columns = out.len() / GROUP * GROUP;
    let groups = columns / GROUP;
    assert!(products.len() >= columns && decode.planes <= row.high.len());
    assert!(row.high[..decode.planes].iter().all(|plane| plane.len() >= columns));
    assert!(decode.short & 4 == 0 || row.fours.len() >= columns / 2);
    assert!(decode.short & 2 == 0 || row.twos.len() >= columns / 4);
    // SAFETY: as in `encode`.
    unsafe {
        if widest_vectors() {
            widest(decode, unit, row, products, out, groups);
        } else if has_avx2() {
            wide(decode, unit, row, products, out, groups);
        } else {
            return 0;
        }
    }
    columns
}

/// # Safety
/// As for [`encode_body`].
#[inline(always)]
unsafe fn decode_body<V: Sixteen>(
    decode: &Decode,
    unit: f64,
    row: &Row<'_>,
    products: &[u32],
    out: &mut [f32],
    groups: usize,
) {
    // SAFETY: as in `encode_body`.
    unsafe {
        // Brought to the upper end of the word, the difference is centred by one shift back.
        let spare = u32::BITS - decode.bits;
        let count = |shift: u32| _mm_cvtsi32_si128(shift as i32);
        let (up, product_up, down) = (count(decode.shifts.0 + spare), count(decode.shifts.1 + spare), count(spare));
        let below = count(8 - decode.short);
        let first_limb = u32::from(decode.short != 0);
        for group in 0..groups {
            let start = group * GROUP;
            let mut low = [_mm_setzero_si128(); 2];
            if decode.short & 4 != 0 {
                let high = _mm_set1_epi8(0xf0_u8 as i8);
                let packed = _mm_loadu_si128(row.fours.as_ptr().add(start / 2).cast());
                low = [_mm_and_si128(_mm_slli_epi16::<4>(packed), high), _mm_and_si128(packed, high)];
            }
            if decode.short & 2 != 0 {
                let three = _mm_set1_epi8(3);
                let packed = _mm_loadl_epi64(row.twos.as_ptr().add(start / 4).cast());
                let four = _mm_unpacklo_epi64(packed, _mm_srli_epi16::<2>(packed));
                let two = |bytes: __m128i| _mm_sll_epi16(_mm_and_si128(bytes, three), below);
                low = [_mm_or_si128(low[0], two(four)), _mm_or_si128(low[1], two(_mm_srli_epi16::<4>(four)))];
            }
            for (part, low) in low.into_iter().enumerate() {
                let at = start + part * LANES;
                let mut body = if decode.short == 0 { V::splat(0) } else { V::of_bytes(low) };
                for (plane, bytes) in row.high[..decode.planes].iter().enumerate() {
                    let bytes = V::of_bytes(_mm_loadu_si128(bytes.as_ptr().add(at).cast()));
                    body = body.or(bytes.left(count(8 * (plane as u32 + first_limb))));
                }
                let product = V::load(products.as_ptr().add(at)).left(product_up);
                body.left(up).sub(product).right_signed(down).write_scaled(unit, out.as_mut_ptr().add(at));
            }
        }
    }
}
