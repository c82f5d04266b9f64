//! Machine words that hold a value mod `2^(8·limbs)`: 32 bits for up to four limbs, 64 beyond. Everything between
//! byte planes and polynomials is written once, over this trait.

use super::lanes::{transpose_any, transpose_words};
use crate::buffer::Pooled;

/// Adding this to an `f64` below 2^51 in absolute value leaves the nearest integer in the low bits of the sum.
const ROUNDER: f64 = 6_755_399_441_055_744.0; // 1.5 · 2^52

/// An unsigned word whose arithmetic wraps, so that it is also arithmetic mod any smaller power of two.
pub(crate) trait Word: Send + Sync + Pooled {
    /// The byte of weight `2^(8·limb)`.
    fn limb(self, limb: usize) -> u8;
    /// `byte · 2^(8·limb)`.
    fn of_limb(byte: u8, limb: usize) -> Self;
    /// Sum mod the word size.
    fn add(self, other: Self) -> Self;
    /// Difference mod the word size.
    fn sub(self, other: Self) -> Self;
    /// A signed number mod the word size.
    fn of_signed(value: i32) -> Self;
    /// `self · 2^shift` mod the word size; `shift` less than it has bits.
    fn shifted_up(self, shift: u32) -> Self;
    /// `(self + addend) >> shift`.
    fn add_shift(self, addend: u64, shift: u32) -> Self;
    /// The low `bits` as a signed number.
    fn centred(self, bits: u32) -> f64;
    /// `value` rounded to the nearest integer (ties to even), mod the word size; `|value| < 2^51`.
    fn rounded(value: f64) -> Self;
    /// Transposes an 8 × 8 matrix: row `i` is `from[i·from_stride..][..8]`, row `i` of the transpose goes to
    /// `to[i·to_stride..][..8]`. Panics if a row is not inside of its slice.
    fn transpose(from: &[Self], from_stride: usize, to: &mut [Self], to_stride: usize);
}

macro_rules! word {
    ($word:ty, $signed:ty, $transpose:path) => {
        impl Word for $word {
            #[inline(always)]
            fn limb(self, limb: usize) -> u8 {
                (self >> (8 * limb)) as u8
            }

            #[inline(always)]
            fn of_limb(byte: u8, limb: usize) -> Self {
                <$word>::from(byte) << (8 * limb)
            }

            #[inline(always)]
            fn add(self, other: Self) -> Self {
                self.wrapping_add(other)
            }

            #[inline(always)]
            fn sub(self, other: Self) -> Self {
                self.wrapping_sub(other)
            }

            #[inline(always)]
            fn of_signed(value: i32) -> Self {
                value as $signed as $word
            }

            #[inline(always)]
            fn shifted_up(self, shift: u32) -> Self {
                self << shift
            }

            #[inline(always)]
            fn add_shift(self, addend: u64, shift: u32) -> Self {
                self.wrapping_add(addend as $word) >> shift
            }

            #[inline(always)]
            fn centred(self, bits: u32) -> f64 {
                let spare = <$word>::BITS - bits;
                f64::from_signed((self << spare) as $signed >> spare)
            }

            #[inline(always)]
            fn rounded(value: f64) -> Self {
                (value + ROUNDER).to_bits().wrapping_sub(ROUNDER.to_bits()) as $word
            }

            #[inline(always)]
            fn transpose(from: &[Self], from_stride: usize, to: &mut [Self], to_stride: usize) {
                $transpose(from, from_stride, to, to_stride);
            }
        }
    };
}

/// Exact or nearest conversion of a signed integer.
trait FromSigned<T> {
    fn from_signed(value: T) -> Self;
}

impl FromSigned<i32> for f64 {
    #[inline(always)]
    fn from_signed(value: i32) -> Self {
        f64::from(value)
    }
}

impl FromSigned<i64> for f64 {
    #[inline(always)]
    fn from_signed(value: i64) -> Self {
        value as f64
    }
}

word!(u32, i32, transpose_words);
word!(u64, i64, transpose_any);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn rounding_is_to_the_nearest_integer(value in -1.4e14f64..1.4e14) {
            let expected = value.round_ties_even() as i64;
            prop_assert_eq!(<u64 as Word>::rounded(value), expected as u64);
            prop_assert_eq!(<u32 as Word>::rounded(value), expected as u32);
        }

        #[test]
        fn limbs_make_the_word_again(value: u64) {
            let word: u64 = (0..8).map(|limb| <u64 as Word>::of_limb(value.limb(limb), limb)).sum();
            prop_assert_eq!(word, value);
        }

        #[test]
        fn centring_keeps_the_residue(value: u32, bits in 8u32..=32) {
            let centred = value.centred(bits) as i64;
            let half = 1i64 << (bits - 1);
            prop_assert!((-half..half).contains(&centred));
            prop_assert_eq!((i64::from(value) - centred).rem_euclid(2 * half), 0);
        }
    }
}
