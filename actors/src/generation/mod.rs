//! Generation: an owner's model writes texts, and says how likely given ones are.
//!
//! The base products are asked of a [`LinearBackend`](crate::backend::LinearBackend) as in training; everything else is the
//! owner's. An [`Engine`] takes [`Request`]s from several callers and computes them side by side: each step is one pass
//! through the layers with a few rows of each text, since a pass costs its round trips to the workers whatever it carries.
//! What a caller asked for comes back as [`Event`]s.

mod config;
mod drafts;
mod ends;
mod engine;
mod error;
mod events;
mod kept;
mod request;
mod sampling;
mod sequence;
#[cfg(test)]
mod tests;
mod text;
mod writer;

pub use config::{Drafts, EngineConfig};
pub use engine::{Activity, Engine};
pub use error::GenerationError;
pub use events::{Event, Events, FinishReason, Finished, PromptScores, Scored, Token, Usage};
pub use request::{Request, Sampling, Stops};
