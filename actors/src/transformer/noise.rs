//! Noise on the embeddings of what is trained on (NEFTune, Jain et al., 2023): answers become less like the examples' words.

use rand::Rng as _;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

use crate::data::MicroBatch;
use crate::lora::Draw;

/// Adds noise to each sequence's embeddings, `tokens × features`: uniform in `±alpha / √(its tokens · features)`, the same for
/// the same place of a run. What fills the micro-batch up is left as it is.
pub(super) fn add(alpha: f32, draw: Draw, batch: &MicroBatch, features: usize, embedded: &mut [f32]) {
    let mut key = *b"velum embedding noise           ";
    key[8..16].copy_from_slice(&draw.seed.to_le_bytes());
    key[16..24].copy_from_slice(&draw.step.to_le_bytes());
    key[24..28].copy_from_slice(&draw.micro_batch.to_le_bytes());
    for (number, rows) in (0..).zip(batch.sequences()) {
        let size = alpha / ((rows.len() * features) as f32).sqrt();
        let mut random = ChaCha8Rng::from_seed(key);
        random.set_stream(number);
        let values = &mut embedded[rows.start * features..rows.end * features];
        values.iter_mut().for_each(|value| *value += size * random.random_range(-1.0f32..1.0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DRAW: Draw = Draw { seed: 1, step: 2, micro_batch: 3 };

    fn noise(alpha: f32, draw: Draw) -> Vec<f32> {
        let sequence = |length: usize| vec![0; length];
        let (short, long) = (sequence(4), sequence(100));
        let batch = MicroBatch::new([(&short[..], short.clone()), (&long[..], long.clone())], 0, 64);
        let mut values = vec![0.0; batch.tokens.len() * 9];
        add(alpha, draw, &batch, 9, &mut values);
        values
    }

    #[test]
    fn each_sequence_is_blurred_by_its_own_length_and_nothing_else_is() {
        let values = noise(5.0, DRAW);
        for (rows, tokens) in [(0..4, 4.0f32), (4..104, 100.0)] {
            let size = 5.0 / (tokens * 9.0).sqrt();
            let part = &values[rows.start * 9..rows.end * 9];
            let largest = part.iter().fold(0.0f32, |most, value| most.max(value.abs()));
            assert!(largest <= size && largest > 0.8 * size, "{largest} of {size}");
            assert!(part.iter().sum::<f32>().abs() < 0.3 * size * part.len() as f32);
        }
        assert!(values[104 * 9..].iter().all(|&value| value == 0.0));
    }

    #[test]
    fn the_same_place_draws_the_same() {
        assert_eq!(noise(5.0, DRAW), noise(5.0, DRAW));
        for other in [Draw { seed: 2, ..DRAW }, Draw { step: 3, ..DRAW }, Draw { micro_batch: 4, ..DRAW }] {
            assert_ne!(noise(5.0, DRAW), noise(5.0, other));
        }
    }
}
