//! BLEU of a corpus (Papineni et al., 2002) as sacreBLEU computes it: its tokenizer `13a`, n-grams up to four, exponential
//! smoothing, one reference.

use std::collections::HashMap;
use std::sync::LazyLock;

use regex::Regex;

/// Longest n-grams.
const ORDERS: usize = 4;

/// What the texts of a corpus add up to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Bleu {
    /// For each order the n-grams of the answers that are in the references, and all of them.
    correct: [u64; ORDERS],
    total: [u64; ORDERS],
    /// Words of the answers, and of the references.
    words: [u64; 2],
}

impl Bleu {
    /// Adds an answer and what it should have been.
    pub(super) fn add(&mut self, answer: &str, reference: &str) {
        let (answer, reference) = (tokenized(answer), tokenized(reference));
        let words = [answer.as_str(), reference.as_str()].map(|text| text.split_whitespace().collect::<Vec<_>>());
        for order in 1..=ORDERS {
            let [said, known] = [&words[0], &words[1]].map(|words| ngrams(words, order));
            let matched = |(ngram, count): (&&[&str], &u64)| known.get(*ngram).map_or(0, |known| *known.min(count));
            self.correct[order - 1] += said.iter().map(matched).sum::<u64>();
            self.total[order - 1] += said.values().sum::<u64>();
        }
        for (sum, words) in self.words.iter_mut().zip(&words) {
            *sum += words.len() as u64;
        }
    }

    /// From 0 to 100.
    pub(super) fn score(&self) -> f64 {
        if self.correct == [0; ORDERS] {
            return 0.0;
        }
        let mut smoothing = 1.0;
        let mut logarithms = 0.0;
        for (&correct, &total) in self.correct.iter().zip(&self.total) {
            if total == 0 {
                // No answer is so long: the mean has a factor of zero.
                return 0.0;
            }
            let correct = if correct == 0 {
                smoothing *= 2.0;
                1.0 / smoothing
            } else {
                correct as f64
            };
            logarithms += (correct / total as f64).ln();
        }
        let [answers, references] = self.words.map(|words| words as f64);
        let brevity = if answers < references { (1.0 - references / answers).exp() } else { 1.0 };
        100.0 * brevity * (logarithms / ORDERS as f64).exp()
    }
}

fn ngrams<'w, 't>(words: &'w [&'t str], order: usize) -> HashMap<&'w [&'t str], u64> {
    let mut counts = HashMap::new();
    words.windows(order).for_each(|ngram| *counts.entry(ngram).or_insert(0) += 1);
    counts
}

/// Steps of the tokenizer: what is found, and what stands in its place.
static STEPS: LazyLock<Vec<(Regex, &str)>> = LazyLock::new(|| {
    let steps = [
        // Signs.
        (r"([\{-\~\[-` -&\(-\+:-@/])", " $1 "),
        // A full stop or comma that is not part of a number.
        (r"([^0-9])([\.,])", "$1 $2 "),
        (r"([\.,])([^0-9])", " $1 $2"),
        // A dash behind a digit.
        (r"([0-9])(-)", "$1 $2 "),
    ];
    steps.into_iter().filter_map(|(find, put)| Some((Regex::new(find).ok()?, put))).collect()
});

/// A text with white space around its words and signs.
fn tokenized(text: &str) -> String {
    let mut line = text.trim_end().replace("<skipped>", "").replace("-\n", "").replace('\n', " ");
    if line.contains('&') {
        for (name, sign) in [("&quot;", "\""), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")] {
            line = line.replace(name, sign);
        }
    }
    let mut line = format!(" {line} ");
    for (find, put) in STEPS.iter() {
        line = find.replace_all(&line, *put).into_owned();
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_step_of_the_tokenizer_is_an_expression() {
        assert_eq!(STEPS.len(), 4);
        let words = |text: &str| tokenized(text).split_whitespace().collect::<Vec<_>>().join(" ");
        assert_eq!(words("It's 3,500.5 km (or 2-3 &amp; more)."), "It's 3,500.5 km ( or 2 - 3 & more ) .");
    }
}
