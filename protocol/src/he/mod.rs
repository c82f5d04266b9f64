//! The encryption scheme: column-packed module-RLWE with one-time secrets, whose matrix product is a plain
//! integer matrix product (DESIGN of record; Bae, Cheon, Hanrot, Park, Stehlé, CRYPTO 2024).
//!
//! The way of one product, in the order of the modules:
//!
//! 1. [`params`] names a parameter set and the bytes of its answer;
//! 2. the owner expands the public mask from a seed and encrypts its rows, keeping a one-time secret;
//! 3. the worker expands the same mask, multiplies mask and body by its int8 weights and switches the
//!    modulus of the result;
//! 4. the owner decrypts the switched tiles with the only ticket there is.

pub mod decrypt;
pub mod encrypt;
mod lanes;
pub mod mask;
pub mod modulus;
pub mod noise;
mod ntt;
pub mod paper;
pub mod params;
pub mod planes;
mod products;
pub mod reference;
mod sampling;
pub mod scheme;
mod secret;
#[cfg(test)]
mod tests;
mod word;

pub use decrypt::{DecryptError, Decryption, Ticket};
pub use encrypt::{EncryptError, Plaintext, encrypt};
pub use mask::{MaskDomain, MaskSeed};
pub use params::{ParameterSet, Precision};
pub use planes::{Planes, ProductTile};
