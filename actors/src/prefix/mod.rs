//! What enters the lowest adapted layer, kept on the owner's disk.
//!
//! Nothing below that layer is trained, and dropout is in adapters alone: the hidden states that enter it are the same for
//! a text in every pass over the data and in every evaluation. So they are computed once a text, and later come from
//! a file of the run; neither the products of the layers below nor their bytes are paid for again.
//!
//! The file is never a reason for a wrong result. It says which model, layer and products its states are of, and another's is
//! emptied; each text's states are found by a hash of its tokens and read under a checksum, and what is damaged, torn or
//! missing is computed anew. Where states are rounded they are so from the first time on, so that with products that are
//! the same each time a run computes the same whether it finds them or not.
//!
//! States tell their text to whoever has the model: the file is as private as the data, and readable by its owner alone.

mod records;

use std::io;
use std::path::Path;

use half::bf16;
use zeroize::Zeroizing;

use self::records::Records;

/// How a state is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateFormat {
    /// As it is.
    F32,
    /// Rounded to bfloat16: half of the room, and an error of at most 0.2 %.
    Bf16,
}

impl StateFormat {
    /// Bytes of a value.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }
}

/// All that states depend on beside their text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrefixIdentity {
    /// The model's digest.
    pub model: String,
    /// The layer that they enter.
    pub layer: usize,
    /// Where, and how precisely, the products below are computed.
    pub products: String,
    /// How they are stored.
    pub format: StateFormat,
}

impl PrefixIdentity {
    fn digest(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new_derive_key("velum prefix states 2");
        for part in [&self.model, &self.products] {
            hasher.update(&(part.len() as u64).to_le_bytes()).update(part.as_bytes());
        }
        hasher.update(&(self.layer as u64).to_le_bytes()).update(&[self.format.bytes() as u8]);
        hasher.finalize().into()
    }
}

/// See the module's documentation.
pub struct PrefixCache {
    records: Records,
    layer: usize,
    format: StateFormat,
}

impl PrefixCache {
    /// The cache at `path`, of at most `limit_bytes`: what is there is found again if it is of the same, and removed else.
    ///
    /// # Errors
    /// When the file cannot be made, or another process uses it.
    pub fn open(path: &Path, identity: &PrefixIdentity, limit_bytes: u64) -> io::Result<Self> {
        let records = Records::open(path, identity.digest(), limit_bytes)?;
        Ok(Self { records, layer: identity.layer, format: identity.format })
    }

    /// The layer that the states enter.
    pub fn layer(&self) -> usize {
        self.layer
    }

    /// Texts whose states are there.
    pub fn texts(&self) -> usize {
        self.records.len()
    }

    /// Reads the states of a text, `tokens × features`; `false` where they are not there, and `states` is whatever it is then.
    pub(crate) fn read(&self, tokens: &[u32], states: &mut [f32]) -> bool {
        let key = key(tokens);
        match self.format {
            StateFormat::F32 => {
                let found = self.records.read(&key, bytemuck::cast_slice_mut(states));
                // The file's order of bytes is that of almost every processor.
                states.iter_mut().for_each(|state| *state = f32::from_bits(u32::from_le(state.to_bits())));
                found
            }
            StateFormat::Bf16 => {
                let mut stored = Zeroizing::new(vec![0u16; states.len()]);
                let found = self.records.read(&key, bytemuck::cast_slice_mut(&mut stored));
                let values = stored.iter().map(|&bits| bf16::from_bits(u16::from_le(bits)).to_f32());
                states.iter_mut().zip(values).for_each(|(state, value)| *state = value);
                found
            }
        }
    }

    /// Rounds states to what is read back when they are stored.
    pub(crate) fn settle(&self, states: &mut [f32]) {
        if self.format == StateFormat::Bf16 {
            states.iter_mut().for_each(|state| *state = bf16::from_f32(*state).to_f32());
        }
    }

    /// Stores the settled states of a text, if there is room. That they cannot be written is said once, and nothing more is
    /// stored then.
    pub(crate) fn write(&self, tokens: &[u32], states: &[f32]) {
        let key = key(tokens);
        match self.format {
            StateFormat::F32 if cfg!(target_endian = "little") => {
                self.records.write(&key, bytemuck::cast_slice(states));
            }
            StateFormat::F32 => {
                let stored: Vec<u32> = states.iter().map(|state| state.to_bits().to_le()).collect();
                self.records.write(&key, bytemuck::cast_slice(&Zeroizing::new(stored)));
            }
            StateFormat::Bf16 => {
                let stored: Vec<u16> = states.iter().map(|&state| bf16::from_f32(state).to_bits().to_le()).collect();
                self.records.write(&key, bytemuck::cast_slice(&Zeroizing::new(stored)));
            }
        }
    }
}

/// What a text's states are found by.
fn key(tokens: &[u32]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key("velum prefix text 1");
    for token in tokens {
        hasher.update(&token.to_le_bytes());
    }
    hasher.finalize().into()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn identity(layer: usize, format: StateFormat) -> PrefixIdentity {
        PrefixIdentity { model: "m".into(), layer, products: "plain".into(), format }
    }

    #[test]
    fn states_come_back_as_they_were_settled_and_of_their_own_run_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("states");
        let states: Vec<f32> = (0..12).map(|i| 0.1 + 1e3 * (i as f32).sin()).collect();
        for format in [StateFormat::F32, StateFormat::Bf16] {
            let cache = PrefixCache::open(&path, &identity(3, format), 1 << 20).unwrap();
            assert_eq!((cache.texts(), cache.layer()), (0, 3), "what was there is of another format");
            let (mut settled, mut read) = (states.clone(), vec![0.0; 12]);
            cache.settle(&mut settled);
            assert_eq!(settled == states, format == StateFormat::F32);
            assert!(settled.iter().zip(&states).all(|(a, b)| (a - b).abs() <= b.abs() / 256.0));
            cache.write(&[1, 2, 3], &settled);
            for tokens in [vec![1, 2], vec![1, 2, 4], vec![]] {
                assert!(!cache.read(&tokens, &mut read), "{tokens:?}");
            }
            drop(cache);
            let again = PrefixCache::open(&path, &identity(3, format), 1 << 20).unwrap();
            assert!(again.read(&[1, 2, 3], &mut read));
            assert_eq!(read, settled);
            // A text of as many tokens has as many states.
            assert!(!again.read(&[1, 2, 3], &mut [0.0; 8]));
        }
        let others = [
            identity(2, StateFormat::Bf16),
            PrefixIdentity { model: "n".into(), ..identity(2, StateFormat::Bf16) },
            PrefixIdentity { products: "encrypted".into(), ..identity(2, StateFormat::Bf16) },
        ];
        for other in others {
            let cache = PrefixCache::open(&path, &other, 1 << 20).unwrap();
            assert_eq!(cache.texts(), 0, "{other:?}");
            cache.write(&[7], &states);
        }
    }
}
