//! The worker's arithmetic: rows mod q times int8 weights, on whatever this machine has.
//!
//! A [`Kernel`] multiplies a mask or a body by a [`PackedMatrix`] and gives the product away in tiles of output
//! columns, already rounded to the bits that go back. It knows values of some bytes, not parameter sets. Which kernels
//! a machine has is found out once, at run time ([`kernels`]); all of them give the same bytes.
//!
//! A worker sees none of this: it has [`Device`]s, of which the processor with its best kernel is one ([`CpuDevice`]).

mod agreement;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
mod cpu;
pub mod cuda;
pub mod device;
pub mod devices;
mod digits;
pub mod exactness;
mod lines;
mod micro;
mod product;
mod speed;
#[cfg(target_arch = "x86_64")]
mod vnni;
mod weights;

#[cfg(test)]
mod tests;

use std::ops::ControlFlow;
use std::sync::Arc;

use protocol::he::{Planes, ProductTile};

pub use cpu::{CpuDevice, expand_masks};
pub use device::{Device, DeviceError, HeldMatrix, Multiplicand, ProductTask};
pub use speed::{measure_device_speed, measure_speed, product_seconds, task_seconds};
pub use weights::{PackedLinear, PackedMatrix};

/// Most bytes of a value.
pub const MAX_LIMBS: usize = 6;
/// Tiles into which a product is cut, where it is wide enough: an owner decrypts one while the next is computed.
const TILES: usize = 8;
/// Rows of a product that takes about as long as its weights come from memory, whatever is done with them.
const FEW_ROWS: usize = 16;
/// Values of an answer that goes as one tile, if it has few rows: it is written in less time than it takes to wake up whoever writes
/// the next one.
const WHOLE_VALUES: usize = 1 << 16;
/// Fewest columns of a tile: narrower ones would spend their time on headers and on fetching the rows again.
const MIN_TILE_COLUMNS: usize = 64;
/// Tiles begin at multiples of this: the widest register block.
const TILE_STEP: usize = 32;

/// The left operand of a product.
#[derive(Clone, Copy)]
pub enum Rows<'a> {
    /// An expanded mask.
    Masks {
        /// `[feature][limb][row]`: `inner · limbs · rows` bytes.
        keystream: &'a [u8],
        /// Rows of the mask.
        rows: usize,
    },
    /// Values of whole bytes, `limbs × tokens × inner`.
    Body(&'a Planes),
}

impl Rows<'_> {
    /// How many rows there are.
    pub fn count(&self) -> usize {
        match self {
            Self::Masks { rows, .. } => *rows,
            Self::Body(body) => body.rows(),
        }
    }
}

/// A product mod `2^(8·limbs)` of rows by int8 weights.
///
/// With one limb it is the plain product of unsigned bytes by int8 weights, of which a byte is kept: what the same
/// kernel costs on operands that nobody encrypted.
pub struct Product<'a> {
    /// The matrix of the product's direction, `inner × outer`.
    pub weights: &'a PackedMatrix,
    /// Bytes of a value of the rows, 1 to [`MAX_LIMBS`].
    pub limbs: usize,
    /// Most significant bits of an output value that are given away, rounded to the nearest: some that planes can have, at
    /// most `8·limbs`. They come in whole bytes, at whose upper end they stand, with zeros below them.
    pub output_bits: u32,
    /// What is multiplied.
    pub rows: Rows<'a>,
}

impl Product<'_> {
    fn check(&self) -> Result<(), ProductError> {
        let &Self { weights, limbs, output_bits, rows } = self;
        if !are_possible(limbs, output_bits) {
            return Err(ProductError::Bits { limbs, output_bits });
        }
        let inner = weights.inner();
        match rows {
            Rows::Masks { keystream, rows } => {
                let expected = inner.checked_mul(limbs).and_then(|column| column.checked_mul(rows));
                if expected != Some(keystream.len()) {
                    return Err(ProductError::Masks { bytes: keystream.len(), rows, limbs, inner });
                }
            }
            Rows::Body(body) => {
                if body.bits() != 8 * limbs as u32 || body.columns() != inner {
                    let (body_bits, columns) = (body.bits(), body.columns());
                    return Err(ProductError::Body { body_bits, columns, limbs, inner });
                }
            }
        }
        Ok(())
    }
}

/// Whether there is a product of values of so many bytes that gives so many bits.
fn are_possible(limbs: usize, output_bits: u32) -> bool {
    (1..=MAX_LIMBS).contains(&limbs) && Planes::has_width(output_bits) && output_bits <= 8 * limbs as u32
}

/// Why a product cannot be computed: operands that do not fit each other.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ProductError {
    /// Numbers that no kernel has.
    #[error("there is no product of {limbs} bytes a value that gives {output_bits} bits")]
    Bits {
        /// Bytes of a value asked for.
        limbs: usize,
        /// Bits of an output value asked for.
        output_bits: u32,
    },
    /// A mask of the wrong length.
    #[error("a mask of {bytes} bytes is not {rows} rows of {inner} values of {limbs} bytes")]
    Masks {
        /// Bytes that came.
        bytes: usize,
        /// Rows that they should be.
        rows: usize,
        /// Bytes of a value.
        limbs: usize,
        /// Inner dimension of the weights.
        inner: usize,
    },
    /// A body of the wrong shape.
    #[error("a body of {body_bits} bits a value and {columns} columns does not fit {inner} values of {limbs} bytes")]
    Body {
        /// Bits of a value that came.
        body_bits: u32,
        /// Columns that came.
        columns: usize,
        /// Limbs of the product.
        limbs: usize,
        /// Inner dimension of the weights.
        inner: usize,
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

    /// Integer operations that one multiply-add of a value of `limbs` bytes by a weight takes: two for each digit that
    /// the kernel splits it into, a byte (`vpdpbusd`, `tdpbusd`) or 16 bits (`vpmaddwd`).
    fn operations(&self, limbs: usize) -> usize;

    /// The most of these operations per second that all threads of the current rayon pool can do together: the
    /// kernel's own multiply instruction on registers alone, measured for some milliseconds. `None` where the compiler
    /// chooses the instructions.
    fn peak_ops(&self) -> Option<f64>;
}

/// Columns of the tiles in which a product of so many rows and `outer` columns is best sent: a small answer of few rows goes as
/// a whole.
pub fn answer_columns(rows: usize, outer: usize) -> usize {
    let whole = rows <= FEW_ROWS && rows.saturating_mul(outer) <= WHOLE_VALUES;
    if whole { outer.max(1) } else { tile_columns(outer) }
}

/// Columns of the tiles in which a product of `outer` columns is best sent, if it has many rows.
pub fn tile_columns(outer: usize) -> usize {
    outer.div_ceil(TILES).max(MIN_TILE_COLUMNS).next_multiple_of(TILE_STEP)
}

/// Every CPU kernel that this machine can run, fastest first.
pub fn kernels() -> Vec<Arc<dyn Kernel>> {
    let mut kernels: Vec<Arc<dyn Kernel>> = Vec::new();
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    if let Some(micro) = amx::Amx::detect() {
        kernels.push(Arc::new(product::Cpu::new("amx", micro)));
    }
    #[cfg(target_arch = "x86_64")]
    {
        if let Some(micro) = vnni::Vnni::detect() {
            kernels.push(Arc::new(product::Cpu::new("avx512-vnni", micro)));
        }
        if let Some(micro) = avx2::Avx2::detect() {
            kernels.push(Arc::new(product::Cpu::new("avx2", micro)));
        }
    }
    kernels.push(portable_kernel());
    kernels
}

/// The kernel that runs everywhere and by which all others are judged.
pub fn portable_kernel() -> Arc<dyn Kernel> {
    Arc::new(product::Cpu::new("portable", micro::Portable))
}

/// The fastest CPU kernel of this machine that gives the portable kernel's bytes.
pub fn best_kernel() -> Arc<dyn Kernel> {
    let mut kernels = kernels();
    let portable = kernels.remove(kernels.len() - 1);
    let sound = |kernel: &Arc<dyn Kernel>| {
        let sound = agreement::agrees(kernel.as_ref(), portable.as_ref());
        if !sound {
            tracing::error!(kernel = kernel.name(), "multiplies wrongly on this processor and is not used");
        }
        sound
    };
    kernels.into_iter().find(sound).unwrap_or(portable)
}
