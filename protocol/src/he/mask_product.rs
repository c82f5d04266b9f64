//! The product of a matrix and its masks, `A' = A·W`, as the owner keeps it: transformed, ready to be multiplied by the
//! secrets of any call.
//!
//! Masks are public and stay the same for a run, while every block of every call has a secret of its own; so one mask
//! product serves all calls of a run. Nothing in it is secret.

use std::ops::Range;

use rayon::prelude::*;

use super::decrypt::{Columns, DecryptError};
use super::lanes::{TILE, vectorised};
use super::ntt::Digits;
use super::products::{MaskTransform, Polynomials};
use super::word::Word;
use super::{Planes, Precision, ProductTile};

/// `A'` of one matrix in one direction: complete, rounded to [`Precision::mask_bits`] and transformed.
pub struct MaskProduct {
    precision: Precision,
    outer: usize,
    /// `[column][digit][component][N]`.
    transformed: Vec<u32>,
}

impl MaskProduct {
    /// Bytes of memory that it takes.
    pub fn memory_bytes(&self) -> usize {
        Self::memory_for(self.precision, self.outer)
    }

    /// Bytes of memory that the mask product of a matrix with `outer` output columns takes. `precision` is valid.
    pub fn memory_for(precision: Precision, outer: usize) -> usize {
        outer.saturating_mul(transform_of(precision).column_residues()).saturating_mul(size_of::<u32>())
    }

    /// Precision that it was asked for with. It serves products of the same parameter set and `mask_limbs`.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Output columns.
    pub fn outer(&self) -> usize {
        self.outer
    }

    /// Transformed columns, one after the other.
    pub(super) fn columns(&self, columns: Range<usize>) -> &[u32] {
        let residues = transform_of(self.precision).column_residues();
        &self.transformed[columns.start * residues..columns.end * residues]
    }
}

/// How products of masks that came with `precision` are transformed.
pub(super) fn transform_of(precision: Precision) -> MaskTransform {
    let set = precision.set;
    MaskTransform::new(set, Digits::rounded(usize::from(precision.mask_limbs), set.mask_rows()))
}

/// A mask product whose tiles are still coming.
pub struct MaskProductBuilder {
    product: MaskProduct,
    columns: Columns,
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
        let transformed = vec![0; outer * transform_of(precision).column_residues()];
        Ok(Self { product: MaskProduct { precision, outer, transformed }, columns: Columns::of(outer) })
    }

    /// Takes a tile, `mask_limbs × k·N × columns`, which the caller has verified.
    ///
    /// # Errors
    /// When the tile does not fit the product or overlaps an earlier one; it is not taken then.
    pub fn tile(&mut self, tile: &ProductTile) -> Result<(), DecryptError> {
        let precision = self.product.precision;
        let columns = self.columns.check(tile, usize::from(precision.mask_limbs), precision.set.mask_rows())?;
        self.columns.claim(columns.clone());
        let residues = transform_of(precision).column_residues();
        let transformed = &mut self.product.transformed[columns.start * residues..columns.end * residues];
        if u32::from(precision.mask_limbs) * 8 <= u32::BITS {
            transform_tile::<u32>(precision, &tile.rows, transformed);
        } else {
            transform_tile::<u64>(precision, &tile.rows, transformed);
        }
        Ok(())
    }

    /// The product, once all of it has come.
    ///
    /// # Errors
    /// When columns are missing.
    pub fn finish(self) -> Result<MaskProduct, DecryptError> {
        self.columns.finish()?;
        Ok(self.product)
    }
}

fn transform_tile<W: Word>(precision: Precision, rows: &Planes, transformed: &mut [u32]) {
    let residues = transform_of(precision).column_residues();
    let scratch = || Polynomials::<W>::new(precision.set);
    transformed.par_chunks_mut(TILE * residues).enumerate().for_each_init(scratch, |polynomials, (index, out)| {
        transform_columns(precision, rows, index * TILE, polynomials, out);
    });
}

vectorised! {
    /// Transforms as many columns of `rows` from `first` on as `out` has room for.
    fn transform_columns<W: Word>(
        precision: Precision,
        rows: &Planes,
        first: usize,
        polynomials: &mut Polynomials<W>,
        out: &mut [u32],
    ) = transform_columns_body
}

#[inline(always)]
fn transform_columns_body<W: Word>(
    precision: Precision,
    rows: &Planes,
    first: usize,
    polynomials: &mut Polynomials<W>,
    out: &mut [u32],
) {
    let transform = transform_of(precision);
    let residues = transform.column_residues();
    for component in 0..precision.set.glwe_dimension() {
        polynomials.load_planes(rows, component, first, out.len() / residues);
        for (column, out) in out.chunks_exact_mut(residues).enumerate() {
            transform.transform(component, polynomials.column_mut(column), out);
        }
    }
}
