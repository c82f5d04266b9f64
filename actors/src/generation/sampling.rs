//! The next token, of the model's logits.
//!
//! The steps and their order are those of Hugging Face's `transformers`: repetition penalty, temperature, `top_k`, `top_p`,
//! `min_p`, each on what the one before has left. The random number of a token follows from the seed and the token's place in
//! the answer, and from nothing else: not from what else is computed, nor from how many tokens a pass has guessed.

use std::collections::HashSet;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore as _, SeedableRng as _};

use super::events::Scored;
use super::request::Sampling;
use crate::transformer::{exp_row, maximum};

/// Words of random numbers for each token.
const WORDS: u128 = 2;

/// Chooses the tokens of one text.
pub(super) struct Sampler {
    sampling: Sampling,
    random: ChaCha8Rng,
    /// Tokens of the text so far, if they matter.
    seen: HashSet<u32>,
}

impl Sampler {
    /// For a text that begins with these tokens.
    pub(super) fn new(sampling: Sampling, seed: u64, text: &[u32]) -> Self {
        let mut sampler = Self { sampling, random: ChaCha8Rng::seed_from_u64(seed), seen: HashSet::new() };
        text.iter().for_each(|&token| sampler.note(token));
        sampler
    }

    /// The text goes on with this token.
    pub(super) fn note(&mut self, token: u32) {
        if self.sampling.repetition_penalty != 1.0 {
            self.seen.insert(token);
        }
    }

    /// The token at a place of the answer, counted from 0, from the logits of the vocabulary.
    pub(super) fn choose(&mut self, place: usize, logits: &[f32]) -> u32 {
        let scores = self.penalised(logits);
        let scores = scores.as_deref().unwrap_or(logits);
        if self.sampling.temperature == 0.0 {
            return likeliest(scores);
        }
        let kept = distribution(&self.sampling, scores);
        let mut left = self.draw(place) * kept.iter().map(|(_, weight)| weight).sum::<f64>();
        for &(token, weight) in &kept {
            if left < weight {
                return token;
            }
            left -= weight;
        }
        // Rounding may leave a little behind the last one.
        kept.last().map_or_else(|| likeliest(scores), |&(token, _)| token)
    }

    /// Logits after the penalty, if there is one.
    fn penalised(&self, logits: &[f32]) -> Option<Vec<f32>> {
        if self.seen.is_empty() {
            return None;
        }
        let (mut scores, penalty) = (logits.to_vec(), self.sampling.repetition_penalty as f32);
        for &token in &self.seen {
            if let Some(score) = scores.get_mut(token as usize) {
                *score = if *score < 0.0 { *score * penalty } else { *score / penalty };
            }
        }
        Some(scores)
    }

    /// A number from 0 up to 1.
    fn draw(&mut self, place: usize) -> f64 {
        self.random.set_word_pos(place as u128 * WORDS);
        (self.random.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// The first of the largest.
pub(super) fn likeliest(scores: &[f32]) -> u32 {
    let largest = maximum(scores);
    scores.iter().position(|&score| score == largest).unwrap_or_default() as u32
}

/// Tokens that may be chosen at a temperature above 0, in the vocabulary's order, with weights that are proportional to their
/// probabilities.
fn distribution(sampling: &Sampling, scores: &[f32]) -> Vec<(u32, f64)> {
    let temperature = sampling.temperature as f32;
    let mut weights: Vec<f32> = scores.iter().map(|score| score / temperature).collect();
    let kth = match sampling.top_k {
        0 => f32::NEG_INFINITY,
        k => largest(&weights, k),
    };
    let kept: Vec<u32> = match sampling.top_k {
        0 => (0..weights.len() as u32).collect(),
        _ => (0..weights.len() as u32).filter(|&token| weights[token as usize] >= kth).collect(),
    };
    let top = maximum(&weights);
    exp_row(&mut weights, top);
    let mut kept: Vec<(u32, f64)> = kept.into_iter().map(|token| (token, f64::from(weights[token as usize]))).collect();
    if sampling.top_p < 1.0 {
        kept = nucleus(kept, sampling.top_p);
    }
    if sampling.min_p > 0.0 {
        // The likeliest token has the weight 1.
        kept.retain(|&(_, weight)| weight >= sampling.min_p);
    }
    kept
}

/// The `k`th largest of some numbers; the smallest, if there are fewer.
fn largest(values: &[f32], k: usize) -> f32 {
    let mut values = values.to_vec();
    let place = k.min(values.len()) - 1;
    *values.select_nth_unstable_by(place, |a, b| b.total_cmp(a)).1
}

/// What is left when the least likely tokens are removed for as long as their probabilities together are at most `1 − top_p`.
fn nucleus(mut heavy: Vec<(u32, f64)>, top_p: f64) -> Vec<(u32, f64)> {
    let total: f64 = heavy.iter().map(|(_, weight)| weight).sum();
    let mut removable = (1.0 - top_p) * total;
    // All that weigh no more than this can be removed together: no need to sort them.
    let (share, mut light) = (removable / heavy.len() as f64, 0.0);
    heavy.retain(|&(_, weight)| {
        light += if weight <= share { weight } else { 0.0 };
        weight > share
    });
    removable -= light;
    heavy.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    while heavy.len() > 1 {
        let Some(&(_, least)) = heavy.last() else { break };
        if least > removable {
            break;
        }
        removable -= least;
        heavy.pop();
    }
    heavy.sort_unstable_by_key(|&(token, _)| token);
    heavy
}

/// How likely a token is, and which ones are the likeliest, of the model's own logits.
pub(super) fn scored(logits: &[f32], id: u32, top: usize) -> Scored {
    let largest = maximum(logits);
    let sum = exp_row(&mut logits.to_vec(), largest);
    let logarithm = f64::from(largest) + f64::from(sum).ln();
    let of = |token: u32| (f64::from(logits[token as usize]) - logarithm) as f32;
    let top = top.min(logits.len());
    let mut tokens: Vec<u32> = (0..logits.len() as u32).filter(|_| top > 0).collect();
    let order = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    if top > 0 && top < tokens.len() {
        tokens.select_nth_unstable_by(top - 1, order);
        tokens.truncate(top);
    }
    tokens.sort_unstable_by(order);
    Scored { id, logprob: of(id), top: tokens.into_iter().map(|token| (token, of(token))).collect() }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    /// The distribution as `transformers` computes it, in double precision: every step on all logits, those removed at `-∞`.
    fn by_definition(sampling: &Sampling, logits: &[f32], seen: &[u32]) -> Vec<f64> {
        let mut scores: Vec<f64> = logits.iter().map(|&x| f64::from(x)).collect();
        for &token in seen.iter().collect::<HashSet<_>>() {
            let score = &mut scores[token as usize];
            *score *= if *score < 0.0 { sampling.repetition_penalty } else { sampling.repetition_penalty.recip() };
        }
        scores.iter_mut().for_each(|score| *score /= sampling.temperature);
        let softmax = |scores: &[f64]| {
            let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let exps: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
            let sum: f64 = exps.iter().sum();
            exps.into_iter().map(|x| x / sum).collect::<Vec<f64>>()
        };
        if sampling.top_k > 0 {
            let mut sorted = scores.clone();
            sorted.sort_by(|a, b| b.total_cmp(a));
            let least = sorted[sampling.top_k.min(sorted.len()) - 1];
            scores.iter_mut().filter(|score| **score < least).for_each(|score| *score = f64::NEG_INFINITY);
        }
        if sampling.top_p < 1.0 {
            let probabilities = softmax(&scores);
            let mut order: Vec<usize> = (0..scores.len()).collect();
            order.sort_by(|&a, &b| scores[a].total_cmp(&scores[b]));
            let (likeliest, others) = order.split_last().expect("there are tokens");
            let mut sum = 0.0;
            for &token in others {
                sum += probabilities[token];
                if sum <= 1.0 - sampling.top_p {
                    scores[token] = f64::NEG_INFINITY;
                }
            }
            assert!(scores[*likeliest].is_finite());
        }
        if sampling.min_p > 0.0 {
            let probabilities = softmax(&scores);
            let most = probabilities.iter().copied().fold(0.0, f64::max);
            for (score, probability) in scores.iter_mut().zip(&probabilities) {
                if *probability < sampling.min_p * most {
                    *score = f64::NEG_INFINITY;
                }
            }
        }
        softmax(&scores)
    }

    #[test]
    fn transformers_itself_leaves_the_same_probabilities() {
        #[derive(serde::Deserialize)]
        struct Fixture {
            sampling: Vec<Sampled>,
        }
        /// What `tests/generation.py` had transformers compute.
        #[derive(serde::Deserialize)]
        struct Sampled {
            settings: HashMap<String, f64>,
            logits: Vec<f32>,
            seen: Vec<u32>,
            probabilities: Vec<f64>,
        }
        let text =
            std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/generation.json")).expect("the fixture");
        let Fixture { sampling } = serde_json::from_slice(&text).expect("the fixture's form");
        for Sampled { settings, logits, seen, probabilities } in sampling {
            let setting = |name: &str, usual: f64| settings.get(name).copied().unwrap_or(usual);
            let sampling = Sampling {
                temperature: settings["temperature"],
                top_p: setting("top_p", 1.0),
                top_k: setting("top_k", 0.0) as usize,
                min_p: setting("min_p", 0.0),
                repetition_penalty: setting("repetition_penalty", 1.0),
                seed: None,
            };
            let sampler = Sampler::new(sampling, 1, &seen);
            let kept = distribution(&sampling, sampler.penalised(&logits).as_deref().unwrap_or(&logits));
            let sum: f64 = kept.iter().map(|(_, weight)| weight).sum();
            let mut found = vec![0.0; logits.len()];
            kept.iter().for_each(|&(token, weight)| found[token as usize] = weight / sum);
            let off = found.iter().zip(&probabilities).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
            assert!(off < 1e-5, "{settings:?}: off by {off}");
        }
    }

    fn logits(count: usize) -> impl Strategy<Value = Vec<f32>> {
        proptest::collection::vec(-8.0f32..8.0, count)
    }

    fn settings() -> impl Strategy<Value = Sampling> {
        let top_p = prop_oneof![Just(1.0), 0.05..0.99f64];
        let (top_k, min_p) = (prop_oneof![Just(0usize), 1usize..70], prop_oneof![Just(0.0), 0.01..0.9f64]);
        (0.2..3.0f64, top_p, top_k, min_p, 0.5..2.0f64).prop_map(|(temperature, top_p, top_k, min_p, penalty)| {
            Sampling { temperature, top_p, top_k, min_p, repetition_penalty: penalty, seed: None }
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        #[test]
        fn the_distribution_is_that_of_transformers(
            logits in logits(60),
            sampling in settings(),
            seen in proptest::collection::vec(0u32..60, 0..20),
        ) {
            let sampler = Sampler::new(sampling, 1, &seen);
            let scores = sampler.penalised(&logits).unwrap_or_else(|| logits.clone());
            let kept = distribution(&sampling, &scores);
            let sum: f64 = kept.iter().map(|(_, weight)| weight).sum();
            let mut found = vec![0.0; logits.len()];
            kept.iter().for_each(|&(token, weight)| found[token as usize] = weight / sum);
            let expected = by_definition(&sampling, &logits, &seen);
            for (token, (found, expected)) in found.iter().zip(&expected).enumerate() {
                prop_assert!((found - expected).abs() < 1e-5, "token {token}: {found} for {expected} by {sampling:?}");
            }
        }

        #[test]
        fn log_probabilities_add_up_and_the_likeliest_come_first(logits in logits(50), id in 0u32..50, top in 0usize..60) {
            let all = scored(&logits, id, 50);
            let sum: f64 = all.top.iter().map(|&(_, logprob)| f64::from(logprob).exp()).sum();
            prop_assert!((sum - 1.0).abs() < 1e-5);
            prop_assert!(all.top.is_sorted_by(|a, b| a.1 >= b.1));
            prop_assert!(all.top.contains(&(id, all.logprob)));
            let some = scored(&logits, id, top);
            prop_assert_eq!(&some.top[..], &all.top[..top.min(50)]);
            prop_assert_eq!(all.top[0].0, likeliest(&logits));
        }
    }

    #[test]
    fn tokens_come_as_often_as_they_are_likely() {
        let logits: Vec<f32> = (0..40).map(|i| ((i * 29 % 17) as f32) / 5.0).collect();
        let sampling = Sampling { temperature: 0.8, top_p: 0.9, ..Sampling::default() };
        let expected = by_definition(&sampling, &logits, &[]);
        let (mut sampler, draws) = (Sampler::new(sampling, 7, &[]), 40_000);
        let mut counts: HashMap<u32, usize> = HashMap::new();
        (0..draws).for_each(|place| *counts.entry(sampler.choose(place, &logits)).or_default() += 1);
        for (token, &expected) in expected.iter().enumerate() {
            let found = counts.get(&(token as u32)).copied().unwrap_or(0) as f64 / f64::from(draws as u32);
            let deviation = (expected * (1.0 - expected) / draws as f64).sqrt();
            assert!((found - expected).abs() <= 5.0 * deviation, "token {token}: {found} for {expected}");
        }
        let again = Sampler::new(sampling, 7, &[]).choose(5, &logits);
        assert_eq!(sampler.choose(5, &logits), again, "a place has its number, whatever was drawn before");
    }

    #[test]
    fn at_temperature_0_the_first_of_the_largest_is_taken_after_the_penalty() {
        let logits = [1.0, 3.0, 3.0, 2.5];
        assert_eq!(Sampler::new(Sampling::default(), 1, &[]).choose(0, &logits), 1);
        let penalised = Sampling { repetition_penalty: 1.5, ..Sampling::default() };
        let mut sampler = Sampler::new(penalised, 1, &[1]);
        assert_eq!(sampler.choose(0, &logits), 2);
        sampler.note(2);
        assert_eq!(sampler.choose(1, &logits), 3);
    }
}
