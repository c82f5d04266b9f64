//! Exact negacyclic products through a fast Fourier transform in f64.
//!
//! Of the `N` complex roots of `X^N + 1`, one half are conjugates of the other, so a real polynomial is known by its
//! values at one half. With `ζ_k = e^(iπ(1−4k)/N)`, `ζ_k^(N/2) = i` for every `k`, and
//!
//! ```text
//! a(ζ_k) = Σ_{j<N/2} (a_j + i·a_{j+N/2})·e^(iπj/N) · e^(−2πi·jk/(N/2))
//! ```
//!
//! is a transform of `N/2` complex numbers. A product of polynomials is the product of these values, number by number.
//!
//! A mask coefficient mod `2^(8·limbs)` is cut into centred **digits** of at most 32 bits. The product of a digit
//! polynomial by a ternary secret, summed over the components, is an integer below 2^42, which f64 holds exactly; what
//! the transforms return differs from it by rounding errors, and the nearest integer is the product as long as these
//! are below 1/2. A transform of `M = N/2` numbers errs by at most about `7u·log2 M` of the vector's 2-norm, `u = 2^-53`
//! (Higham, *Accuracy and Stability of Numerical Algorithms*, theorem 24.2), so that a product, three transforms, errs by
//! less than `250u·‖a‖₂·‖s‖₂` times the factor, at most `√M` and about 3 for a uniform mask, by which the largest value
//! of the mask's transform exceeds their root mean square:
//!
//! | value | n | digits | bound for uniform masks | for the worst mask there is |
//! |---|---|---|---|---|
//! | up to 24 bits (P24) | 1024 | 1 × 24 | 2^-11 | 2^-7 |
//! | up to 32 bits (P32) | 1280 | 1 × 32 | 2^-3 | 2^-0.5 |
//! | up to 32 bits (P48) | 2048 | 1 × 32 | 2^-2 | 2^2 |
//! | 40 bits (P48) | 2048 | 2 × 20 | 2^-14 | 2^-9 |
//! | 48 bits (P48) | 2048 | 2 × 24 | 2^-10 | 2^-5 |
//!
//! In truth errors are random and hundreds of times smaller than these bounds (a test measures them). Masks are uniform
//! or products of uniform masks that have been verified; the worst one, which only a cheating worker can make, would
//! decrypt wrongly anyway.
//!
//! Time does not depend on the numbers: there are no branches, and no denormals, which begin hundreds of orders of
//! magnitude below the rounding errors that nothing but an exact 0 falls short of.

use std::f64::consts::PI;
use std::sync::OnceLock;

use dyn_stack::PodStack;
use tfhe_fft::c64;
use tfhe_fft::ordered::FftAlgo;
use tfhe_fft::unordered::{Method, Plan};

use super::word::Word;

/// A ring `Z[X]/(X^N + 1)` and its transform. A transformed polynomial is `N/2` complex numbers as `N` f64, real and
/// imaginary parts alternating, in an order of the transform's own.
pub struct Ring {
    plan: Plan,
    /// `e^(iπj/N)` for `j < N/2`.
    cosines: Box<[f64]>,
    sines: Box<[f64]>,
}

impl Ring {
    /// The ring of degree `size`: 256, 1024 or 2048. Its tables are computed once per process.
    pub fn of_size(size: usize) -> &'static Self {
        static RINGS: [OnceLock<Ring>; 3] = [const { OnceLock::new() }; 3];
        // The fastest of the library's algorithms for each size, measured with AVX2.
        let (slot, base_algo) = match size {
            256 => (&RINGS[0], FftAlgo::Dif4),
            1024 => (&RINGS[1], FftAlgo::Dif8),
            2048 => (&RINGS[2], FftAlgo::Dif8),
            _ => unreachable!("no parameter set has N = {size}"),
        };
        slot.get_or_init(|| {
            let half = size / 2;
            let angle = |j: usize| PI * j as f64 / size as f64;
            Self {
                plan: Plan::new(half, Method::UserProvided { base_algo, base_n: half.min(512) }),
                cosines: (0..half).map(|j| angle(j).cos()).collect(),
                sines: (0..half).map(|j| angle(j).sin()).collect(),
            }
        })
    }

    /// Numbers of working memory that a transform needs.
    pub fn working_numbers(&self) -> usize {
        self.plan.fft_scratch().unaligned_bytes_required().div_ceil(size_of::<f64>())
    }

    /// Transforms, in place, what `fold` has written. `working` has [`Self::working_numbers`].
    ///
    /// Panics if it has fewer.
    pub fn forward(&self, polynomial: &mut [f64], working: &mut [f64]) {
        self.plan.fwd(bytemuck::cast_slice_mut::<f64, c64>(polynomial), PodStack::new_any(working));
    }

    /// Inverse of [`Self::forward`] times `N/2`.
    ///
    /// Panics like it.
    pub fn inverse(&self, polynomial: &mut [f64], working: &mut [f64]) {
        self.plan.inv(bytemuck::cast_slice_mut::<f64, c64>(polynomial), PodStack::new_any(working));
    }

    /// Prepares coefficients, given by their two halves, for [`Self::forward`].
    #[inline(always)]
    pub(crate) fn fold(&self, coefficient: impl Fn(usize) -> (f64, f64), out: &mut [f64]) {
        for (j, ((out, &cosine), &sine)) in
            out.as_chunks_mut::<2>().0.iter_mut().zip(&*self.cosines).zip(&*self.sines).enumerate()
        {
            let (low, high) = coefficient(j);
            *out = [low * cosine - high * sine, low * sine + high * cosine];
        }
    }

    /// Undoes [`Self::fold`]: gives `take(j)` coefficients `j` and `j + N/2`.
    #[inline(always)]
    pub(crate) fn unfold(&self, folded: &[f64], mut take: impl FnMut(usize, f64, f64)) {
        for (j, ((&[re, im], &cosine), &sine)) in
            folded.as_chunks::<2>().0.iter().zip(&*self.cosines).zip(&*self.sines).enumerate()
        {
            take(j, re * cosine + im * sine, im * cosine - re * sine);
        }
    }
}

/// `sum ← left·right`, or `sum += left·right` unless it is the `first` term, in the transformed domain.
#[inline(always)]
pub(crate) fn accumulate(sum: &mut [f64], left: &[f64], right: &[f64], first: bool) {
    assert!(sum.len() == left.len() && sum.len() == right.len());
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma") {
        // SAFETY: the function needs AVX2 and FMA, which were just detected.
        return unsafe { x86::accumulate(sum, left, right, first) };
    }
    let numbers = sum.as_chunks_mut::<2>().0.iter_mut().zip(left.as_chunks::<2>().0).zip(right.as_chunks::<2>().0);
    for ((sum, &[a, b]), &[c, d]) in numbers {
        let [re, im] = if first { [0.0; 2] } else { *sum };
        *sum = [re + (a * c - b * d), im + (a * d + b * c)];
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        _mm256_add_pd, _mm256_fmaddsub_pd, _mm256_loadu_pd, _mm256_movedup_pd, _mm256_mul_pd, _mm256_permute_pd,
        _mm256_storeu_pd,
    };

    /// [`super::accumulate`], two complex numbers at a time. Slices have equal lengths, multiples of 4.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    pub(super) fn accumulate(sum: &mut [f64], left: &[f64], right: &[f64], first: bool) {
        let vectors = sum.as_chunks_mut::<4>().0.iter_mut().zip(left.as_chunks::<4>().0).zip(right.as_chunks::<4>().0);
        for ((sum, left), right) in vectors {
            // SAFETY: each pointer is that of an array of four f64, which is what is read or written through it.
            unsafe {
                let (a, b) = (_mm256_loadu_pd(left.as_ptr()), _mm256_loadu_pd(right.as_ptr()));
                // (re, im)·(im', im') swapped, then re·re' − im·im' and im·re' + re·im' at once.
                let swapped = _mm256_mul_pd(_mm256_permute_pd::<0b0101>(a), _mm256_permute_pd::<0b1111>(b));
                let mut product = _mm256_fmaddsub_pd(a, _mm256_movedup_pd(b), swapped);
                if !first {
                    product = _mm256_add_pd(product, _mm256_loadu_pd(sum.as_ptr()));
                }
                _mm256_storeu_pd(sum.as_mut_ptr(), product);
            }
        }
    }
}

/// How a value mod `2^(8·limbs)` is cut for the transform.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Digits {
    /// Digits of a value.
    pub(crate) count: usize,
    /// Bits of a digit.
    pub(crate) bits: u32,
}

impl Digits {
    /// As few equal digits of at most 32 bits as `8·limbs` bits need.
    pub(crate) fn of(limbs: usize) -> Self {
        let count = limbs.div_ceil(4);
        Self { count, bits: (8 * limbs / count) as u32 }
    }

    /// Digit `index` of a value, centred.
    #[inline(always)]
    fn digit<W: Word>(self, index: usize, value: W) -> f64 {
        let mut rest = value;
        // Rounding each lower digit off carries into the next; what is carried out of the top is a multiple of the
        // modulus.
        for _ in 0..index {
            rest = rest.add_shift(1 << (self.bits - 1), self.bits);
        }
        rest.centred(self.bits)
    }

    /// Writes digit `index` of each value, ready for [`Ring::forward`].
    #[inline(always)]
    pub(crate) fn split<W: Word>(self, ring: &Ring, index: usize, values: &[W], out: &mut [f64]) {
        let (low, high) = values.split_at(values.len() / 2);
        let high = &high[..low.len()];
        if self.count == 1 {
            // Without a loop over lower digits, this one becomes vectors.
            ring.fold(|j| (low[j].centred(self.bits), high[j].centred(self.bits)), out);
        } else {
            ring.fold(|j| (self.digit(index, low[j]), self.digit(index, high[j])), out);
        }
    }

    /// Adds the product of digit `index`, as [`Ring::inverse`] leaves it, to values mod the word size; the first digit's
    /// replaces them.
    #[inline(always)]
    pub(crate) fn join<W: Word>(self, ring: &Ring, index: usize, product: &[f64], values: &mut [W]) {
        let half = values.len() / 2;
        let (low, high) = values.split_at_mut(half);
        let high = &mut high[..half];
        if index == 0 {
            ring.unfold(product, |j, a, b| (low[j], high[j]) = (W::rounded(a), W::rounded(b)));
        } else {
            let shift = self.bits * index as u32;
            ring.unfold(product, |j, a, b| {
                low[j] = low[j].add(W::rounded(a).shifted_up(shift));
                high[j] = high[j].add(W::rounded(b).shifted_up(shift));
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::{Rng, SeedableRng};

    use super::*;
    use crate::he::ParameterSet;

    #[test]
    fn digits_are_those_of_the_table() {
        for (limbs, count, bits) in [(1, 1, 8), (2, 1, 16), (3, 1, 24), (4, 1, 32), (5, 2, 20), (6, 2, 24)] {
            assert_eq!(Digits::of(limbs), Digits { count, bits });
        }
    }

    /// `Σ a_c·s_c` over the components, mod 2^64.
    fn schoolbook(a: &[u64], s: &[i32], size: usize) -> Vec<u64> {
        let mut product = vec![0u64; size];
        for (a, s) in a.chunks(size).zip(s.chunks(size)) {
            for (i, &a) in a.iter().enumerate() {
                for (j, &s) in s.iter().enumerate() {
                    let term = a.wrapping_mul(i64::from(s) as u64);
                    let at = (i + j) % size;
                    let wraps = i + j >= size;
                    product[at] = if wraps { product[at].wrapping_sub(term) } else { product[at].wrapping_add(term) };
                }
            }
        }
        product
    }

    /// The product through the transform, and the largest distance of what it returned from an integer.
    fn through_transform<W: Word>(limbs: usize, size: usize, a: &[W], s: &[i32]) -> (Vec<W>, f64) {
        let (ring, digits) = (Ring::of_size(size), Digits::of(limbs));
        let mut working = vec![0.0; ring.working_numbers()];
        let (mut values, mut worst) = (vec![W::default(); size], 0.0f64);
        for index in 0..digits.count {
            let mut sum = vec![0.0; size];
            for (component, (a, s)) in a.chunks(size).zip(s.chunks(size)).enumerate() {
                let mut secret = vec![0.0; size];
                let scale = 2.0 / size as f64;
                let at = |j: usize| f64::from(s[j]) * scale;
                ring.fold(|j| (at(j), at(j + size / 2)), &mut secret);
                ring.forward(&mut secret, &mut working);
                let mut digit = vec![0.0; size];
                digits.split(ring, index, a, &mut digit);
                ring.forward(&mut digit, &mut working);
                accumulate(&mut sum, &digit, &secret, component == 0);
            }
            ring.inverse(&mut sum, &mut working);
            ring.unfold(&sum, |_, a, b| {
                worst = worst.max((a - a.round()).abs()).max((b - b.round()).abs());
            });
            digits.join(ring, index, &sum, &mut values);
        }
        (values, worst)
    }

    fn check(set: ParameterSet, limbs: usize, a: &[u64], s: &[i32]) -> f64 {
        let size = set.polynomial_size();
        let mask = (1u64 << (8 * limbs)) - 1;
        let expected: Vec<u64> = schoolbook(a, s, size).iter().map(|value| value & mask).collect();
        let (wide, worst) = through_transform(limbs, size, a, s);
        assert!(wide.iter().map(|value| value & mask).eq(expected.iter().copied()), "{set} {limbs}");
        if limbs <= 4 {
            let a: Vec<u32> = a.iter().map(|&a| a as u32).collect();
            let (narrow, _) = through_transform(limbs, size, &a, s);
            assert!(narrow.iter().map(|&value| u64::from(value) & mask).eq(expected), "{set} {limbs}");
        }
        worst
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4))]
        #[test]
        fn products_are_those_of_the_schoolbook(seed: u64) {
            let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
            for set in ParameterSet::ALL {
                for limbs in 1..=set.limbs() {
                    let mask = (1u64 << (8 * limbs)) - 1;
                    let a: Vec<u64> = (0..set.mask_rows()).map(|_| rng.random::<u64>() & mask).collect();
                    let s: Vec<i32> = (0..set.mask_rows()).map(|_| rng.random_range(-1..=1)).collect();
                    let worst = check(set, limbs, &a, &s);
                    prop_assert!(worst < 1.0 / 64.0, "{} limbs of {}: {}", limbs, set, worst);
                }
            }
        }
    }

    #[test]
    fn the_largest_products_are_exact_too() {
        for set in ParameterSet::ALL {
            for limbs in 1..=set.limbs() {
                let top = 1u64 << (8 * limbs - 1);
                let ones = vec![1; set.mask_rows()];
                let alternating: Vec<i32> = (0..set.mask_rows()).map(|i| if i % 2 == 0 { 1 } else { -1 }).collect();
                for a in [top, top - 1] {
                    check(set, limbs, &vec![a; set.mask_rows()], &ones);
                    check(set, limbs, &vec![a; set.mask_rows()], &alternating);
                }
            }
        }
    }
}
