//! Parquet: a table in columns, whose rows are put together here, a page of each column at a time. A cell without a value is
//! a field that is not there.

use std::fs::File;
use std::path::{Path, PathBuf};

use parquet::basic::{ConvertedType, Repetition};
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader as _, SerializedFileReader};
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row};
use parquet::schema::types::Type;
use serde_json::{Map, Value};

use super::{Place, Raw, Records};
use crate::data::DataError;

/// What a file begins with, and ends with.
pub(super) const MAGIC: &[u8] = b"PAR1";

pub(super) struct Table {
    path: PathBuf,
    rows: RowIter<'static>,
    /// The last row that was read.
    row: usize,
}

impl Table {
    /// Reads the foot of a file, in which its columns are described.
    ///
    /// # Errors
    /// When it cannot be read, or is none.
    pub(super) fn open(path: &Path) -> Result<Self, DataError> {
        let file = File::open(path).map_err(|source| DataError::Io { path: path.to_owned(), source })?;
        let reader = SerializedFileReader::new(file).map_err(|error| damaged(path, &error))?;
        if let Some(name) = bare_repetition(reader.metadata().file_metadata().schema(), false) {
            let what = format!(
                "the column `{name}` repeats without being a list, as very old writers had it; write the file anew (pyarrow), or as \
                 JSON lines"
            );
            return Err(DataError::Nothing { path: path.to_owned(), what });
        }
        Ok(Self { path: path.to_owned(), rows: RowIter::from_file_into(Box::new(reader)), row: 0 })
    }
}

/// A column that is repeated and neither a list nor a map, which the reader of rows does not put together rightly.
fn bare_repetition(schema: &Type, of_list: bool) -> Option<&str> {
    if !schema.is_group() {
        return None;
    }
    schema.get_fields().iter().find_map(|field| {
        let info = field.get_basic_info();
        if info.has_repetition() && info.repetition() == Repetition::REPEATED && !of_list {
            return Some(info.name());
        }
        let kinds = [ConvertedType::LIST, ConvertedType::MAP, ConvertedType::MAP_KEY_VALUE];
        bare_repetition(field, kinds.contains(&info.converted_type()))
    })
}

fn damaged(path: &Path, error: &ParquetError) -> DataError {
    let what = format!("the file is Parquet, but cannot be read: {error}; fetch it again, or write it as JSON lines");
    DataError::Nothing { path: path.to_owned(), what }
}

impl Records for Table {
    fn next(&mut self) -> Result<Option<(Place, Raw)>, DataError> {
        let Some(row) = self.rows.next() else { return Ok(None) };
        let row = row.map_err(|error| damaged(&self.path, &error))?;
        self.row += 1;
        let place = Place::Row(self.row);
        let fields = object(row).map_err(|what| place.wrong(&self.path, what))?;
        Ok(Some((place, Raw::Row(fields))))
    }
}

fn object(row: Row) -> Result<Map<String, Value>, String> {
    let fields = row.into_columns().into_iter().filter(|(_, field)| !matches!(field, Field::Null));
    fields.map(|(name, field)| Ok((name.clone(), value(field).map_err(|what| format!("`{name}` {what}"))?))).collect()
}

/// A cell as JSON has it.
fn value(field: Field) -> Result<Value, String> {
    Ok(match field {
        Field::Null => Value::Null,
        Field::Bool(value) => value.into(),
        Field::Byte(value) => value.into(),
        Field::Short(value) => value.into(),
        Field::Int(value) => value.into(),
        Field::Long(value) => value.into(),
        Field::UByte(value) => value.into(),
        Field::UShort(value) => value.into(),
        Field::UInt(value) => value.into(),
        Field::ULong(value) => value.into(),
        Field::Float16(value) => value.to_f32().into(),
        Field::Float(value) => value.into(),
        Field::Double(value) => value.into(),
        Field::Str(text) => text.into(),
        Field::Bytes(bytes) => {
            std::str::from_utf8(bytes.data()).map_err(|_| "holds bytes that are no text".to_owned())?.into()
        }
        Field::Group(row) => object(row)?.into(),
        Field::ListInternal(list) => list.elements().iter().cloned().map(value).collect::<Result<Vec<_>, _>>()?.into(),
        Field::MapInternal(map) => {
            let entries = map.entries().iter().map(|(key, field)| match key {
                Field::Str(key) => Ok((key.clone(), value(field.clone())?)),
                key => Err(format!("is a table with the key {key}, which is no text")),
            });
            entries.collect::<Result<Map<_, _>, _>>()?.into()
        }
        // Days and times, as they are written.
        other @ (Field::Decimal(_)
        | Field::Date(_)
        | Field::TimeMillis(_)
        | Field::TimeMicros(_)
        | Field::TimestampMillis(_)
        | Field::TimestampMicros(_)) => other.to_string().into(),
    })
}
