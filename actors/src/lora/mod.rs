//! Low-rank adapters (Hu et al., 2021): the part of the model that is trained, which never leaves its owner.
//!
//! A projection's output gains `(alpha / rank) · dropout(x)·Aᵀ·Bᵀ`, or `(alpha / √rank)` times that. The base product comes from workers; this
//! one is small and the owner computes it in the clear.

mod adapters;
mod config;
mod dropout;
mod layers;
mod norms;
mod patterns;
mod targets;
mod tokens;
mod values;

pub use adapters::{GroupAdapter, Learning, LoraAdapters, Slot};
pub use config::LoraConfig;
pub use layers::Layers;
pub use patterns::Patterns;
pub use protocol::model::Projection;
pub use targets::Initialisation;
pub use tokens::NamedToken;

pub(crate) use dropout::{Draw, Dropout};
pub(crate) use norms::{Depth, SavedNorm};
pub(crate) use targets::read as read_targets;
pub(crate) use tokens::TokenRows;
pub(crate) use values::Values;
