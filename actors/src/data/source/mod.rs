//! The records of a file, with the places that they stand at.
//!
//! What a file is, is told by what it begins with, and for tables of text by its name: Parquet (`PAR1`), or, once gzip and zstd
//! are undone, a list in JSON (`[`), CSV (`.csv`, `.tsv`) or an object per line. All are read a part at a time.

mod csv;
mod folder;
mod json;
mod parquet;
mod zstd;

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

pub(super) use self::folder::split;
use super::DataError;

/// What is said of bytes that are no text.
const NOT_UTF8: &str = "it is not UTF-8, perhaps Latin-1; write it as UTF-8 (iconv -f LATIN1 -t UTF-8)";

/// What is read of a file at once, to tell what it is.
const BUFFER: usize = 1 << 16;

/// Where in a file a record is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// The line that it begins in, from 1.
    Line(usize),
    /// The row of a table that has no lines, from 1.
    Row(usize),
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Line(line) => write!(f, "line {line}"),
            Self::Row(row) => write!(f, "row {row}"),
        }
    }
}

impl Place {
    /// What is wrong with the record at this place.
    pub(super) fn wrong(self, path: &Path, what: String) -> DataError {
        DataError::Record { path: path.to_owned(), place: self.to_string(), what }
    }
}

/// A record as a file has it.
pub(super) enum Raw {
    /// JSON that is not looked into yet.
    Json(Vec<u8>),
    /// A row of a table.
    Row(Map<String, Value>),
}

impl Raw {
    /// The fields of the record, which stands at `place`.
    ///
    /// # Errors
    /// What it is instead, in words.
    pub(super) fn fields(self, place: Place) -> Result<Map<String, Value>, String> {
        match self {
            Self::Json(bytes) => json::object(&bytes, place),
            Self::Row(row) => Ok(row),
        }
    }
}

/// A file of records.
pub(super) trait Records {
    /// The next record; none at the end.
    ///
    /// # Errors
    /// When the file cannot be read, or is not what it began as.
    fn next(&mut self) -> Result<Option<(Place, Raw)>, DataError>;
}

/// Opens a file of records.
///
/// # Errors
/// When it cannot be read, or is of a kind that is not known.
pub(super) fn open(path: &Path) -> Result<Box<dyn Records>, DataError> {
    let io = |source| DataError::Io { path: path.to_owned(), source };
    let mut file = BufReader::with_capacity(BUFFER, File::open(path).map_err(io)?);
    let first = file.fill_buf().map_err(io)?;
    if first.starts_with(parquet::MAGIC) {
        return Ok(Box::new(parquet::Table::open(path)?));
    }
    let mut name = path.to_owned();
    let reader: Box<dyn Read> = if first.starts_with(b"\x1f\x8b") {
        name.set_extension("");
        Box::new(flate2::bufread::MultiGzDecoder::new(file))
    } else if first.starts_with(b"\x28\xb5\x2f\xfd") {
        name.set_extension("");
        Box::new(zstd::Frames::new(file))
    } else {
        Box::new(file)
    };
    let mut reader = BufReader::with_capacity(BUFFER, reader);
    let first = reader.fill_buf().map_err(io)?;
    let kind = |what: &str| Err(DataError::Nothing { path: path.to_owned(), what: what.to_owned() });
    match first {
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => {
            return kind("the file is UTF-16; write it as UTF-8 (iconv -f UTF-16 -t UTF-8)");
        }
        [b'P', b'K', 3, 4, ..] => return kind("the file is a zip archive; unpack it first"),
        [0xfd, b'7', b'z', b'X', b'Z', ..] => return kind("the file is compressed with xz; unpack it first (xz -d)"),
        [b'B', b'Z', b'h', ..] => return kind("the file is compressed with bzip2; unpack it first (bzip2 -d)"),
        [b'P', b'A', b'R', b'1', ..] => {
            return kind("the file is Parquet that was compressed as a whole; unpack it first (gunzip, zstd -d)");
        }
        _ if first.starts_with(b"version https://git-lfs") => {
            return kind("the file is a pointer of Git LFS and not the data; fetch them (git lfs pull)");
        }
        [0xef, 0xbb, 0xbf, ..] => reader.consume(3),
        _ => {}
    }
    let extension = name.extension().and_then(|extension| extension.to_str()).map(str::to_ascii_lowercase);
    match extension.as_deref() {
        Some("csv") => return Ok(Box::new(csv::Table::open(path, reader, b',')?)),
        Some("tsv") => return Ok(Box::new(csv::Table::open(path, reader, b'\t')?)),
        _ => {}
    }
    let listed = reader.fill_buf().map_err(io)?.trim_ascii_start().starts_with(b"[");
    let path = PathBuf::from(path);
    Ok(if listed { Box::new(json::List::new(path, reader)) } else { Box::new(json::Lines::new(path, reader)) })
}
