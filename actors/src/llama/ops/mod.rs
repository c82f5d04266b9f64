//! The operations of a Llama as candle custom operations, forward and backward.
//!
//! candle's own fused norms, rotary positions and attention have no backward, and its primitive operations would
//! write each intermediate of a layer to memory several times and keep it until the gradient is known. These
//! here read their input once, keep nothing, and compute again in the backward pass what it needs.

mod attention;
mod linear;
mod loss;
mod norm;
mod rope;
mod storage;
mod swiglu;

#[cfg(test)]
mod tests;

pub(crate) use attention::CausalAttention;
pub(crate) use linear::{AdaptedProduct, Adapter, BaseProduct};
pub(crate) use loss::HeadLoss;
pub(crate) use norm::RmsNorm;
pub(crate) use rope::RopeTable;
pub(crate) use swiglu::SwiGlu;
