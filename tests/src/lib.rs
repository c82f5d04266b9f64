//! The cluster harness: real `node` processes on loopback, on a small random model.
//!
//! Tests say what a user would type; the harness finds the binary, makes models and data, reads what processes print,
//! and leaves no process behind.

mod liar;
mod process;
mod workspace;

pub use liar::{Liar, Lie};
pub use process::{Finished, Node};
pub use workspace::{LAYERS, Workspace};
