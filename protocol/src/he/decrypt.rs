//! Decryption of a product's tiles as they come.

use rayon::prelude::*;

use super::lanes::{ColumnTile, STRIP, TILE, column_tiles, vectorised};
use super::products::{MaskTile, gather_row};
use super::secret::OneTimeSecret;
use super::word::Word;
use super::{ParameterSet, Precision, ProductTile};

/// The only right to decrypt one product: its one-time secrets and its steps. Neither can be read, copied or printed;
/// opening it consumes it, and dropping it wipes the secrets.
pub struct Ticket {
    set: ParameterSet,
    secrets: Vec<OneTimeSecret>,
    steps: zeroize::Zeroizing<Vec<f64>>,
}

impl Ticket {
    pub(super) fn new(set: ParameterSet, secrets: Vec<OneTimeSecret>, steps: Vec<f64>) -> Self {
        Self { set, secrets, steps: steps.into() }
    }

    /// Parameters that the product was encrypted with.
    pub fn set(&self) -> ParameterSet {
        self.set
    }

    /// Rows of the product.
    pub fn tokens(&self) -> usize {
        self.steps.len()
    }

    /// Coefficients of the secret of one block, for an independent decryption.
    #[cfg(test)]
    pub(super) fn secret(&self, block: usize) -> Vec<i8> {
        self.secrets[block].coefficients(self.set)
    }

    /// Begins the decryption of a product with `outer_dimension` columns that was asked for at `precision`.
    ///
    /// # Errors
    /// When the precision is not one of this ticket's parameter set.
    pub fn open(self, precision: Precision, outer_dimension: usize) -> Result<Decryption, DecryptError> {
        if precision.set != self.set || !precision.is_valid() {
            return Err(DecryptError::Precision { precision, set: self.set });
        }
        Ok(Decryption { ticket: self, precision, seen: vec![false; outer_dimension] })
    }
}

/// A product on its way to be decrypted.
pub struct Decryption {
    ticket: Ticket,
    precision: Precision,
    seen: Vec<bool>,
}

/// Why a tile, or a product, could not be decrypted.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DecryptError {
    /// The precision is not one of the parameter set.
    #[error("precision {precision} does not fit a product that was encrypted with {set}")]
    Precision {
        /// What was asked for.
        precision: Precision,
        /// What the rows were encrypted with.
        set: ParameterSet,
    },
    /// The planes of a tile do not have the dimensions of the product.
    #[error("the {part} of a tile is {limbs} × {rows} × {columns}, not {expected_limbs} × {expected_rows} × columns")]
    Dimensions {
        /// `mask` or `body`.
        part: &'static str,
        /// Limbs of the plane.
        limbs: usize,
        /// Rows of the plane.
        rows: usize,
        /// Columns of the plane.
        columns: usize,
        /// Limbs that the precision says.
        expected_limbs: usize,
        /// Rows that the product has.
        expected_rows: usize,
    },
    /// Columns that the product does not have.
    #[error("a tile has {columns} columns from {first} on; the product has {outer}")]
    Columns {
        /// First column of the tile.
        first: usize,
        /// Columns of the tile.
        columns: usize,
        /// Columns of the product.
        outer: usize,
    },
    /// A column came twice.
    #[error("column {0} of the product came twice")]
    Repeated(usize),
    /// The output slice is not `tokens × outer`.
    #[error("the output has {0} values instead of tokens × columns")]
    Output(usize),
    /// Columns never came.
    #[error("{missing} columns of the product never came, the first is {first}")]
    Missing {
        /// How many.
        missing: usize,
        /// The first of them.
        first: usize,
    },
}

/// What all column tiles of one decryption share.
struct Job<'a> {
    ticket: &'a Ticket,
    tile: &'a ProductTile,
    bits: u32,
    /// What one unit of a decrypted value is worth, row by row.
    units: &'a [f64],
}

impl Decryption {
    /// Decrypts a tile into its columns of `out`, `tokens × outer`, row-major. The caller has verified the tile.
    ///
    /// # Errors
    /// When the tile does not fit the product or overlaps an earlier one; nothing is written then.
    pub fn tile(&mut self, tile: &ProductTile, out: &mut [f32]) -> Result<(), DecryptError> {
        let columns = self.claim(tile, out.len())?;
        let dropped = f64::from(self.precision.dropped_bits()).exp2();
        let unit = |&step: &f64| if step == 0.0 { 0.0 } else { dropped / step };
        let units: zeroize::Zeroizing<Vec<f64>> = self.ticket.steps.iter().map(unit).collect::<Vec<_>>().into();
        let bits = 8 * u32::from(self.precision.output_limbs);
        let job = Job { ticket: &self.ticket, tile, bits, units: &units };
        let tiles = column_tiles(out, self.seen.len(), columns);
        if bits <= u32::BITS {
            decrypt_tiles::<u32>(&job, tiles);
        } else {
            decrypt_tiles::<u64>(&job, tiles);
        }
        Ok(())
    }

    /// Checks a tile and marks its columns as seen.
    fn claim(&mut self, tile: &ProductTile, output: usize) -> Result<std::ops::Range<usize>, DecryptError> {
        let (outer, limbs) = (self.seen.len(), usize::from(self.precision.output_limbs));
        let (first, columns) = (tile.first_column, tile.body.columns());
        let rows = [("mask", &tile.mask, self.precision.set.mask_rows()), ("body", &tile.body, self.ticket.tokens())];
        for (part, planes, expected) in rows {
            if planes.limbs() != limbs || planes.rows() != expected || planes.columns() != columns {
                return Err(DecryptError::Dimensions {
                    part,
                    limbs: planes.limbs(),
                    rows: planes.rows(),
                    columns: planes.columns(),
                    expected_limbs: limbs,
                    expected_rows: expected,
                });
            }
        }
        let end = match first.checked_add(columns) {
            Some(end) if end <= outer && columns > 0 => end,
            _ => return Err(DecryptError::Columns { first, columns, outer }),
        };
        if self.ticket.tokens().checked_mul(outer) != Some(output) {
            return Err(DecryptError::Output(output));
        }
        if let Some(repeated) = self.seen[first..end].iter().position(|&seen| seen) {
            return Err(DecryptError::Repeated(first + repeated));
        }
        self.seen[first..end].fill(true);
        Ok(first..end)
    }

    /// Ends the decryption; the secrets are wiped.
    ///
    /// # Errors
    /// When columns are missing.
    pub fn finish(self) -> Result<(), DecryptError> {
        let missing = self.seen.iter().filter(|&&seen| !seen).count();
        match self.seen.iter().position(|&seen| !seen) {
            Some(first) => Err(DecryptError::Missing { missing, first }),
            None => Ok(()),
        }
    }
}

fn decrypt_tiles<W: Word>(job: &Job<'_>, tiles: Vec<ColumnTile<'_, f32>>) {
    let scratch = || MaskTile::<W>::new(job.ticket.set, (job.bits / 8) as usize);
    tiles.into_par_iter().for_each_init(scratch, |masks, out| decrypt_tile(job, masks, out));
}

vectorised! {
    fn decrypt_tile<W: Word>(
        job: &Job<'_>,
        masks: &mut MaskTile<W>,
        out: ColumnTile<'_, f32>,
    ) = decrypt_tile_body
}

#[inline(always)]
fn decrypt_tile_body<W: Word>(job: &Job<'_>, masks: &mut MaskTile<W>, mut out: ColumnTile<'_, f32>) {
    let width = out.columns().len();
    let first_column = out.columns().start - job.tile.first_column;
    let (size, tokens) = (job.ticket.set.polynomial_size(), job.ticket.tokens());
    masks.load_planes(&job.tile.mask, first_column, width);

    let mut strip = zeroize::Zeroizing::new([[W::default(); TILE]; STRIP]);
    let mut body = [W::default(); TILE];
    for (block, secret) in job.ticket.secrets.iter().enumerate() {
        masks.multiply(secret, width);
        let first = block * size;
        for row in (0..size.min(tokens - first)).step_by(STRIP) {
            masks.transpose_strip(row, width, &mut strip);
            for (token, products) in (first + row..tokens).zip(strip.iter()) {
                gather_row(&job.tile.body, token, first_column, &mut body[..width]);
                let unit = job.units[token];
                for ((value, body), product) in out.row_mut(token).iter_mut().zip(&body).zip(products) {
                    *value = (body.sub(*product).centred(job.bits) * unit) as f32;
                }
            }
        }
    }
}
