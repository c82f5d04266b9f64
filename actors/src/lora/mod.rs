//! Low-rank adapters (Hu et al., 2021): the part of the model that is trained, which never leaves its owner.
//!
//! A projection's output gains `(alpha / rank) · dropout(x)·Aᵀ·Bᵀ`. The base product comes from workers; this
//! one is small and the owner computes it in the clear.

mod adapters;
mod config;
mod dropout;
mod layers;
mod values;

pub use adapters::{GroupAdapter, LoraAdapters, Slot};
pub use config::LoraConfig;
pub use layers::Layers;
pub use protocol::model::Projection;

pub(crate) use dropout::{Draw, Dropout};
pub(crate) use values::Values;
