//! JSON: an object per line, or a list of objects.

use std::io::BufRead;
use std::path::PathBuf;

use serde_json::{Map, Value};

use super::{Place, Raw, Records};
use crate::data::DataError;

/// A record longer than this is none.
const LONGEST: usize = 1 << 30;

/// An object per line; empty lines are skipped.
pub(super) struct Lines<R> {
    path: PathBuf,
    reader: R,
    /// Of the last line that was read.
    number: usize,
}

impl<R: BufRead> Lines<R> {
    pub(super) fn new(path: PathBuf, reader: R) -> Self {
        Self { path, reader, number: 0 }
    }
}

impl<R: BufRead> Records for Lines<R> {
    fn next(&mut self) -> Result<Option<(Place, Raw)>, DataError> {
        loop {
            let mut line = Vec::new();
            let read = self.reader.read_until(b'\n', &mut line);
            if read.map_err(|source| DataError::Io { path: self.path.clone(), source })? == 0 {
                return Ok(None);
            }
            self.number += 1;
            if !line.trim_ascii().is_empty() {
                return Ok(Some((Place::Line(self.number), Raw::Json(line))));
            }
        }
    }
}

/// A list of objects, whose members are cut apart without being looked into.
pub(super) struct List<R> {
    path: PathBuf,
    reader: R,
    /// The line under way.
    number: usize,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Before,
    Within,
    After,
}

impl<R: BufRead> List<R> {
    pub(super) fn new(path: PathBuf, reader: R) -> Self {
        Self { path, reader, number: 1, state: State::Before }
    }

    fn byte(&mut self) -> Result<Option<u8>, DataError> {
        let buffer = self.reader.fill_buf().map_err(|source| DataError::Io { path: self.path.clone(), source })?;
        let Some(&byte) = buffer.first() else { return Ok(None) };
        self.reader.consume(1);
        self.number += usize::from(byte == b'\n');
        Ok(Some(byte))
    }

    fn wrong(&self, what: &str) -> DataError {
        Place::Line(self.number).wrong(&self.path, what.to_owned())
    }

    /// The member that begins with `byte`, up to the comma or bracket behind it, and that.
    fn member(&mut self, byte: u8) -> Result<(Vec<u8>, u8), DataError> {
        let mut member = vec![byte];
        let (mut depth, mut quoted, mut escaped) = (usize::from(matches!(byte, b'{' | b'[')), byte == b'"', false);
        while let Some(byte) = self.byte()? {
            match byte {
                _ if escaped => escaped = false,
                b'\\' if quoted => escaped = true,
                b'"' => quoted = !quoted,
                _ if quoted => {}
                b'{' | b'[' => depth += 1,
                b',' | b']' if depth == 0 => return Ok((member, byte)),
                b'}' | b']' => depth = depth.saturating_sub(1),
                _ => {}
            }
            member.push(byte);
            if member.len() > LONGEST {
                return Err(self.wrong("a member of the list is longer than a gigabyte"));
            }
        }
        Err(self.wrong("the list is not closed"))
    }
}

impl<R: BufRead> Records for List<R> {
    fn next(&mut self) -> Result<Option<(Place, Raw)>, DataError> {
        while let Some(byte) = self.byte()? {
            match (self.state, byte) {
                (_, byte) if byte.is_ascii_whitespace() => {}
                (State::Before, b'[') => self.state = State::Within,
                (State::Within, b']') => self.state = State::After,
                (State::Within, byte) => {
                    let place = Place::Line(self.number);
                    let (member, end) = self.member(byte)?;
                    if end == b']' {
                        self.state = State::After;
                    }
                    return Ok(Some((place, Raw::Json(member))));
                }
                _ => return Err(self.wrong("something follows the list")),
            }
        }
        match self.state {
            State::After => Ok(None),
            _ => Err(self.wrong("the list is not closed")),
        }
    }
}

/// The object that a record is, which begins at `place`.
///
/// # Errors
/// What it is instead, in words.
pub(super) fn object(bytes: &[u8], place: Place) -> Result<Map<String, Value>, String> {
    let bytes = bytes.trim_ascii();
    let text = std::str::from_utf8(bytes).map_err(|error| {
        let (byte, column) = (bytes[error.valid_up_to()], error.valid_up_to() + 1);
        format!("{} (byte {byte:#04x} in column {column})", super::NOT_UTF8)
    })?;
    serde_json::from_str(text).map_err(|error| format!("it is not a JSON object: {}", placed(&error, place)))
}

/// An error with its place in the file, where serde_json counts from the beginning of the record.
fn placed(error: &serde_json::Error, place: Place) -> String {
    let text = error.to_string();
    match text.rfind(" at line ") {
        Some(at) if error.line() > 1 => {
            let (Place::Line(first) | Place::Row(first)) = place;
            format!("{} (line {}, column {})", &text[..at], first + error.line() - 1, error.column())
        }
        Some(at) => format!("{} (column {})", &text[..at], error.column()),
        None => text,
    }
}
