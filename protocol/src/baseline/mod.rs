//! What this project's scheme is measured against: the published one ([`PaperScheme`]), behind an interface that both have.
//!
//! Nothing of it runs in training: benchmarks and tests alone encrypt rows, multiply, decrypt and count bytes through
//! [`Scheme`]. Products are decrypted as they come, without verification: there is nobody to distrust.
#![allow(clippy::disallowed_methods)]

mod column_packed;
mod paper;
#[cfg(test)]
mod tests;

use crate::he::{DecryptError, EncryptError};
use crate::quant::QuantError;

pub use column_packed::{ColumnPacked, with_reference_product};
pub use paper::PaperScheme;

/// Private products of f32 rows by public int8 weights, which the scheme was made with.
pub trait Scheme {
    /// What goes to the worker.
    type Request;
    /// What the owner keeps of one request.
    type Ticket;
    /// What comes back.
    type Answer;

    /// Its name in reports.
    fn name(&self) -> String;

    /// Owner: encrypts `tokens × d_in` rows.
    ///
    /// # Errors
    /// When the rows cannot be encrypted.
    fn encrypt(&self, rows: &[f32], tokens: usize) -> Result<(Self::Request, Self::Ticket), SchemeError>;

    /// Worker: the product with the weights.
    fn multiply(&self, request: &Self::Request) -> Self::Answer;

    /// Owner: `tokens × d_out` rows, without the scales of the weights.
    ///
    /// # Errors
    /// When the answer does not fit the ticket.
    fn decrypt(&self, ticket: Self::Ticket, answer: &Self::Answer) -> Result<Vec<f32>, SchemeError>;

    /// Bytes that a request takes on the wire.
    fn request_bytes(&self, request: &Self::Request) -> usize;

    /// Bytes that an answer takes on the wire.
    fn answer_bytes(&self, answer: &Self::Answer) -> usize;
}

/// Why a private product failed on the owner's side.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SchemeError {
    /// Rows that do not fit the weights.
    #[error("{values} values are not {tokens} rows of {inner}")]
    Shape {
        /// Values given.
        values: usize,
        /// Rows announced.
        tokens: usize,
        /// Inner dimension of the weights.
        inner: usize,
    },
    /// No steps could be found.
    #[error(transparent)]
    Steps(#[from] QuantError),
    /// Encryption failed.
    #[error(transparent)]
    Encrypt(#[from] EncryptError),
    /// Decryption failed.
    #[error(transparent)]
    Decrypt(#[from] DecryptError),
    /// An answer of the wrong size.
    #[error("the answer has {found} parts instead of {expected}")]
    Answer {
        /// Parts that came.
        found: usize,
        /// Parts that were due.
        expected: usize,
    },
}
