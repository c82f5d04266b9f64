//! Sizes of planes. They are never read from the wire: the receiver computes them from a header and from what it
//! knows of the model, in checked arithmetic, and refuses them above its own limit before anything is allocated.

use super::messages::{Operand, ProductHeader};
use crate::he::Planes;

/// Dimensions of planes that are small enough to be allocated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlanesShape {
    limbs: usize,
    rows: usize,
    columns: usize,
    bytes: usize,
}

/// Planes that nobody may ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{limbs} planes of {rows} × {columns} bytes, where {limit} bytes are allowed")]
pub struct ShapeError {
    /// Bytes per value.
    pub limbs: usize,
    /// Rows of a plane.
    pub rows: usize,
    /// Columns of a plane.
    pub columns: usize,
    /// The receiver's limit.
    pub limit: usize,
}

impl PlanesShape {
    /// The shape of `limbs` planes of `rows × columns` bytes.
    ///
    /// # Errors
    /// If a dimension is zero, or the bytes overflow or exceed `limit`.
    pub fn new(limbs: usize, rows: usize, columns: usize, limit: usize) -> Result<Self, ShapeError> {
        limbs
            .checked_mul(rows)
            .and_then(|bytes| bytes.checked_mul(columns))
            .filter(|&bytes| bytes > 0 && bytes <= limit)
            .map(|bytes| Self { limbs, rows, columns, bytes })
            .ok_or(ShapeError { limbs, rows, columns, limit })
    }

    /// The shape of the planes that follow a product's header: `body_limbs × tokens × inner`; `None` where nothing
    /// follows it.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn of_body(header: &ProductHeader, inner: usize, limit: usize) -> Result<Option<Self>, ShapeError> {
        match header.operand {
            Operand::Masks { .. } => Ok(None),
            Operand::Body { .. } => Self::new(header.operand_limbs(), header.rows(), inner, limit).map(Some),
        }
    }

    /// Bytes of all planes together.
    pub fn bytes(self) -> usize {
        self.bytes
    }

    /// Whether `planes` have this shape.
    pub fn fits(self, planes: &Planes) -> bool {
        (planes.limbs(), planes.rows(), planes.columns()) == (self.limbs, self.rows, self.columns)
    }

    /// Planes to be read into, every byte of them. Fresh memory is handed out by the system page by page as it is
    /// written, so a peer that announces much and sends little costs little.
    pub fn allocate(self) -> Planes {
        Planes::scratch(self.limbs, self.rows, self.columns)
    }
}
