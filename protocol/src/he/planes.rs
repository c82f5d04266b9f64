//! Planes: a matrix mod `2^bits` with the bits of equal weight together. They are the wire format, and where their bits are
//! whole bytes, the operand of the integer product.
//!
//! Values have an even number of bits, 8 or more. Their high bytes are byte planes; what is left below them, 2, 4 or 6 bits,
//! is packed densely behind these. Brought to whole bytes, a value stands at their upper end.

use std::fmt;

use super::packing;
use crate::pool::Pool;

/// A matrix of integers mod `2^bits`: byte planes `[byte][row][column]`, least significant first, then, where `bits` are no
/// whole bytes, a plane of 4 bits, one of 2, or both, `[row][group]`.
///
/// Its memory comes from a pool and goes back there: planes of the same few sizes come and go in every product.
pub struct Planes {
    bits: u32,
    rows: usize,
    columns: usize,
    /// At least as many as the dimensions say; those behind are of earlier use.
    bytes: Vec<u8>,
}

/// Bytes that may wait for the next planes: those of a few products of a model of a billion parameters.
static POOL: Pool<u8> = Pool::new(96 << 20);

/// Gives back the memory of what waits: ciphertexts, which nobody has to wipe.
pub(crate) fn free_idle() {
    drop(POOL.drain());
}

impl Planes {
    /// A matrix of zeros mod `2^(8·limbs)`.
    pub fn zeros(limbs: usize, rows: usize, columns: usize) -> Self {
        Self::zeros_of_bits(8 * limbs as u32, rows, columns)
    }

    /// A matrix of zeros mod `2^bits`.
    pub fn zeros_of_bits(bits: u32, rows: usize, columns: usize) -> Self {
        let mut planes = Self::scratch_of_bits(bits, rows, columns);
        planes.bytes_mut().fill(0);
        planes
    }

    /// A matrix mod `2^(8·limbs)` whose bytes are whatever they were: each has to be written before it is read.
    pub fn scratch(limbs: usize, rows: usize, columns: usize) -> Self {
        Self::scratch_of_bits(8 * limbs as u32, rows, columns)
    }

    /// The same mod `2^bits`.
    pub fn scratch_of_bits(bits: u32, rows: usize, columns: usize) -> Self {
        Self { bits, rows, columns, bytes: POOL.scratch(packing::row_bytes(bits, columns) * rows) }
    }

    /// Takes bytes laid out `[limb][row][column]`; `None` if their count is not `limbs·rows·columns`.
    pub fn from_bytes(limbs: usize, rows: usize, columns: usize, bytes: Vec<u8>) -> Option<Self> {
        let expected = limbs.checked_mul(rows)?.checked_mul(columns)?;
        (bytes.len() == expected).then_some(Self { bits: 8 * limbs as u32, rows, columns, bytes })
    }

    /// Whether values may have so many bits.
    pub const fn has_width(bits: u32) -> bool {
        bits >= 8 && bits.is_multiple_of(2)
    }

    /// Bytes of `rows × columns` values of so many bits; `None` if they overflow.
    pub fn bytes_for(bits: u32, rows: usize, columns: usize) -> Option<usize> {
        // More than the packed row has, whatever the bits.
        columns.checked_add(packing::GROUP)?.checked_mul(bits as usize / 8 + 1)?;
        packing::row_bytes(bits, columns).checked_mul(rows)
    }

    /// Bits of a value.
    pub fn bits(&self) -> u32 {
        self.bits
    }

    /// Bytes in which a value has room.
    pub fn limbs(&self) -> usize {
        self.bits.div_ceil(8) as usize
    }

    /// Whether the bits of a value are whole bytes: nothing is packed.
    pub fn is_whole(&self) -> bool {
        self.bits.is_multiple_of(8)
    }

    /// Rows: tokens of a body, `k·N` of a mask.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns: features.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// All bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..packing::row_bytes(self.bits, self.columns) * self.rows]
    }

    /// All bytes, to be written in place.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[..packing::row_bytes(self.bits, self.columns) * self.rows]
    }

    /// One byte plane, `[row][column]`: limb `limb` of the values brought to whole bytes.
    ///
    /// Panics for limb 0 of values whose lowest bits are packed.
    pub fn plane(&self, limb: usize) -> &[u8] {
        let (size, plane) = (self.rows * self.columns, limb - usize::from(!self.is_whole()));
        &self.bytes[plane * size..(plane + 1) * size]
    }

    /// The planes of 4 and of 2 bits, `[row][group]`, of which some may be empty.
    pub(super) fn short_planes(&self) -> [&[u8]; 2] {
        let [fours, twos] = packing::short_row_bytes(self.bits, self.columns).map(|bytes| bytes * self.rows);
        let start = self.bits as usize / 8 * self.rows * self.columns;
        let (first, second) = self.bytes[start..start + fours + twos].split_at(fours);
        [first, second]
    }

    /// The byte planes, and those of 4 and of 2 bits, to be written in place.
    pub(super) fn parts_mut(&mut self) -> [&mut [u8]; 3] {
        let [fours, twos] = packing::short_row_bytes(self.bits, self.columns).map(|bytes| bytes * self.rows);
        let start = self.bits as usize / 8 * self.rows * self.columns;
        let (bytes, packed) = self.bytes[..start + fours + twos].split_at_mut(start);
        let (fours, twos) = packed.split_at_mut(fours);
        [bytes, fours, twos]
    }

    /// The value at `(row, column)` as an unsigned integer.
    pub fn value(&self, row: usize, column: usize) -> u64 {
        let (short, size, index) = (self.bits % 8, self.rows * self.columns, row * self.columns + column);
        let high = |plane: usize| u64::from(self.bytes[plane * size + index]) << (short as usize + 8 * plane);
        let low = packing::get(short, self.short_planes(), row, column, self.columns);
        (0..self.bits as usize / 8).map(high).sum::<u64>() | u64::from(low)
    }

    /// Sets the value at `(row, column)` to `value mod 2^bits`.
    pub fn set_value(&mut self, row: usize, column: usize, value: u64) {
        let (short, columns, index) = (self.bits % 8, self.columns, row * self.columns + column);
        let (planes, size) = (self.bits as usize / 8, self.rows * self.columns);
        let [bytes, fours, twos] = self.parts_mut();
        for plane in 0..planes {
            bytes[plane * size + index] = (value >> (short as usize + 8 * plane)) as u8;
        }
        packing::set(short, [fours, twos], row, column, columns, value as u8);
    }
}

impl Drop for Planes {
    fn drop(&mut self) {
        POOL.put(std::mem::take(&mut self.bytes));
    }
}

impl Clone for Planes {
    fn clone(&self) -> Self {
        let mut copy = Self::scratch_of_bits(self.bits, self.rows, self.columns);
        copy.bytes_mut().copy_from_slice(self.bytes());
        copy
    }
}

impl PartialEq for Planes {
    fn eq(&self, other: &Self) -> bool {
        let dimensions = |planes: &Self| (planes.bits, planes.rows, planes.columns);
        dimensions(self) == dimensions(other) && self.bytes() == other.bytes()
    }
}

impl Eq for Planes {}

impl fmt::Debug for Planes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The bytes are many.
        write!(f, "Planes({} bits × {} × {})", self.bits, self.rows, self.columns)
    }
}

/// Some output columns of a product, after modulus switching: all rows of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProductTile {
    /// First output column of the tile.
    pub first_column: usize,
    /// `A'`, `k·N × columns` values of `mask_limbs` bytes, or `B'`, `tokens × columns` values of `output_bits`.
    pub rows: Planes,
}
