//! What the owner knows of every served matrix: its scales and norms, the precision planned for it, and the secret checks
//! of its products.
//!
//! The table is computed by streaming the weights from the owner's own disk, one matrix at a time, exactly as a worker does;
//! nothing in it is taken from a worker's word, and nothing is kept on a disk: checks are secrets of one run.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, PoisonError, RwLock};

use protocol::he::{ParameterSet, Precision};
use protocol::ids::{Direction, LinearId, LinearShape};
use protocol::model::{Model, ModelError};
use protocol::quant::{Int8Matrix, LinearMeta, PrecisionTarget, ProductCodec, QuantError, plan_for, serve};
use protocol::sketch::Checks;

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
    /// The checks could not be drawn.
    #[error("no randomness from the operating system: {0}")]
    Randomness(#[from] getrandom::Error),
}

/// A matrix in one direction.
struct Way {
    precision: Precision,
    codec: ProductCodec,
    checks: RwLock<Arc<Checks>>,
}

/// One served matrix, both ways.
pub struct TableEntry {
    shape: LinearShape,
    /// Hash of the matrix as it is served.
    digest: [u8; 32],
    forward: Way,
    backward: Way,
}

impl TableEntry {
    /// Plans a matrix, and draws its checks.
    fn new(
        linear: LinearId,
        matrix: &Int8Matrix,
        meta: &LinearMeta,
        target: &PrecisionTarget,
    ) -> Result<Self, TableError> {
        let [forward, backward] = Checks::draw(&matrix.values, matrix.shape)?;
        let way = |direction, checks| {
            let precision = plan_for(linear.group, meta, direction, target);
            let codec = ProductCodec::new(meta, direction, precision);
            let codec = codec.map_err(|source| TableError::Quant { linear, source })?;
            Ok::<_, TableError>(Way { precision, codec, checks: RwLock::new(Arc::new(checks)) })
        };
        Ok(Self {
            shape: meta.shape,
            digest: blake3::hash(bytemuck::cast_slice(&matrix.values)).into(),
            forward: way(Direction::Forward, forward)?,
            backward: way(Direction::Backward, backward)?,
        })
    }

    fn way(&self, direction: Direction) -> &Way {
        match direction {
            Direction::Forward => &self.forward,
            Direction::Backward => &self.backward,
        }
    }

    /// Dimensions of the matrix.
    pub fn shape(&self) -> LinearShape {
        self.shape
    }

    /// Hash of the matrix as it is served, in int8.
    pub fn digest(&self) -> &[u8; 32] {
        &self.digest
    }

    /// What the planner chose for a direction.
    pub fn precision(&self, direction: Direction) -> Precision {
        self.way(direction).precision
    }

    /// How rows of a direction become integers and come back.
    pub fn codec(&self, direction: Direction) -> &ProductCodec {
        &self.way(direction).codec
    }

    /// What products of a direction are checked with from now on. One product is sealed and opened with the same.
    pub fn checks(&self, direction: Direction) -> Arc<Checks> {
        Arc::clone(&self.way(direction).checks.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn set_checks(&self, [forward, backward]: [Checks; 2]) {
        for (way, checks) in [(&self.forward, forward), (&self.backward, backward)] {
            *way.checks.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(checks);
        }
    }
}

/// The served matrices of a model.
pub struct LayerTable {
    entries: HashMap<LinearId, TableEntry>,
    /// Where checks can be drawn from anew.
    model: Option<Arc<Model>>,
}

impl LayerTable {
    /// Plans matrices for `target`, and draws their checks.
    ///
    /// # Errors
    /// When metadata contradict themselves or leave no room for a message, or there is no randomness.
    pub fn new(
        matrices: impl IntoIterator<Item = (LinearId, Int8Matrix, LinearMeta)>,
        target: &PrecisionTarget,
    ) -> Result<Self, TableError> {
        let entry = |(linear, matrix, meta): (LinearId, Int8Matrix, LinearMeta)| {
            Ok((linear, TableEntry::new(linear, &matrix, &meta, target)?))
        };
        Ok(Self { entries: matrices.into_iter().map(entry).collect::<Result<_, TableError>>()?, model: None })
    }

    /// The table of a model's layers and, if it is served, its head, computed matrix by matrix; `progress` is told how
    /// many of how many are done. Blocks.
    ///
    /// # Errors
    /// When the weights cannot be read or quantised, or there is no randomness.
    pub fn of_model(
        model: &Arc<Model>,
        head: bool,
        target: &PrecisionTarget,
        mut progress: impl FnMut(usize, usize),
    ) -> Result<Self, TableError> {
        let config = model.config();
        let slices = if head { config.head_slices() } else { 0 };
        let linears: Vec<LinearId> =
            config.linears().chain((0..slices).map(|slice| config.head_linear(slice))).collect();
        let mut entries = HashMap::with_capacity(linears.len());
        for (done, &linear) in linears.iter().enumerate() {
            progress(done, linears.len());
            let (matrix, meta) = served(model, linear)?;
            entries.insert(linear, TableEntry::new(linear, &matrix, &meta, target)?);
        }
        progress(linears.len(), linears.len());
        Ok(Self { entries, model: Some(Arc::clone(model)) })
    }

    /// Draws the checks of some layers anew, as is due when a worker that served them was caught. Products that are under
    /// way are checked with the ones that they were sealed with. A table that was not made of a model has nothing to draw
    /// them from, and keeps those that it has. Blocks.
    ///
    /// # Errors
    /// When the weights cannot be read, or there is no randomness; checks that were not drawn anew stay.
    pub fn redraw(&self, layers: Range<u16>) -> Result<(), TableError> {
        let Some(model) = &self.model else { return Ok(()) };
        for (&linear, entry) in self.entries.iter().filter(|(linear, _)| layers.contains(&linear.layer)) {
            let (matrix, _) = served(model, linear)?;
            entry.set_checks(Checks::draw(&matrix.values, matrix.shape)?);
        }
        Ok(())
    }

    /// What is known of one matrix.
    pub fn entry(&self, linear: LinearId) -> Option<&TableEntry> {
        self.entries.get(&linear)
    }

    /// Every matrix, in no order.
    pub(super) fn entries(&self) -> impl Iterator<Item = (LinearId, &TableEntry)> {
        self.entries.iter().map(|(&linear, entry)| (linear, entry))
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
        let used = |set| {
            self.entries.values().any(|entry| entry.forward.precision.set == set || entry.backward.precision.set == set)
        };
        ParameterSet::ALL.into_iter().filter(|&set| used(set)).collect()
    }
}

/// A matrix as it is served.
fn served(model: &Model, linear: LinearId) -> Result<(Int8Matrix, LinearMeta), TableError> {
    let shape = model.config().shape(linear.group);
    serve(model.linear(linear)?, shape).map_err(|source| TableError::Quant { linear, source })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use protocol::model::synthetic::{StoredAs, SyntheticLlama};
    use protocol::quant::Step;

    use super::*;

    #[test]
    fn the_table_of_a_model_has_every_matrix_and_its_checks_can_be_drawn_anew() {
        let folder = tempfile::tempdir().unwrap();
        SyntheticLlama::tiny(1).write_folder(folder.path().join("model"), StoredAs::F32).unwrap();
        let model = Arc::new(Model::open(folder.path().join("model")).unwrap());
        let mut computed = 0;
        let table =
            LayerTable::of_model(&model, false, &PrecisionTarget::default(), |done, _| computed = done).unwrap();
        assert_eq!((table.len(), computed), (8, 8));
        let before: HashMap<_, _> = model
            .config()
            .linears()
            .map(|linear| (linear, table.entry(linear).unwrap().checks(Direction::Forward)))
            .collect();
        table.redraw(1..2).unwrap();
        for linear in model.config().linears() {
            let entry = table.entry(linear).unwrap();
            let after = entry.checks(Direction::Forward);
            assert_eq!(Arc::ptr_eq(&before[&linear], &after), linear.layer != 1, "{linear}");
            // The new ones are of the same matrix: rows can be prepared with them.
            let rows: Vec<f32> = (0..entry.shape().d_in).map(|i| i as f32 - 7.0).collect();
            let prepared =
                entry.codec(Direction::Forward).prepare_expecting(&rows, 1, &after.sketch, Step::Sketched).unwrap();
            assert_eq!(prepared.1.tokens(), 1);
        }
    }
}
