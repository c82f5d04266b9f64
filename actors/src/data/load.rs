//! Reads a file of records and encodes them, in parallel and a part of the file at a time.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use protocol::model::TextTokenizer;
use rayon::prelude::*;

use super::example::Encoder;
use super::record::Parsed;
use super::source::{Lines, object};
use super::{DataError, DataOptions};

/// Records that are read and encoded together.
const TOGETHER: usize = 1024;

/// Something of the data that is of no effect, in how many records.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// What it is.
    pub what: String,
    /// How often.
    pub count: usize,
    /// The first line that has it.
    pub line: usize,
}

/// Notes by what they say.
#[derive(Default)]
pub(super) struct Notes(BTreeMap<String, (usize, usize)>);

impl Notes {
    pub(super) fn add(&mut self, line: usize, what: String) {
        self.0.entry(what).or_insert((0, line)).0 += 1;
    }

    pub(super) fn into_list(self) -> Vec<Note> {
        self.0.into_iter().map(|(what, (count, line))| Note { what, count, line }).collect()
    }
}

/// Gives `take` what `make` makes of each record of a file, in order.
///
/// # Errors
/// When the file cannot be read, and the first record that is not as expected.
pub(super) fn each<T: Send>(
    path: &Path,
    options: &DataOptions,
    tokenizer: &TextTokenizer,
    notes: &mut Notes,
    make: impl Fn(Parsed, &Encoder<'_>) -> Result<T, String> + Sync,
    mut take: impl FnMut(usize, T, &mut Notes),
) -> Result<(), DataError> {
    check(options)?;
    let encoder = Encoder::new(options, tokenizer)?;
    let mut lines = Lines::open(path)?;
    loop {
        let some = lines.some(TOGETHER)?;
        if some.is_empty() {
            return Ok(());
        }
        let made = some.into_par_iter().map(|(line, bytes)| {
            let made = object(&bytes).and_then(|object| {
                let (parsed, unused) = Parsed::new(object, &options.fields)?;
                Ok((make(parsed, &encoder)?, unused))
            });
            (line, made)
        });
        // Collected as they are, so that the first error is the one that is told.
        for (line, made) in made.collect::<Vec<_>>() {
            let (made, unused) = made.map_err(|what| at_line(path, line, what))?;
            unused.into_iter().for_each(|name| notes.add(line, format!("the field `{name}`")));
            take(line, made, notes);
        }
    }
}

fn at_line(path: &Path, line: usize, what: String) -> DataError {
    DataError::Line { path: PathBuf::from(path), line, what }
}

fn check(options: &DataOptions) -> Result<(), DataError> {
    if options.max_tokens < 2 {
        return Err(DataError::Options(format!("max_tokens is {}; it must be at least 2", options.max_tokens)));
    }
    if options.pad_to == 0 {
        return Err(DataError::Options("pad_to is 0; it must be at least 1, which pads nothing".into()));
    }
    Ok(())
}

/// Why nothing is left of a file.
pub(super) fn nothing(path: &Path, left_out: usize, what: &str, most: usize) -> DataError {
    let what = match left_out {
        0 => format!("the file holds no {what}"),
        n => format!("nothing to learn is left of its {n} {what} within {most} tokens; raise max_tokens"),
    };
    DataError::Nothing { path: path.to_owned(), what }
}
