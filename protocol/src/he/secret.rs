//! One-time secrets.

use super::ParameterSet;
use super::fft::Ring;
use super::sampling::{SecretRng, ternary};
use crate::wiped::Wiped;

/// The ternary secret of one token block of one call.
///
/// It is drawn by an encryption, used by it and by one decryption, and gone: it can be neither copied, printed nor
/// serialised, and its memory is wiped on drop.
pub(crate) struct OneTimeSecret {
    /// Transform of each component divided by `N/2`, `[component][N]`.
    transformed: Wiped<f64>,
}

impl OneTimeSecret {
    /// A fresh secret.
    pub(crate) fn generate(set: ParameterSet, rng: &mut SecretRng) -> Self {
        let mut coefficients = Wiped::zeros(set.mask_rows());
        ternary(rng, &mut coefficients);
        Self::of(set, &coefficients)
    }

    /// The secret with these coefficients, `[component][N]`.
    pub(crate) fn of(set: ParameterSet, coefficients: &[i8]) -> Self {
        let size = set.polynomial_size();
        let ring = Ring::of_size(size);
        let mut transformed = Wiped::zeros(coefficients.len());
        let mut working = Wiped::zeros(ring.working_numbers());
        let scale = 2.0 / size as f64;
        for (out, coefficients) in transformed.chunks_exact_mut(size).zip(coefficients.chunks_exact(size)) {
            let scaled = |j: usize| f64::from(coefficients[j]) * scale;
            ring.fold(|j| (scaled(j), scaled(j + size / 2)), out);
            ring.forward(out, &mut working);
        }
        Self { transformed }
    }

    /// The transform of one component, divided by `N/2`.
    pub(crate) fn component(&self, index: usize, size: usize) -> &[f64] {
        &self.transformed[index * size..(index + 1) * size]
    }

    /// The coefficients, `[component][N]`, for an independent decryption.
    #[cfg(test)]
    pub(crate) fn coefficients(&self, set: ParameterSet) -> Vec<i8> {
        let size = set.polynomial_size();
        let ring = Ring::of_size(size);
        let mut working = vec![0.0; ring.working_numbers()];
        let mut coefficients = vec![0; self.transformed.len()];
        for (out, transformed) in coefficients.chunks_exact_mut(size).zip(self.transformed.chunks_exact(size)) {
            let mut polynomial = transformed.to_vec();
            ring.inverse(&mut polynomial, &mut working);
            let (low, high) = out.split_at_mut(size / 2);
            ring.unfold(&polynomial, |j, a, b| (low[j], high[j]) = (a.round() as i8, b.round() as i8));
        }
        coefficients
    }
}
