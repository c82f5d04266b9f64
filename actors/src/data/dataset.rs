//! A file of examples.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use protocol::model::TextTokenizer;

use super::batches::shuffled;
use super::load::{self, Note, Notes};
use super::record::Parsed;
use super::source;
use super::{DataError, DataOptions, Example, HeldOut, MicroBatch, PreferencePair, Preferences};

/// Examples in the order of their file.
#[derive(Clone, Debug)]
pub struct Dataset {
    examples: Arc<Vec<Example>>,
    /// Examples that belong together, one behind the other: 1, or 2 of a pair.
    unit: usize,
    padding: u32,
    /// Examples that were cut to the longest length allowed.
    pub truncated: usize,
    /// Where examples are of which nothing to learn was left by the cut; they are left out.
    pub left_out: Vec<String>,
    /// What of the data is of no effect.
    pub notes: Vec<Note>,
    /// Examples of which a token is learnt that ends a turn or a text.
    pub ended: usize,
    /// Files of a folder that are neither trained on nor held out.
    pub unused: Vec<PathBuf>,
    /// What is held out, where a folder has files for that.
    held_out: Option<Arc<Dataset>>,
}

impl Dataset {
    /// Reads a file, or a folder with files `train.*` and where there are any `valid.*`, which are then what [`Self::split`]
    /// holds out: JSON objects in lines or in a list, CSV and TSV, Parquet, compressed with gzip or zstd or not at all.
    ///
    /// # Errors
    /// When a file cannot be read, the first record that is not as expected, and when nothing is left to learn.
    pub fn load(path: &Path, options: &DataOptions, tokenizer: &TextTokenizer) -> Result<Self, DataError> {
        let files = source::split(path)?;
        let mut dataset = Self::read(path, &files.training, options, tokenizer)?;
        if !files.held_out.is_empty() {
            let held_out = Self::read(path, &files.held_out, options, tokenizer)?;
            dataset.truncated += held_out.truncated;
            dataset.left_out.extend_from_slice(&held_out.left_out);
            dataset.notes.extend_from_slice(&held_out.notes);
            dataset.held_out = Some(Arc::new(held_out));
        }
        dataset.unused = files.unused;
        Ok(dataset)
    }

    fn read(
        path: &Path,
        files: &[PathBuf],
        options: &DataOptions,
        tokenizer: &TextTokenizer,
    ) -> Result<Self, DataError> {
        let mut examples = Vec::new();
        let (mut truncated, mut left_out, mut ended, mut notes) = (0, Vec::new(), 0, Notes::default());
        let make = |parsed: Parsed, encoder: &super::example::Encoder<'_>| match parsed {
            Parsed::One(record) => encoder.encode(record),
            Parsed::Preference { .. } => Err(format!(
                "it is a pair to choose from (`{}`, `{}`), which supervised training does not take; training.objective = \
                 \"dpo\" or \"orpo\" does",
                options.fields.chosen, options.fields.rejected
            )),
        };
        load::each(files, options, tokenizer, &mut notes, make, |at, encoded, notes| {
            for encoded in encoded {
                encoded.notes.into_iter().for_each(|note| notes.add(at, note));
                let mut example = encoded.example;
                let cut = example.cut(options.max_tokens);
                truncated += usize::from(cut);
                if example.loss_tokens() == 0 {
                    left_out.push(at.to_string());
                    continue;
                }
                ended += usize::from(encoded.ends.is_some_and(|end| end < example.tokens.len()));
                examples.push(example);
            }
        })?;
        if examples.is_empty() {
            return Err(load::nothing(path, left_out.len(), "examples", options.max_tokens));
        }
        let padding = tokenizer.eos().unwrap_or(0);
        let notes = notes.into_list();
        Ok(Self { truncated, left_out, notes, ended, ..Self::from_examples(examples, padding) })
    }

    /// Reads pairs of answers ([`Preferences::load`]), each a preferred example and one that is not.
    ///
    /// # Errors
    /// Those of [`Preferences::load`].
    pub fn load_pairs(path: &Path, options: &DataOptions, tokenizer: &TextTokenizer) -> Result<Self, DataError> {
        let read = Preferences::load(path, options, tokenizer)?;
        let of = |pairs: Vec<PreferencePair>| {
            let pairs = pairs.into_iter().map(|PreferencePair { chosen, rejected }| (chosen, rejected));
            Self::from_pairs(pairs.collect(), read.padding)
        };
        Ok(Self {
            truncated: read.truncated,
            left_out: read.left_out,
            notes: read.notes,
            unused: read.unused,
            held_out: read.held_out.map(|pairs| Arc::new(of(pairs))),
            ..of(read.pairs)
        })
    }

    /// A data set of examples made elsewhere; micro-batches are made up with the token `padding`.
    pub fn from_examples(examples: Vec<Example>, padding: u32) -> Self {
        let ended = examples.iter().filter(|example| example.learnt.last() == Some(&true)).count();
        Self {
            examples: Arc::new(examples),
            unit: 1,
            padding,
            truncated: 0,
            left_out: Vec::new(),
            notes: Vec::new(),
            ended,
            unused: Vec::new(),
            held_out: None,
        }
    }

    /// A data set of pairs, each a preferred example and one that is not.
    pub fn from_pairs(pairs: Vec<(Example, Example)>, padding: u32) -> Self {
        let examples = pairs.into_iter().flat_map(|(chosen, rejected)| [chosen, rejected]).collect();
        Self { unit: 2, ..Self::from_examples(examples, padding) }
    }

    /// Examples that belong together: 1, or 2 of a pair.
    pub fn unit(&self) -> usize {
        self.unit
    }

    /// Examples, or pairs of them.
    pub fn units(&self) -> usize {
        self.examples.len() / self.unit
    }

    /// The examples.
    pub fn examples(&self) -> &[Example] {
        &self.examples
    }

    /// Names the examples as the model sees them: a hash of their tokens and of what is learnt of them.
    pub fn digest(&self) -> String {
        let mut hasher = blake3::Hasher::new_derive_key("velum examples 1");
        hasher.update(&u64::from(self.padding).to_le_bytes());
        for Example { tokens, learnt } in self.examples.iter() {
            hasher.update(&(tokens.len() as u64).to_le_bytes());
            for (token, &learnt) in tokens.iter().zip(learnt) {
                hasher.update(&token.to_le_bytes());
                hasher.update(&[u8::from(learnt)]);
            }
        }
        hasher.finalize().to_hex().to_string()
    }

    pub(super) fn shared(&self) -> Arc<Vec<Example>> {
        Arc::clone(&self.examples)
    }

    /// The token that micro-batches are made up with.
    pub fn padding(&self) -> u32 {
        self.padding
    }

    /// Sets examples aside, or pairs: `(to train on, held out)`, both in the order of the file, unless a folder has files of
    /// its own to hold out. The choice depends on the seed and their number alone.
    ///
    /// # Errors
    /// [`DataError::Options`] when nothing would be left to train on, or the fraction is not one.
    pub fn split(&self, held_out: HeldOut, seed: u64) -> Result<(Self, Self), DataError> {
        if let Some(held_out) = &self.held_out {
            return Ok((Self { held_out: None, ..self.clone() }, (**held_out).clone()));
        }
        let total = self.units();
        let count = match held_out {
            HeldOut::Count(count) => count,
            HeldOut::Fraction(0.0) => 0,
            HeldOut::Fraction(part) if part > 0.0 && part < 1.0 => ((total as f64 * part).round() as usize).max(1),
            HeldOut::Fraction(part) => {
                return Err(DataError::Options(format!("held_out is {part}; give a count or a fraction below 1")));
            }
        };
        if count >= total {
            let what = format!("holding out {count} of {total} examples leaves none to train on");
            return Err(DataError::Options(what));
        }
        let mut aside = vec![false; total];
        shuffled(total, seed, SPLIT).into_iter().take(count).for_each(|index| aside[index] = true);
        let part = |wanted: bool| {
            let chosen = self.examples.chunks(self.unit).zip(&aside).filter(|&(_, &aside)| aside == wanted);
            let examples = chosen.flat_map(|(examples, _)| examples.to_vec()).collect();
            Self { unit: self.unit, ..Self::from_examples(examples, self.padding) }
        };
        Ok((part(false), part(true)))
    }

    /// All examples once, in order, `batch` or pairs, at a time and made up as those of [`super::Batches`]; the last micro-batch may
    /// have fewer sequences.
    pub fn in_order(&self, batch: usize, pad_to: usize) -> impl Iterator<Item = MicroBatch> + '_ {
        let batch = batch.max(1);
        self.examples.chunks(batch * self.unit).enumerate().map(move |(index, examples)| {
            let numbers = (0..examples.len() / self.unit).map(|number| index * batch + number).collect();
            let examples: Vec<&Example> = examples.iter().collect();
            MicroBatch::of(&examples, numbers, self.padding, pad_to)
        })
    }
}

/// Number of the stream of random numbers that chooses what is held out; epochs use their own numbers.
const SPLIT: u64 = u64::MAX;
