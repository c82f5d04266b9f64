//! The head as it lies in the model's files: read block by block, never held in f32 as a whole.

use protocol::model::{Model, ModelError};

use super::ops::HeadRows;

impl HeadRows for Model {
    fn vocabulary(&self) -> usize {
        self.config().vocabulary
    }

    fn read(&self, first: usize, out: &mut [f32]) -> Result<(), ModelError> {
        self.head_rows(first, out)
    }
}
