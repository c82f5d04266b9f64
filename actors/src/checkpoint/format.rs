//! A checkpoint as bytes:
//!
//! | bytes | what |
//! |---|---|
//! | 16 | `velum checkpoint` |
//! | 4 | version, little-endian |
//! | 32 | BLAKE3 of all that follows |
//! | 8 | length of the next part, little-endian |
//! | … | identity and state, bincode |
//! | … | tensors in f32, safetensors |

use std::path::Path;

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{CheckpointError, Identity};

const MAGIC: &[u8; 16] = b"velum checkpoint";
/// Raised whenever a part changes its layout or its meaning.
const VERSION: u32 = 1;
const HASHED_FROM: usize = 16 + 4 + 32;
const HEAD_FROM: usize = HASHED_FROM + 8;
/// Most bytes of identity and state: a report of ten million steps has less.
pub(super) const MAX_HEAD_BYTES: usize = 1 << 30;
/// Room for the tensors' names and shapes.
pub(super) const MAX_NAMES_BYTES: usize = 16 << 20;

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
    /// All of it as bytes.
    ///
    /// # Errors
    /// When two tensors have one name, or the state cannot be encoded.
    pub fn to_bytes(&self) -> Result<Vec<u8>, CheckpointError> {
        let fail = |what: &dyn ToString| CheckpointError::Encoding(what.to_string());
        let head = bincode::serde::encode_to_vec((&self.identity, &self.state), bincode::config::standard());
        let head = head.map_err(|error| fail(&error))?;
        if head.len() > MAX_HEAD_BYTES {
            return Err(fail(&format!("its state has {} bytes, more than the {MAX_HEAD_BYTES} allowed", head.len())));
        }
        let views = self.tensors.iter().map(|Tensor { name, values }| {
            Ok((name, TensorView::new(Dtype::F32, vec![values.len()], bytemuck::cast_slice(values))?))
        });
        let views: Vec<_> = views.collect::<Result<_, safetensors::SafeTensorError>>().map_err(|error| fail(&error))?;
        let tensors = safetensors::serialize(views, None).map_err(|error| fail(&error))?;
        let mut bytes = Vec::with_capacity(HEAD_FROM + head.len() + tensors.len());
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&[0; 32]);
        bytes.extend_from_slice(&(head.len() as u64).to_le_bytes());
        bytes.extend_from_slice(&head);
        bytes.extend_from_slice(&tensors);
        let hash = blake3::hash(&bytes[HASHED_FROM..]);
        bytes[HASHED_FROM - 32..HASHED_FROM].copy_from_slice(hash.as_bytes());
        Ok(bytes)
    }
}

impl<S: DeserializeOwned> Checkpoint<S> {
    /// Reads what [`Self::to_bytes`] wrote to `path`.
    ///
    /// # Errors
    /// [`CheckpointError::Damaged`] for anything else.
    pub fn from_bytes(path: &Path, bytes: &[u8]) -> Result<Self, CheckpointError> {
        Self::decode(bytes).map_err(|what| CheckpointError::Damaged { path: path.to_owned(), what })
    }

    fn decode(bytes: &[u8]) -> Result<Self, String> {
        if bytes.len() < HEAD_FROM {
            return Err(format!("it ends after {} bytes", bytes.len()));
        }
        let (before, hashed) = bytes.split_at(HASHED_FROM);
        if &before[..16] != MAGIC {
            return Err("it does not begin as one".into());
        }
        let version = number::<4>(&before[16..20]);
        if version != u64::from(VERSION) {
            return Err(format!("it has version {version}, and this program reads version {VERSION}"));
        }
        if blake3::hash(hashed).as_bytes()[..] != before[20..] {
            return Err("it is damaged or not whole: its hash is another".into());
        }
        let (length, rest) = (number::<8>(&hashed[..8]), &hashed[8..]);
        let length = usize::try_from(length).ok().filter(|&length| length <= rest.len().min(MAX_HEAD_BYTES));
        let (head, tensors) = rest.split_at(length.ok_or("its state is larger than one can be")?);
        let settings = bincode::config::standard().with_limit::<MAX_HEAD_BYTES>();
        let (read, used) = bincode::serde::decode_from_slice(head, settings).map_err(|error| error.to_string())?;
        let (identity, state) = read;
        if used != head.len() {
            return Err("its state is longer than what was read of it".into());
        }
        let tensors = SafeTensors::deserialize(tensors).map_err(|error| error.to_string())?;
        let tensors = tensors.iter().map(|(name, tensor)| match tensor.dtype() {
            Dtype::F32 => Ok(Tensor { name: name.to_owned(), values: floats(tensor.data()) }),
            other => Err(format!("{name} is of type {other:?}")),
        });
        Ok(Self { identity, state, tensors: tensors.collect::<Result<_, _>>()? })
    }
}

fn number<const N: usize>(bytes: &[u8]) -> u64 {
    bytes.iter().take(N).rev().fold(0, |number, &byte| number << 8 | u64::from(byte))
}

/// Little-endian values, which need not be aligned.
fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|bytes| f32::from_bits(number::<4>(bytes) as u32)).collect()
}
