//! Byte planes: a matrix mod `2^(8·limbs)` with the bytes of equal weight together. They are at once the wire
//! format and the operand of the integer product.

/// A matrix of integers mod `2^(8·limbs)`, stored `[limb][row][column]`, least significant limb first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Planes {
    limbs: usize,
    rows: usize,
    columns: usize,
    bytes: Vec<u8>,
}

impl Planes {
    /// A matrix of zeros.
    pub fn zeros(limbs: usize, rows: usize, columns: usize) -> Self {
        Self { limbs, rows, columns, bytes: vec![0; limbs * rows * columns] }
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
        &self.bytes
    }

    /// All bytes, to be written in place.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }

    /// The bytes themselves.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
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

/// Some output columns of a product, after modulus switching: all rows of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProductTile {
    /// First output column of the tile.
    pub first_column: usize,
    /// `A'`, `mask_limbs × k·N × columns`, or `B'`, `output_limbs × tokens × columns`.
    pub rows: Planes,
}
