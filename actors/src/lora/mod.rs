//! Low-rank adapters (Hu et al., 2021): the part of the model that is trained, which never leaves its owner.
//!
//! A projection's output gains `(alpha / rank) · dropout(x)·Aᵀ·Bᵀ`. The base product comes from workers; this
//! one is small and the owner computes it in the clear.

mod config;
mod projection;

pub use config::LoraConfig;
pub use projection::Projection;
