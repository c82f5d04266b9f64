//! Parameter sets: ring, modulus, error, and how many bits of each value travel.
//!
//! Each set has an estimate in the repository (`benches/security/`); one without an estimate does not exist.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::Planes;

/// A set of encryption parameters: ring `Z[X]/(X^N + 1)`, GLWE dimension `k`, modulus `q = 2^(8·L)`, ternary
/// secrets and a centred binomial error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ParameterSet {
    /// `N = 1024, k = 1, q = 2^24`, η = 4: the cheapest; for inner dimensions to about 1,000. 2^135.7.
    P24,
    /// `N = 256, k = 5, q = 2^32`, η = 21: error at the level of the int8 weights for every Llama. 2^133.7.
    P32,
    /// `N = 2048, k = 1, q = 2^48`, η = 21: for studies at 16 bits and beyond. 2^142.8.
    P48,
}

impl ParameterSet {
    /// Every set, cheapest first.
    pub const ALL: [Self; 3] = [Self::P24, Self::P32, Self::P48];

    /// Degree `N` of the ring: tokens per secret.
    pub const fn polynomial_size(self) -> usize {
        match self {
            Self::P24 => 1024,
            Self::P32 => 256,
            Self::P48 => 2048,
        }
    }

    /// GLWE dimension `k`: mask polynomials per ciphertext.
    pub const fn glwe_dimension(self) -> usize {
        match self {
            Self::P24 | Self::P48 => 1,
            Self::P32 => 5,
        }
    }

    /// `n = k·N`: rows that the mask adds to a product.
    pub const fn mask_rows(self) -> usize {
        self.polynomial_size() * self.glwe_dimension()
    }

    /// Byte limbs `L` of a value mod `q`.
    pub const fn limbs(self) -> usize {
        match self {
            Self::P24 => 3,
            Self::P32 => 4,
            Self::P48 => 6,
        }
    }

    /// `log2 q`.
    pub const fn modulus_bits(self) -> u32 {
        8 * self.limbs() as u32
    }

    /// Half of the width of the centred binomial error: each error is a difference of two sums of η bits,
    /// of variance `η/2`.
    pub const fn error_eta(self) -> u32 {
        match self {
            Self::P24 => 4,
            Self::P32 | Self::P48 => 21,
        }
    }

    /// log2 of the cost of the cheapest known attack (lattice-estimator, MATZOV, 2^24 samples).
    pub const fn security_bits(self) -> f64 {
        match self {
            Self::P24 => 135.7,
            Self::P32 => 133.7,
            Self::P48 => 142.8,
        }
    }

    /// The name used in configurations and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::P24 => "p24",
            Self::P32 => "p32",
            Self::P48 => "p48",
        }
    }
}

impl fmt::Display for ParameterSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How one product is computed: the parameter set, and how many of the most significant bits of each kind of value
/// travel, the rest being rounded off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Precision {
    /// Parameters of the encryption.
    pub set: ParameterSet,
    /// Bits of a body value on its way up, even, from 8 to those of the modulus.
    pub body_bits: u8,
    /// Byte limbs of a value of the mask product on its way down, `1..=set.limbs()`: it comes once a run.
    pub mask_limbs: u8,
    /// Bits of a value of the body product on its way down, even, from 8 to `body_bits`.
    pub output_bits: u8,
}

impl Precision {
    /// Whole bytes, as few as leave each set's error near that of the encryption.
    pub const fn standard(set: ParameterSet) -> Self {
        let (body_bits, mask_limbs, output_bits) = match set {
            ParameterSet::P24 | ParameterSet::P32 => (24, 3, 16),
            ParameterSet::P48 => (48, 5, 32),
        };
        Self { set, body_bits, mask_limbs, output_bits }
    }

    /// Nothing is rounded off, neither up nor down.
    pub const fn exact(set: ParameterSet) -> Self {
        let bits = set.modulus_bits() as u8;
        Self { set, body_bits: bits, mask_limbs: set.limbs() as u8, output_bits: bits }
    }

    /// The same with body and output filled up to whole bytes.
    pub const fn in_whole_bytes(self) -> Self {
        let (body_bits, output_bits) = (self.body_bits.next_multiple_of(8), self.output_bits.next_multiple_of(8));
        Self { body_bits, output_bits, ..self }
    }

    /// Every valid precision of a set.
    pub fn all(set: ParameterSet) -> impl Iterator<Item = Self> {
        let bits = |most: u8| (8..=most).filter(|&bits| Planes::has_width(bits.into()));
        bits(set.modulus_bits() as u8).flat_map(move |body_bits| {
            (1..=set.limbs() as u8).flat_map(move |mask_limbs| {
                bits(body_bits).map(move |output_bits| Self { set, body_bits, mask_limbs, output_bits })
            })
        })
    }

    /// Whether the numbers are ones that the set has, and no output has more bits than its body.
    pub const fn is_valid(self) -> bool {
        let Self { set, body_bits, mask_limbs, output_bits } = self;
        Planes::has_width(output_bits as u32)
            && Planes::has_width(body_bits as u32)
            && output_bits <= body_bits
            && body_bits as u32 <= set.modulus_bits()
            && mask_limbs >= 1
            && mask_limbs as usize <= set.limbs()
    }

    /// What the magnitude of an encoded value has to be below, so that it does not wrap.
    pub(super) fn encodable(self) -> f64 {
        f64::from(self.set.modulus_bits() - 1).exp2() - 0.5
    }

    /// Bits that the owner rounds off each body value after encryption.
    pub const fn body_dropped_bits(self) -> u32 {
        self.set.modulus_bits() - self.body_bits as u32
    }

    /// Bits below an output value: those missing from the body, and those dropped by the worker's modulus switching.
    pub const fn output_dropped_bits(self) -> u32 {
        self.set.modulus_bits() - self.output_bits as u32
    }

    /// Bits that the worker rounds off each value of the mask product.
    pub const fn mask_dropped_bits(self) -> u32 {
        self.set.modulus_bits() - 8 * self.mask_limbs as u32
    }
}

impl fmt::Display for Precision {
    /// `set/body:output` in bits, e.g. `p24/22:10`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}:{}", self.set, self.body_bits, self.output_bits)
    }
}
