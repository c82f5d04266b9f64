//! Pairs of answers of which one is better: what preference tuning learns from.

use std::path::{Path, PathBuf};

use protocol::model::TextTokenizer;

use super::example::{Encoded, Encoder};
use super::load::{self, Notes};
use super::record::Parsed;
use super::{DataError, DataOptions, Example};

/// Two ways to go on from one prompt. In both only what follows the prompt is learnt, and the token that ends it.
#[derive(Debug)]
pub(super) struct PreferencePair {
    /// The better one, with the prompt before it.
    pub(super) chosen: Example,
    /// The worse one, with the same prompt before it.
    pub(super) rejected: Example,
}

/// What is told of data that were read.
#[derive(Default)]
pub(super) struct Told {
    /// Examples, or pairs, that were cut.
    pub(super) truncated: usize,
    /// Where those are of which nothing was left to learn.
    pub(super) left_out: Vec<String>,
    /// Examples that teach an end, of pairs those whose preferred answer does.
    pub(super) ended: usize,
    pub(super) notes: Notes,
}

/// Gives `take` each pair of these files of the data set `path`, in order.
///
/// # Errors
/// When a file cannot be read, the first record that is not as expected, when nothing is left to learn, and what `take`
/// returns.
pub(super) fn each(
    path: &Path,
    files: &[PathBuf],
    options: &DataOptions,
    tokenizer: &TextTokenizer,
    told: &mut Told,
    mut take: impl FnMut(PreferencePair) -> Result<(), DataError>,
) -> Result<(), DataError> {
    // Answers that consist of several turns are compared as a whole.
    let options = DataOptions { turns: super::Turns::All, ..options.clone() };
    let Told { truncated, left_out, ended, notes } = told;
    let (mut pairs, first) = (0, left_out.len());
    load::each(files, &options, tokenizer, notes, pair, |at, [chosen, rejected], notes| {
        let mut cut = false;
        let end = chosen.ends;
        let [chosen, rejected] = [chosen, rejected].map(|encoded| {
            encoded.notes.into_iter().for_each(|note| notes.add(at, note));
            let mut example = encoded.example;
            cut |= example.cut(options.max_tokens);
            example
        });
        *truncated += usize::from(cut);
        if chosen.loss_tokens().min(rejected.loss_tokens()) == 0 {
            left_out.push(at.to_string());
            return Ok(());
        }
        pairs += 1;
        *ended += usize::from(end.is_some_and(|end| end < chosen.tokens.len()));
        take(PreferencePair { chosen, rejected })
    })?;
    match pairs {
        0 => Err(load::nothing(path, left_out.len() - first, "pairs", options.max_tokens)),
        _ => Ok(()),
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
