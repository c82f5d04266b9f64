//! A file of examples, or several.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use protocol::model::TextTokenizer;

use super::load::{self, Note};
use super::order::{Part, shuffled};
use super::preferences::{self, PreferencePair, Told};
use super::record::Parsed;
use super::store::{Store, StoreWriter};
use super::{DataError, DataFile, DataOptions, Example, HeldOut, MicroBatch, options, source};

/// Examples in the order of their files. Their tokens are read from where they are kept when they are asked for.
#[derive(Clone, Debug)]
pub struct Dataset {
    store: Arc<Store>,
    /// Its units, by their numbers in the store.
    chosen: Arc<[u32]>,
    /// Examples that belong together, one behind the other: 1, or 2 of a pair.
    unit: usize,
    /// Where the units of one file end and those of the next begin, and how often each is taken.
    parts: Arc<[Part]>,
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

/// What is read.
struct Reader<'a> {
    options: &'a DataOptions,
    tokenizer: &'a TextTokenizer,
    pairs: bool,
    told: Told,
}

impl Reader<'_> {
    /// Reads files of the data set `path` to a store.
    fn read(&mut self, path: &Path, files: &[PathBuf], store: &mut StoreWriter) -> Result<(), DataError> {
        let (options, tokenizer) = (self.options, self.tokenizer);
        if self.pairs {
            return preferences::each(path, files, options, tokenizer, &mut self.told, |pair| {
                let PreferencePair { chosen, rejected } = pair;
                store.push(&chosen)?;
                store.push(&rejected)
            });
        }
        let make = |parsed: Parsed, encoder: &super::example::Encoder<'_>| match parsed {
            Parsed::One(record) => encoder.encode(record),
            Parsed::Preference { .. } => Err(format!(
                "it is a pair to choose from (`{}`, `{}`), which supervised training does not take; training.objective = \
                 \"dpo\" or \"orpo\" does",
                options.fields.chosen, options.fields.rejected
            )),
        };
        let Told { truncated, left_out, ended, notes } = &mut self.told;
        let (before, first) = (store.len(), left_out.len());
        load::each(files, options, tokenizer, notes, make, |at, encoded, notes| {
            for encoded in encoded {
                encoded.notes.into_iter().for_each(|note| notes.add(at, note));
                let mut example = encoded.example;
                let cut = example.cut(options.max_tokens);
                *truncated += usize::from(cut);
                if example.loss_tokens() == 0 {
                    left_out.push(at.to_string());
                    continue;
                }
                *ended += usize::from(encoded.ends.is_some_and(|end| end < example.tokens.len()));
                store.push(&example)?;
            }
            Ok(())
        })?;
        match store.len() == before {
            true => Err(load::nothing(path, left_out.len() - first, "examples", options.max_tokens)),
            false => Ok(()),
        }
    }
}

impl Dataset {
    /// Reads a file, or a folder with files `train.*` and where there are any `valid.*`, which are then what [`Self::split`]
    /// holds out: JSON objects in lines or in a list, CSV and TSV, compressed with gzip or zstd or not at all, and Parquet.
    ///
    /// # Errors
    /// When a file cannot be read, the first record that is not as expected, and when nothing is left to learn.
    pub fn load(path: &Path, options: &DataOptions, tokenizer: &TextTokenizer) -> Result<Self, DataError> {
        Self::load_files(&[DataFile::new(path)], options, tokenizer)
    }

    /// Reads several files or folders, each as [`Self::load`] does, whose examples are taken as often as their weights say.
    ///
    /// # Errors
    /// Those of [`Self::load`], and when a weight is none.
    pub fn load_files(files: &[DataFile], options: &DataOptions, tokenizer: &TextTokenizer) -> Result<Self, DataError> {
        Self::read(files, &mut Reader { options, tokenizer, pairs: false, told: Told::default() })
    }

    /// Reads files of pairs: `prompt`, `chosen` and `rejected`, as texts or as messages. Each is a preferred example and one that
    /// is not.
    ///
    /// # Errors
    /// Those of [`Self::load_files`].
    pub fn load_pairs(files: &[DataFile], options: &DataOptions, tokenizer: &TextTokenizer) -> Result<Self, DataError> {
        Self::read(files, &mut Reader { options, tokenizer, pairs: true, told: Told::default() })
    }

    fn read(files: &[DataFile], reader: &mut Reader<'_>) -> Result<Self, DataError> {
        let unit = if reader.pairs { 2 } else { 1 };
        let padding = reader.tokenizer.eos().unwrap_or(0);
        let (mut store, mut held_out) = (StoreWriter::default(), StoreWriter::default());
        let (mut parts, mut unused) = (Vec::new(), Vec::new());
        for DataFile { path, weight } in files {
            if !(weight.is_finite() && *weight > 0.0 && *weight <= options::MAX_WEIGHT) {
                return Err(DataError::Options(format!(
                    "the weight of {} in data.files is {weight}; it must be above 0, and at most {}",
                    path.display(),
                    options::MAX_WEIGHT
                )));
            }
            let split = source::split(path)?;
            let before = store.len();
            reader.read(path, &split.training, &mut store)?;
            parts.push(Part { units: (store.len() - before) / unit, weight: *weight });
            if !split.held_out.is_empty() {
                reader.read(path, &split.held_out, &mut held_out)?;
            }
            unused.extend(split.unused);
        }
        let held_out = match held_out.len() {
            0 => None,
            _ => Some(Arc::new(Self::of(held_out.finish()?, unit, None, padding)?)),
        };
        let Told { truncated, left_out, ended, notes } = std::mem::take(&mut reader.told);
        let notes = notes.into_list();
        let dataset = Self::of(store.finish()?, unit, Some(parts), padding)?;
        Ok(Self { truncated, left_out, notes, ended, unused, held_out, ..dataset })
    }

    /// All of a store.
    fn of(store: Store, unit: usize, parts: Option<Vec<Part>>, padding: u32) -> Result<Self, DataError> {
        let Ok(units) = u32::try_from(store.len() / unit) else {
            return Err(DataError::Options(format!("{} examples are more than can be dealt", store.len())));
        };
        let parts = parts.unwrap_or_else(|| vec![Part { units: units as usize, weight: 1.0 }]);
        let taken: usize = parts.iter().map(Part::taken).sum();
        if u32::try_from(taken).is_err() {
            return Err(DataError::Options(format!(
                "a pass takes {taken} examples, which are more than can be dealt; give smaller weights in data.files"
            )));
        }
        Ok(Self {
            store: Arc::new(store),
            chosen: (0..units).collect(),
            unit,
            parts: parts.into(),
            padding,
            truncated: 0,
            left_out: Vec::new(),
            notes: Vec::new(),
            ended: 0,
            unused: Vec::new(),
            held_out: None,
        })
    }

    /// A data set of examples made elsewhere, at most 2³² of them; micro-batches are made up with the token `padding`.
    pub fn from_examples(examples: Vec<Example>, padding: u32) -> Self {
        Self::in_memory(&examples, 1, padding)
    }

    /// A data set of pairs, each a preferred example and one that is not.
    pub fn from_pairs(pairs: Vec<(Example, Example)>, padding: u32) -> Self {
        let examples: Vec<Example> = pairs.into_iter().flat_map(|(chosen, rejected)| [chosen, rejected]).collect();
        Self::in_memory(&examples, 2, padding)
    }

    fn in_memory(examples: &[Example], unit: usize, padding: u32) -> Self {
        let units = examples.len() / unit;
        Self {
            store: Arc::new(Store::of(examples)),
            chosen: (0..units as u32).collect(),
            unit,
            parts: [Part { units, weight: 1.0 }].into(),
            padding,
            truncated: 0,
            left_out: Vec::new(),
            notes: Vec::new(),
            ended: examples.iter().filter(|example| example.learnt.last() == Some(&true)).count(),
            unused: Vec::new(),
            held_out: None,
        }
    }

    /// Examples that belong together: 1, or 2 of a pair.
    pub fn unit(&self) -> usize {
        self.unit
    }

    /// Examples, or pairs of them.
    pub fn units(&self) -> usize {
        self.chosen.len()
    }

    /// Number of examples.
    pub fn len(&self) -> usize {
        self.chosen.len() * self.unit
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.chosen.is_empty()
    }

    /// Examples, or pairs, that one pass over the data takes.
    pub fn pass(&self) -> usize {
        self.parts.iter().map(Part::taken).sum()
    }

    /// Tokens of each example.
    pub fn lengths(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.len()).map(|number| self.store.length(self.place(number)))
    }

    /// Where an example is in the store.
    fn place(&self, number: usize) -> usize {
        self.chosen[number / self.unit] as usize * self.unit + number % self.unit
    }

    /// The examples, one after the other.
    pub fn iter(&self) -> impl Iterator<Item = Result<Example, DataError>> + '_ {
        (0..self.len()).map(|number| self.store.example(self.place(number)))
    }

    /// The examples, in memory.
    ///
    /// # Errors
    /// When they cannot be read from where they are kept.
    pub fn examples(&self) -> Result<Vec<Example>, DataError> {
        self.iter().collect()
    }

    /// The examples of these units, as one micro-batch.
    pub(super) fn batch(&self, units: Vec<usize>, pad_to: usize) -> Result<MicroBatch, DataError> {
        let numbers = units.iter().flat_map(|&unit| unit * self.unit..(unit + 1) * self.unit);
        let examples = numbers.map(|number| self.store.example(self.place(number))).collect::<Result<Vec<_>, _>>()?;
        Ok(MicroBatch::of(&examples.iter().collect::<Vec<_>>(), units, self.padding, pad_to))
    }

    /// The order of a pass over the data.
    pub(super) fn order(&self, seed: u64, epoch: u64) -> Vec<u32> {
        super::order::pass(&self.parts, seed, epoch)
    }

    /// Names the examples as the model sees them: a hash of their tokens, of what is learnt of them, and of how often files are
    /// taken where that is not once.
    ///
    /// # Errors
    /// When they cannot be read from where they are kept.
    pub fn digest(&self) -> Result<String, DataError> {
        let mut hasher = blake3::Hasher::new_derive_key("velum examples 1");
        hasher.update(&u64::from(self.padding).to_le_bytes());
        for example in self.iter() {
            let Example { tokens, learnt } = example?;
            hasher.update(&(tokens.len() as u64).to_le_bytes());
            for (token, learnt) in tokens.iter().zip(learnt) {
                hasher.update(&token.to_le_bytes());
                hasher.update(&[u8::from(learnt)]);
            }
        }
        if self.parts.iter().any(|part| part.weight != 1.0) {
            for part in self.parts.iter() {
                hasher.update(&(part.units as u64).to_le_bytes());
                hasher.update(&part.weight.to_le_bytes());
            }
        }
        Ok(hasher.finalize().to_hex().to_string())
    }

    /// The token that micro-batches are made up with.
    pub fn padding(&self) -> u32 {
        self.padding
    }

    /// Sets examples aside, or pairs: `(to train on, held out)`, both in the order of the files, unless a folder has files of
    /// its own to hold out. The choice depends on the seed and their number alone. What is held out has no weights.
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
        shuffled(total, seed, SPLIT).into_iter().take(count).for_each(|index| aside[index as usize] = true);
        let part = |wanted: bool, parts: Vec<Part>| {
            let chosen = self.chosen.iter().zip(&aside).filter(|&(_, &aside)| aside == wanted);
            Self {
                chosen: chosen.map(|(&unit, _)| unit).collect(),
                parts: parts.into(),
                truncated: 0,
                left_out: Vec::new(),
                notes: Vec::new(),
                unused: Vec::new(),
                ..self.clone()
            }
        };
        let mut first = 0;
        let left = self.parts.iter().map(|part| {
            let units = &aside[first..first + part.units];
            first += part.units;
            Part { units: units.iter().filter(|&&aside| !aside).count(), weight: part.weight }
        });
        let left = left.collect();
        Ok((part(false, left), part(true, vec![Part { units: count, weight: 1.0 }])))
    }

    /// All examples once, in order, `batch` or pairs, at a time and made up as those of [`super::Batches`]; the last micro-batch may
    /// have fewer sequences.
    pub fn in_order(&self, batch: usize, pad_to: usize) -> impl Iterator<Item = Result<MicroBatch, DataError>> + '_ {
        let (batch, units) = (batch.max(1), self.units());
        let first = (0..units).step_by(batch);
        first.map(move |first| self.batch((first..units.min(first + batch)).collect(), pad_to))
    }
}

/// Number of the stream of random numbers that chooses what is held out; epochs use their own numbers.
const SPLIT: u64 = u64::MAX;
