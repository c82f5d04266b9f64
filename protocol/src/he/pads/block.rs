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
    pub(super) fn limbs(&self) -> usize {
        match self.source {
            Source::Masks(_) => self.domain.set.limbs(),
            Source::Product(masks) => usize::from(masks.precision().mask_limbs),
        }
    }
}

/// Some columns of the rows that are kept, in byte planes.
struct LimbTile<'a> {
    bytes: ColumnTile<'a, u8>,
    rows: usize,
}

impl LimbTile<'_> {
    /// Writes a row.
    #[inline(always)]
    fn put<W: RowWord>(&mut self, row: usize, limbs: usize, values: &[W]) {
        let planes: [&mut [u8]; HIGH_PLANES] = self.bytes.rows_mut(row, self.rows, limbs);
        for (limb, bytes) in planes.into_iter().enumerate().take(limbs) {
            bytes.iter_mut().zip(values).for_each(|(byte, value)| *byte = value.limb(limb));
        }
    }
}

/// Writes `<column, secret>` of each of so many columns, as far as rows are kept, to byte planes `[limb][row][column]`.
///
/// # Errors
/// When there is no randomness.
pub(super) fn limbs_of(job: &Job<'_>, columns: usize, block: &mut [u8]) -> Result<(), EncryptError> {
    assert_eq!(block.len(), job.limbs() * job.rows * columns, "a byte for each limb of a value");
    let tiles = column_tiles(block, columns, 0..columns).into_iter();
    let tiles = tiles.map(|bytes| LimbTile { bytes, rows: job.rows }).collect();
    if job.domain.set.modulus_bits() <= u32::BITS { all_tiles::<u32>(job, tiles) } else { all_tiles::<u64>(job, tiles) }
}

fn all_tiles<W: RowWord>(job: &Job<'_>, tiles: Vec<LimbTile<'_>>) -> Result<(), EncryptError> {
    let transform = MaskTransform::new(job.domain.set, job.limbs());
    let scratch = || Scratch::<W>::new(job, &transform);
    tiles.into_par_iter().try_for_each_init(scratch, |scratch, tile| match scratch {
        Ok(scratch) => {
            one_tile(job, &transform, scratch, tile);
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
    fn one_tile<W: RowWord>(
        job: &Job<'_>,
        transform: &MaskTransform,
        scratch: &mut Scratch<W>,
        tile: LimbTile<'_>,
    ) = one_tile_body
}

#[inline(always)]
fn one_tile_body<W: RowWord>(
    job: &Job<'_>,
    transform: &MaskTransform,
    scratch: &mut Scratch<W>,
    mut tile: LimbTile<'_>,
) {
    let _part = Part::Arithmetic.mark();
    let columns = tile.bytes.columns();
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
