//! What one step of the model takes: a rectangle of tokens, and which of them carry loss.

use super::Example;

/// Target of a position that carries no loss: a prompt, padding, the last token of a sequence.
pub const IGNORED: u32 = u32::MAX;

/// A rectangle of `batch × length` tokens with the token that each position should predict.
///
/// Sequences shorter than `length` are padded at their end; padding carries no loss, and since attention is
/// causal it changes no position that does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MicroBatch {
    /// Sequences.
    pub batch: usize,
    /// Tokens of a sequence, padding included.
    pub length: usize,
    /// Inputs, row-major `batch × length`.
    pub tokens: Vec<u32>,
    /// For each position the token that comes next (already shifted), or [`IGNORED`]; row-major `batch × length`.
    pub targets: Vec<u32>,
}

impl MicroBatch {
    /// Positions that carry loss.
    pub fn loss_tokens(&self) -> usize {
        self.targets.iter().filter(|&&target| target != IGNORED).count()
    }
}

impl MicroBatch {
    /// Lays examples side by side, as long as the next multiple of `pad_to ≥ 1` from the longest of them on.
    pub(super) fn of(examples: &[&Example], padding: u32, pad_to: usize) -> Self {
        let longest = examples.iter().map(|example| example.tokens.len()).max().unwrap_or(0);
        let length = longest.next_multiple_of(pad_to.max(1));
        let mut tokens = vec![padding; examples.len() * length];
        let mut targets = vec![IGNORED; examples.len() * length];
        for (row, example) in examples.iter().enumerate() {
            let count = example.tokens.len();
            tokens[row * length..][..count].copy_from_slice(&example.tokens);
            let next = example.tokens.iter().zip(&example.learnt).skip(1);
            for (target, (&token, &learnt)) in targets[row * length..].iter_mut().zip(next) {
                if learnt {
                    *target = token;
                }
            }
        }
        Self { batch: examples.len(), length, tokens, targets }
    }
}
