//! Secrets and errors: a ChaCha20 generator seeded by the operating system, uniform ternary coefficients and centred
//! binomial errors.
//!
//! All rounds, since everything hangs on these bytes; and no table, since they are secret: ChaCha is as fast as it is on
//! every processor, and takes no longer for one key than for another. No bit of it is left over: an error of η is a number
//! of ones among 2η bits, and takes as many.

use chacha20::ChaCha20;
use cipher::{KeyIvInit, StreamCipher};
use zeroize::{ZeroizeOnDrop, Zeroizing};

use super::ParameterSet;
use super::word::Word;
use crate::wiped::Wiped;

/// ChaCha20 keyed by 32 bytes from the operating system; wiped on drop.
pub(crate) struct SecretRng {
    cipher: ChaCha20,
}

/// The cipher wipes its key, and its rest of a block, only where both libraries were built to: a build in which one was not
/// does not compile.
const _: () = {
    const fn is_wiped<T: ZeroizeOnDrop>() {}
    is_wiped::<ChaCha20>();
};

impl SecretRng {
    /// A generator whose key nobody has seen.
    pub(crate) fn from_os() -> Result<Self, getrandom::Error> {
        let mut key = Zeroizing::new([0u8; 32]);
        getrandom::fill(key.as_mut())?;
        // The key is used once, so the nonce may be constant.
        Ok(Self { cipher: ChaCha20::new((&*key).into(), &[0; 12].into()) })
    }

    /// The generator of a key that was drawn from another one, for what is drawn again instead of being kept.
    pub(crate) fn from_key(key: &[u8; 32]) -> Self {
        Self { cipher: ChaCha20::new(key.into(), &[0; 12].into()) }
    }

    /// Fills `out` with random bytes.
    pub(crate) fn fill(&mut self, out: &mut [u8]) {
        self.cipher.write_keystream(out);
    }
}

/// Fills `out` with independent uniform coefficients of -1, 0, 1.
///
/// A byte below 255 is uniform mod 3; byte 255 is thrown away. The only branch is on whether a byte is thrown away,
/// which tells nothing about those that are kept.
pub(crate) fn ternary(rng: &mut SecretRng, out: &mut [i8]) {
    let mut bytes = Zeroizing::new([0u8; 256]);
    let mut filled = 0;
    while filled < out.len() {
        rng.fill(bytes.as_mut());
        for &byte in bytes.iter() {
            if byte != u8::MAX && filled < out.len() {
                // ⌊byte/3⌋ as a multiplication, exact for every byte.
                let third = (u16::from(byte) * 171) >> 9;
                out[filled] = (u16::from(byte) - 3 * third) as i8 - 1;
                filled += 1;
            }
        }
    }
}

/// Centred binomial errors: a sum of η bits less another sum of η bits is distributed like the number of ones among
/// 2η bits, less η; so an error is one population count.
pub(crate) struct ErrorSampler {
    eta: u32,
    bytes: Wiped<u8>,
    counts: Wiped<u8>,
}

impl ErrorSampler {
    /// A sampler of `count` errors at a time, `count` a multiple of 4.
    pub(crate) fn new(set: ParameterSet, count: usize) -> Self {
        debug_assert!(count.is_multiple_of(4));
        let eta = set.error_eta();
        Self { eta, bytes: Wiped::zeros(Self::random_bytes(eta, count)), counts: Wiped::zeros(count) }
    }

    /// η = 4 takes a byte. η = 21 takes 42 bits: five whole bytes, and a quarter of a byte shared by four.
    const fn random_bytes(eta: u32, count: usize) -> usize {
        match eta {
            4 => count,
            21 => 5 * count + count / 4,
            _ => panic!("no parameter set has this η"),
        }
    }

    /// Adds fresh errors to `values` (as many as the sampler was made for).
    #[inline(always)]
    pub(crate) fn add_to<W: Word>(&mut self, rng: &mut SecretRng, values: &mut [W]) {
        rng.fill(&mut self.bytes);
        let count = self.counts.len();
        let (first, rest) = self.bytes.split_at(count);
        for (sum, &byte) in self.counts.iter_mut().zip(first) {
            *sum = ones(byte);
        }
        if self.eta == 21 {
            let (whole, shared) = rest.split_at(4 * count);
            for bytes in whole.chunks_exact(count) {
                for (sum, &byte) in self.counts.iter_mut().zip(bytes) {
                    *sum += ones(byte);
                }
            }
            for (quarter, sums) in self.counts.chunks_exact_mut(count / 4).enumerate() {
                for (sum, &byte) in sums.iter_mut().zip(shared) {
                    *sum += ones((byte >> (2 * quarter)) & 3);
                }
            }
        }
        let eta = self.eta as i32;
        for (value, &sum) in values.iter_mut().zip(self.counts.iter()) {
            *value = value.add(W::of_signed(i32::from(sum) - eta));
        }
    }
}

/// Ones of a byte, by arithmetic that the compiler can spread over a vector.
#[inline(always)]
fn ones(byte: u8) -> u8 {
    let pairs = byte - ((byte >> 1) & 0x55);
    let nibbles = (pairs & 0x33) + ((pairs >> 2) & 0x33);
    (nibbles + (nibbles >> 4)) & 0x0f
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ones_are_counted() {
        assert!((0..=u8::MAX).all(|byte| u32::from(ones(byte)) == byte.count_ones()));
    }

    #[test]
    fn ternary_coefficients_are_uniform() {
        let mut rng = SecretRng::from_os().expect("the operating system has entropy");
        let mut coefficients = vec![7i8; 300_000];
        ternary(&mut rng, &mut coefficients);
        // 6 σ of a binomial count: σ = √(300000·2/9) = 258.
        for value in -1..=1 {
            let count = coefficients.iter().filter(|&&coefficient| coefficient == value).count();
            assert!(count.abs_diff(100_000) < 1_550, "{value}: {count}");
        }
    }

    /// Probability of each centred binomial error, by summing binomial coefficients.
    fn probability(eta: u32, error: i32) -> f64 {
        let ones = (error + eta as i32) as u32;
        (0..ones).fold(0.25f64.powi(eta as i32), |p, i| p * f64::from(2 * eta - i) / f64::from(i + 1))
    }

    #[test]
    fn errors_are_centred_binomial() {
        let mut rng = SecretRng::from_os().expect("the operating system has entropy");
        for set in ParameterSet::ALL {
            let (eta, size, rounds) = (set.error_eta(), 1024, 400);
            let mut sampler = ErrorSampler::new(set, size);
            let mut counts = vec![0u32; 2 * eta as usize + 1];
            for _ in 0..rounds {
                let mut values = vec![0u32; size];
                sampler.add_to(&mut rng, &mut values);
                for value in values {
                    counts[(value as i32 + eta as i32) as usize] += 1;
                }
            }
            let total = (size * rounds) as f64;
            for (index, &count) in counts.iter().enumerate() {
                let expected = total * probability(eta, index as i32 - eta as i32);
                assert!((f64::from(count) - expected).abs() < 6.0 * expected.sqrt() + 6.0, "{set} {index}: {count}");
            }
        }
    }
}
