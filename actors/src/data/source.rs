//! The records of a file, with the lines that they stand on.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::DataError;

/// A JSONL file: one object per line; empty lines are skipped.
pub(super) struct Lines {
    path: PathBuf,
    reader: BufReader<File>,
    /// Of the next line, from 1.
    number: usize,
}

impl Lines {
    /// Opens a file.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(super) fn open(path: &Path) -> Result<Self, DataError> {
        let file = File::open(path).map_err(|source| DataError::Io { path: path.to_owned(), source })?;
        Ok(Self { path: path.to_owned(), reader: BufReader::new(file), number: 1 })
    }

    /// The next lines that are not empty, at most `most` of them, with their numbers; none at the end.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub(super) fn some(&mut self, most: usize) -> Result<Vec<(usize, Vec<u8>)>, DataError> {
        let mut lines = Vec::new();
        while lines.len() < most {
            let mut line = Vec::new();
            let read = self.reader.read_until(b'\n', &mut line);
            if read.map_err(|source| DataError::Io { path: self.path.clone(), source })? == 0 {
                break;
            }
            if self.number == 1 && line.starts_with(b"\xef\xbb\xbf") {
                line.drain(..3);
            }
            if !line.trim_ascii().is_empty() {
                lines.push((self.number, line));
            }
            self.number += 1;
        }
        Ok(lines)
    }
}

/// The object that a line is.
///
/// # Errors
/// What it is instead, in words.
pub(super) fn object(line: &[u8]) -> Result<Map<String, Value>, String> {
    if line.starts_with(b"\xff\xfe") || line.starts_with(b"\xfe\xff") {
        return Err("the file is UTF-16; write it as UTF-8 (iconv -f UTF-16 -t UTF-8)".to_owned());
    }
    let text = std::str::from_utf8(line.trim_ascii()).map_err(|error| {
        let byte = line.trim_ascii()[error.valid_up_to()];
        let column = error.valid_up_to() + 1;
        format!("it is not UTF-8 (byte {byte:#04x} in column {column}), perhaps Latin-1; write it as UTF-8 (iconv -f LATIN1 -t UTF-8)")
    })?;
    serde_json::from_str(text).map_err(|error| format!("it is not a JSON object: {}", without_line(&error)))
}

/// An error about a single line, without the number of a line that it counts itself.
fn without_line(error: &serde_json::Error) -> String {
    let text = error.to_string();
    match text.rfind(" at line ") {
        Some(at) => format!("{} (column {})", &text[..at], error.column()),
        None => text,
    }
}
