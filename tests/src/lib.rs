//! The cluster harness: real `node` processes on loopback, on a small random model.
//!
//! Tests say what a user would type beside what all of them do ([`Run`]); the harness finds the binary, makes models and data,
//! reads what processes print, and leaves no process behind.

mod http;
mod liar;
mod process;
mod run;
mod workspace;

pub use http::{Client, Response, read};
pub use liar::{Liar, Lie};
pub use process::{Finished, Node};
pub use run::{LAYERS, PLAIN, Run, SETTINGS, text};
pub use workspace::Workspace;
