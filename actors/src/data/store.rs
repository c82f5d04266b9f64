//! Where a data set's tokens are: in memory while they are few, and beyond that in a file that has no name.
//!
//! The file is made without one, or loses it at once, so that nobody else can open it and nothing of it is left when the process
//! ends, however it ends; its mode is 0600. It lies in the folder for temporary files (`TMPDIR`). Memory has eight bytes for an
//! example however long it is, so that it does not grow with the text.

use std::fs::{File, Permissions};
use std::io::{BufWriter, Write as _};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};

use super::{DataError, Example};

/// Tokens that are kept in memory, of four bytes each.
const IN_MEMORY: usize = 16 << 20;
/// Of a token: predicting it is learnt. Vocabularies are far smaller than what is left.
const LEARNT: u32 = 1 << 31;
const WORD: u64 = 4;

/// Examples that are read one at a time.
#[derive(Debug)]
pub(super) struct Store {
    words: Words,
    /// Where each example ends, in tokens.
    ends: Vec<u64>,
}

#[derive(Debug)]
enum Words {
    Memory(Vec<u32>),
    File(File),
}

impl Store {
    /// These examples, in memory.
    pub(super) fn of(examples: &[Example]) -> Self {
        let mut ends = Vec::with_capacity(examples.len());
        let mut words = Vec::new();
        for example in examples {
            words.extend(pack(example));
            ends.push(words.len() as u64);
        }
        Self { words: Words::Memory(words), ends }
    }

    /// Number of examples.
    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    /// Tokens of an example.
    pub(super) fn length(&self, number: usize) -> usize {
        let (start, end) = self.place(number);
        (end - start) as usize
    }

    fn place(&self, number: usize) -> (u64, u64) {
        (if number == 0 { 0 } else { self.ends[number - 1] }, self.ends[number])
    }

    /// An example.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub(super) fn example(&self, number: usize) -> Result<Example, DataError> {
        let (start, end) = self.place(number);
        match &self.words {
            Words::Memory(words) => Ok(unpack(words[start as usize..end as usize].iter().copied())),
            Words::File(file) => {
                let mut bytes = vec![0; ((end - start) * WORD) as usize];
                file.read_exact_at(&mut bytes, start * WORD).map_err(failed)?;
                Ok(unpack(bytes.as_chunks().0.iter().map(|bytes| u32::from_le_bytes(*bytes))))
            }
        }
    }
}

fn pack(example: &Example) -> impl Iterator<Item = u32> + '_ {
    let words = example.tokens.iter().zip(&example.learnt);
    words.map(|(&token, &learnt)| if learnt { token | LEARNT } else { token })
}

fn unpack(words: impl Iterator<Item = u32>) -> Example {
    let (tokens, learnt) = words.map(|word| (word & !LEARNT, word & LEARNT != 0)).unzip();
    Example { tokens, learnt }
}

/// The file has no name; the folder is what can be set right.
fn failed(source: std::io::Error) -> DataError {
    DataError::Temporary { folder: std::env::temp_dir(), source }
}

/// Examples on their way to a store.
#[derive(Default)]
pub(super) struct StoreWriter {
    /// Those that are in no file yet.
    words: Vec<u32>,
    file: Option<BufWriter<File>>,
    ends: Vec<u64>,
    most: Option<usize>,
}

impl StoreWriter {
    /// One that keeps no more than so many tokens in memory.
    #[cfg(test)]
    pub(super) fn with_memory_for(most: usize) -> Self {
        Self { most: Some(most), ..Self::default() }
    }

    /// Examples so far.
    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    /// Takes an example.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub(super) fn push(&mut self, example: &Example) -> Result<(), DataError> {
        let end = self.ends.last().copied().unwrap_or(0) + example.tokens.len() as u64;
        self.ends.push(end);
        self.words.extend(pack(example));
        if self.file.is_some() || self.words.len() > self.most.unwrap_or(IN_MEMORY) {
            self.spill()?;
        }
        Ok(())
    }

    fn spill(&mut self) -> Result<(), DataError> {
        let file = match &mut self.file {
            Some(file) => file,
            file => {
                let new = tempfile::tempfile().map_err(failed)?;
                // One without a name is made with whatever mode the process gives files.
                new.set_permissions(Permissions::from_mode(0o600)).map_err(failed)?;
                file.insert(BufWriter::with_capacity(1 << 20, new))
            }
        };
        for word in self.words.drain(..) {
            file.write_all(&word.to_le_bytes()).map_err(failed)?;
        }
        if self.words.capacity() > 1 << 20 {
            self.words = Vec::new();
        }
        Ok(())
    }

    /// All that it took.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub(super) fn finish(self) -> Result<Store, DataError> {
        let Self { words, file, ends, .. } = self;
        let words = match file {
            None => Words::Memory(words),
            Some(file) => Words::File(file.into_inner().map_err(|error| failed(error.into_error()))?),
        };
        Ok(Store { words, ends })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn examples_are_the_same_from_memory_and_from_a_file() {
        let example = |n: u32| Example {
            tokens: (0..n % 7 + 1).map(|t| t * 1000 + n).collect(),
            learnt: (0..n % 7 + 1).map(|t| t % 2 == n % 2 && t > 0).collect(),
        };
        let examples: Vec<Example> = (0..50).map(example).collect();
        let mut writer = StoreWriter::with_memory_for(20);
        examples.iter().for_each(|example| writer.push(example).unwrap());
        let (filed, memory) = (writer.finish().unwrap(), Store::of(&examples));
        assert!(matches!(memory.words, Words::Memory(_)));
        let Words::File(file) = &filed.words else { panic!("so many are in a file") };
        assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        for store in [filed, memory] {
            assert_eq!(store.len(), 50);
            for number in [49, 0, 17, 16, 3] {
                assert_eq!(store.example(number).unwrap(), examples[number]);
                assert_eq!(store.length(number), examples[number].tokens.len());
            }
        }
    }
}
