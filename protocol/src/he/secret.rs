//! One-time secrets.

use zeroize::Zeroizing;

use super::ParameterSet;
use super::ntt::{Ring, residue};
use super::sampling::{SecretRng, ternary};

/// The ternary secret of one token block of one call.
///
/// It is drawn by an encryption, used by it and by one decryption, and gone: it can be neither copied, printed nor
/// serialised, and its memory is wiped on drop.
pub(crate) struct OneTimeSecret {
    /// Transform of each component divided by `N`, `[component][N]`.
    transformed: Zeroizing<Box<[u32]>>,
}

impl OneTimeSecret {
    /// A fresh secret.
    pub(crate) fn generate(set: ParameterSet, rng: &mut SecretRng) -> Self {
        let mut coefficients = Zeroizing::new(vec![0i8; set.mask_rows()].into_boxed_slice());
        ternary(rng, &mut coefficients);
        Self::of(set, &coefficients)
    }

    /// The secret with these coefficients, `[component][N]`.
    pub(crate) fn of(set: ParameterSet, coefficients: &[i8]) -> Self {
        let ring = Ring::of_size(set.polynomial_size());
        let residues: Box<[u32]> = coefficients.iter().map(|&s| residue(i32::from(s))).collect();
        let mut transformed = Zeroizing::new(residues);
        for component in transformed.chunks_exact_mut(set.polynomial_size()) {
            ring.forward(component);
            ring.normalize(component);
        }
        Self { transformed }
    }

    /// The transform of one component, divided by `N`.
    pub(crate) fn component(&self, index: usize, size: usize) -> &[u32] {
        &self.transformed[index * size..(index + 1) * size]
    }

    /// The coefficients, `[component][N]`, for an independent decryption.
    #[cfg(test)]
    pub(crate) fn coefficients(&self, set: ParameterSet) -> Vec<i8> {
        let ring = Ring::of_size(set.polynomial_size());
        let mut residues = self.transformed.to_vec();
        for component in residues.chunks_exact_mut(set.polynomial_size()) {
            ring.inverse(component);
        }
        residues.iter().map(|&value| super::ntt::nearest(value) as i8).collect()
    }
}
