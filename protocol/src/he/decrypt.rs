//! Decryption of a product's tiles as they come. What comes out is nobody's word yet: [`crate::sketch`] makes values of
//! it that can be used.

use std::ops::{DerefMut, Range};
use std::sync::Arc;

use rayon::prelude::*;
use zeroize::Zeroizing;

use super::lanes::{AHEAD, ColumnTile, STRIP, TILE, column_tiles, prefetch, vectorised};
use super::mask_product::MaskProduct;
use super::packing;
use super::pads::shared::{self, Late};
use super::pads::{self, PadOuter};
use super::products::{MaskTransform, Polynomials, Working};
use super::rows::{Decode, RowWord};
use super::secret::OneTimeSecret;
use super::{ParameterSet, Precision, ProductTile};
use crate::columns::{ColumnError, ColumnLedger};
use crate::parts::Part;

/// The only right to decrypt one product: its one-time secrets and its steps. Neither can be read, copied or printed;
/// opening it consumes it, and dropping it wipes the secrets.
pub struct Ticket {
    precision: Precision,
    secrets: Vec<OneTimeSecret>,
    steps: Zeroizing<Vec<f64>>,
}

impl Ticket {
    pub(super) fn new(precision: Precision, secrets: Vec<OneTimeSecret>, steps: Vec<f64>) -> Self {
        Self { precision, secrets, steps: steps.into() }
    }

    /// Precision that the product was encrypted for.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Rows of the product.
    pub fn tokens(&self) -> usize {
        self.steps.len()
    }

    /// Coefficients of the secret of one block, for an independent decryption.
    #[cfg(test)]
    pub(super) fn secret(&self, block: usize) -> Vec<i8> {
        self.secrets[block].coefficients(self.precision.set)
    }

    /// Begins the decryption of a product that was asked for at `precision`, with the mask product of its matrix and
    /// direction, made from the seed and domain of the encryption. Values go to `out`, `tokens × outer`, row-major.
    ///
    /// # Errors
    /// When the precision is not the one of the encryption, the mask product is of another parameter set or number of
    /// limbs, or `out` has another size.
    pub fn open<T: DerefMut<Target = [f32]>>(
        self,
        masks: Arc<MaskProduct>,
        precision: Precision,
        out: T,
    ) -> Result<Decryption<T>, DecryptError> {
        if precision != self.precision {
            return Err(DecryptError::Precision { precision, expected: Some(self.precision) });
        }
        let of_masks = masks.precision();
        if of_masks.set != precision.set || of_masks.mask_limbs != precision.mask_limbs {
            return Err(DecryptError::Precision { precision: of_masks, expected: Some(precision) });
        }
        if self.tokens().checked_mul(masks.outer()) != Some(out.len()) {
            return Err(DecryptError::Output(out.len()));
        }
        let (outer, Self { precision, secrets, steps }) = (masks.outer(), self);
        Ok(Decryption::new(precision, steps, Key::Secrets(secrets, masks), outer, out))
    }
}

/// What an answer is decrypted with.
pub(super) enum Key {
    /// The secrets of its blocks, and the mask product.
    Secrets(Vec<OneTimeSecret>, Arc<MaskProduct>),
    /// What was made of these ahead, for each row.
    Pads(Vec<PadOuter>),
    /// What was made of these for several calls.
    Shared(shared::SharedAnswer),
}

/// A product on its way to be decrypted.
pub struct Decryption<T> {
    precision: Precision,
    steps: Zeroizing<Vec<f64>>,
    key: Key,
    columns: ColumnLedger,
    /// Tiles that are decrypted row by row when all of them are there.
    come: Vec<ProductTile>,
    pub(super) out: T,
}

/// What an answer was decrypted to, all of it, and nobody has verified yet. The secrets are wiped.
pub struct Decrypted<T> {
    values: T,
    steps: Zeroizing<Vec<f64>>,
    precision: Precision,
    late: Option<Late>,
}

impl<T> Decrypted<T> {
    /// The values over κ, `tokens × outer`; κ of each row; how they were encrypted; what rows still have to be decrypted with, before
    /// anything else is done with them.
    pub(crate) fn into_parts(self) -> (T, Zeroizing<Vec<f64>>, Precision, Option<Late>) {
        (self.values, self.steps, self.precision, self.late)
    }
}

impl<T: DerefMut<Target = [f32]>> Decrypted<T> {
    /// The values as they are, whatever a worker made of them: for measurements of the scheme itself. Where it is called
    /// has to say so to the linter.
    pub fn unchecked(mut self) -> T {
        self.late.iter().for_each(|late| late.rows(0, &mut self.values));
        self.values
    }
}

/// Why a tile, or a product, could not be decrypted.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DecryptError {
    /// The precision contradicts itself, or is not the one that was due.
    #[error("precision {precision} is not valid here{}", due(.expected))]
    Precision {
        /// What was asked for.
        precision: Precision,
        /// What the rows were encrypted for.
        expected: Option<Precision>,
    },
    /// The planes of a tile do not have the dimensions of the product.
    #[error("a tile has {rows} × {columns} values of {bits} bits, not {expected_rows} × columns of {expected_bits}")]
    Dimensions {
        /// Bits of a value of the tile.
        bits: u32,
        /// Rows of the tile.
        rows: usize,
        /// Columns of the tile.
        columns: usize,
        /// Bits that the precision says.
        expected_bits: u32,
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
    /// The rows of a block that are to decrypt an answer are not those that its body was encrypted with.
    #[error("these rows of a block did not encrypt this product")]
    OtherRows,
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

fn due(expected: &Option<Precision>) -> String {
    expected.map_or_else(String::new, |expected| format!(": {expected} with {} mask limbs is due", expected.mask_limbs))
}

/// Which columns a tile of a product has, if it has the right dimensions and only columns that have not come.
pub(super) fn fitting(
    ledger: &ColumnLedger,
    tile: &ProductTile,
    expected_bits: u32,
    expected_rows: usize,
) -> Result<Range<usize>, DecryptError> {
    let (first, columns, outer) = (tile.first_column, tile.rows.columns(), ledger.outer());
    let (bits, rows) = (tile.rows.bits(), tile.rows.rows());
    if (bits, rows) != (expected_bits, expected_rows) {
        return Err(DecryptError::Dimensions { bits, rows, columns, expected_bits, expected_rows });
    }
    ledger.check(first, columns).map_err(|error| match error {
        ColumnError::OutOfRange => DecryptError::Columns { first, columns, outer },
        ColumnError::Twice(column) => DecryptError::Repeated(column),
    })
}

/// Whether all columns have come.
pub(super) fn complete(ledger: &ColumnLedger) -> Result<(), DecryptError> {
    match ledger.first_missing() {
        Some(first) => Err(DecryptError::Missing { missing: ledger.left(), first }),
        None => Ok(()),
    }
}

/// Enters columns that [`fitting`] has let pass.
pub(super) fn enter(ledger: &mut ColumnLedger, columns: &Range<usize>) {
    let entered = ledger.enter(columns.start, columns.len());
    debug_assert!(entered.is_ok(), "they were just found to fit");
}

/// What all column tiles of one decryption share.
struct Job<'a> {
    set: ParameterSet,
    secrets: &'a [OneTimeSecret],
    masks: &'a MaskProduct,
    transform: MaskTransform,
    tile: &'a ProductTile,
    /// Bits of a value in which both products fit.
    bits: u32,
    /// Shifts that bring a value of the body and of the mask product to `bits`.
    shifts: (u32, u32),
    /// What one unit of a decrypted value is worth, row by row.
    units: &'a [f64],
}

/// A thread's working memory.
struct Scratch<W: RowWord> {
    /// Transformed columns of the mask product, `[column][digit][component][N]`, or one if nothing shares them.
    masks: Vec<f64>,
    working: Working<W>,
    polynomials: Polynomials<W>,
}

impl<T: DerefMut<Target = [f32]>> Decryption<T> {
    /// Of a product of `outer` columns, of which nothing has come.
    pub(super) fn new(precision: Precision, steps: Zeroizing<Vec<f64>>, key: Key, outer: usize, out: T) -> Self {
        Self { precision, steps, key, columns: ColumnLedger::new(outer), come: Vec::new(), out }
    }

    /// Takes a tile, `tokens × columns` values of `output_bits`, and decrypts it, unless rows are to be decrypted as a whole.
    ///
    /// # Errors
    /// When the tile does not fit the product or overlaps an earlier one; nothing is written then.
    pub fn tile(&mut self, tile: ProductTile) -> Result<(), DecryptError> {
        let (precision, outer) = (self.precision, self.columns.outer());
        let columns = fitting(&self.columns, &tile, precision.output_bits.into(), self.steps.len())?;
        enter(&mut self.columns, &columns);
        let (secrets, masks) = match &self.key {
            Key::Pads(pads) => {
                pads::decrypt_tile(pads, &tile, &Units::of(precision, &self.steps), outer, &mut self.out);
                return Ok(());
            }
            Key::Shared(_) => {
                self.come.push(tile);
                return Ok(());
            }
            Key::Secrets(secrets, masks) => (secrets, masks),
        };
        let Units { bits, shifts, units } = Units::of(precision, &self.steps);
        let transform = MaskTransform::new(precision.set, usize::from(precision.mask_limbs));
        let job = Job { set: precision.set, secrets, masks, transform, tile: &tile, bits, shifts, units: &units };
        let tiles = column_tiles(&mut self.out, outer, columns);
        if bits <= u32::BITS {
            decrypt_tiles::<u32>(&job, tiles);
        } else {
            decrypt_tiles::<u64>(&job, tiles);
        }
        Ok(())
    }

    /// Ends the decryption; the secrets are wiped.
    ///
    /// # Errors
    /// When columns are missing.
    pub fn finish(self) -> Result<Decrypted<T>, DecryptError> {
        let Self { precision, steps, key, columns, come, out } = self;
        complete(&columns)?;
        let late = match key {
            Key::Shared(answer) => Some(Late::new(answer, come, Units::of(precision, &steps))),
            Key::Secrets(..) | Key::Pads(_) => None,
        };
        Ok(Decrypted { values: out, steps, precision, late })
    }
}

/// How the values of an answer are brought together with those of its mask product, and what they are worth.
pub(super) struct Units {
    /// Bits of a value in which both fit, in whole bytes.
    pub(super) bits: u32,
    /// Shifts that bring a value of the body and of the mask product to these.
    pub(super) shifts: (u32, u32),
    /// What one unit of a decrypted value is worth, row by row.
    pub(super) units: Zeroizing<Vec<f64>>,
}

impl Units {
    /// Of an answer at this precision to rows of these steps.
    fn of(precision: Precision, steps: &[f64]) -> Self {
        let whole = |bits: u8| u32::from(bits).next_multiple_of(8);
        let (body_bits, mask_bits) = (whole(precision.output_bits), 8 * u32::from(precision.mask_limbs));
        let bits = body_bits.max(mask_bits);
        let dropped = f64::from(precision.set.modulus_bits() - bits).exp2();
        let unit = |&step: &f64| if step == 0.0 { 0.0 } else { dropped / step };
        let units = steps.iter().map(unit).collect::<Vec<_>>().into();
        Self { bits, shifts: (bits - body_bits, bits - mask_bits), units }
    }
}

fn decrypt_tiles<W: RowWord>(job: &Job<'_>, tiles: Vec<ColumnTile<'_, f32>>) {
    let scratch = || Scratch::<W> {
        masks: vec![0.0; if job.secrets.len() == 1 { 1 } else { TILE } * job.transform.column_numbers()],
        working: job.transform.working(),
        polynomials: Polynomials::new(job.set),
    };
    tiles.into_par_iter().for_each_init(scratch, |scratch, out| decrypt_tile(job, scratch, out));
}

vectorised! {
    fn decrypt_tile<W: RowWord>(
        job: &Job<'_>,
        scratch: &mut Scratch<W>,
        out: ColumnTile<'_, f32>,
    ) = decrypt_tile_body
}

#[inline(always)]
fn decrypt_tile_body<W: RowWord>(job: &Job<'_>, scratch: &mut Scratch<W>, mut out: ColumnTile<'_, f32>) {
    let _part = Part::Arithmetic.mark();
    let columns = out.columns();
    let (width, first_column) = (columns.len(), columns.start - job.tile.first_column);
    let (size, tokens) = (job.set.polynomial_size(), job.units.len());
    let numbers = job.transform.column_numbers();
    let Scratch { masks, working, polynomials } = scratch;

    let mut strip = Zeroizing::new([[W::default(); TILE]; STRIP]);
    let decode = Decode::of(&job.tile.rows, job.bits, job.shifts);
    for (block, secret) in job.secrets.iter().enumerate() {
        for column in 0..width {
            // With one block there is room for one column only, and its transform is not kept.
            let at = if job.secrets.len() == 1 { 0 } else { column * numbers };
            let mask = &mut masks[at..at + numbers];
            let _part = Part::Transforms.mark();
            if block == 0 {
                if column + 1 < width {
                    prefetch(job.masks.column(columns.start + column + 1));
                }
                job.transform.transform(job.masks.column(columns.start + column), working, mask);
            }
            job.transform.multiply(mask, secret, working, polynomials.column_mut(column));
        }
        let first = block * size;
        for row in (0..size.min(tokens - first)).step_by(STRIP) {
            polynomials.transpose_strip(row, width, &mut strip);
            for (token, products) in (first + row..tokens).zip(strip.iter()) {
                out.fetch(token + AHEAD);
                if token + AHEAD < tokens {
                    packing::fetch(&job.tile.rows, token + AHEAD, first_column, width);
                }
                let body = packing::row(&job.tile.rows, token, first_column, width);
                decode.row(job.units[token], body, &products[..width], out.row_mut(token));
            }
        }
    }
}
