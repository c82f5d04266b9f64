//! The head of a GGUF file: its metadata and the table of its tensors.
//!
//! The head is read in place from the mapped file, and nothing in it is believed: every length is checked against the
//! bytes that are left before it is used, so that reading costs no more memory than the file has bytes, and a
//! damaged file is an error and never a panic. (Layout: the GGUF specification of ggml, versions 2 and 3.)

use std::collections::HashMap;

use candle_core::quantized::GgmlDType;

const MAGIC: &[u8; 4] = b"GGUF";
const DEFAULT_ALIGNMENT: u64 = 32;
/// Arrays of arrays deeper than this are refused; no known file nests them at all.
const MAX_DEPTH: usize = 4;
const MAX_DIMENSIONS: u32 = 4;
/// Array elements in all of the metadata: enough for the largest vocabulary with its merges, and no more memory
/// than a few hundred megabytes whatever the file says.
const MAX_ELEMENTS: u64 = 1 << 23;

/// A metadata value, borrowed from the file.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Value<'a> {
    /// Any integer.
    Integer(i128),
    /// Any float.
    Float(f64),
    /// A truth value.
    Bool(bool),
    /// Text.
    Text(&'a str),
    /// Values of one type.
    Array(Vec<Value<'a>>),
}

impl<'a> Value<'a> {
    pub(crate) fn text(&self) -> Option<&'a str> {
        if let Self::Text(text) = self { Some(text) } else { None }
    }

    pub(crate) fn float(&self) -> Option<f64> {
        match *self {
            Self::Float(value) => Some(value),
            Self::Integer(value) => Some(value as f64),
            _ => None,
        }
    }

    pub(crate) fn count(&self) -> Option<usize> {
        if let Self::Integer(value) = *self { value.try_into().ok() } else { None }
    }

    pub(crate) fn flag(&self) -> Option<bool> {
        if let Self::Bool(value) = *self { Some(value) } else { None }
    }

    pub(crate) fn array(&self) -> Option<&[Self]> {
        if let Self::Array(values) = self { Some(values) } else { None }
    }
}

/// What the head says of one tensor.
pub(crate) struct TensorEntry {
    /// Outermost dimension first.
    pub(crate) shape: Vec<usize>,
    /// Code of the number format.
    pub(crate) dtype: u32,
    /// From the start of the tensor data.
    pub(crate) offset: u64,
}

/// A whole head.
pub(crate) struct Header<'a> {
    pub(crate) metadata: HashMap<&'a str, Value<'a>>,
    pub(crate) tensors: HashMap<&'a str, TensorEntry>,
    /// Where the tensor data starts.
    pub(crate) data_offset: u64,
}

/// Reads the head of a mapped file.
///
/// # Errors
/// What contradicts, in words.
pub(crate) fn read(file: &[u8]) -> Result<Header<'_>, String> {
    let mut cursor = Cursor { left: file, elements: MAX_ELEMENTS };
    if cursor.take(4)? != MAGIC {
        return Err("it does not begin with GGUF".to_owned());
    }
    let version = cursor.u32()?;
    if !(2..=3).contains(&version) {
        return Err(format!("GGUF version {version}; versions 2 and 3 are known"));
    }
    let (tensor_count, metadata_count) = (cursor.u64()?, cursor.u64()?);
    let mut metadata = HashMap::new();
    for _ in 0..metadata_count {
        let key = cursor.text()?;
        let kind = cursor.u32()?;
        metadata.insert(key, cursor.value(kind, 0)?);
    }
    let mut tensors = HashMap::new();
    for _ in 0..tensor_count {
        let name = cursor.text()?;
        let dimensions = cursor.u32()?;
        if dimensions > MAX_DIMENSIONS {
            return Err(format!("the tensor `{name}` has {dimensions} dimensions"));
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            let size = cursor.u64()?;
            shape.push(usize::try_from(size).map_err(|_| format!("the tensor `{name}` has a side of {size}"))?);
        }
        shape.reverse();
        tensors.insert(name, TensorEntry { shape, dtype: cursor.u32()?, offset: cursor.u64()? });
    }
    let alignment = match metadata.get("general.alignment") {
        None => DEFAULT_ALIGNMENT,
        Some(&Value::Integer(value)) if (1..=1 << 20).contains(&value) => value as u64,
        Some(other) => return Err(format!("general.alignment is {other:?}")),
    };
    let data_offset = ((file.len() - cursor.left.len()) as u64).next_multiple_of(alignment);
    Ok(Header { metadata, tensors, data_offset })
}

/// One of the metadata as it lies in a file: its key, the code of its type and the bytes of its value.
pub(crate) type RawEntry<'a> = (&'a str, u32, &'a [u8]);

/// The metadata as they lie in a file.
///
/// # Errors
/// What contradicts, in words.
pub(crate) fn entries(file: &[u8]) -> Result<Vec<RawEntry<'_>>, String> {
    let mut cursor = Cursor { left: file, elements: MAX_ELEMENTS };
    cursor.take(8)?;
    let (_tensors, count) = (cursor.u64()?, cursor.u64()?);
    let mut entries = Vec::new();
    for _ in 0..count {
        let key = cursor.text()?;
        let kind = cursor.u32()?;
        let before = cursor.left;
        cursor.value(kind, 0)?;
        entries.push((key, kind, &before[..before.len() - cursor.left.len()]));
    }
    Ok(entries)
}

/// What the code of a number format means, for the formats that can be read.
pub(crate) fn number_format(code: u32) -> Option<GgmlDType> {
    Some(match code {
        0 => GgmlDType::F32,
        1 => GgmlDType::F16,
        2 => GgmlDType::Q4_0,
        3 => GgmlDType::Q4_1,
        6 => GgmlDType::Q5_0,
        7 => GgmlDType::Q5_1,
        8 => GgmlDType::Q8_0,
        9 => GgmlDType::Q8_1,
        10 => GgmlDType::Q2K,
        11 => GgmlDType::Q3K,
        12 => GgmlDType::Q4K,
        13 => GgmlDType::Q5K,
        14 => GgmlDType::Q6K,
        15 => GgmlDType::Q8K,
        30 => GgmlDType::BF16,
        _ => return None,
    })
}

struct Cursor<'a> {
    left: &'a [u8],
    /// Array elements that may still be read.
    elements: u64,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, length: u64) -> Result<&'a [u8], String> {
        let split = usize::try_from(length).ok().and_then(|length| self.left.split_at_checked(length));
        let (head, tail) = split
            .ok_or_else(|| format!("{length} bytes were announced where {} are left in the file", self.left.len()))?;
        self.left = tail;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut bytes = [0; N];
        bytes.copy_from_slice(self.take(N as u64)?);
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32, String> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, String> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn text(&mut self) -> Result<&'a str, String> {
        let length = self.u64()?;
        let bytes = self.take(length)?;
        std::str::from_utf8(bytes).map_err(|_| "a text in its metadata is not UTF-8".to_owned())
    }

    fn value(&mut self, kind: u32, depth: usize) -> Result<Value<'a>, String> {
        Ok(match kind {
            0 => Value::Integer(u8::from_le_bytes(self.array()?).into()),
            1 => Value::Integer(i8::from_le_bytes(self.array()?).into()),
            2 => Value::Integer(u16::from_le_bytes(self.array()?).into()),
            3 => Value::Integer(i16::from_le_bytes(self.array()?).into()),
            4 => Value::Integer(u32::from_le_bytes(self.array()?).into()),
            5 => Value::Integer(i32::from_le_bytes(self.array()?).into()),
            6 => Value::Float(f32::from_le_bytes(self.array()?).into()),
            7 => Value::Bool(self.array::<1>()? != [0]),
            8 => Value::Text(self.text()?),
            9 => {
                let (kind, length) = (self.u32()?, self.u64()?);
                if depth == MAX_DEPTH {
                    return Err("its metadata nests arrays too deeply".to_owned());
                }
                let left = self.elements.checked_sub(length);
                self.elements = left.ok_or_else(|| format!("its metadata holds an array of {length} elements"))?;
                (0..length).map(|_| self.value(kind, depth + 1)).collect::<Result<Vec<_>, _>>().map(Value::Array)?
            }
            10 => Value::Integer(u64::from_le_bytes(self.array()?).into()),
            11 => Value::Integer(i64::from_le_bytes(self.array()?).into()),
            12 => Value::Float(f64::from_le_bytes(self.array()?)),
            other => return Err(format!("a metadata value is of unknown type {other}")),
        })
    }
}
