//! The product of a matrix and its masks, `A' = A·W`, as the owner keeps it: column by column, ready to be transformed
//! and multiplied by the secrets of any call.
//!
//! It is kept as the bytes that came: its transform would take almost three times as many, and all blocks of a call share
//! one.
//!
//! Where memory is short it lies in a file, and is read where the operating system has it: a copy would pass all that a step
//! reads of files, three quarters of what it sends, through the memory once more.
//!
//! Masks are public and stay the same for a run, while every block of every call has a secret of its own; so one mask
//! product serves all calls of a run. Nothing in it is secret.

use std::fs::File;
use std::io;

use memmap2::{Mmap, MmapOptions};
use rayon::prelude::*;

use super::decrypt::{DecryptError, complete, enter, fitting};
use super::lanes::{TILE, transpose_bytes, vectorised};
use super::{Planes, Precision, ProductTile};
use crate::columns::ColumnLedger;

/// `A'` of one matrix in one direction, complete.
pub struct MaskProduct {
    precision: Precision,
    outer: usize,
    held: Held,
}

/// Where the bytes are, `[column][limb][component][N]`.
enum Held {
    Memory(Vec<u8>),
    File(Mmap),
}

impl MaskProduct {
    /// The product whose bytes, as [`Self::bytes`] gave them, lie in a file from `start` on. Blocks until they are read, where
    /// the operating system has none of them.
    ///
    /// # Errors
    /// When the file has fewer bytes, or cannot be mapped.
    pub fn mapped(precision: Precision, outer: usize, file: &File, start: u64) -> io::Result<Self> {
        let size = Self::memory_for(precision, outer);
        let end = start.checked_add(size as u64).ok_or(io::ErrorKind::InvalidInput)?;
        if file.metadata()?.len() < end {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        // SAFETY: the map is read-only and inside of the file. Should somebody shorten the file while it is mapped, a read
        // beyond its new end raises SIGBUS: a crash, no read of foreign memory. Should its bytes change, others are
        // read, which decryption takes whatever they are, and what it makes of them is verified.
        let map = unsafe { MmapOptions::new().offset(start).len(size).populate().map(file) }?;
        Ok(Self { precision, outer, held: Held::File(map) })
    }

    /// All of it, [`Self::memory_for`] bytes.
    pub fn bytes(&self) -> &[u8] {
        match &self.held {
            Held::Memory(bytes) => bytes,
            Held::File(map) => map,
        }
    }

    /// Bytes of memory that the mask product of a matrix with `outer` output columns takes.
    pub fn memory_for(precision: Precision, outer: usize) -> usize {
        outer.saturating_mul(column_bytes(precision))
    }

    /// Precision that it was asked for with. It serves products of the same parameter set and `mask_limbs`.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Output columns.
    pub fn outer(&self) -> usize {
        self.outer
    }

    /// A column, `[limb][component][N]`.
    pub(super) fn column(&self, column: usize) -> &[u8] {
        let size = column_bytes(self.precision);
        &self.bytes()[column * size..(column + 1) * size]
    }
}

const fn column_bytes(precision: Precision) -> usize {
    precision.mask_limbs as usize * precision.set.mask_rows()
}

/// A mask product whose tiles are still coming.
pub struct MaskProductBuilder {
    precision: Precision,
    bytes: Vec<u8>,
    columns: ColumnLedger,
}

impl MaskProductBuilder {
    /// Room for the mask product of a matrix with `outer` output columns.
    ///
    /// # Errors
    /// When the precision contradicts itself.
    pub fn new(precision: Precision, outer: usize) -> Result<Self, DecryptError> {
        if !precision.is_valid() {
            return Err(DecryptError::Precision { precision, expected: None });
        }
        let bytes = vec![0; MaskProduct::memory_for(precision, outer)];
        Ok(Self { precision, bytes, columns: ColumnLedger::new(outer) })
    }

    /// Takes a tile, `k·N × columns` values of `mask_limbs` bytes.
    ///
    /// # Errors
    /// When the tile does not fit the product or overlaps an earlier one; it is not taken then.
    pub fn tile(&mut self, tile: &ProductTile) -> Result<(), DecryptError> {
        let precision = self.precision;
        let columns = fitting(&self.columns, tile, 8 * u32::from(precision.mask_limbs), precision.set.mask_rows())?;
        enter(&mut self.columns, &columns);
        let size = column_bytes(precision);
        self.bytes[columns.start * size..columns.end * size]
            .par_chunks_mut(TILE * size)
            .enumerate()
            .for_each(|(index, out)| transpose_columns(&tile.rows, index * TILE, size, out));
        Ok(())
    }

    /// The product, once all of it has come.
    ///
    /// # Errors
    /// When columns are missing.
    pub fn finish(self) -> Result<UnverifiedMasks, DecryptError> {
        complete(&self.columns)?;
        let (precision, outer, held) = (self.precision, self.columns.outer(), Held::Memory(self.bytes));
        Ok(UnverifiedMasks(MaskProduct { precision, outer, held }))
    }
}

/// What came as a mask product, all of it, and nobody has verified yet. A wrong one would put the secrets into what is
/// decrypted with it.
pub struct UnverifiedMasks(MaskProduct);

impl UnverifiedMasks {
    /// Precision that it was asked for with.
    pub fn precision(&self) -> Precision {
        self.0.precision
    }

    /// Output columns.
    pub fn outer(&self) -> usize {
        self.0.outer
    }

    /// A column, `[limb][component][N]`.
    pub(crate) fn column(&self, column: usize) -> &[u8] {
        self.0.column(column)
    }

    /// The product, of whose values `limbs` bytes are kept: for whoever has verified it.
    ///
    /// Panics unless it has as many.
    pub(crate) fn accept(self, limbs: u8) -> MaskProduct {
        let from = self.0.precision;
        assert!((1..=from.mask_limbs).contains(&limbs));
        if limbs == from.mask_limbs {
            return self.0;
        }
        let to = Precision { mask_limbs: limbs, ..from };
        let mut bytes = vec![0; MaskProduct::memory_for(to, self.0.outer)];
        let rows = from.set.mask_rows();
        let columns =
            bytes.par_chunks_exact_mut(column_bytes(to)).zip(self.0.bytes().par_chunks_exact(column_bytes(from)));
        columns.for_each(|(to, from)| switch_column(from, rows, to));
        MaskProduct { precision: to, outer: self.0.outer, held: Held::Memory(bytes) }
    }

    /// The product as it is, whatever a worker made of it: for measurements of the scheme itself. Where it is called has to
    /// say so to the linter.
    pub fn unchecked(self) -> MaskProduct {
        self.0
    }
}

vectorised! {
    /// Rounds a column, `[limb][row]`, to the most significant limbs that `to` has room for, fewer than there are: what
    /// [`switch_value`](super::modulus::switch_value) does to a value.
    fn switch_column<>(from: &[u8], rows: usize, to: &mut [u8]) = switch_column_body
}

/// Rows that are rounded at a time.
const ROUNDED: usize = 64;

#[inline(always)]
fn switch_column_body(from: &[u8], rows: usize, to: &mut [u8]) {
    let (dropped, kept) = from.split_at(from.len() - to.len());
    let highest_dropped = &dropped[dropped.len() - rows..];
    let mut carries = [0; ROUNDED];
    for row in (0..rows).step_by(ROUNDED) {
        let carries = &mut carries[..ROUNDED.min(rows - row)];
        // Half of a unit of what is kept makes a carry of the highest bit that is not.
        for (carry, &byte) in carries.iter_mut().zip(&highest_dropped[row..]) {
            *carry = byte >> 7;
        }
        for (to, from) in to.chunks_exact_mut(rows).zip(kept.chunks_exact(rows)) {
            for ((to, &from), carry) in to[row..].iter_mut().zip(&from[row..]).zip(carries.iter_mut()) {
                *to = from.wrapping_add(*carry);
                *carry &= u8::from(*to == 0);
            }
        }
    }
}

vectorised! {
    /// `[limb·row][column]` to `[column][limb·row]`: as many columns of `size` bytes as `out` has, from `first` on.
    fn transpose_columns<>(planes: &Planes, first: usize, size: usize, out: &mut [u8]) = transpose_columns_body
}

#[inline(always)]
fn transpose_columns_body(planes: &Planes, first: usize, size: usize, out: &mut [u8]) {
    let (width, stride) = (out.len() / size, planes.columns());
    for row in (0..size).step_by(8) {
        for column in (0..width).step_by(8) {
            let count = (width - column).min(8);
            let mut block = [0u64; 8];
            for (i, word) in block.iter_mut().enumerate() {
                let bytes = &planes.bytes()[(row + i) * stride + first + column..][..count];
                let mut lanes = [0; 8];
                match <&[u8; 8]>::try_from(bytes) {
                    Ok(bytes) => lanes = *bytes,
                    Err(_) => lanes[..count].copy_from_slice(bytes),
                }
                *word = u64::from_le_bytes(lanes);
            }
            transpose_bytes(&mut block);
            for (lane, word) in block.iter().enumerate().take(count) {
                out[(column + lane) * size + row..][..8].copy_from_slice(&word.to_le_bytes());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng as _, SeedableRng as _};
    use rand_chacha::ChaCha8Rng;

    use super::*;
    use crate::he::modulus::switch_value;

    #[test]
    fn columns_are_rounded_as_values_are() {
        const ROWS: usize = 200;
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        for from_limbs in 2..=6 {
            // Bytes that carry often beside any.
            let mut from: Vec<u8> = (0..from_limbs * ROWS).map(|_| rng.random()).collect();
            from.iter_mut()
                .filter(|_| rng.random())
                .for_each(|byte| *byte = [0x7f, 0x80, 0xff][usize::from(*byte) % 3]);
            let value = |bytes: &[u8], row: usize| {
                bytes.chunks(ROWS).rev().fold(0, |value, plane| value << 8 | u64::from(plane[row]))
            };
            for to_limbs in 1..from_limbs {
                let mut to = vec![0; to_limbs * ROWS];
                switch_column(&from, ROWS, &mut to);
                for row in 0..ROWS {
                    assert_eq!(
                        value(&to, row),
                        switch_value(value(&from, row), 8 * from_limbs as u32, 8 * to_limbs as u32)
                    );
                }
            }
        }
    }
}
