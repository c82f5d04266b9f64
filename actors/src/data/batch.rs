//! What one step of the model takes: a rectangle of tokens, and which of them carry loss.

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
