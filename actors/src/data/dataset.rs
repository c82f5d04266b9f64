//! A file of examples.

use std::path::Path;
use std::sync::Arc;

use protocol::model::TextTokenizer;
use rayon::prelude::*;

use super::batches::shuffled;
use super::lines::Line;
use super::{DataError, DataOptions, Example, HeldOut, MicroBatch, PromptFormat};

/// Examples in the order of their file.
#[derive(Clone, Debug)]
pub struct Dataset {
    examples: Arc<Vec<Example>>,
    /// Examples that belong together, one behind the other: 1, or 2 of a pair.
    unit: usize,
    padding: u32,
    /// Examples that were cut to the longest length allowed.
    pub truncated: usize,
    /// Lines, from 1, of which nothing to learn was left by the cut; they are left out.
    pub left_out: Vec<usize>,
}

impl Dataset {
    /// Reads a JSONL file; empty lines are skipped.
    ///
    /// # Errors
    /// When the file cannot be read, the first line that is not as expected, and when nothing is left to learn.
    pub fn load(path: &Path, options: &DataOptions, tokenizer: &TextTokenizer) -> Result<Self, DataError> {
        if options.max_tokens < 2 {
            return Err(DataError::Options(format!("max_tokens is {}; it must be at least 2", options.max_tokens)));
        }
        if options.pad_to == 0 {
            return Err(DataError::Options("pad_to is 0; it must be at least 1, which pads nothing".into()));
        }
        let default = if tokenizer.chat_template().is_some() { PromptFormat::Chat } else { PromptFormat::Plain };
        let format = options.format.unwrap_or(default);
        let bytes = std::fs::read(path).map_err(|source| DataError::Io { path: path.to_owned(), source })?;
        let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&bytes);
        let lines: Vec<(usize, &[u8])> = (1..)
            .zip(bytes.split(|&byte| byte == b'\n'))
            .map(|(number, line)| (number, line.trim_ascii()))
            .filter(|(_, line)| !line.is_empty())
            .collect();
        let results: Vec<Result<Example, String>> = lines
            .par_iter()
            .map(|(_, line)| Example::encode(&Line::parse(line, &options.fields)?, format, tokenizer))
            .collect();
        let mut examples = Vec::with_capacity(results.len());
        let (mut truncated, mut left_out) = (0, Vec::new());
        for ((line, _), result) in lines.into_iter().zip(results) {
            let mut example = result.map_err(|what| DataError::Line { path: path.to_owned(), line, what })?;
            if example.tokens.len() > options.max_tokens {
                example.tokens.truncate(options.max_tokens);
                example.learnt.truncate(options.max_tokens);
                truncated += 1;
            }
            if example.loss_tokens() == 0 {
                left_out.push(line);
                continue;
            }
            examples.push(example);
        }
        if examples.is_empty() {
            let what = match left_out.len() {
                0 => "the file holds no examples".to_owned(),
                n => format!(
                    "nothing to learn is left of its {n} examples within {} tokens; raise max_tokens",
                    options.max_tokens
                ),
            };
            return Err(DataError::Nothing { path: path.to_owned(), what });
        }
        Ok(Self { examples: Arc::new(examples), unit: 1, padding: tokenizer.eos().unwrap_or(0), truncated, left_out })
    }

    /// A data set of examples made elsewhere; micro-batches are made up with the token `padding`.
    pub fn from_examples(examples: Vec<Example>, padding: u32) -> Self {
        Self { examples: Arc::new(examples), unit: 1, padding, truncated: 0, left_out: Vec::new() }
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

    /// Sets examples aside, or pairs: `(to train on, held out)`, both in the order of the file. The choice depends on the
    /// seed and their number alone.
    ///
    /// # Errors
    /// [`DataError::Options`] when nothing would be left to train on, or the fraction is not one.
    pub fn split(&self, held_out: HeldOut, seed: u64) -> Result<(Self, Self), DataError> {
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
