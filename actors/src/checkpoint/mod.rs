//! Checkpoints: all that a run needs to go on as if nothing had happened, in one file that is whole or not there.
//!
//! A checkpoint is made by whoever trains and does not know what that is: here is only how it lies on the disk.
//!
//! 1. [`Identity`] says which run it belongs to, field by field, so that one of another model, other data or other settings
//!    is refused by the name of what differs;
//! 2. `format` puts identity, the run's own state and its tensors into bytes under a hash, so that a torn or damaged file
//!    is known from a good one;
//! 3. [`Store`] is a folder of them: it writes one atomically, keeps the last few, and finds the newest good one.

mod format;
mod identity;
mod store;
#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::files::FileError;

pub use format::{Checkpoint, Tensor};
pub use identity::{Difference, Identity};
pub use store::{Found, Store};

/// When checkpoints are made, and how many stay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CheckpointConfig {
    /// After every so many steps; 0 leaves it to the minutes.
    pub save_every: usize,
    /// After the step at whose end so many minutes have passed since the last one; 0 leaves it to the steps.
    pub save_minutes: u64,
    /// How many stay: older ones are removed once a newer one is on the disk.
    pub keep: usize,
}

impl Default for CheckpointConfig {
    fn default() -> Self {
        // A checkpoint is written in milliseconds for a small model and in a second for one of billions of parameters, so
        // that neither takes a hundredth of the time between two.
        Self { save_every: 20, save_minutes: 5, keep: 2 }
    }
}

impl CheckpointConfig {
    /// Whether a checkpoint is to be made after so many steps, when the last one was made so long ago.
    pub(crate) fn is_due(&self, steps: usize, age: Duration) -> bool {
        let minutes = Duration::from_secs(self.save_minutes.saturating_mul(60));
        (self.save_every > 0 && steps.is_multiple_of(self.save_every)) || (!minutes.is_zero() && age >= minutes)
    }
}

/// Why there is no checkpoint.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The file system refused.
    #[error(transparent)]
    File(#[from] FileError),
    /// The file is not a whole checkpoint of this version.
    #[error("{} is no checkpoint that can be used: {what}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// It could not be put into bytes.
    #[error("a checkpoint cannot be made: {0}")]
    Encoding(String),
    /// The state that it would hold could not be had.
    #[error("the state of the run cannot be read: {0}")]
    State(String),
}
