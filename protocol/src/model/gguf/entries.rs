//! The bytes of a GGUF file's head: metadata with their types, and the table of the tensors.

const MAGIC: &[u8; 4] = b"GGUF";
const VERSION: u32 = 3;
/// Tensors begin at multiples of this, which is what readers take where a file says nothing else.
pub(super) const ALIGNMENT: u64 = 32;

/// A value of the metadata.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Entry<'a> {
    U32(u32),
    F32(f32),
    Bool(bool),
    Text(String),
    I32s(Vec<i32>),
    F32s(Vec<f32>),
    Texts(Vec<String>),
    /// As it lies in another file.
    Copied {
        /// Code of its type.
        kind: u32,
        /// The value.
        bytes: &'a [u8],
    },
}

/// Codes of types.
mod kind {
    pub(super) const U32: u32 = 4;
    pub(super) const I32: u32 = 5;
    pub(super) const F32: u32 = 6;
    pub(super) const BOOL: u32 = 7;
    pub(super) const TEXT: u32 = 8;
    pub(super) const ARRAY: u32 = 9;
}

impl Entry<'_> {
    fn kind(&self) -> u32 {
        match self {
            Self::U32(_) => kind::U32,
            Self::F32(_) => kind::F32,
            Self::Bool(_) => kind::BOOL,
            Self::Text(_) => kind::TEXT,
            Self::I32s(_) | Self::F32s(_) | Self::Texts(_) => kind::ARRAY,
            Self::Copied { kind, .. } => *kind,
        }
    }

    fn write(&self, out: &mut Vec<u8>) {
        let array = |out: &mut Vec<u8>, kind: u32, length: usize| {
            out.extend(kind.to_le_bytes());
            out.extend((length as u64).to_le_bytes());
        };
        match self {
            Self::U32(value) => out.extend(value.to_le_bytes()),
            Self::F32(value) => out.extend(value.to_le_bytes()),
            Self::Bool(value) => out.push(u8::from(*value)),
            Self::Text(value) => text(out, value),
            Self::I32s(values) => {
                array(out, kind::I32, values.len());
                values.iter().for_each(|value| out.extend(value.to_le_bytes()));
            }
            Self::F32s(values) => {
                array(out, kind::F32, values.len());
                values.iter().for_each(|value| out.extend(value.to_le_bytes()));
            }
            Self::Texts(values) => {
                array(out, kind::TEXT, values.len());
                values.iter().for_each(|value| text(out, value));
            }
            Self::Copied { bytes, .. } => out.extend_from_slice(bytes),
        }
    }
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}

/// Metadata in the order in which they are written.
#[derive(Clone, Debug, Default)]
pub(crate) struct Entries<'a>(Vec<(String, Entry<'a>)>);

impl<'a> Entries<'a> {
    /// Sets a value, in place of an earlier one of this key.
    pub(crate) fn set(&mut self, key: impl Into<String>, value: Entry<'a>) {
        let key = key.into();
        match self.0.iter_mut().find(|(known, _)| *known == key) {
            Some((_, known)) => *known = value,
            None => self.0.push((key, value)),
        }
    }
}

/// What the table says of a tensor.
pub(super) struct TableRow<'a> {
    pub(super) name: &'a str,
    /// Dimensions, outermost first.
    pub(super) shape: &'a [usize],
    /// Code of the number format.
    pub(super) code: u32,
    /// From the start of the data.
    pub(super) offset: u64,
}

/// Everything before the data.
pub(super) fn head(entries: &Entries<'_>, table: &[TableRow<'_>]) -> Vec<u8> {
    let mut out = MAGIC.to_vec();
    out.extend(VERSION.to_le_bytes());
    out.extend((table.len() as u64).to_le_bytes());
    out.extend((entries.0.len() as u64).to_le_bytes());
    for (key, value) in &entries.0 {
        text(&mut out, key);
        out.extend(value.kind().to_le_bytes());
        value.write(&mut out);
    }
    for row in table {
        text(&mut out, row.name);
        out.extend((row.shape.len() as u32).to_le_bytes());
        row.shape.iter().rev().for_each(|&side| out.extend((side as u64).to_le_bytes()));
        out.extend(row.code.to_le_bytes());
        out.extend(row.offset.to_le_bytes());
    }
    out.resize(out.len().next_multiple_of(ALIGNMENT as usize), 0);
    out
}
