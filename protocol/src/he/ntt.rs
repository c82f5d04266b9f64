//! Exact negacyclic products through a number-theoretic transform mod one 31-bit prime.
//!
//! A mask coefficient mod `2^(8·limbs)` is cut into centred **digits** so small that the integer product of a digit
//! polynomial by a ternary secret, summed over the components, stays between `-p/2` and `p/2`: then the residue mod
//! `p` is the integer, and digits are put together again mod `2^(8·limbs)`.
//!
//! It stays there with overwhelming probability, not with certainty. Mask coefficients are uniform, so one
//! coefficient of the product is a sum of about `2n/3` independent centred uniform digits of `w` bits: a
//! sub-Gaussian variable with σ = 2^w/√12 · √(2n/3), and P(|X| > p/2) ≤ 2·exp(−(p/2σ)²/2). A digit is as wide as
//! leaves p/2 at least 8 σ:
//!
//! | value | n | digits | p/2σ | chance of a wrong coefficient |
//! |---|---|---|---|---|
//! | 24 bits (P24) | 1024 | 1 × 24 | 8.49 | < 5·10⁻¹⁶, 2·10⁻¹⁷ for a Gaussian |
//! | 23 bits (P32 and P48 switched to 3 bytes) | 1280, 2048 | 1 × 23 | 15.2, 12.0 | < 2·10⁻³¹ |
//! | 32 bits | 1280, 2048 | 2 × 16 | > 1500 | 0 |
//! | 40 bits | 2048 | 2 × 20 | 96 | 0 |
//! | 48 bits | 2048 | 3 × 16 | > 1500 | 0 |
//! | 16 bits, 8 bits | any | 1 | > 1500 | 0 |
//!
//! Three bytes of a product of P32's or P48's masks are one bit too many for one digit. The owner rounds that bit off
//! (which [`noise`](super::noise) counts) rather than pay for two transforms of 12 bits. What is encrypted is never
//! rounded before it is encrypted: the masks themselves always keep all of their bits.
//!
//! A wrong coefficient would be one wrong activation; a thousand training steps of SmolLM2-135M have about 4·10¹¹
//! coefficients. A prime above 2³¹ would give 17 σ, but the transform is then five times slower (measured with
//! AVX2: 9.0 µs against 1.6 µs at N = 1024).

use std::sync::OnceLock;

use tfhe_ntt::prime32::Plan;

use super::word::Word;

/// The largest prime below 2³¹ that is 1 mod 4096 and for which tfhe-ntt has its fast reduction:
/// every ring up to N = 2048 has its roots of unity in it.
const PRIME: u32 = 2_147_377_153;

/// A ring `Z[X]/(X^N + 1)` and its transform mod [`PRIME`].
pub(crate) struct Ring {
    plan: Plan,
}

impl Ring {
    /// The ring of degree `size`: 256, 1024 or 2048. Its tables are computed once per process.
    pub(crate) fn of_size(size: usize) -> &'static Self {
        static RINGS: [OnceLock<Ring>; 3] = [const { OnceLock::new() }; 3];
        let slot = match size {
            256 => &RINGS[0],
            1024 => &RINGS[1],
            2048 => &RINGS[2],
            _ => unreachable!("no parameter set has N = {size}"),
        };
        slot.get_or_init(|| {
            let plan = Plan::try_new(size, PRIME).expect("the prime is 1 mod 4096");
            assert!(plan.can_use_fast_reduction_code());
            Self { plan }
        })
    }

    /// Transforms residues in place.
    pub(crate) fn forward(&self, polynomial: &mut [u32]) {
        self.plan.fwd(polynomial);
    }

    /// Inverse of [`Self::forward`] times `N`.
    pub(crate) fn inverse(&self, polynomial: &mut [u32]) {
        self.plan.inv(polynomial);
    }

    /// Divides residues by `N`: done once for each secret instead of after each inverse.
    pub(crate) fn normalize(&self, polynomial: &mut [u32]) {
        self.plan.normalize(polynomial);
    }

    /// `sum += left ∘ right` in the transformed domain.
    pub(crate) fn accumulate(&self, sum: &mut [u32], left: &[u32], right: &[u32]) {
        self.plan.mul_accumulate(sum, left, right);
    }
}

/// The residue of a number between `-p` and `p`, without a branch.
#[inline(always)]
pub(crate) fn residue(value: i32) -> u32 {
    // A negative number is a huge unsigned one, and becomes the smaller of the two by adding p; for others the sum
    // is the larger.
    (value as u32).min((value as u32).wrapping_add(PRIME))
}

/// The number nearest to zero with this residue, without a branch.
#[inline(always)]
pub(crate) fn nearest(residue: u32) -> i32 {
    let negative = i32::from(residue > PRIME / 2);
    (residue as i32).wrapping_sub(negative.wrapping_neg() & PRIME as i32)
}

/// How a value mod `2^(8·limbs)` is cut for the transform.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Digits {
    /// Digits of a value.
    pub(crate) count: usize,
    /// Bits of a digit.
    pub(crate) bits: u32,
    /// Low bits that are rounded off before the value is cut, to nearest and ties to even: 0 or 1. With one bit every
    /// odd value is a tie, and rounding all of them up would be an error of the same sign in every column.
    pub(crate) dropped: u32,
}

impl Digits {
    /// The widest equal digits of all `8·limbs` bits with the margin that the module's text asks for, when the secret
    /// has `mask_rows` coefficients.
    pub(crate) fn exact(limbs: usize, mask_rows: usize) -> Self {
        Self::dropping(0, limbs, mask_rows)
    }

    /// The same, or one bit less where that saves a digit.
    pub(crate) fn rounded(limbs: usize, mask_rows: usize) -> Self {
        let (all, less) = (Self::exact(limbs, mask_rows), Self::dropping(1, limbs, mask_rows));
        if less.count < all.count { less } else { all }
    }

    fn dropping(dropped: u32, limbs: usize, mask_rows: usize) -> Self {
        const MARGIN: f64 = 8.0;
        let total = 8 * limbs as u32 - dropped;
        let fits = |bits: u32| {
            let deviation = f64::from(bits).exp2() / 12f64.sqrt() * (2.0 * mask_rows as f64 / 3.0).sqrt();
            MARGIN * deviation <= f64::from(PRIME / 2)
        };
        let count = (1..=total).find(|count| total.is_multiple_of(*count) && fits(total / count)).unwrap_or(total);
        Self { count: count as usize, bits: total / count, dropped }
    }

    /// Bits of all digits together: products are right mod `2^total_bits`.
    pub(crate) const fn total_bits(self) -> u32 {
        self.count as u32 * self.bits
    }

    /// Digit `index` of each value, centred, as residues.
    #[inline(always)]
    pub(crate) fn split<W: Word>(self, index: usize, values: &[W], out: &mut [u32]) {
        let half = 1u32 << (self.bits - 1);
        let mask = half | (half - 1);
        for (digit, &value) in out.iter_mut().zip(values) {
            // Rounding each lower digit off carries into the next; what is carried out of the top is a multiple of
            // the modulus.
            let mut rest = if self.dropped == 0 { value } else { value.halved_to_even() };
            for _ in 0..index {
                rest = rest.add_shift(u64::from(half), self.bits);
            }
            let low = rest.shifted_low(0).wrapping_add(half) & mask;
            *digit = residue(low as i32 - half as i32);
        }
    }

    /// Adds the product of digit `index`, given as residues, to values mod the word size.
    #[inline(always)]
    pub(crate) fn join<W: Word>(self, index: usize, residues: &[u32], values: &mut [W]) {
        let shift = self.bits * index as u32;
        for (value, &residue) in values.iter_mut().zip(residues) {
            *value = value.add(W::of_signed(nearest(residue), shift));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::he::ParameterSet;

    #[test]
    fn digits_are_those_of_the_table() {
        for (limbs, rows, count, bits, dropped) in [
            (3, 1024, 1, 24, 0),
            (3, 1280, 1, 23, 1),
            (3, 2048, 1, 23, 1),
            (4, 1280, 2, 16, 0),
            (4, 2048, 2, 16, 0),
            (5, 2048, 2, 20, 0),
            (6, 2048, 3, 16, 0),
            (2, 2048, 1, 16, 0),
            (1, 1024, 1, 8, 0),
        ] {
            assert_eq!(Digits::rounded(limbs, rows), Digits { count, bits, dropped });
            assert_eq!(Digits::exact(limbs, rows).dropped, 0);
        }
        // Masks are never rounded before they are encrypted.
        for set in ParameterSet::ALL {
            assert_eq!(Digits::exact(set.limbs(), set.mask_rows()).total_bits(), set.modulus_bits());
        }
    }

    #[test]
    fn residues_are_centred_and_back() {
        let half = (PRIME / 2) as i32;
        for value in [0, 1, -1, 8_388_607, -8_388_608, half, -half] {
            assert_eq!(nearest(residue(value)), value);
            assert!(residue(value) < PRIME);
        }
    }

    fn schoolbook(a: &[u64], s: &[i32]) -> Vec<u64> {
        let n = a.len();
        let mut product = vec![0u64; n];
        for (i, &a) in a.iter().enumerate() {
            for (j, &s) in s.iter().enumerate() {
                let term = a.wrapping_mul(i64::from(s) as u64);
                let at = (i + j) % n;
                product[at] = if i + j < n { product[at].wrapping_add(term) } else { product[at].wrapping_sub(term) };
            }
        }
        product
    }

    fn through_transform<W: Word>(limbs: usize, set: ParameterSet, a: &[W], s: &[i32]) -> Vec<W> {
        let ring = Ring::of_size(set.polynomial_size());
        let digits = Digits::exact(limbs, set.mask_rows());
        let mut secret: Vec<u32> = s.iter().map(|&s| residue(s)).collect();
        ring.forward(&mut secret);
        ring.normalize(&mut secret);
        let mut values = vec![W::default(); a.len()];
        for index in 0..digits.count {
            let mut digit = vec![0; a.len()];
            digits.split(index, a, &mut digit);
            ring.forward(&mut digit);
            let mut sum = vec![0; a.len()];
            ring.accumulate(&mut sum, &digit, &secret);
            ring.inverse(&mut sum);
            digits.join(index, &sum, &mut values);
        }
        values
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4))]
        #[test]
        fn products_are_those_of_the_schoolbook(seed: u64) {
            use rand::{Rng, SeedableRng};
            let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
            for set in ParameterSet::ALL {
                for limbs in 1..=set.limbs() {
                    let n = set.polynomial_size();
                    let mask = (1u64 << (8 * limbs)) - 1;
                    let a: Vec<u64> = (0..n).map(|_| rng.random::<u64>() & mask).collect();
                    let s: Vec<i32> = (0..n).map(|_| rng.random_range(-1..=1)).collect();
                    let expected: Vec<u64> = schoolbook(&a, &s).iter().map(|value| value & mask).collect();
                    let wide: Vec<u64> = through_transform(limbs, set, &a, &s);
                    prop_assert!(wide.iter().map(|value| value & mask).eq(expected.iter().copied()));
                    if limbs <= 4 {
                        let a: Vec<u32> = a.iter().map(|&a| a as u32).collect();
                        let narrow = through_transform(limbs, set, &a, &s);
                        prop_assert!(narrow.iter().map(|&value| u64::from(value) & mask).eq(expected));
                    }
                }
            }
        }
    }
}
