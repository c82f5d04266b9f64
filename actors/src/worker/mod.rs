//! The worker's side: who holds weights, who multiplies, and what the network calls.
//!
//! 1. [`shard_store::ShardStore`] loads the layers that owners were assigned and packs them for the kernels;
//! 2. [`executor::MatmulExecutor`], one for each device, expands a mask, multiplies mask and body, and gives the answer
//!    away in tiles;
//! 3. [`service::Worker`] stands before both: it decides who may ask for what.
//!
//! A worker holds public weights and ciphertexts. It never holds a secret, a token or an adapter, and nothing that an
//! owner sends is kept after its answer.

pub mod executor;
pub mod service;
pub mod shard_store;
pub mod source;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

pub use executor::MatmulExecutor;
pub use service::{StartError, Worker, WorkerLimits};
pub use shard_store::ShardStore;
pub use source::{ModelSource, ShardSource, SourceError};
