//! Reads files of records and encodes them, in parallel and a part of a file at a time.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use protocol::model::TextTokenizer;
use rayon::prelude::*;

use super::example::Encoder;
use super::record::Parsed;
use super::source::{self, Place, Raw, Records};
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
    /// The file and the place of the first one.
    pub first: String,
}

/// Notes by what they say.
#[derive(Default)]
pub(super) struct Notes(BTreeMap<String, (usize, String)>);

impl Notes {
    pub(super) fn add(&mut self, at: &At<'_>, what: String) {
        self.0.entry(what).or_insert_with(|| (0, at.to_string())).0 += 1;
    }

    pub(super) fn into_list(self) -> Vec<Note> {
        self.0.into_iter().map(|(what, (count, first))| Note { what, count, first }).collect()
    }
}

/// Where a record is.
pub(super) struct At<'a> {
    path: &'a Path,
    place: Place,
}

impl std::fmt::Display for At<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.path.display(), self.place)
    }
}

/// Gives `take` what `make` makes of each record of these files, in order.
///
/// # Errors
/// When a file cannot be read, the first record that is not as expected, and what `take` returns.
pub(super) fn each<T: Send>(
    paths: &[PathBuf],
    options: &DataOptions,
    tokenizer: &TextTokenizer,
    notes: &mut Notes,
    make: impl Fn(Parsed, &Encoder<'_>) -> Result<T, String> + Sync,
    mut take: impl FnMut(&At<'_>, T, &mut Notes) -> Result<(), DataError>,
) -> Result<(), DataError> {
    check(options)?;
    let encoder = Encoder::new(options, tokenizer)?;
    for path in paths {
        let mut records = source::open(path)?;
        loop {
            let (some, failed) = some(records.as_mut());
            let done = some.is_empty() || failed.is_some();
            let made = some.into_par_iter().map(|(place, raw)| {
                let made = raw.fields(place).and_then(|fields| {
                    let (parsed, unused) = Parsed::new(fields, &options.fields)?;
                    Ok((make(parsed, &encoder)?, unused))
                });
                (place, made)
            });
            // Collected as they are, so that the first error is the one that is told.
            for (place, made) in made.collect::<Vec<_>>() {
                let (made, unused) = made.map_err(|what| place.wrong(path, what))?;
                let at = At { path, place };
                unused.into_iter().for_each(|name| notes.add(&at, format!("the field `{name}`")));
                take(&at, made, notes)?;
            }
            match failed {
                Some(error) => return Err(error),
                None if done => break,
                None => {}
            }
        }
    }
    Ok(())
}

/// The next records, and why there are no more where the file fails.
fn some(records: &mut dyn Records) -> (Vec<(Place, Raw)>, Option<DataError>) {
    let mut some = Vec::new();
    while some.len() < TOGETHER {
        match records.next() {
            Ok(Some(record)) => some.push(record),
            Ok(None) => break,
            Err(error) => return (some, Some(error)),
        }
    }
    (some, None)
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
