//! The worker's arithmetic: rows mod q times int8 weights, on whatever this machine has.
//!
//! A [`Kernel`] multiplies a mask and a body by a [`PackedMatrix`] and gives the product away in tiles of output
//! columns, already rounded to the bytes that go back. Which kernels a machine has is found out once, at run time
//! ([`kernels`]); all of them give the same bytes.

pub mod devices;
mod digits;
mod micro;
mod product;
mod speed;
mod weights;
#[cfg(target_arch = "x86_64")]
mod x86;

#[cfg(test)]
mod tests;

use std::ops::ControlFlow;
use std::sync::Arc;

use protocol::he::{Planes, Precision, ProductTile};

pub use speed::measure_speed;
pub use weights::{PackedLinear, PackedMatrix};

/// Tiles into which a product is cut, where it is wide enough: an owner decrypts one while the next is computed.
const TILES: usize = 8;
/// Fewest columns of a tile: narrower ones would spend their time on headers and on fetching the rows again.
const MIN_TILE_COLUMNS: usize = 64;
/// Tiles begin at multiples of this: the widest register block.
const TILE_STEP: usize = 32;

/// One encrypted product.
pub struct Product<'a> {
    /// Parameter set, and bytes of an output value.
    pub precision: Precision,
    /// The matrix of the product's direction, `inner × outer`.
    pub weights: &'a PackedMatrix,
    /// The expanded mask, `[feature][limb][row]`: `inner · set.limbs() · set.mask_rows()` bytes.
    pub mask: &'a [u8],
    /// The body, `set.limbs() × tokens × inner`.
    pub body: &'a Planes,
}

impl Product<'_> {
    fn check(&self) -> Result<(), ProductError> {
        let set = self.precision.set;
        if !self.precision.is_valid() {
            return Err(ProductError::Precision(self.precision));
        }
        let inner = self.weights.inner();
        let expected = inner.checked_mul(set.limbs() * set.mask_rows());
        if expected != Some(self.mask.len()) {
            return Err(ProductError::Mask { bytes: self.mask.len(), inner, precision: self.precision });
        }
        if self.body.limbs() != set.limbs() || self.body.columns() != inner {
            let (limbs, columns) = (self.body.limbs(), self.body.columns());
            return Err(ProductError::Body { limbs, columns, inner, precision: self.precision });
        }
        Ok(())
    }
}

/// Why a product cannot be computed: operands that do not fit each other.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ProductError {
    /// The set has no such number of output limbs.
    #[error("precision {0} asks for output bytes that the set does not have")]
    Precision(Precision),
    /// A mask of the wrong length.
    #[error("a mask of {bytes} bytes does not fit {inner} inner elements at {precision}")]
    Mask {
        /// Bytes that came.
        bytes: usize,
        /// Inner dimension of the weights.
        inner: usize,
        /// Precision of the product.
        precision: Precision,
    },
    /// A body of the wrong shape.
    #[error("a body of {limbs} limbs and {columns} columns does not fit {inner} inner elements at {precision}")]
    Body {
        /// Limbs that came.
        limbs: usize,
        /// Columns that came.
        columns: usize,
        /// Inner dimension of the weights.
        inner: usize,
        /// Precision of the product.
        precision: Precision,
    },
}

/// Takes the tiles of a product, in any order and from any thread of the pool, and says whether to go on. It must not
/// block: the pool may be the one that its reader works on.
pub type TileSink<'a> = &'a (dyn Fn(ProductTile) -> ControlFlow<()> + Sync);

/// A way to compute products. All kernels give the same bytes.
pub trait Kernel: Send + Sync + 'static {
    /// Its name, as it stands in a worker's offer: `avx2`.
    fn name(&self) -> &str;

    /// Computes a product in tiles of about `tile_columns` output columns. Blocks until all tiles are given away, or
    /// until `sink` breaks off.
    ///
    /// # Errors
    /// When the operands do not fit each other; then `sink` was not called.
    fn multiply(&self, product: &Product<'_>, tile_columns: usize, sink: TileSink<'_>) -> Result<(), ProductError>;
}

/// Columns of the tiles in which a product of `outer` columns is best sent.
pub fn tile_columns(outer: usize) -> usize {
    outer.div_ceil(TILES).max(MIN_TILE_COLUMNS).next_multiple_of(TILE_STEP)
}

/// Every CPU kernel that this machine can run, fastest first.
pub fn kernels() -> Vec<Arc<dyn Kernel>> {
    let mut kernels: Vec<Arc<dyn Kernel>> = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        if let Some(micro) = x86::Vnni::detect() {
            kernels.push(Arc::new(product::Cpu { name: "avx512-vnni", micro }));
        }
        if let Some(micro) = x86::Avx2::detect() {
            kernels.push(Arc::new(product::Cpu { name: "avx2", micro }));
        }
    }
    kernels.push(Arc::new(product::Cpu { name: "portable", micro: micro::Portable }));
    kernels
}

/// The fastest CPU kernel of this machine.
pub fn best_kernel() -> Arc<dyn Kernel> {
    kernels().swap_remove(0)
}
