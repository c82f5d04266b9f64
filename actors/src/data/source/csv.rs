//! Tables as text (RFC 4180): a head with the names of the columns, and a record per row. A cell in quotes may hold anything, its
//! own quotes doubled. An empty cell is the same as none.

use std::collections::HashSet;
use std::io::BufRead;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::{Place, Raw, Records};
use crate::data::DataError;

pub(super) struct Table<R> {
    path: PathBuf,
    reader: R,
    delimiter: u8,
    /// The last line that was read.
    line: usize,
    names: Vec<String>,
}

impl<R: BufRead> Table<R> {
    /// Reads the head of a table whose cells are parted by `delimiter`.
    ///
    /// # Errors
    /// When it cannot be read, or names a column twice.
    pub(super) fn open(path: &Path, reader: R, delimiter: u8) -> Result<Self, DataError> {
        let mut table = Self { path: path.to_owned(), reader, delimiter, line: 0, names: Vec::new() };
        if let Some((place, names)) = table.row()? {
            let mut seen = HashSet::new();
            if let Some(twice) = names.iter().find(|name| !seen.insert(name.as_str())) {
                return Err(place.wrong(path, format!("two columns are called `{twice}`")));
            }
            table.names = names;
        }
        Ok(table)
    }

    /// The next row that is not empty.
    fn row(&mut self) -> Result<Option<(Place, Vec<String>)>, DataError> {
        loop {
            let place = Place::Line(self.line + 1);
            let mut row = Vec::new();
            if !self.line_into(&mut row)? {
                return Ok(None);
            }
            // A quote that is open at the end of a line goes on on the next; doubled ones count twice.
            while row.iter().filter(|&&byte| byte == b'"').count() % 2 == 1 {
                if !self.line_into(&mut row)? {
                    return Err(place.wrong(&self.path, "a quote is not closed".to_owned()));
                }
            }
            let row = row.strip_suffix(b"\n").unwrap_or(&row);
            let row = row.strip_suffix(b"\r").unwrap_or(row);
            if row.is_empty() {
                continue;
            }
            let row = std::str::from_utf8(row).map_err(|_| place.wrong(&self.path, super::NOT_UTF8.to_owned()))?;
            let cells = cells(row, char::from(self.delimiter)).map_err(|what| place.wrong(&self.path, what))?;
            return Ok(Some((place, cells)));
        }
    }

    fn line_into(&mut self, row: &mut Vec<u8>) -> Result<bool, DataError> {
        let read = self.reader.read_until(b'\n', row);
        let read = read.map_err(|source| DataError::Io { path: self.path.clone(), source })?;
        self.line += usize::from(read > 0);
        Ok(read > 0)
    }
}

impl<R: BufRead> Records for Table<R> {
    fn next(&mut self) -> Result<Option<(Place, Raw)>, DataError> {
        let Some((place, cells)) = self.row()? else { return Ok(None) };
        if cells.len() != self.names.len() {
            let what = format!("it has {} cells, where the head has {}", cells.len(), self.names.len());
            return Err(place.wrong(&self.path, what));
        }
        let cells = self.names.iter().zip(cells).filter(|(_, cell)| !cell.is_empty());
        let fields: Map<String, Value> = cells.map(|(name, cell)| (name.clone(), cell.into())).collect();
        Ok(Some((place, Raw::Row(fields))))
    }
}

/// The cells of a row.
fn cells(row: &str, delimiter: char) -> Result<Vec<String>, String> {
    let mut cells = Vec::new();
    let mut rest = row;
    loop {
        let (cell, after) = match rest.strip_prefix('"') {
            None => {
                let end = rest.find(delimiter).unwrap_or(rest.len());
                (rest[..end].to_owned(), &rest[end..])
            }
            Some(mut quoted) => {
                let mut cell = String::new();
                loop {
                    let end = quoted.find('"').ok_or("a quote is not closed")?;
                    cell.push_str(&quoted[..end]);
                    quoted = &quoted[end + 1..];
                    match quoted.strip_prefix('"') {
                        Some(more) => {
                            cell.push('"');
                            quoted = more;
                        }
                        None => break,
                    }
                }
                (cell, quoted)
            }
        };
        cells.push(cell);
        match after.strip_prefix(delimiter) {
            Some(more) => rest = more,
            None if after.is_empty() => return Ok(cells),
            None => return Err("something follows a cell that is closed by a quote".to_owned()),
        }
    }
}
