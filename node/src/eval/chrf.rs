//! chrF (Popović, 2015) as sacreBLEU computes it: F2 of the n-grams of characters up to six, white space left out, over a
//! corpus with one reference.

use std::collections::HashMap;

/// Longest n-grams.
const ORDERS: usize = 6;
/// How much more recall weighs than precision.
const BETA: f64 = 2.0;

/// What the texts of a corpus add up to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Chrf {
    /// For each order the n-grams of the answers, of the references, and those that are in both.
    counts: [[u64; 3]; ORDERS],
}

impl Chrf {
    /// Adds an answer and what it should have been.
    pub(super) fn add(&mut self, answer: &str, reference: &str) {
        let [answer, reference] =
            [answer, reference].map(|text| text.split_whitespace().flat_map(str::chars).collect());
        let (answer, reference): (Vec<char>, Vec<char>) = (answer, reference);
        for (order, [said, known, both]) in (1..).zip(&mut self.counts) {
            let (answers, references) = (ngrams(&answer, order), ngrams(&reference, order));
            // Nothing is held against an answer where the reference has nothing to compare with.
            if !references.is_empty() {
                *said += answers.values().sum::<u64>();
            }
            *known += references.values().sum::<u64>();
            let matched =
                |(ngram, count): (&&[char], &u64)| references.get(*ngram).map_or(0, |known| *known.min(count));
            *both += answers.iter().map(matched).sum::<u64>();
        }
    }

    /// From 0 to 100.
    pub(super) fn score(&self) -> f64 {
        let (mut precision, mut recall, mut orders) = (0.0, 0.0, 0.0);
        for &[said, known, both] in self.counts.iter().filter(|counts| counts[0] > 0 && counts[1] > 0) {
            precision += both as f64 / said as f64;
            recall += both as f64 / known as f64;
            orders += 1.0;
        }
        if precision + recall == 0.0 {
            return 0.0;
        }
        let (precision, recall) = (precision / orders, recall / orders);
        let factor = BETA * BETA;
        100.0 * (1.0 + factor) * precision * recall / (factor * precision + recall)
    }
}

fn ngrams(text: &[char], order: usize) -> HashMap<&[char], u64> {
    let mut counts = HashMap::new();
    text.windows(order).for_each(|ngram| *counts.entry(ngram).or_insert(0) += 1);
    counts
}
