//! Which input features an adapter does not see, the same on every machine and with every backend.

use rand::RngCore;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

/// Everything that a draw depends on. The same place always draws the same, so that the backward pass can draw
/// again instead of keeping masks, and runs with different backends are comparable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Draw {
    /// The run's seed.
    pub(crate) seed: u64,
    /// Optimiser step.
    pub(crate) step: u64,
    /// Micro-batch of the step.
    pub(crate) micro_batch: u32,
}

/// Drops features of one projection's input.
pub(crate) struct Dropout {
    key: [u8; 32],
    /// A 16-bit draw below this drops.
    threshold: u32,
}

impl Dropout {
    /// `rate` is at least 0 and less than 1.
    pub(crate) fn new(rate: f32, draw: Draw, layer: u16, projection: u8) -> Self {
        let mut key = *b"velum adapter dropout           ";
        key[9..17].copy_from_slice(&draw.seed.to_le_bytes());
        key[17..25].copy_from_slice(&draw.step.to_le_bytes());
        key[25..29].copy_from_slice(&draw.micro_batch.to_le_bytes());
        key[29..31].copy_from_slice(&layer.to_le_bytes());
        key[31] = projection;
        Self { key, threshold: (rate * 65536.0).round().min(65535.0) as u32 }
    }

    /// Factors of one token's features: 0 where dropped, else what keeps the expectation.
    pub(crate) fn factors(&self, token: usize, factors: &mut [f32]) {
        let kept = 65536.0 / (65536 - self.threshold) as f32;
        let mut random = ChaCha8Rng::from_seed(self.key);
        random.set_stream(token as u64);
        for pair in factors.chunks_mut(2) {
            let draw = random.next_u32();
            for (factor, draw) in pair.iter_mut().zip([draw & 0xffff, draw >> 16]) {
                *factor = if draw < self.threshold { 0.0 } else { kept };
            }
        }
    }

    /// The factors of the tokens from the first on, `tokens × features`.
    #[cfg(test)]
    pub(crate) fn of_tokens(&self, tokens: usize, features: usize) -> Vec<f32> {
        let mut factors = vec![0.0; tokens * features];
        factors.chunks_mut(features).enumerate().for_each(|(token, row)| self.factors(token, row));
        factors
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DRAW: Draw = Draw { seed: 1, step: 2, micro_batch: 3 };

    #[test]
    fn drops_its_share_and_keeps_the_expectation() {
        let factors = Dropout::new(0.25, DRAW, 0, 0).of_tokens(64, 513);
        let dropped = factors.iter().filter(|&&f| f == 0.0).count() as f64 / factors.len() as f64;
        assert!((dropped - 0.25).abs() < 0.01, "{dropped}");
        let mean = factors.iter().map(|&f| f64::from(f)).sum::<f64>() / factors.len() as f64;
        assert!((mean - 1.0).abs() < 0.015, "{mean}");
        assert!(Dropout::new(0.0, DRAW, 0, 0).of_tokens(4, 100).iter().all(|&f| f == 1.0));
    }

    #[test]
    fn every_part_of_the_place_changes_the_draw() {
        let first = Dropout::new(0.5, DRAW, 0, 0).of_tokens(2, 64);
        assert_eq!(first, Dropout::new(0.5, DRAW, 0, 0).of_tokens(2, 64));
        assert_ne!(first[..64], first[64..]);
        for (draw, layer, projection) in [
            (Draw { seed: 2, ..DRAW }, 0, 0),
            (Draw { step: 3, ..DRAW }, 0, 0),
            (Draw { micro_batch: 4, ..DRAW }, 0, 0),
            (DRAW, 1, 0),
            (DRAW, 0, 1),
        ] {
            assert_ne!(first, Dropout::new(0.5, draw, layer, projection).of_tokens(2, 64));
        }
    }
}
