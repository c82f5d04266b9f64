//! What the owner knows of every served matrix: its scales and norms, and the precision planned for it.
//!
//! The table is computed by streaming the weights from the owner's own disk, one matrix at a time, exactly as a
//! worker does; nothing in it is taken from a worker's word. It depends on the model alone, so it is kept in a cache
//! folder under the model's digest.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::Path;

use protocol::he::{ParameterSet, Precision};
use protocol::ids::ModelDigest;
use protocol::ids::{Direction, LinearId, LinearShape};
use protocol::model::{Model, ModelError};
use protocol::quant::{LinearMeta, PrecisionTarget, ProductCodec, QuantError, plan, serve};

use crate::files::{Readers, create_folder, write_atomically};

/// Names the layout of a cached table; a file that begins with another name is computed anew.
const CACHE_FORMAT: &str = "velum layer table 1";

/// Why a table could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TableError {
    /// The model could not be read.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A matrix could not be quantised.
    #[error("{linear}: {source}")]
    Quant {
        /// Which matrix.
        linear: LinearId,
        /// Why.
        source: QuantError,
    },
}

/// One served matrix, both ways.
pub struct TableEntry {
    shape: LinearShape,
    forward: (Precision, ProductCodec),
    backward: (Precision, ProductCodec),
}

impl TableEntry {
    fn new(meta: &LinearMeta, target: &PrecisionTarget) -> Result<Self, QuantError> {
        let way = |direction| {
            let precision = plan(meta, direction, target);
            ProductCodec::new(meta, direction, precision).map(|codec| (precision, codec))
        };
        Ok(Self { shape: meta.shape, forward: way(Direction::Forward)?, backward: way(Direction::Backward)? })
    }

    fn way(&self, direction: Direction) -> &(Precision, ProductCodec) {
        match direction {
            Direction::Forward => &self.forward,
            Direction::Backward => &self.backward,
        }
    }

    /// Dimensions of the matrix.
    pub fn shape(&self) -> LinearShape {
        self.shape
    }

    /// What the planner chose for a direction.
    pub fn precision(&self, direction: Direction) -> Precision {
        self.way(direction).0
    }

    /// How rows of a direction become integers and come back.
    pub fn codec(&self, direction: Direction) -> &ProductCodec {
        &self.way(direction).1
    }
}

/// The served matrices of a model.
pub struct LayerTable {
    entries: HashMap<LinearId, TableEntry>,
}

impl LayerTable {
    /// Plans every matrix of `metas` for `target`.
    ///
    /// # Errors
    /// When metadata contradict themselves or leave no room for a message.
    pub fn new(metas: &[(LinearId, LinearMeta)], target: &PrecisionTarget) -> Result<Self, TableError> {
        let entry = |(linear, meta): &(LinearId, LinearMeta)| match TableEntry::new(meta, target) {
            Ok(entry) => Ok((*linear, entry)),
            Err(source) => Err(TableError::Quant { linear: *linear, source }),
        };
        Ok(Self { entries: metas.iter().map(entry).collect::<Result<_, _>>()? })
    }

    /// The table of a model: from `cache` if it is there, else computed matrix by matrix (`progress` is told how many
    /// of how many are done) and written to `cache`. A cache that cannot be read or written costs time, never the run.
    ///
    /// # Errors
    /// When the weights cannot be read or quantised.
    pub fn of_model(
        model: &Model,
        digest: ModelDigest,
        target: &PrecisionTarget,
        cache: Option<&Path>,
        mut progress: impl FnMut(usize, usize),
    ) -> Result<Self, TableError> {
        let linears: Vec<LinearId> = model.config().linears().collect();
        let file = cache.map(|folder| folder.join(format!("{digest}.table")));
        if let Some(metas) = file.as_deref().and_then(|path| read_cache(path, &linears)) {
            return Self::new(&metas, target);
        }
        let mut metas = Vec::with_capacity(linears.len());
        for (done, linear) in linears.iter().enumerate() {
            progress(done, linears.len());
            let shape = model.config().shape(linear.group);
            let (_, meta) =
                serve(model.linear(*linear)?, shape).map_err(|source| TableError::Quant { linear: *linear, source })?;
            metas.push((*linear, meta));
        }
        progress(linears.len(), linears.len());
        if let Some(path) = file
            && let Err(error) = write_cache(&path, &metas)
        {
            tracing::warn!(path = %path.display(), %error, "the layer table is not cached");
        }
        Self::new(&metas, target)
    }

    /// What is known of one matrix.
    pub fn entry(&self, linear: LinearId) -> Option<&TableEntry> {
        self.entries.get(&linear)
    }

    /// Matrices in the table.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether the table is empty.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The parameter sets in use, cheapest first.
    pub fn parameter_sets(&self) -> Vec<ParameterSet> {
        let used = |set| self.entries.values().any(|entry| entry.forward.0.set == set || entry.backward.0.set == set);
        ParameterSet::ALL.into_iter().filter(|&set| used(set)).collect()
    }
}

/// The cached metadata, if the file is there, whole, and of exactly these matrices.
fn read_cache(path: &Path, linears: &[LinearId]) -> Option<Vec<(LinearId, LinearMeta)>> {
    let bytes = fs::read(path).ok()?;
    let (format, metas): (String, Vec<(LinearId, LinearMeta)>) = serde_json::from_slice(&bytes).ok()?;
    let same = format == CACHE_FORMAT && metas.iter().map(|(linear, _)| linear).eq(linears);
    same.then_some(metas)
}

fn write_cache(path: &Path, metas: &[(LinearId, LinearMeta)]) -> io::Result<()> {
    create_folder(path.parent().unwrap_or(Path::new("."))).map_err(io::Error::other)?;
    let json = serde_json::to_vec(&(CACHE_FORMAT, metas))?;
    write_atomically(path, &json, Readers::Usual).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use protocol::model::synthetic::{StoredAs, SyntheticLlama};

    use super::*;

    fn table(model: &Model, cache: &Path) -> (LayerTable, usize) {
        let mut computed = 0;
        let digest = model.digest().unwrap();
        let target = PrecisionTarget::default();
        let table = LayerTable::of_model(model, digest, &target, Some(cache), |done, _| computed = done).unwrap();
        (table, computed)
    }

    #[test]
    fn a_table_is_computed_once_and_a_damaged_cache_is_computed_anew() {
        let folder = tempfile::tempdir().unwrap();
        SyntheticLlama::tiny(1).write_folder(folder.path().join("model"), StoredAs::F32).unwrap();
        let model = Model::open(folder.path().join("model")).unwrap();
        let cache = folder.path().join("cache");
        let (first, computed) = table(&model, &cache);
        assert_eq!((first.len(), computed), (8, 8));
        let (second, computed) = table(&model, &cache);
        assert_eq!((second.len(), computed), (8, 0));
        for linear in model.config().linears() {
            let (a, b) = (first.entry(linear).unwrap(), second.entry(linear).unwrap());
            assert_eq!(a.precision(Direction::Forward), b.precision(Direction::Forward));
            assert_eq!(a.shape(), b.shape());
            let rows: Vec<f32> = (0..a.shape().d_in).map(|i| i as f32 - 7.0).collect();
            let [a, b] = [a, b].map(|entry| entry.codec(Direction::Forward).prepare(&rows, 1).unwrap().steps);
            assert_eq!(a, b, "a cached table encodes as the computed one");
        }
        let file = fs::read_dir(&cache).unwrap().next().unwrap().unwrap().path();
        fs::write(&file, b"[\"velum layer table 0\", []]").unwrap();
        assert_eq!(table(&model, &cache).1, 8);
    }
}
