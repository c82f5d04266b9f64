//! What one step of the model takes: sequences of tokens, and which of them carry loss.

use std::ops::Range;

use super::Example;

/// Target of a position that carries no loss: a prompt, padding, the last token of a sequence.
pub const IGNORED: u32 = u32::MAX;

/// Padding attends to no more of itself than this, so that it costs little however much there is.
const PADDING_RUN: usize = 64;

/// Sequences one after the other, with the token that each position should predict.
///
/// Nothing is padded to the length of another sequence: to a linear layer rows are just rows, and attention goes over each
/// sequence by itself. What follows the last one makes the number of rows up to a multiple, so that whoever sees it
/// does not learn the lengths of texts exactly; it carries no loss, and no sequence sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MicroBatch {
    /// Tokens of each sequence, at least one.
    pub lengths: Vec<usize>,
    /// The number of rows is a multiple of this.
    pub multiple: usize,
    /// Inputs: those of the sequences and then padding.
    pub tokens: Vec<u32>,
    /// For each input the token that comes next (already shifted), or [`IGNORED`].
    pub targets: Vec<u32>,
    /// Which units of their data set the sequences are: one number a sequence, or one a pair of them; empty where they are
    /// of none.
    pub numbers: Vec<usize>,
}

impl MicroBatch {
    /// Sequences of tokens and their targets, of which each has as many, made up with the token `padding` to the next
    /// multiple of `multiple ≥ 1`.
    pub fn new<'a>(sequences: impl IntoIterator<Item = (&'a [u32], Vec<u32>)>, padding: u32, multiple: usize) -> Self {
        let multiple = multiple.max(1);
        let mut batch =
            Self { lengths: Vec::new(), multiple, tokens: Vec::new(), targets: Vec::new(), numbers: Vec::new() };
        for (tokens, targets) in sequences {
            batch.lengths.push(tokens.len());
            batch.tokens.extend(tokens);
            batch.targets.extend(targets);
        }
        let rows = batch.tokens.len().next_multiple_of(multiple);
        batch.tokens.resize(rows, padding);
        batch.targets.resize(rows, IGNORED);
        batch
    }

    /// Examples one after the other, which are these units of their data set.
    pub(super) fn of(examples: &[&Example], numbers: Vec<usize>, padding: u32, multiple: usize) -> Self {
        let sequence = |example: &&'_ Example| {
            let next = example.tokens.iter().zip(&example.learnt).skip(1);
            let targets = next.map(|(&token, &learnt)| if learnt { token } else { IGNORED });
            targets.chain([IGNORED]).take(example.tokens.len()).collect()
        };
        let sequences = examples.iter().map(|example| (&example.tokens[..], sequence(example)));
        Self { numbers, ..Self::new(sequences, padding, multiple) }
    }

    /// The sequences of these numbers alone, made up to the same multiple.
    pub(crate) fn only(&self, numbers: &[usize]) -> Self {
        let rows: Vec<Range<usize>> = self.sequences().collect();
        let sequence = |&number: &usize| {
            let rows = rows[number].clone();
            (&self.tokens[rows.clone()], self.targets[rows].to_vec())
        };
        // Whatever makes it up is seen by nobody.
        let padding = self.tokens.last().copied().unwrap_or_default();
        Self::new(numbers.iter().map(sequence), padding, self.multiple)
    }

    /// Its sequences in up to so many parts of about as many rows, in their order, each made up to the same multiple.
    pub(crate) fn cut(&self, parts: usize) -> Vec<Self> {
        let (used, mut cut) = (self.used(), vec![Vec::new(); parts.max(1)]);
        // What is no micro-batch is left to whoever refuses it.
        if self.lengths.is_empty() || self.lengths.contains(&0) || used > self.tokens.len() {
            return vec![self.clone()];
        }
        for (number, rows) in self.sequences().enumerate() {
            // Where its middle falls.
            let part = (rows.start + rows.end) * cut.len() / (2 * used);
            cut[part].push(number);
        }
        let shared = self.numbers.len() == self.lengths.len();
        let part = |sequences: Vec<usize>| {
            let numbers = if shared { sequences.iter().map(|&at| self.numbers[at]).collect() } else { Vec::new() };
            Self { numbers, ..self.only(&sequences) }
        };
        cut.into_iter().filter(|sequences| !sequences.is_empty()).map(part).collect()
    }

    /// The rows of each sequence.
    pub fn sequences(&self) -> impl Iterator<Item = Range<usize>> + '_ {
        self.lengths.iter().scan(0, |end, length| {
            let start = *end;
            *end += length;
            Some(start..*end)
        })
    }

    /// Rows of what attends to itself alone, one after the other: the sequences, and the padding in pieces.
    pub(crate) fn runs(&self) -> Vec<usize> {
        let mut runs = self.lengths.clone();
        let mut left = self.tokens.len() - self.used();
        while left > 0 {
            runs.push(left.min(PADDING_RUN));
            left -= left.min(PADDING_RUN);
        }
        runs
    }

    /// Rows of all sequences together.
    pub fn used(&self) -> usize {
        self.lengths.iter().sum()
    }

    /// Positions that carry loss.
    pub fn loss_tokens(&self) -> usize {
        self.targets.iter().filter(|&&target| target != IGNORED).count()
    }
}
