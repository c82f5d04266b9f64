//! Blocks whose rows several calls share: those of micro-batches that go through the model side by side.
//!
//! While the products of one micro-batch travel, the owner works on another. Each of them alone fills a part of a block of
//! `N` rows, and what encryption and decryption transform is a block, full or not: four micro-batches of a quarter would cost
//! four times the transforms of one. So the first of them to come to a product makes the block for all: `<a_i, s> + e_i` of the
//! features that go up, and, while its rows travel, `<a'_j, s>` of the columns that come back. Each call takes the rows that are its own.
//!
//! It is with them as with pads: a row of a block serves one call. [`share`] deals the rows out, and neither a part of them
//! nor the ticket that it leaves can be copied; encryption takes the one by value, decryption the other. The secret is
//! forgotten as soon as both halves are made ([`SharedSecret::finish`] consumes it), and an answer is opened with no other rows than
//! those that it was encrypted with.

use std::ops::{DerefMut, Range};
use std::sync::Arc;

use rayon::prelude::*;
use zeroize::Zeroizing;

use super::PadRow;
use super::block::{self, Job, Layout, Source};
use crate::buffer::Reused;
use crate::he::decrypt::{DecryptError, Decryption, Key};
use crate::he::encrypt::{EncryptError, Plaintext, check};
use crate::he::lanes::vectorised;
use crate::he::mask::{MaskDomain, MaskSeed};
use crate::he::packing::{self, RowMut};
use crate::he::rows::{Decode, Encode, RowWord};
use crate::he::sampling::SecretRng;
use crate::he::secret::OneTimeSecret;
use crate::he::{MaskProduct, Planes, Precision, ProductTile};
use crate::parts::Part;

/// Rows that a task encodes or decodes: a row is read and written from end to end.
const TASK_ROWS: usize = 16;

/// A half of a block: values of all its rows, in bytes. Its memory is wiped as that of all rows of a step is
/// ([`crate::buffer`]): it hides, and shows, no more than the rows beside which it lies. Nor is it kept in words, which would be
/// quicker to read: it is read from memory each time, and there bytes count.
struct Half {
    layout: Layout,
    bytes: Reused<u8>,
}

impl Half {
    fn made(job: &Job<'_>, columns: usize) -> Result<Self, EncryptError> {
        let layout = Layout::of(job, columns);
        let mut bytes = Reused::scratch(layout.bytes());
        block::write(job, layout, &mut bytes)?;
        Ok(Self { layout, bytes })
    }

    /// Values of a row from column `first` on, as many as `words` has.
    #[inline(always)]
    fn load<W: RowWord>(&self, row: usize, first: usize, words: &mut [W]) {
        self.layout.load(&self.bytes, row, first, words);
    }
}

/// Tells blocks apart, within the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct BlockNumber(u64);

impl BlockNumber {
    fn next() -> Self {
        use std::sync::atomic::{AtomicU64, Ordering};
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// A call's rows of a block, as encryption needs them. They can be neither copied, printed nor serialised.
pub struct SharedRows {
    domain: MaskDomain,
    block: BlockNumber,
    features: usize,
    rows: Range<usize>,
    half: Arc<Half>,
}

/// The secret of a block until the other half of it is made. It can be neither copied, printed nor serialised, and is wiped on drop.
pub struct SharedSecret {
    domain: MaskDomain,
    block: BlockNumber,
    calls: Vec<usize>,
    secret: OneTimeSecret,
}

/// A call's rows of a block, as decryption needs them.
pub struct SharedAnswer {
    block: BlockNumber,
    rows: Range<usize>,
    outer: usize,
    mask_limbs: u8,
    half: Arc<Half>,
}

/// What a call that was encrypted with rows of a block waits for its answer with. It cannot be copied or printed; opening it consumes it.
pub struct SharedTicket {
    precision: Precision,
    block: BlockNumber,
    rows: Range<usize>,
    steps: Zeroizing<Vec<f64>>,
}

/// Bytes that a block of so many rows takes, of a product of these dimensions at this precision.
pub const fn shared_bytes(precision: Precision, rows: usize, features: usize, columns: usize) -> usize {
    rows.saturating_mul(PadRow::bytes_for(precision, features, columns))
}

/// Ranges of so many rows, one behind the other.
fn dealt(counts: &[usize]) -> impl Iterator<Item = Range<usize>> {
    counts.iter().scan(0, |end, count| {
        let start = *end;
        *end += count;
        Some(start..*end)
    })
}

/// Makes what calls of so many rows each are encrypted with, out of one block under a fresh secret.
///
/// # Errors
/// When a block has fewer rows, a call has none, or there is no randomness.
pub fn share(
    seed: &MaskSeed,
    domain: &MaskDomain,
    features: usize,
    calls: &[usize],
) -> Result<(Vec<SharedRows>, SharedSecret), EncryptError> {
    let (set, most) = (domain.set, domain.set.polynomial_size());
    let rows = calls.iter().fold(0, |sum: usize, &count| sum.saturating_add(count));
    if rows > most || features == 0 || calls.is_empty() || calls.contains(&0) {
        return Err(EncryptError::PadRows { rows, most, features });
    }
    let secret = OneTimeSecret::generate(set, &mut SecretRng::from_os().map_err(EncryptError::Randomness)?);
    let half = Half::made(&Job { domain, secret: &secret, rows, source: Source::Masks(seed) }, features)?;
    let (half, block) = (Arc::new(half), BlockNumber::next());
    let part = |rows| SharedRows { domain: *domain, block, features, rows, half: Arc::clone(&half) };
    let parts = dealt(calls).map(part).collect();
    Ok((parts, SharedSecret { domain: *domain, block, calls: calls.to_vec(), secret }))
}

impl SharedSecret {
    /// Makes what the calls' answers are decrypted with, and forgets the secret.
    ///
    /// # Errors
    /// When the mask product is of another parameter set, or there is no randomness.
    pub fn finish(self, masks: &MaskProduct) -> Result<Vec<SharedAnswer>, EncryptError> {
        let Self { domain, block, calls, secret } = self;
        let (set, precision) = (domain.set, masks.precision());
        if precision.set != set {
            return Err(EncryptError::Precision { precision, set });
        }
        let (rows, outer) = (calls.iter().sum(), masks.outer());
        let job = Job { domain: &domain, secret: &secret, rows, source: Source::Product(masks) };
        let half = Arc::new(Half::made(&job, outer)?);
        let mask_limbs = precision.mask_limbs;
        let answer = |rows| SharedAnswer { block, rows, outer, mask_limbs, half: Arc::clone(&half) };
        Ok(dealt(&calls).map(answer).collect())
    }
}

impl SharedRows {
    /// Encrypts up to as many rows as these are; those behind are never used.
    ///
    /// Returns the body, `tokens × features` values of `body_bits`, and the only ticket that opens the product.
    ///
    /// # Errors
    /// When sizes disagree, the rows are of another product or precision, or a step or a value cannot be encoded.
    pub fn encrypt(
        self,
        domain: &MaskDomain,
        precision: Precision,
        plaintext: Plaintext<'_>,
    ) -> Result<(Planes, SharedTicket), EncryptError> {
        check(&plaintext)?;
        let set = domain.set;
        if precision.set != set || !precision.is_valid() {
            return Err(EncryptError::Precision { precision, set });
        }
        let Plaintext { tokens, features, steps, .. } = plaintext;
        if self.domain != *domain || self.features != features || self.rows.len() < tokens {
            return Err(EncryptError::Pads { rows: self.rows.len(), tokens });
        }
        let Self { block, rows, half, .. } = self;
        let mut body = Planes::scratch_of_bits(precision.body_bits.into(), tokens, features);
        let mut to = packing::rows_mut(&mut body);
        let job = EncodeJob { half: &half, first: rows.start, precision, plaintext };
        if set.modulus_bits() <= u32::BITS {
            encode_all::<u32>(&job, &mut to)?;
        } else {
            encode_all::<u64>(&job, &mut to)?;
        }
        let rows = rows.start..rows.start + tokens;
        Ok((body, SharedTicket { precision, block, rows, steps: steps.to_vec().into() }))
    }
}

/// What all rows of a call share on their way up.
struct EncodeJob<'a> {
    half: &'a Half,
    /// The call's first row in the block.
    first: usize,
    precision: Precision,
    plaintext: Plaintext<'a>,
}

fn encode_all<W: RowWord>(job: &EncodeJob<'_>, rows: &mut [RowMut<'_>]) -> Result<(), EncryptError> {
    let words = || Zeroizing::new(vec![W::default(); job.plaintext.features]);
    let tasks = rows.par_chunks_mut(TASK_ROWS).enumerate();
    tasks.try_for_each_init(words, |words, (task, rows)| encode_rows(job, task * TASK_ROWS, words, rows))
}

vectorised! {
    fn encode_rows<W: RowWord>(
        job: &EncodeJob<'_>,
        token: usize,
        words: &mut [W],
        rows: &mut [RowMut<'_>],
    ) -> Result<(), EncryptError> = encode_rows_body
}

/// Encodes the rows from `token` on.
#[inline(always)]
fn encode_rows_body<W: RowWord>(
    job: &EncodeJob<'_>,
    token: usize,
    words: &mut [W],
    rows: &mut [RowMut<'_>],
) -> Result<(), EncryptError> {
    let _part = Part::Arithmetic.mark();
    let Plaintext { rows: inputs, features, steps, .. } = job.plaintext;
    let (encode, limit) = (Encode::of(job.precision), job.precision.encodable());
    for (token, row) in (token..).zip(rows) {
        job.half.load(job.first + token, 0, words);
        let (input, step) = (&inputs[token * features..][..features], steps[token]);
        let largest = encode.row(step, words, input, row);
        // NaN fails every comparison.
        let encodable = f64::from(f32::from_bits(largest)) * step < limit;
        if !encodable {
            return Err(EncryptError::Range { token });
        }
    }
    Ok(())
}

impl SharedTicket {
    /// Precision that the product was encrypted for.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Rows of the product.
    pub fn tokens(&self) -> usize {
        self.steps.len()
    }

    /// Begins the decryption of the product with the other half of the same rows. Values go to `out`, `tokens × outer`, row-major.
    ///
    /// # Errors
    /// When that is of other rows, made from another mask product than the precision says, or `out` has another size.
    pub fn open<T: DerefMut<Target = [f32]>>(
        self,
        answer: SharedAnswer,
        out: T,
    ) -> Result<Decryption<T>, DecryptError> {
        let Self { precision, block, rows, steps } = self;
        if block != answer.block || rows.start != answer.rows.start || answer.rows.len() < rows.len() {
            return Err(DecryptError::OtherRows);
        }
        if answer.mask_limbs != precision.mask_limbs {
            let of_masks = Precision { mask_limbs: answer.mask_limbs, ..precision };
            return Err(DecryptError::Precision { precision: of_masks, expected: Some(precision) });
        }
        let outer = answer.outer;
        if rows.len().checked_mul(outer) != Some(out.len()) {
            return Err(DecryptError::Output(out.len()));
        }
        Ok(Decryption::new(precision, steps, Key::Shared(answer), outer, out))
    }
}

/// What all rows of a tile of an answer share.
struct DecodeJob<'a> {
    answer: &'a SharedAnswer,
    tile: &'a ProductTile,
    decode: Decode,
    /// What one unit of a value of a row is worth.
    units: &'a [f64],
}

/// Decrypts a tile of columns, whose rows go to `out`, `tokens × outer`; one unit of a value of a row is worth its `units`.
pub(in crate::he) fn decrypt_tile(
    answer: &SharedAnswer,
    tile: &ProductTile,
    (bits, shifts): (u32, (u32, u32)),
    units: &[f64],
    out: &mut [f32],
) {
    let job = DecodeJob { answer, tile, decode: Decode::of(&tile.rows, bits, shifts), units };
    if bits <= u32::BITS { decode_all::<u32>(&job, out) } else { decode_all::<u64>(&job, out) }
}

fn decode_all<W: RowWord>(job: &DecodeJob<'_>, out: &mut [f32]) {
    let words = || Zeroizing::new(vec![W::default(); job.tile.rows.columns()]);
    let tasks = out.par_chunks_mut(TASK_ROWS * job.answer.outer).enumerate();
    tasks.for_each_init(words, |words, (task, out)| decode_rows(job, task * TASK_ROWS, words, out));
}

vectorised! {
    fn decode_rows<W: RowWord>(job: &DecodeJob<'_>, token: usize, words: &mut [W], out: &mut [f32]) = decode_rows_body
}

/// Decodes the rows from `token` on.
#[inline(always)]
fn decode_rows_body<W: RowWord>(job: &DecodeJob<'_>, token: usize, words: &mut [W], out: &mut [f32]) {
    let _part = Part::Arithmetic.mark();
    let DecodeJob { answer, tile, decode, units } = job;
    let (first, width) = (tile.first_column, tile.rows.columns());
    for (token, out) in (token..).zip(out.chunks_exact_mut(answer.outer)) {
        answer.half.load(answer.rows.start + token, first, words);
        decode.row(units[token], packing::row(&tile.rows, token, 0, width), words, &mut out[first..first + width]);
    }
}
