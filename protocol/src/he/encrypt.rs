//! Column-packed encryption: `b_{r,i} = <a_i, s_r> + e_{r,i} + m_{r,i}` for every feature `i` and token block `r`.
//!
//! A thread takes a tile of features: it expands and transforms their masks once, and for each token block multiplies
//! them by the block's secret, adds errors, and turns the polynomials into rows, where the encoded message is added
//! and the most significant `body_bits` are written to their planes, the rest being rounded off. The rounding is done to a
//! complete ciphertext, with nothing but public constants, so it costs no security.

use rayon::prelude::*;
use zeroize::Zeroizing;

use super::decrypt::Ticket;
use super::lanes::{AHEAD, STRIP, TILE, prefetch, vectorised};
use super::mask::{MaskColumns, MaskDomain, MaskSeed};
use super::packing::PlanesTile;
use super::products::{MaskTransform, Polynomials, Working};
use super::rows::{Encode, RowWord};
use super::sampling::{ErrorSampler, SecretRng};
use super::secret::OneTimeSecret;
use super::{ParameterSet, Planes, Precision};
use crate::parts::Part;

/// Rows to encrypt and the step of each.
#[derive(Clone, Copy)]
pub struct Plaintext<'a> {
    /// `tokens × features`, row-major.
    pub rows: &'a [f32],
    /// Number of rows, at least 1.
    pub tokens: usize,
    /// Columns: the inner dimension of the product.
    pub features: usize,
    /// κ of each row: a value `x` is encrypted as the integer nearest to `κ·x`. 0 encrypts zeros and decrypts to
    /// exact zeros.
    pub steps: &'a [f64],
}

/// Why rows could not be encrypted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EncryptError {
    /// The slices do not have the sizes that the dimensions say.
    #[error("{tokens} × {features} rows with {rows} values and {steps} steps: sizes must agree and not be zero")]
    Shape {
        /// Tokens that were announced.
        tokens: usize,
        /// Features that were announced.
        features: usize,
        /// Values given.
        rows: usize,
        /// Steps given.
        steps: usize,
    },
    /// A step that is negative or not finite.
    #[error("the step of row {token} is negative or not a number")]
    Step {
        /// Which row.
        token: usize,
    },
    /// An encoded value would wrap mod q, or is not a number.
    #[error("a value of row {token} is not a number or too large for its step")]
    Range {
        /// Which row.
        token: usize,
    },
    /// A precision that contradicts itself, or is not of the mask's parameter set.
    #[error("precision {precision} does not fit masks of {set}")]
    Precision {
        /// What was asked for.
        precision: Precision,
        /// Parameters of the mask.
        set: ParameterSet,
    },
    /// Pads that a block does not have.
    #[error("a block has 1 to {most} rows of pads of some features, not {rows} of {features}")]
    PadRows {
        /// Rows asked for.
        rows: usize,
        /// Rows that a block has.
        most: usize,
        /// Features asked for.
        features: usize,
    },
    /// Pads that the rows cannot be encrypted with.
    #[error("{rows} rows of pads are not for {tokens} rows of this product at this precision")]
    Pads {
        /// Rows of the pads.
        rows: usize,
        /// Rows to be encrypted.
        tokens: usize,
    },
    /// The operating system gave no random bytes.
    #[error("no randomness from the operating system: {0}")]
    Randomness(getrandom::Error),
}

/// What all tiles of one encryption share.
struct Job<'a> {
    precision: Precision,
    seed: &'a MaskSeed,
    domain: &'a MaskDomain,
    transform: MaskTransform,
    plaintext: Plaintext<'a>,
    secrets: &'a [OneTimeSecret],
}

/// A thread's working memory.
struct Scratch<W: RowWord> {
    rng: SecretRng,
    /// One column of masks.
    keystream: Vec<u8>,
    /// Transformed masks of a tile, `[column][digit][component][N]`, or of one column if nothing shares them.
    masks: Vec<f64>,
    working: Working<W>,
    polynomials: Polynomials<W>,
    errors: ErrorSampler,
}

impl<W: RowWord> Scratch<W> {
    fn new(job: &Job<'_>) -> Result<Self, EncryptError> {
        let set = job.precision.set;
        Ok(Self {
            rng: SecretRng::from_os().map_err(EncryptError::Randomness)?,
            keystream: vec![0; job.transform.column_bytes()],
            masks: vec![0.0; if job.secrets.len() == 1 { 1 } else { TILE } * job.transform.column_numbers()],
            working: job.transform.working(),
            polynomials: Polynomials::new(set),
            errors: ErrorSampler::new(set, set.polynomial_size()),
        })
    }
}

/// Some rows that are made where they are encrypted, so that they need not go through memory in between.
pub trait RowTask: Send {
    /// Why a row cannot be made.
    type Error: Send;

    /// How many rows.
    fn rows(&self) -> usize;

    /// Writes them, `rows × features`, and κ of each.
    ///
    /// # Errors
    /// When one cannot be made.
    fn make(self, rows: &mut [f32], steps: &mut [f64]) -> Result<(), Self::Error>;
}

/// Why rows that were still to be made were not encrypted.
#[derive(Debug, thiserror::Error)]
pub enum RowError<E> {
    /// A row could not be made.
    #[error(transparent)]
    Make(E),
    /// The rows could not be encrypted.
    #[error(transparent)]
    Encrypt(#[from] EncryptError),
}

/// Encrypts rows under fresh one-time secrets, one per block of `N` tokens.
///
/// Returns the body, `tokens × features` values of `body_bits`, and the only ticket that opens the product.
///
/// # Errors
/// When sizes or parameter sets disagree, a step or a value cannot be encoded, or there is no randomness.
pub fn encrypt(
    seed: &MaskSeed,
    domain: &MaskDomain,
    precision: Precision,
    plaintext: Plaintext<'_>,
) -> Result<(Planes, Ticket), EncryptError> {
    check(&plaintext)?;
    let set = domain.set;
    if precision.set != set || !precision.is_valid() {
        return Err(EncryptError::Precision { precision, set });
    }
    let mut rng = SecretRng::from_os().map_err(EncryptError::Randomness)?;
    let blocks = plaintext.tokens.div_ceil(set.polynomial_size());
    let secrets: Vec<_> = (0..blocks).map(|_| OneTimeSecret::generate(set, &mut rng)).collect();
    let mut body = Planes::scratch_of_bits(precision.body_bits.into(), plaintext.tokens, plaintext.features);
    let tiles = PlanesTile::cut(&mut body);
    let transform = MaskTransform::new(set, set.limbs());
    let job = Job { precision, seed, domain, transform, plaintext, secrets: &secrets };
    if set.modulus_bits() <= u32::BITS {
        encrypt_tiles::<u32>(&job, tiles)?;
    } else {
        encrypt_tiles::<u64>(&job, tiles)?;
    }
    Ok((body, Ticket::new(precision, secrets, plaintext.steps.to_vec())))
}

pub(super) fn check(plaintext: &Plaintext<'_>) -> Result<(), EncryptError> {
    let Plaintext { rows, tokens, features, steps } = *plaintext;
    if tokens == 0 || features == 0 || steps.len() != tokens || tokens.checked_mul(features) != Some(rows.len()) {
        return Err(EncryptError::Shape { tokens, features, rows: rows.len(), steps: steps.len() });
    }
    check_steps(steps, 0)
}

/// Refuses steps that none can be, those of the rows from `first` on.
pub(super) fn check_steps(steps: &[f64], first: usize) -> Result<(), EncryptError> {
    match steps.iter().position(|step| !(step.is_finite() && *step >= 0.0)) {
        Some(row) => Err(EncryptError::Step { token: first + row }),
        None => Ok(()),
    }
}

fn encrypt_tiles<W: RowWord>(job: &Job<'_>, tiles: Vec<PlanesTile<'_>>) -> Result<(), EncryptError> {
    tiles.into_par_iter().try_for_each_init(
        || Scratch::<W>::new(job),
        |scratch, tile| match scratch {
            Ok(scratch) => encrypt_tile(job, scratch, tile),
            Err(EncryptError::Randomness(error)) => Err(EncryptError::Randomness(*error)),
            Err(_) => unreachable!("only randomness can be missing"),
        },
    )
}

vectorised! {
    fn encrypt_tile<W: RowWord>(
        job: &Job<'_>,
        scratch: &mut Scratch<W>,
        tile: PlanesTile<'_>,
    ) -> Result<(), EncryptError> = encrypt_tile_body
}

#[inline(always)]
fn encrypt_tile_body<W: RowWord>(
    job: &Job<'_>,
    scratch: &mut Scratch<W>,
    mut tile: PlanesTile<'_>,
) -> Result<(), EncryptError> {
    let _part = Part::Arithmetic.mark();
    let columns = tile.columns();
    let width = columns.len();
    let (set, tokens) = (job.precision.set, job.plaintext.tokens);
    let (size, numbers) = (set.polynomial_size(), job.transform.column_numbers());
    let Scratch { rng, keystream, masks, working, polynomials, errors } = scratch;
    let (encode, limit) = (Encode::of(job.precision), job.precision.encodable());
    let mut mask_columns = MaskColumns::from(job.seed, job.domain, columns.start);

    let mut strip = Zeroizing::new([[W::default(); TILE]; STRIP]);
    for (block, secret) in job.secrets.iter().enumerate() {
        for column in 0..width {
            // With one block there is room for one column only, and its transform is not kept.
            let at = if job.secrets.len() == 1 { 0 } else { column * numbers };
            let mask = &mut masks[at..at + numbers];
            if block == 0 {
                let _part = Part::Keystream.mark();
                mask_columns.write(keystream);
            }
            let values = polynomials.column_mut(column);
            let transforms = Part::Transforms.mark();
            if block == 0 {
                job.transform.transform(keystream, working, mask);
            }
            job.transform.multiply(mask, secret, working, values);
            drop(transforms);
            errors.add_to(rng, values);
        }
        let first = block * size;
        for row in (0..size.min(tokens - first)).step_by(STRIP) {
            polynomials.transpose_strip(row, width, &mut strip);
            for (token, values) in (first + row..tokens).zip(strip.iter()) {
                let start = token * job.plaintext.features + columns.start;
                if let Some(later) = job.plaintext.rows.get(start + AHEAD * job.plaintext.features..) {
                    prefetch(&later[..width.min(later.len())]);
                }
                tile.fetch(token + AHEAD);
                let step = job.plaintext.steps[token];
                let largest =
                    encode.row(step, &values[..width], &job.plaintext.rows[start..][..width], &mut tile.row_mut(token));
                // NaN fails every comparison.
                let encodable = f64::from(f32::from_bits(largest)) * step < limit;
                if !encodable {
                    return Err(EncryptError::Range { token });
                }
            }
        }
    }
    Ok(())
}
