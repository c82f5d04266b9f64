//! What an owner and a worker agree on: the encryption scheme ([`he`]), how activations and weights become
//! integers ([`quant`]), how a stranger's answer is verified ([`sketch`]), which model is served ([`model`]), what travels
//! between them ([`wire`]), and the memory that all of it works in ([`pool`], [`buffer`]). All of them speak of products by
//! the names in [`ids`], and keep the same book of what came ([`columns`]); [`baseline`] is what benchmarks hold the scheme
//! against.
//!
//! Nothing in this crate opens a socket, reads a clock or knows an actor: it is the part of Velum that a
//! second implementation would have to reproduce bit by bit.

pub mod baseline;
pub mod buffer;
pub mod columns;
pub mod he;
pub mod ids;
pub mod model;
pub mod parts;
pub mod pool;
pub mod quant;
pub mod sketch;
mod wiped;
pub mod wire;
