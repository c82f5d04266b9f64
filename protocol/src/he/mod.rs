//! The encryption scheme: column-packed module-RLWE with one-time secrets, whose matrix product is a plain
//! integer matrix product (Bae, Cheon, Hanrot, Park, Stehlé, CRYPTO 2024).
//!
//! The way of one product, in the order of the modules:
//!
//! 1. [`params`] names a parameter set and the bits of each value that travels;
//! 2. once per run, for each matrix and direction, the worker expands the public masks from a seed and multiplies them by
//!    its int8 weights; the owner verifies the result ([`crate::sketch`]), switches its modulus and keeps it
//!    ([`mask_product`]);
//! 3. for each call the owner expands the same masks and encrypts its rows, keeping a one-time secret for each block;
//! 4. the worker multiplies the body by its weights and switches the modulus of the result;
//! 5. the owner decrypts the switched tiles with the mask product and the only ticket there is, and verifies the whole.
//!
//! Calls of few rows take what steps 3 and 5 compute from a store that was filled ahead ([`pads`]); calls of micro-batches that
//! go side by side, or small ones, compute it for a block as a whole ([`share`]).
//!
//! Masks that stay the same while every block of every call has its own secret are multi-secret RLWE: by a hybrid
//! argument, the advantage over all blocks is at most the sum of that over each. What must never serve twice is a secret.

pub mod decrypt;
pub mod encrypt;
pub mod fft;
mod lanes;
pub mod mask;
pub mod mask_product;
pub mod modulus;
pub mod noise;
mod packing;
pub mod pads;
pub mod params;
pub mod planes;
mod products;
pub mod reference;
mod rows;
mod sampling;
mod secret;
#[cfg(test)]
pub(crate) mod tests;
mod word;

pub(crate) use lanes::vectorised;
#[cfg(target_arch = "x86_64")]
pub(crate) use lanes::widest_vectors;
pub(crate) use mask::MaskColumns;
pub(crate) use sampling::SecretRng;

pub use decrypt::{DecryptError, Decrypted, Decryption, Ticket};
pub use encrypt::{EncryptError, Plaintext, RowError, RowTask, encrypt};
pub use mask::{MaskDomain, MaskSeed};
pub use mask_product::{MaskProduct, MaskProductBuilder, UnverifiedMasks};
pub(crate) use pads::shared::Late;
pub use pads::shared::{SharedAnswer, SharedRows, SharedSecret, SharedTicket, share, shared_bytes};
pub use pads::{PadRow, PadTicket, encrypt_with_pads};
pub use params::{ParameterSet, Precision};
pub use planes::{Planes, ProductTile};
