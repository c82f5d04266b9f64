//! Products of columns by a block's secret, made for rows that are used later: those of a pad, or of several calls.

use rayon::prelude::*;
use zeroize::Zeroizing;

use crate::he::encrypt::EncryptError;
use crate::he::lanes::{ColumnTile, STRIP, TILE, column_tiles, prefetch, vectorised};
use crate::he::mask::{MaskColumns, MaskDomain, MaskSeed};
use crate::he::mask_product::MaskProduct;
use crate::he::packing::HIGH_PLANES;
use crate::he::products::{MaskTransform, Polynomials, Working};
use crate::he::rows::RowWord;
use crate::he::sampling::{ErrorSampler, SecretRng};
use crate::he::secret::OneTimeSecret;
use crate::parts::Part;
use crate::wiped::Wiped;

/// Where columns come from.
#[derive(Clone, Copy)]
pub(super) enum Source<'a> {
    /// The masks themselves; errors are added.
    Masks(&'a MaskSeed),
    /// Their product.
    Product(&'a MaskProduct),
}

/// What all tiles of a block share.
pub(super) struct Job<'a> {
    pub(super) domain: &'a MaskDomain,
    pub(super) secret: &'a OneTimeSecret,
    /// Rows that are kept.
    pub(super) rows: usize,
    pub(super) source: Source<'a>,
}

impl Job<'_> {
    /// Limbs of a value.
    fn limbs(&self) -> usize {
        match self.source {
            Source::Masks(_) => self.domain.set.limbs(),
            Source::Product(masks) => usize::from(masks.precision().mask_limbs),
        }
    }
}

/// Some columns of the rows that are kept.
trait Kept<W> {
    /// Writes a row.
    fn put(&mut self, row: usize, limbs: usize, values: &[W]);
}

/// Byte planes, `[limb][row][column]`.
struct LimbTile<'a> {
    bytes: ColumnTile<'a, u8>,
    rows: usize,
}

impl<W: RowWord> Kept<W> for LimbTile<'_> {
    #[inline(always)]
    fn put(&mut self, row: usize, limbs: usize, values: &[W]) {
        let planes: [&mut [u8]; HIGH_PLANES] = self.bytes.rows_mut(row, self.rows, limbs);
        for (limb, bytes) in planes.into_iter().enumerate().take(limbs) {
            bytes.iter_mut().zip(values).for_each(|(byte, value)| *byte = value.limb(limb));
        }
    }
}

/// Words, `[row][column]`.
struct WordTile<'a, W>(ColumnTile<'a, W>);

impl<W: RowWord> Kept<W> for WordTile<'_, W> {
    #[inline(always)]
    fn put(&mut self, row: usize, _limbs: usize, values: &[W]) {
        let to = self.0.row_mut(row);
        to.copy_from_slice(&values[..to.len()]);
    }
}

/// `<column, secret>` of each of so many columns, as far as rows are kept, in byte planes `[limb][row][column]`.
///
/// # Errors
/// When there is no randomness.
pub(super) fn limbs_of(job: &Job<'_>, columns: usize) -> Result<Wiped<u8>, EncryptError> {
    let mut block = Wiped::zeros(job.limbs() * job.rows * columns);
    let tiles = column_tiles(&mut block, columns, 0..columns).into_iter();
    let tiles = tiles.map(|bytes| (bytes.columns(), LimbTile { bytes, rows: job.rows })).collect();
    if job.domain.set.modulus_bits() <= u32::BITS {
        all_tiles::<u32, _>(job, tiles)?;
    } else {
        all_tiles::<u64, _>(job, tiles)?;
    }
    Ok(block)
}

/// The same in words, `[row][column]`, to `block`, which is of rows of so many columns.
///
/// # Errors
/// When there is no randomness.
pub(super) fn words_of<W: RowWord>(job: &Job<'_>, columns: usize, block: &mut [W]) -> Result<(), EncryptError> {
    assert_eq!(block.len(), job.rows * columns, "a word for each value");
    let tiles = column_tiles(block, columns, 0..columns).into_iter();
    all_tiles::<W, _>(job, tiles.map(|tile| (tile.columns(), WordTile(tile))).collect())
}

type Columns = std::ops::Range<usize>;

fn all_tiles<W: RowWord, K: Kept<W> + Send>(job: &Job<'_>, tiles: Vec<(Columns, K)>) -> Result<(), EncryptError> {
    let transform = MaskTransform::new(job.domain.set, job.limbs());
    let scratch = || Scratch::<W>::new(job, &transform);
    tiles.into_par_iter().try_for_each_init(scratch, |scratch, (columns, tile)| match scratch {
        Ok(scratch) => {
            one_tile(job, &transform, scratch, columns, tile);
            Ok(())
        }
        Err(error) => Err(EncryptError::Randomness(*error)),
    })
}

/// A thread's working memory.
struct Scratch<W: RowWord> {
    rng: SecretRng,
    keystream: Vec<u8>,
    mask: Vec<f64>,
    working: Working<W>,
    polynomials: Polynomials<W>,
    errors: ErrorSampler,
}

impl<W: RowWord> Scratch<W> {
    fn new(job: &Job<'_>, transform: &MaskTransform) -> Result<Self, getrandom::Error> {
        let set = job.domain.set;
        Ok(Self {
            rng: SecretRng::from_os()?,
            keystream: vec![0; transform.column_bytes()],
            mask: vec![0.0; transform.column_numbers()],
            working: transform.working(),
            polynomials: Polynomials::new(set),
            errors: ErrorSampler::new(set, set.polynomial_size()),
        })
    }
}

impl<W: RowWord> Drop for Scratch<W> {
    fn drop(&mut self) {
        // A block's rows may serve long after the step in which they were made, and its secret follows from these.
        self.polynomials.wipe();
    }
}

vectorised! {
    fn one_tile<W: RowWord, K: Kept<W>>(
        job: &Job<'_>,
        transform: &MaskTransform,
        scratch: &mut Scratch<W>,
        columns: Columns,
        tile: K,
    ) = one_tile_body
}

#[inline(always)]
fn one_tile_body<W: RowWord, K: Kept<W>>(
    job: &Job<'_>,
    transform: &MaskTransform,
    scratch: &mut Scratch<W>,
    columns: Columns,
    mut tile: K,
) {
    let _part = Part::Arithmetic.mark();
    let (width, limbs) = (columns.len(), job.limbs());
    let Scratch { rng, keystream, mask, working, polynomials, errors } = scratch;
    let mut mask_columns = match job.source {
        Source::Masks(seed) => Some(MaskColumns::from(seed, job.domain, columns.start)),
        Source::Product(_) => None,
    };
    for (at, column) in columns.enumerate() {
        let bytes = match (job.source, &mut mask_columns) {
            (Source::Product(product), _) => {
                if at + 1 < width {
                    prefetch(product.column(column + 1));
                }
                product.column(column)
            }
            (Source::Masks(_), generator) => {
                let _part = Part::Keystream.mark();
                generator.iter_mut().for_each(|generator| generator.write(keystream));
                &keystream[..]
            }
        };
        let values = polynomials.column_mut(at);
        let transforms = Part::Transforms.mark();
        transform.transform(bytes, working, mask);
        transform.multiply(mask, job.secret, working, values);
        drop(transforms);
        if let Source::Masks(_) = job.source {
            errors.add_to(rng, values);
        }
    }
    let mut strip = Zeroizing::new([[W::default(); TILE]; STRIP]);
    for first in (0..job.rows).step_by(STRIP) {
        polynomials.transpose_strip(first, width, &mut strip);
        for (row, values) in (first..job.rows).zip(strip.iter()) {
            tile.put(row, limbs, &values[..width]);
        }
    }
}
