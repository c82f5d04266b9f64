//! What can be wrong with numbers on their way to integers.

use crate::he::Precision;

/// Why weights or rows cannot be turned into integers.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum QuantError {
    /// A buffer does not have the length that its shape asks for.
    #[error("{what} has {found} values, its shape asks for {expected}")]
    Length {
        /// Which buffer.
        what: &'static str,
        /// Its length.
        found: usize,
        /// The length that was due; `usize::MAX` where the shape itself overflows.
        expected: usize,
    },
    /// A row to be encoded holds NaN or an infinity.
    #[error("row {row}, feature {feature} is {value}: only finite numbers can be encoded")]
    NotFiniteRow {
        /// Row (token), from 0.
        row: usize,
        /// Feature, from 0.
        feature: usize,
        /// NaN or ±∞.
        value: f32,
    },
    /// A weight is NaN or infinite.
    #[error("the weight of input {input} and output {output} is {value}: the model's file is damaged")]
    NotFiniteWeight {
        /// Input feature, from 0.
        input: usize,
        /// Output feature, from 0.
        output: usize,
        /// NaN or ±∞.
        value: f32,
    },
    /// Weights so large that their rotated matrix leaves the range of f32.
    #[error("the weights overflow f32 when rotated (output {output}): the model's file is damaged")]
    WeightOverflow {
        /// Rotated output column in which it happened.
        output: usize,
    },
    /// Metadata that contradicts itself.
    #[error("the metadata of a served matrix is inconsistent: {0}")]
    Metadata(&'static str),
    /// The worst noise of a product already fills the modulus.
    #[error(
        "{precision} leaves no room for a message with {inner} inner features: choose a larger set or more output bytes"
    )]
    NoRoom {
        /// The precision that was asked for.
        precision: Precision,
        /// Inner dimension of the product.
        inner: usize,
    },
}
