//! Pairs of answers of which one is better: what preference tuning learns from.

use std::path::{Path, PathBuf};

use protocol::model::TextTokenizer;

use super::example::{Encoded, Encoder};
use super::load::{self, Note, Notes};
use super::record::Parsed;
use super::source;
use super::{DataError, DataOptions, Example};

/// Two ways to go on from one prompt. In both only what follows the prompt is learnt, and the token that ends it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PreferencePair {
    /// The better one, with the prompt before it.
    pub chosen: Example,
    /// The worse one, with the same prompt before it.
    pub rejected: Example,
}

/// Pairs in the order of their files.
#[derive(Clone, Debug)]
pub struct Preferences {
    /// The pairs.
    pub pairs: Vec<PreferencePair>,
    /// What is held out, where a folder has files for that.
    pub held_out: Option<Vec<PreferencePair>>,
    /// The token that micro-batches are made up with.
    pub padding: u32,
    /// Pairs of which one answer or both were cut to the longest length allowed.
    pub truncated: usize,
    /// Where pairs are of which the cut left no answer; they are left out.
    pub left_out: Vec<String>,
    /// What of the data is of no effect.
    pub notes: Vec<Note>,
    /// Files of a folder that are neither trained on nor held out.
    pub unused: Vec<PathBuf>,
}

impl Preferences {
    /// Reads a file or a folder, as [`super::Dataset::load`] does, of pairs: `prompt`, `chosen` and `rejected`, as texts or as
    /// messages.
    ///
    /// # Errors
    /// When a file cannot be read, the first record that is not as expected, and when nothing is left to learn.
    pub fn load(path: &Path, options: &DataOptions, tokenizer: &TextTokenizer) -> Result<Self, DataError> {
        // Answers that consist of several turns are compared as a whole.
        let options = DataOptions { turns: super::Turns::All, ..options.clone() };
        let files = source::split(path)?;
        let (mut truncated, mut left_out, mut notes) = (0, Vec::new(), Notes::default());
        let mut read = |files: &[PathBuf]| {
            let (mut pairs, first) = (Vec::new(), left_out.len());
            load::each(files, &options, tokenizer, &mut notes, pair, |at, [chosen, rejected], notes| {
                let mut cut = false;
                let [chosen, rejected] = [chosen, rejected].map(|encoded| {
                    encoded.notes.into_iter().for_each(|note| notes.add(at, note));
                    let mut example = encoded.example;
                    cut |= example.cut(options.max_tokens);
                    example
                });
                truncated += usize::from(cut);
                match chosen.loss_tokens().min(rejected.loss_tokens()) {
                    0 => left_out.push(at.to_string()),
                    _ => pairs.push(PreferencePair { chosen, rejected }),
                }
            })?;
            match pairs.is_empty() {
                true => Err(load::nothing(path, left_out.len() - first, "pairs", options.max_tokens)),
                false => Ok(pairs),
            }
        };
        let pairs = read(&files.training)?;
        let held_out = Some(&files.held_out).filter(|files| !files.is_empty()).map(|files| read(files)).transpose()?;
        let padding = tokenizer.eos().unwrap_or(0);
        let (notes, unused) = (notes.into_list(), files.unused);
        Ok(Self { pairs, held_out, padding, truncated, left_out, notes, unused })
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
