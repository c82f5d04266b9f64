//! Pairs of answers of which one is better: what preference tuning learns from.

use std::path::Path;

use protocol::model::TextTokenizer;

use super::example::{Encoded, Encoder};
use super::load::{self, Note, Notes};
use super::record::Parsed;
use super::{DataError, DataOptions, Example};

/// Two ways to go on from one prompt. In both only what follows the prompt is learnt, and the token that ends it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PreferencePair {
    /// The better one, with the prompt before it.
    pub chosen: Example,
    /// The worse one, with the same prompt before it.
    pub rejected: Example,
}

/// Pairs in the order of their file.
#[derive(Clone, Debug)]
pub struct Preferences {
    /// The pairs.
    pub pairs: Vec<PreferencePair>,
    /// The token that micro-batches are made up with.
    pub padding: u32,
    /// Pairs of which one answer or both were cut to the longest length allowed.
    pub truncated: usize,
    /// Lines, from 1, of which the cut left no answer; they are left out.
    pub left_out: Vec<usize>,
    /// What of the data is of no effect.
    pub notes: Vec<Note>,
}

impl Preferences {
    /// Reads a file of pairs: `prompt`, `chosen` and `rejected`, as texts or as messages.
    ///
    /// # Errors
    /// When the file cannot be read, the first record that is not as expected, and when nothing is left to learn.
    pub fn load(path: &Path, options: &DataOptions, tokenizer: &TextTokenizer) -> Result<Self, DataError> {
        // Answers that consist of several turns are compared as a whole.
        let options = DataOptions { turns: super::Turns::All, ..options.clone() };
        let most = options.max_tokens;
        let (mut pairs, mut truncated, mut left_out, mut notes) = (Vec::new(), 0, Vec::new(), Notes::default());
        load::each(path, &options, tokenizer, &mut notes, pair, |line, [chosen, rejected], notes| {
            let mut cut = false;
            let [chosen, rejected] = [chosen, rejected].map(|encoded| {
                encoded.notes.into_iter().for_each(|note| notes.add(line, note));
                let mut example = encoded.example;
                cut |= example.cut(most);
                example
            });
            truncated += usize::from(cut);
            match chosen.loss_tokens().min(rejected.loss_tokens()) {
                0 => left_out.push(line),
                _ => pairs.push(PreferencePair { chosen, rejected }),
            }
        })?;
        if pairs.is_empty() {
            return Err(load::nothing(path, left_out.len(), "pairs", most));
        }
        let padding = tokenizer.eos().unwrap_or(0);
        Ok(Self { pairs, padding, truncated, left_out, notes: notes.into_list() })
    }
}

/// Both answers of a record.
fn pair(parsed: Parsed, encoder: &Encoder<'_>) -> Result<[Encoded; 2], String> {
    let Parsed::Preference { chosen, rejected } = parsed else {
        return Err("it is no pair of a chosen and a rejected answer, which preference tuning takes".to_owned());
    };
    let one = |record, name: &str| {
        let encoded = encoder.encode(record).map_err(|what| format!("of `{name}`: {what}"))?;
        encoded.into_iter().next().ok_or_else(|| format!("`{name}` is empty"))
    };
    let (chosen, rejected) = (one(chosen, "chosen")?, one(rejected, "rejected")?);
    if chosen.example == rejected.example {
        return Err("`chosen` and `rejected` are the same, so there is nothing to prefer".to_owned());
    }
    Ok([chosen, rejected])
}
