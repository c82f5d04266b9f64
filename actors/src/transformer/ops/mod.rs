//! The operations of a transformer, forward and backward, on rows of f32.
//!
//! Each backward computes again what it can from the operation's input instead of having the forward pass keep it,
//! and writes where its operands lie wherever they are needed no more. What is row by row works on blocks of rows,
//! so that a layer can run several operations on a block while it is in the cache; see [`rows`].

mod adapter;
mod attention;
mod cached;
pub(crate) mod gates;
mod known;
mod local_head;
mod loss;
pub(crate) mod norm;
mod rope;
pub(crate) mod rows;
mod sequences;

#[cfg(test)]
mod tests;

pub(crate) use adapter::{Adapter, AdapterGradient};
pub(crate) use attention::{Attended, CausalAttention, Heads, LayerAttention};
pub(crate) use cached::{CachedAttention, FEW, KeptLayer, KeptSequences, PAGE, Piece};
pub(crate) use known::Known;
pub use known::KnownPart;
pub(crate) use local_head::LocalHead;
pub(crate) use loss::{HeadBatch, HeadLoss, HeadRows, HeadSlices, Losses, Slice};
pub(crate) use norm::RmsNorm;
pub(crate) use rope::{RopeRows, RopeTables};
pub(crate) use sequences::Sequences;
