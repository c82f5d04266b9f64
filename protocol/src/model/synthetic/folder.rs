//! Synthetic models as Hugging Face folders, drawn while they are written: memory does not grow with the model.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::ops::ControlFlow;
use std::path::Path;

use rayon::prelude::*;
use serde_json::{Value as Json, json};

use super::{RUN, SyntheticLlama, settings, tokenizer};
use crate::model::{ModelError, expected};

/// Numbers drawn at a time, a multiple of [`RUN`]: enough for all cores, little memory.
const CHUNK: usize = 64 * RUN;
/// Safetensors' data begin at a multiple of this.
const ALIGNMENT: usize = 8;

/// How a folder's weights are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoredAs {
    /// 32-bit floats.
    F32,
    /// 16-bit brain floats.
    Bf16,
}

impl StoredAs {
    fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }

    fn in_safetensors(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::Bf16 => "BF16",
        }
    }

    pub(super) fn in_config(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::Bf16 => "bfloat16",
        }
    }

    fn encode(self, values: &[f32], bytes: &mut [u8]) {
        match self {
            Self::F32 => {
                let places = bytes.par_chunks_exact_mut(4).zip(values).with_min_len(RUN);
                places.for_each(|(place, value)| place.copy_from_slice(&value.to_le_bytes()));
            }
            Self::Bf16 => {
                let places = bytes.par_chunks_exact_mut(2).zip(values).with_min_len(RUN);
                places.for_each(|(place, &value)| place.copy_from_slice(&half::bf16::from_f32(value).to_le_bytes()));
            }
        }
    }
}

impl SyntheticLlama {
    /// Weights of the model, all tensors together.
    pub fn parameters(&self) -> u64 {
        expected(&self.config).iter().map(|(_, shape)| shape.iter().product::<usize>() as u64).sum()
    }

    /// Bytes of the weights in a folder, which [`write_folder_watched`](Self::write_folder_watched) counts up to.
    pub fn weight_bytes(&self, stored_as: StoredAs) -> u64 {
        self.parameters() * stored_as.bytes() as u64
    }

    /// Writes a Hugging Face folder: `config.json`, `model.safetensors`, `tokenizer.json`, `tokenizer_config.json`.
    ///
    /// # Errors
    /// When the configuration is impossible or the disk refuses.
    pub fn write_folder(&self, folder: impl AsRef<Path>, stored_as: StoredAs) -> Result<(), ModelError> {
        self.write_folder_watched(folder, stored_as, &mut |_| ControlFlow::Continue(()))
    }

    /// The same, with every few megabytes the number of bytes of weights written so far given to `watch`, which may
    /// break it off.
    ///
    /// # Errors
    /// When the configuration is impossible, the disk refuses, or `watch` broke off ([`io::ErrorKind::Interrupted`]).
    pub fn write_folder_watched(
        &self,
        folder: impl AsRef<Path>,
        stored_as: StoredAs,
        watch: &mut dyn FnMut(u64) -> ControlFlow<()>,
    ) -> Result<(), ModelError> {
        let folder = folder.as_ref();
        self.check(folder)?;
        std::fs::create_dir_all(folder).map_err(|source| ModelError::io(folder, source))?;
        let write = |name: &str, json: &Json| {
            let path = folder.join(name);
            std::fs::write(&path, format!("{json:#}\n")).map_err(|source| ModelError::io(&path, source))
        };
        write("config.json", &settings::of(&self.config, stored_as))?;
        write("tokenizer.json", &tokenizer::description())?;
        write("tokenizer_config.json", &tokenizer::settings())?;
        let path = folder.join("model.safetensors");
        self.write_weights(&path, stored_as, watch).map_err(|source| ModelError::io(&path, source))
    }

    /// A safetensors file: the length of a JSON header, the header, the tensors.
    fn write_weights(
        &self,
        path: &Path,
        stored_as: StoredAs,
        watch: &mut dyn FnMut(u64) -> ControlFlow<()>,
    ) -> io::Result<()> {
        let tensors = expected(&self.config);
        let (mut header, mut end) = (serde_json::Map::new(), 0);
        for (name, shape) in &tensors {
            let begin = end;
            end += shape.iter().product::<usize>() * stored_as.bytes();
            let entry = json!({"dtype": stored_as.in_safetensors(), "shape": shape, "data_offsets": [begin, end]});
            header.insert(name.clone(), entry);
        }
        let mut header = Json::Object(header).to_string();
        header.push_str(&" ".repeat(header.len().next_multiple_of(ALIGNMENT) - header.len()));

        let mut file = BufWriter::new(File::create(path)?);
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(header.as_bytes())?;
        let (mut values, mut bytes, mut written) = (vec![0.0; CHUNK], vec![0; CHUNK * stored_as.bytes()], 0);
        for (name, shape) in &tensors {
            let numbers = shape.iter().product::<usize>();
            for first in (0..numbers).step_by(CHUNK) {
                let count = CHUNK.min(numbers - first);
                let (values, bytes) = (&mut values[..count], &mut bytes[..count * stored_as.bytes()]);
                self.draw(name, shape, first / RUN, values);
                stored_as.encode(values, bytes);
                file.write_all(bytes)?;
                written += bytes.len() as u64;
                if watch(written).is_break() {
                    return Err(io::ErrorKind::Interrupted.into());
                }
            }
        }
        file.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()
    }
}
