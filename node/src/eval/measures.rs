//! How near answers are to what they should have been.

use anyhow::{Context as _, ensure};
use regex::Regex;
use serde::Serialize;

use super::bleu::Bleu;
use super::chrf::Chrf;

/// What the answers of one model came to. Shares and scores are from 0 to 100.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Measures {
    /// Answers.
    pub(super) answers: usize,
    /// Answers that are the reference, white space around them aside; or, with an expression, whose cut is the reference's.
    pub(super) exact_match: f64,
    /// chrF2.
    pub(super) chrf: f64,
    /// BLEU.
    pub(super) bleu: f64,
    /// Answers out of which an expression cuts nothing; none without one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) without_answer: Option<usize>,
}

/// Adds answers up.
pub(super) struct Judge {
    expression: Option<AnswerExpression>,
    answers: usize,
    exact: usize,
    without: usize,
    chrf: Chrf,
    bleu: Bleu,
}

impl Judge {
    pub(super) fn new(expression: Option<AnswerExpression>) -> Self {
        let (chrf, bleu) = (Chrf::default(), Bleu::default());
        Self { expression, answers: 0, exact: 0, without: 0, chrf, bleu }
    }

    /// Adds an answer and what it should have been; whether it is right.
    pub(super) fn add(&mut self, answer: &str, reference: &str) -> bool {
        self.answers += 1;
        self.chrf.add(answer, reference);
        self.bleu.add(answer, reference);
        let right = match &self.expression {
            None => answer.trim() == reference.trim(),
            Some(expression) => {
                let cut = expression.cut(answer);
                self.without += usize::from(cut.is_none());
                cut.is_some() && cut == expression.cut(reference)
            }
        };
        self.exact += usize::from(right);
        right
    }

    /// What they came to.
    pub(super) fn measures(&self) -> Measures {
        Measures {
            answers: self.answers,
            exact_match: if self.answers == 0 { 0.0 } else { 100.0 * self.exact as f64 / self.answers as f64 },
            chrf: self.chrf.score(),
            bleu: self.bleu.score(),
            without_answer: self.expression.as_ref().map(|_| self.without),
        }
    }
}

/// Cuts what counts out of an answer.
#[derive(Clone, Debug)]
pub(super) struct AnswerExpression(Regex);

impl AnswerExpression {
    /// # Errors
    /// When it is no regular expression, or has more than one group.
    pub(super) fn new(text: &str) -> anyhow::Result<Self> {
        let expression = Regex::new(text).with_context(|| format!("--answer-regex: `{text}`"))?;
        let groups = expression.captures_len() - 1;
        ensure!(
            groups <= 1,
            "--answer-regex: `{text}` has {groups} groups; mark what counts by one, the others by (?:...)"
        );
        Ok(Self(expression))
    }

    /// The group of the last place that fits, or all of it without a group; commas between digits do not count.
    fn cut(&self, text: &str) -> Option<String> {
        let last = self.0.captures_iter(text).last()?;
        let cut = last.get(1).or_else(|| last.get(0))?.as_str().trim().trim_end_matches(['.', ',']);
        let number = cut.chars().all(|c| c.is_ascii_digit() || matches!(c, ',' | '.' | '-' | '+' | '$'));
        Some(if number { cut.replace(',', "") } else { cut.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use serde::Deserialize;

    use super::*;

    /// Texts and what sacreBLEU makes of them (`tests/eval_scores.py`).
    #[derive(Deserialize)]
    struct Corpus {
        answers: Vec<String>,
        references: Vec<String>,
        bleu: f64,
        chrf: f64,
    }

    #[test]
    fn scores_are_those_of_sacrebleu() {
        let corpora: Vec<Corpus> = serde_json::from_str(include_str!("../../../tests/eval_scores.json")).unwrap();
        assert!(corpora.len() >= 10);
        for (number, corpus) in corpora.iter().enumerate() {
            let mut judge = Judge::new(None);
            for (answer, reference) in corpus.answers.iter().zip(&corpus.references) {
                judge.add(answer, reference);
            }
            let measures = judge.measures();
            assert!((measures.bleu - corpus.bleu).abs() < 1e-9, "corpus {number}: {} {}", measures.bleu, corpus.bleu);
            assert!((measures.chrf - corpus.chrf).abs() < 1e-9, "corpus {number}: {} {}", measures.chrf, corpus.chrf);
        }
    }

    #[test]
    fn answers_are_cut_out_of_both_texts() {
        let expression = AnswerExpression::new(r"#### (-?[0-9.,]+)").unwrap();
        let mut judge = Judge::new(Some(expression));
        for (answer, reference, right) in [
            ("So 5 + 5.\n#### 1,000", "It is so.\n#### 1000", true),
            ("#### 3 no, #### 4.", "#### 4", true),
            ("#### 5", "#### 6", false),
            ("I do not know", "#### 6", false),
        ] {
            assert_eq!(judge.add(answer, reference), right, "{answer}");
        }
        let measures = judge.measures();
        assert_eq!((measures.exact_match, measures.without_answer, measures.answers), (50.0, Some(1), 4));
        assert!(AnswerExpression::new("(").is_err());
        let error = AnswerExpression::new("(a)(b)").unwrap_err().to_string();
        assert!(error.contains("2 groups"), "{error}");
        assert!(Judge::new(None).add(" same\n", "same"));
    }
}
