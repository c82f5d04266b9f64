//! The worker's side: who holds weights, who multiplies, and what the network calls.
//!
//! 1. [`shard_store::ShardStore`] loads the layers that owners were assigned into the memory of the worker's devices, each
//!    where [`spread`] says;
//! 2. [`executor::MatmulExecutor`], one for each device, multiplies masks and bodies by the matrices that the device
//!    holds, and gives the answer away in tiles;
//! 3. [`aggregator::CiphertextAggregator`] adds partial products, where a matrix is cut over several devices ([`parts`]);
//! 4. [`service::Worker`] stands before all of them: it decides who may ask for what, within what [`tenants`] and
//!    [`place`] say of who keeps layers for how long, and how much an owner's products may take.
//!
//! A worker holds public weights and ciphertexts. It never holds a secret, a token or an adapter, and nothing that an
//! owner sends is kept after its answer.

pub mod aggregator;
pub mod executor;
mod limits;
pub mod parts;
pub mod place;
mod product;
pub mod service;
pub mod shard_store;
pub mod source;
pub mod spread;
mod streams;
pub mod sum;
pub mod tenants;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

pub use aggregator::CiphertextAggregator;
pub use executor::MatmulExecutor;
pub use limits::WorkerLimits;
pub use service::{StartError, Worker};
pub use shard_store::ShardStore;
pub use source::{ModelSource, ShardSource, SourceError};
pub use spread::Split;
