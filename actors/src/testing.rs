//! What several modules' tests stand on: a checkpoint small enough for them, and a device that can be told to fail.

#![allow(clippy::unwrap_used)]

mod device;

use std::sync::Arc;

use candle_core::{Device, Tensor, Var};
use protocol::model::synthetic::{StoredAs, SyntheticLlama};
use protocol::model::{LlamaConfig, Model};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

use crate::backend::PlainBackend;
use crate::transformer::Llama;

pub(crate) use device::{Switches, TestDevice};

/// Two layers of random weights, in a folder that lives as long.
pub(crate) struct TinyModel {
    pub(crate) model: Arc<Model>,
    _folder: tempfile::TempDir,
}

impl TinyModel {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        SyntheticLlama::tiny(17).write_folder(folder.path(), StoredAs::F32).unwrap();
        Self { model: Arc::new(Model::open(folder.path()).unwrap()), _folder: folder }
    }

    pub(crate) fn config(&self) -> &LlamaConfig {
        self.model.config()
    }

    /// The model over its own weights in f32.
    pub(crate) fn llama(&self) -> Llama {
        Llama::new(self.model.clone(), Arc::new(PlainBackend::new(&self.model).unwrap())).unwrap()
    }
}

/// Adds uniform noise of up to `±size` to every value.
pub(crate) fn nudge(var: &Var, seed: u64, size: f32) {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let values: Vec<f32> = (0..var.elem_count()).map(|_| random.random_range(-size..size)).collect();
    let noise = Tensor::from_vec(values, var.shape(), &Device::Cpu).unwrap();
    var.set(&(var.as_tensor() + noise).unwrap()).unwrap();
}
