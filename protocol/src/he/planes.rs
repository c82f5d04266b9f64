//! Byte planes: a matrix mod `2^(8·limbs)` with the bytes of equal weight together. They are at once the wire
//! format and the operand of the integer product.

use std::fmt;

use crate::pool::Pool;

/// A matrix of integers mod `2^(8·limbs)`, stored `[limb][row][column]`, least significant limb first.
///
/// Its memory comes from a pool and goes back there: planes of the same few sizes come and go in every product.
pub struct Planes {
    limbs: usize,
    rows: usize,
    columns: usize,
    /// At least `limbs·rows·columns`; those behind are of earlier use.
    bytes: Vec<u8>,
}

/// Bytes that may wait for the next planes: those of a few products of a model of a billion parameters.
static POOL: Pool<u8> = Pool::new(192 << 20);

impl Planes {
    /// A matrix of zeros.
    pub fn zeros(limbs: usize, rows: usize, columns: usize) -> Self {
        let mut planes = Self::scratch(limbs, rows, columns);
        planes.bytes_mut().fill(0);
        planes
    }

    /// A matrix whose bytes are whatever they were: each has to be written before it is read.
    pub fn scratch(limbs: usize, rows: usize, columns: usize) -> Self {
        Self { limbs, rows, columns, bytes: POOL.scratch(limbs * rows * columns) }
    }

    /// Takes bytes laid out `[limb][row][column]`; `None` if their count is not `limbs·rows·columns`.
    pub fn from_bytes(limbs: usize, rows: usize, columns: usize, bytes: Vec<u8>) -> Option<Self> {
        let expected = limbs.checked_mul(rows)?.checked_mul(columns)?;
        (bytes.len() == expected).then_some(Self { limbs, rows, columns, bytes })
    }

    /// Bytes per value.
    pub fn limbs(&self) -> usize {
        self.limbs
    }

    /// Rows: tokens of a body, `k·N` of a mask.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns: features.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// All bytes, `[limb][row][column]`.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.limbs * self.rows * self.columns]
    }

    /// All bytes, to be written in place.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[..self.limbs * self.rows * self.columns]
    }

    /// One plane, `[row][column]`.
    pub fn plane(&self, limb: usize) -> &[u8] {
        let size = self.rows * self.columns;
        &self.bytes[limb * size..(limb + 1) * size]
    }

    /// The value at `(row, column)` as an unsigned integer.
    pub fn value(&self, row: usize, column: usize) -> u64 {
        (0..self.limbs).map(|limb| u64::from(self.plane(limb)[row * self.columns + column]) << (8 * limb)).sum()
    }

    /// Sets the value at `(row, column)` to `value mod 2^(8·limbs)`.
    pub fn set_value(&mut self, row: usize, column: usize, value: u64) {
        let (size, index) = (self.rows * self.columns, row * self.columns + column);
        for limb in 0..self.limbs {
            self.bytes[limb * size + index] = (value >> (8 * limb)) as u8;
        }
    }
}

impl Drop for Planes {
    fn drop(&mut self) {
        POOL.put(std::mem::take(&mut self.bytes));
    }
}

impl Clone for Planes {
    fn clone(&self) -> Self {
        let mut copy = Self::scratch(self.limbs, self.rows, self.columns);
        copy.bytes_mut().copy_from_slice(self.bytes());
        copy
    }
}

impl PartialEq for Planes {
    fn eq(&self, other: &Self) -> bool {
        let dimensions = |planes: &Self| (planes.limbs, planes.rows, planes.columns);
        dimensions(self) == dimensions(other) && self.bytes() == other.bytes()
    }
}

impl Eq for Planes {}

impl fmt::Debug for Planes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The bytes are many.
        write!(f, "Planes({} × {} × {})", self.limbs, self.rows, self.columns)
    }
}

/// Some output columns of a product, after modulus switching: all rows of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProductTile {
    /// First output column of the tile.
    pub first_column: usize,
    /// `A'`, `mask_limbs × k·N × columns`, or `B'`, `output_limbs × tokens × columns`.
    pub rows: Planes,
}
