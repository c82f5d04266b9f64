//! Products of columns by a block's secret, made for rows that are used later: those of a pad, or of several calls.

use rayon::prelude::*;
use zeroize::Zeroizing;

use super::load;
use crate::he::encrypt::EncryptError;
use crate::he::lanes::{STRIP, TILE, prefetch, tile_width, vectorised};
use crate::he::mask::{MaskColumns, MaskDomain, MaskSeed};
use crate::he::mask_product::MaskProduct;
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

/// Rows between the one that is loaded and the one that is fetched.
const AHEAD: usize = 2;

/// How values of a block's rows lie in bytes: `[tile][row][limb][column of the tile]`. Tiles of columns are what is made and read at
/// a time, so that both go through memory one byte behind the other, where rows of the whole block would be a page apart.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    limbs: usize,
    rows: usize,
    columns: usize,
    /// Columns of each tile but the last.
    width: usize,
}

impl Layout {
    /// For so many columns of the rows that are kept.
    pub(super) fn of(job: &Job<'_>, columns: usize) -> Self {
        Self { limbs: job.limbs(), rows: job.rows, columns, width: tile_width(columns) }
    }

    /// A byte for each limb of a value.
    pub(super) fn bytes(&self) -> usize {
        self.limbs * self.rows * self.columns
    }

    /// The same of one row.
    pub(super) fn row_bytes(&self) -> usize {
        self.limbs * self.columns
    }

    /// Copies one row, to `[limb][column]`.
    pub(super) fn cut(&self, block: &[u8], row: usize, to: &mut [u8]) {
        for first in (0..self.columns).step_by(self.width) {
            let (run, _) = self.run(block, row, first);
            let width = run.len() / self.limbs;
            for (to, from) in to.chunks_exact_mut(self.columns).zip(run.chunks_exact(width)) {
                to[first..first + width].copy_from_slice(from);
            }
        }
    }

    /// The part `[limb][column]` of a row that lies in the tile of this column, and the column's place in it.
    #[inline(always)]
    fn run<'a>(&self, block: &'a [u8], row: usize, column: usize) -> (&'a [u8], usize) {
        let first = column / self.width * self.width;
        let bytes = self.limbs * self.width.min(self.columns - first);
        (&block[self.limbs * self.rows * first + row * bytes..][..bytes], column - first)
    }

    /// Puts together a row's values from column `first` on, as many as `words` has.
    #[inline(always)]
    pub(super) fn load<W: RowWord>(&self, block: &[u8], row: usize, first: usize, words: &mut [W]) {
        let mut done = 0;
        while done < words.len() {
            if row + AHEAD < self.rows {
                prefetch(self.run(block, row + AHEAD, first + done).0);
            }
            let (run, at) = self.run(block, row, first + done);
            let count = (run.len() / self.limbs - at).min(words.len() - done);
            load(run, self.limbs, at, &mut words[done..done + count]);
            done += count;
        }
    }
}

/// Writes `<column, secret>` of each column, as far as rows are kept, to a block of this layout.
///
/// # Errors
/// When there is no randomness.
pub(super) fn write(job: &Job<'_>, layout: Layout, block: &mut [u8]) -> Result<(), EncryptError> {
    assert!(block.len() == layout.bytes() && layout.rows == job.rows && layout.limbs == job.limbs());
    let tiles = block.chunks_mut(layout.limbs * layout.rows * layout.width).enumerate();
    let tiles = tiles.map(|(tile, bytes)| Tile { first: tile * layout.width, bytes }).collect();
    if job.domain.set.modulus_bits() <= u32::BITS { all_tiles::<u32>(job, tiles) } else { all_tiles::<u64>(job, tiles) }
}

/// Some columns of the rows that are kept, `[row][limb][column]`.
struct Tile<'a> {
    first: usize,
    bytes: &'a mut [u8],
}

fn all_tiles<W: RowWord>(job: &Job<'_>, tiles: Vec<Tile<'_>>) -> Result<(), EncryptError> {
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
        tile: Tile<'_>,
    ) = one_tile_body
}

#[inline(always)]
fn one_tile_body<W: RowWord>(job: &Job<'_>, transform: &MaskTransform, scratch: &mut Scratch<W>, tile: Tile<'_>) {
    let _part = Part::Arithmetic.mark();
    let limbs = job.limbs();
    let width = tile.bytes.len() / (limbs * job.rows);
    let columns = tile.first..tile.first + width;
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
    for (number, rows) in tile.bytes.chunks_mut(STRIP * limbs * width).enumerate() {
        polynomials.transpose_strip(number * STRIP, width, &mut strip);
        for (row, values) in rows.chunks_exact_mut(limbs * width).zip(strip.iter()) {
            for (limb, bytes) in row.chunks_exact_mut(width).enumerate() {
                bytes.iter_mut().zip(&values[..width]).for_each(|(byte, value)| *byte = value.limb(limb));
            }
        }
    }
}
