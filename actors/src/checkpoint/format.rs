//! A checkpoint as bytes:
//!
//! | bytes | what |
//! |---|---|
//! | 16 | `velum checkpoint` |
//! | 4 | version, little-endian |
//! | 8 | length of the next part, little-endian |
//! | … | identity, state, and name and length of every tensor, bincode |
//! | … | the tensors' values one after the other, f32, little-endian |
//! | 32 | BLAKE3 of all that comes before |
//!
//! It is written as it is hashed, so that the values are never in memory once more.

use std::io::{self, Write};
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{CheckpointError, Identity};

const MAGIC: &[u8; 16] = b"velum checkpoint";
/// Raised whenever a part changes its layout or its meaning.
const VERSION: u32 = 2;
const HEAD_FROM: usize = 16 + 4 + 8;
const HASH_BYTES: usize = 32;
/// Most bytes of all but the values: a report of ten million steps has less.
pub(super) const MAX_HEAD_BYTES: usize = 1 << 30;
/// Values that are written at a time.
const CHUNK: usize = 1 << 14;

/// Values of one tensor, whose shape whoever reads it knows.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// Its name, of which there is only one.
    pub name: String,
    /// Its values.
    pub values: Vec<f32>,
}

/// What a checkpoint holds. `S` is the run's state but for its tensors.
#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint<S> {
    /// Which run it belongs to.
    pub identity: Identity,
    /// Where that run was.
    pub state: S,
    /// Parameters and what goes with them.
    pub tensors: Vec<Tensor>,
}

impl<S> Checkpoint<S> {
    /// Takes a tensor out.
    pub fn take(&mut self, name: &str) -> Option<Vec<f32>> {
        let index = self.tensors.iter().position(|tensor| tensor.name == name)?;
        Some(self.tensors.swap_remove(index).values)
    }
}

impl<S: Serialize> Checkpoint<S> {
    /// All but the values.
    ///
    /// # Errors
    /// When it cannot be encoded, or would be too long to be read back.
    pub(super) fn head(&self) -> Result<Vec<u8>, CheckpointError> {
        let fail = |what: String| CheckpointError::Encoding(what);
        let tensors: Vec<(&str, usize)> = self.tensors.iter().map(|t| (t.name.as_str(), t.values.len())).collect();
        let head = bincode::serde::encode_to_vec((&self.identity, &self.state, tensors), bincode::config::standard());
        let head = head.map_err(|error| fail(error.to_string()))?;
        match head.len() {
            0..=MAX_HEAD_BYTES => Ok(head),
            bytes => Err(fail(format!("its state has {bytes} bytes, more than the {MAX_HEAD_BYTES} allowed"))),
        }
    }
}

impl<S> Checkpoint<S> {
    /// Writes it all, behind its own head.
    ///
    /// # Errors
    /// When `out` cannot be written.
    pub(super) fn write(&self, head: &[u8], out: &mut dyn Write) -> io::Result<()> {
        let mut hasher = blake3::Hasher::new();
        let mut put = |bytes: &[u8]| {
            hasher.update(bytes);
            out.write_all(bytes)
        };
        put(MAGIC)?;
        put(&VERSION.to_le_bytes())?;
        put(&(head.len() as u64).to_le_bytes())?;
        put(head)?;
        let mut bytes = Vec::with_capacity(4 * CHUNK);
        for values in self.tensors.iter().flat_map(|tensor| tensor.values.chunks(CHUNK)) {
            bytes.clear();
            bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
            put(&bytes)?;
        }
        out.write_all(hasher.finalize().as_bytes())
    }
}

impl<S: DeserializeOwned> Checkpoint<S> {
    /// Reads what [`Self::write`] wrote to `path`.
    ///
    /// # Errors
    /// [`CheckpointError::Damaged`] for anything else.
    pub(super) fn from_bytes(path: &Path, bytes: &[u8]) -> Result<Self, CheckpointError> {
        Self::decode(bytes).map_err(|what| CheckpointError::Damaged { path: path.to_owned(), what })
    }

    fn decode(bytes: &[u8]) -> Result<Self, String> {
        let too_short = || format!("it ends after {} bytes", bytes.len());
        let (hashed, hash) = bytes.split_last_chunk::<HASH_BYTES>().ok_or_else(too_short)?;
        let (start, rest) = hashed.split_first_chunk::<HEAD_FROM>().ok_or_else(too_short)?;
        if &start[..16] != MAGIC {
            return Err("it does not begin as one".into());
        }
        let version = number(&start[16..20]);
        if version != u64::from(VERSION) {
            return Err(format!("it has version {version}, and this program reads version {VERSION}"));
        }
        if blake3::hash(hashed) != *hash {
            return Err("it is damaged or not whole: its hash is another".into());
        }
        let length = usize::try_from(number(&start[20..])).ok();
        let length = length.filter(|&length| length <= rest.len().min(MAX_HEAD_BYTES));
        let (head, mut values) = rest.split_at(length.ok_or("its state is larger than one can be")?);
        let settings = bincode::config::standard().with_limit::<MAX_HEAD_BYTES>();
        let (read, used) = bincode::serde::decode_from_slice(head, settings).map_err(|error| error.to_string())?;
        let (identity, state, names): (Identity, S, Vec<(String, usize)>) = read;
        let mut tensors = Vec::with_capacity(names.len());
        for (name, count) in names {
            let split = count.checked_mul(4).and_then(|bytes| values.split_at_checked(bytes));
            let (own, others) = split.ok_or_else(|| format!("{name} is not whole"))?;
            tensors.push(Tensor { name, values: floats(own) });
            values = others;
        }
        if used != head.len() || !values.is_empty() {
            return Err("it is longer than what it says of itself".into());
        }
        Ok(Self { identity, state, tensors })
    }
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte))
}

/// Little-endian values, which need not be aligned.
fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|bytes| f32::from_bits(number(bytes) as u32)).collect()
}
