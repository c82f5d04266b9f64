//! Where a worker's weights come from.

use std::sync::Arc;

use protocol::ids::ModelDigest;
use protocol::ids::{Group, LinearId, LinearShape};
use protocol::model::{Model, ModelError};
use protocol::quant::{Int8Matrix, LinearMeta, serve};

/// Why a matrix could not be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{linear} could not be loaded: {why}")]
pub struct SourceError {
    /// The served matrix.
    pub linear: LinearId,
    /// What went wrong, with the file where one is to blame.
    pub why: String,
}

/// The served matrices of one model.
pub trait ShardSource: Send + Sync + 'static {
    /// Names the model; known without reading anything.
    fn digest(&self) -> ModelDigest;

    /// Layers that can be asked for: those of the transformer, then the slices of the head.
    fn layers(&self) -> u16;

    /// The matrices of a layer; none where there is no such layer.
    fn groups(&self, layer: u16) -> &'static [Group];

    /// Dimensions of a served matrix: those of a group are the same in every layer.
    fn shape(&self, linear: LinearId) -> LinearShape;

    /// Reads, rotates and rounds one matrix. Blocks; no more than this one matrix is held in f32.
    ///
    /// # Errors
    /// When the file is damaged.
    fn load(&self, linear: LinearId) -> Result<(Int8Matrix, LinearMeta), SourceError>;
}

/// A model on disk.
pub struct ModelSource {
    model: Arc<Model>,
    digest: ModelDigest,
}

impl ModelSource {
    /// A source of the model's matrices. Computes the model's digest, which reads every weight once.
    ///
    /// # Errors
    /// As [`Model::digest`].
    pub fn new(model: Arc<Model>) -> Result<Self, ModelError> {
        let digest = model.digest()?;
        Ok(Self { model, digest })
    }
}

impl ShardSource for ModelSource {
    fn digest(&self) -> ModelDigest {
        self.digest
    }

    fn layers(&self) -> u16 {
        u16::try_from(self.model.config().served_layers()).unwrap_or(u16::MAX)
    }

    fn groups(&self, layer: u16) -> &'static [Group] {
        self.model.config().groups_of(layer)
    }

    fn shape(&self, linear: LinearId) -> LinearShape {
        self.model.config().shape(linear.group)
    }

    fn load(&self, linear: LinearId) -> Result<(Int8Matrix, LinearMeta), SourceError> {
        let failed = |why: String| SourceError { linear, why };
        let weights = self.model.linear(linear).map_err(|error| failed(error.to_string()))?;
        serve(weights, self.shape(linear)).map_err(|error| failed(error.to_string()))
    }
}
