//! What the owner knows of every served matrix: its scales and norms, and the precision planned for it.
//!
//! The table is computed by streaming the weights from the owner's own disk, one matrix at a time, exactly as a
//! worker does; nothing in it is taken from a worker's word. It depends on the model alone, so it is kept in a cache
//! folder under the model's digest.

use std::collections::HashMap;

use protocol::he::{ParameterSet, Precision};
use protocol::model::{Direction, LinearId, LinearShape};
use protocol::quant::{LinearMeta, PrecisionTarget, ProductCodec, QuantError, plan};

/// Why a table could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TableError {
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
