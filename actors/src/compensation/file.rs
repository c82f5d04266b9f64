//! What is known of a model's products, on a disk: it follows from the model alone, so that one run's is all the others'.
//!
//! A file is the blake3 hash of what follows, and the parts in bincode. Whatever is wrong with it, it is made anew.

use std::path::{Path, PathBuf};

use bincode::config::{Configuration, Fixint, LittleEndian};
use half::bf16;
use protocol::ids::{LinearId, ModelDigest};
use protocol::model::LlamaConfig;
use serde::{Deserialize, Serialize};

use super::Compensation;
use super::calibrate::linears;
use crate::files::{FileError, Readers, create_folder, read_bounded, write_atomically};
use crate::transformer::KnownPart;

/// Of the file, and of the way in which parts are found.
const VERSION: u32 = 2;

/// Numbers take as many bytes as they have: the length of a file is known.
const FORMAT: Configuration<LittleEndian, Fixint> = bincode::config::standard().with_fixed_int_encoding();

/// Bytes of the hash.
const HASH: usize = 32;

/// Bytes of a file besides its values, for each matrix.
const BESIDE: u64 = 64;

#[derive(Serialize, Deserialize)]
struct Stored {
    version: u32,
    /// Matrices with the bits of their directions, and outputs.
    parts: Vec<(LinearId, Vec<u16>, Vec<f32>)>,
}

/// Where those of a model are.
pub(super) fn path(folder: &Path, model: ModelDigest, rank: usize) -> PathBuf {
    folder.join(format!("{model}-{rank}"))
}

/// Those of a model, if they are there and whole.
pub(super) fn read(path: &Path, config: &LlamaConfig, rank: usize) -> Option<Compensation> {
    let bytes = |linear: LinearId| {
        let shape = config.shape(linear.group);
        ((size_of::<bf16>() * shape.d_in + size_of::<f32>() * shape.d_out) * rank) as u64 + BESIDE
    };
    let limit = linears(config).map(bytes).sum::<u64>();
    let bytes = match read_bounded(path, limit + BESIDE) {
        Ok(bytes) => bytes,
        Err(error) => {
            if !error.is_not_found() {
                tracing::warn!("{error}: it is made anew");
            }
            return None;
        }
    };
    let found = parse(&bytes, config, rank);
    if found.is_none() {
        tracing::warn!("{} is damaged or of another version: it is made anew", path.display());
    }
    found
}

fn parse(bytes: &[u8], config: &LlamaConfig, rank: usize) -> Option<Compensation> {
    let (hash, content) = bytes.split_at_checked(HASH)?;
    if blake3::hash(content).as_bytes() != hash {
        return None;
    }
    let (stored, read): (Stored, usize) = bincode::serde::decode_from_slice(content, FORMAT).ok()?;
    let whole = stored.version == VERSION && read == content.len();
    let of_bits = |bits: Vec<u16>| bits.into_iter().map(bf16::from_bits).collect::<Vec<_>>();
    let parts = stored.parts.into_iter().map(|(linear, directions, outputs)| {
        let shape = config.has(linear).then(|| config.shape(linear.group))?;
        let part = KnownPart::new(shape, of_bits(directions), outputs).filter(|part| part.rank() == rank);
        part.map(|part| (linear, part))
    });
    let parts = whole.then(|| parts.collect::<Option<_>>())??;
    let found = Compensation { parts };
    linears(config).all(|linear| found.parts.contains_key(&linear)).then_some(found)
}

/// Writes them, whole or not at all.
pub(super) fn write(path: &Path, compensation: &Compensation) -> Result<(), FileError> {
    let bits = |values: &[bf16]| values.iter().map(|value| value.to_bits()).collect();
    let each = compensation.parts.iter();
    let parts = each.map(|(&linear, it)| (linear, bits(it.directions()), it.outputs().to_vec())).collect();
    let stored = Stored { version: VERSION, parts };
    let unwritten = |error: &dyn std::fmt::Display| FileError::Io {
        path: path.to_owned(),
        action: "written",
        source: std::io::Error::other(error.to_string()),
    };
    let content = bincode::serde::encode_to_vec(&stored, FORMAT);
    let content = content.map_err(|error| unwritten(&error))?;
    path.parent().map_or(Ok(()), create_folder)?;
    write_atomically(path, &[blake3::hash(&content).as_bytes(), &content[..]].concat(), Readers::Usual)
}
