//! Parameter sets: ring, modulus, error, and how many bytes of an output value are sent back.
//!
//! Each set has an estimate in the repository (`benches/security/`); one without an estimate does not exist.

use std::fmt;

use serde::{Deserialize, Serialize};

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

/// How one product is computed: the parameter set, and how many of the most significant byte limbs of each
/// output value survive the worker's modulus switching.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Precision {
    /// Parameters of the encryption.
    pub set: ParameterSet,
    /// Byte limbs of an output value, `1..=set.limbs()`.
    pub output_limbs: u8,
}

impl Precision {
    /// The usual answer of each set: two bytes for P24, three for P32, four for P48.
    pub const fn standard(set: ParameterSet) -> Self {
        let output_limbs = match set {
            ParameterSet::P24 => 2,
            ParameterSet::P32 => 3,
            ParameterSet::P48 => 4,
        };
        Self { set, output_limbs }
    }

    /// Whether `output_limbs` is a count that the set has.
    pub const fn is_valid(self) -> bool {
        self.output_limbs >= 1 && self.output_limbs as usize <= self.set.limbs()
    }

    /// Bits dropped from each output value by modulus switching.
    pub const fn dropped_bits(self) -> u32 {
        self.set.modulus_bits() - 8 * self.output_limbs as u32
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.set, self.output_limbs)
    }
}
