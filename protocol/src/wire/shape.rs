//! Sizes of planes. They are never read from the wire: the receiver computes them from a header and from what it
//! knows of the model, in checked arithmetic, and refuses them above its own limit before anything is allocated.

use super::messages::{Operand, ProductHeader};
use crate::he::Planes;

/// Dimensions of planes that are small enough to be allocated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlanesShape {
    bits: u32,
    rows: usize,
    columns: usize,
    bytes: usize,
}

/// Planes that nobody may ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{rows} × {columns} values of {bits} bits, where {limit} bytes are allowed")]
pub struct ShapeError {
    /// Bits of a value.
    pub bits: u32,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub columns: usize,
    /// The receiver's limit.
    pub limit: usize,
}

impl PlanesShape {
    /// The shape of the planes of `rows × columns` values of `bits` bits.
    ///
    /// # Errors
    /// If a dimension is zero, values cannot have so many bits, or the bytes overflow or exceed `limit`.
    pub fn new(bits: u32, rows: usize, columns: usize, limit: usize) -> Result<Self, ShapeError> {
        let bytes = Planes::has_width(bits).then(|| Planes::bytes_for(bits, rows, columns)).flatten();
        bytes
            .filter(|&bytes| bytes > 0 && bytes <= limit)
            .map(|bytes| Self { bits, rows, columns, bytes })
            .ok_or(ShapeError { bits, rows, columns, limit })
    }

    /// The shape of the planes that follow a product's header: `tokens × inner` values of `body_bits`; `None` where nothing
    /// follows it.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn of_body(header: &ProductHeader, inner: usize, limit: usize) -> Result<Option<Self>, ShapeError> {
        match header.operand {
            Operand::Masks { .. } => Ok(None),
            Operand::Body { .. } => Self::new(header.operand_bits(), header.rows(), inner, limit).map(Some),
        }
    }

    /// Bytes of all planes together.
    pub fn bytes(self) -> usize {
        self.bytes
    }

    /// Whether `planes` have this shape.
    pub fn fits(self, planes: &Planes) -> bool {
        (planes.bits(), planes.rows(), planes.columns()) == (self.bits, self.rows, self.columns)
    }

    /// Planes to be read into, every byte of them. Fresh memory is handed out by the system page by page as it is
    /// written, so a peer that announces much and sends little costs little.
    pub fn allocate(self) -> Planes {
        Planes::scratch_of_bits(self.bits, self.rows, self.columns)
    }
}
