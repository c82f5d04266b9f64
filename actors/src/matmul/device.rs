//! What multiplies for a worker, whatever it is: the processor, or one GPU.
//!
//! A [`Device`] takes served matrices into its memory, and each of these [`HeldMatrix`] multiplies masks and bodies by
//! itself. Whatever the device, the bytes of an answer are those of the portable kernel on the processor: that is what
//! correct means here.

use std::sync::Arc;

use protocol::he::{MaskDomain, MaskSeed, Planes};
use protocol::ids::{Direction, LinearShape};

use super::{ProductError, TileSink};

/// What multiplies for a worker: the processor, or one GPU.
pub trait Device: Send + Sync + 'static {
    /// As it stands in a worker's offer: `cpu (avx2)`, `cuda:0 (NVIDIA H100 80GB HBM3, compute capability 9.0)`.
    fn name(&self) -> String;

    /// Bytes of its own memory that matrices may take, while it holds none; `None` where they lie in the worker's memory.
    fn own_memory(&self) -> Option<u64>;

    /// Bytes that a matrix of this shape takes, both directions.
    fn memory_for(&self, shape: LinearShape) -> u64;

    /// Makes `values`, row-major `d_in × d_out`, ready for products in both directions.
    ///
    /// # Errors
    /// When the device has no memory for it or does not work, or `values` are not as many as the shape has.
    fn hold(&self, shape: LinearShape, values: &[i8]) -> Result<Arc<dyn HeldMatrix>, DeviceError>;

    /// Multiply-accumulates a second of a value mod 2^24 by an int8 weight, measured over whole products. Blocks for a
    /// fraction of a second.
    ///
    /// # Errors
    /// When the device does not work.
    fn measure_speed(&self) -> Result<f64, DeviceError>;
}

/// A matrix in a device's memory, which is free again when this is dropped.
pub trait HeldMatrix: Send + Sync + 'static {
    /// Its dimensions.
    fn shape(&self) -> LinearShape;

    /// What it takes of the device's memory, bytes.
    fn memory_bytes(&self) -> u64;

    /// Computes a product in tiles of about `tile_columns` output columns, as they travel. Blocks until all tiles are given
    /// away or `sink` breaks off.
    ///
    /// # Errors
    /// When the operands do not fit each other, the device has no memory for the product, or it does not work. Tiles
    /// that `sink` was given before are right.
    fn multiply(&self, task: &ProductTask, tile_columns: usize, sink: TileSink<'_>) -> Result<(), DeviceError>;
}

/// One product, as a device takes it.
#[derive(Clone, Debug)]
pub struct ProductTask {
    /// `X·W` or `dY·Wᵀ`.
    pub direction: Direction,
    /// Bytes in which a value of the rows has room, and in which it is multiplied: of a body that has fewer bits, these stand
    /// at their upper end.
    pub limbs: usize,
    /// Most significant bits of an output value that are given away, rounded to the nearest: some that planes can have, at
    /// most `8·limbs`.
    pub output_bits: u32,
    /// What the matrix is multiplied by.
    pub rows: Multiplicand,
}

/// What a matrix is multiplied by.
#[derive(Clone, Debug)]
pub enum Multiplicand {
    /// The masks of features `first_feature..first_feature + inner` of a domain, expanded on the device.
    Masks {
        /// Their seed.
        seed: MaskSeed,
        /// What they are for. Its set has as many limbs as the product.
        domain: MaskDomain,
        /// The feature of the first row of the matrix: not 0 where the matrix is a part of a wider one.
        first_feature: usize,
    },
    /// The body of a ciphertext as it travels, `tokens × inner`.
    Body(Arc<Planes>),
}

impl Multiplicand {
    /// How many rows there are: `n` of a mask, tokens of a body.
    pub fn count(&self) -> usize {
        match self {
            Self::Masks { domain, .. } => domain.set.mask_rows(),
            Self::Body(body) => body.rows(),
        }
    }
}

/// Why a device does not do what it was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// Operands that do not fit each other.
    #[error(transparent)]
    Product(#[from] ProductError),
    /// Values that are not as many as the matrix has.
    #[error("{count} values are no matrix of {} × {}", .shape.d_in, .shape.d_out)]
    Values {
        /// How many came.
        count: usize,
        /// The matrix that they should be.
        shape: LinearShape,
    },
    /// No memory for a matrix or for a product.
    #[error("{device} is out of memory: {needed} bytes are needed, {free} are free")]
    OutOfMemory {
        /// Which device.
        device: String,
        /// Bytes that were asked for.
        needed: u64,
        /// Bytes that it has left.
        free: u64,
    },
    /// The device or its driver does not work.
    #[error("{device} failed: {what}")]
    Failed {
        /// Which device.
        device: String,
        /// What it said.
        what: String,
    },
}
