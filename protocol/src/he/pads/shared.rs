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
use crate::he::decrypt::{DecryptError, Decryption, Key, Units};
use crate::he::encrypt::{EncryptError, RowError, RowTask, check_steps};
use crate::he::lanes::vectorised;
use crate::he::mask::{MaskDomain, MaskSeed};
use crate::he::packing::{self, RowMut};
use crate::he::rows::{Decode, Encode, RowWord};
use crate::he::sampling::SecretRng;
use crate::he::secret::OneTimeSecret;
use crate::he::{MaskProduct, Planes, Precision, ProductTile};
use crate::parts::Part;

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
    /// Encrypts up to as many rows as these are, which `tasks` make, one behind the other; those behind are never used.
    ///
    /// Returns the body, `tokens × features` values of `body_bits`, and the only ticket that opens the product.
    ///
    /// # Errors
    /// When a row cannot be made, there are none or too many, they are of another product or precision, or a step or a value cannot be
    /// encoded.
    pub fn encrypt<T: RowTask>(
        self,
        domain: &MaskDomain,
        precision: Precision,
        features: usize,
        tasks: Vec<T>,
    ) -> Result<(Planes, SharedTicket), RowError<T::Error>> {
        let set = domain.set;
        if precision.set != set || !precision.is_valid() {
            return Err(EncryptError::Precision { precision, set }.into());
        }
        let tokens = tasks.iter().map(T::rows).sum();
        if tokens == 0 || features == 0 {
            return Err(EncryptError::Shape { tokens, features, rows: 0, steps: tokens }.into());
        }
        if self.domain != *domain || self.features != features || self.rows.len() < tokens {
            return Err(EncryptError::Pads { rows: self.rows.len(), tokens }.into());
        }
        let Self { block, rows, half, .. } = self;
        let mut body = Planes::scratch_of_bits(precision.body_bits.into(), tokens, features);
        let mut steps = Zeroizing::new(vec![0.0; tokens]);
        let job = EncodeJob { half: &half, first: rows.start, precision, features };
        let encoded = packing::rows_mut(&mut body);
        if set.modulus_bits() <= u32::BITS {
            encode_all::<u32, T>(&job, tasks, encoded, &mut steps)?;
        } else {
            encode_all::<u64, T>(&job, tasks, encoded, &mut steps)?;
        }
        let rows = rows.start..rows.start + tokens;
        Ok((body, SharedTicket { precision, block, rows, steps }))
    }
}

/// What all rows of a call share on their way up.
struct EncodeJob<'a> {
    half: &'a Half,
    /// The call's first row in the block.
    first: usize,
    precision: Precision,
    features: usize,
}

/// Rows of a task from `token` on, where they are encoded to, and where their steps go.
struct EncodeTask<'a, 'b, T> {
    make: T,
    token: usize,
    rows: &'a mut [RowMut<'b>],
    steps: &'a mut [f64],
}

fn encode_all<W: RowWord, T: RowTask>(
    job: &EncodeJob<'_>,
    tasks: Vec<T>,
    mut rows: Vec<RowMut<'_>>,
    steps: &mut [f64],
) -> Result<(), RowError<T::Error>> {
    let (mut token, mut rows, mut steps) = (0, &mut rows[..], steps);
    let tasks = tasks.into_iter().map(|make| {
        let count = make.rows();
        let (first, (mine, others)) = (token, std::mem::take(&mut rows).split_at_mut(count));
        let (my_steps, other_steps) = std::mem::take(&mut steps).split_at_mut(count);
        (token, rows, steps) = (token + count, others, other_steps);
        EncodeTask { make, token: first, rows: mine, steps: my_steps }
    });
    let tasks: Vec<_> = tasks.collect();
    let words = || Zeroizing::new(vec![W::default(); job.features]);
    tasks.into_par_iter().try_for_each_init(words, |words, EncodeTask { make, token, rows, steps }| {
        let mut inputs = Zeroizing::new(vec![0.0; rows.len() * job.features]);
        make.make(&mut inputs, steps).map_err(RowError::Make)?;
        check_steps(steps, token)?;
        Ok(encode_rows(job, token, words, &inputs, steps, rows)?)
    })
}

vectorised! {
    fn encode_rows<W: RowWord>(
        job: &EncodeJob<'_>,
        token: usize,
        words: &mut [W],
        inputs: &[f32],
        steps: &[f64],
        rows: &mut [RowMut<'_>],
    ) -> Result<(), EncryptError> = encode_rows_body
}

/// Encodes the rows from `token` on.
#[inline(always)]
fn encode_rows_body<W: RowWord>(
    job: &EncodeJob<'_>,
    token: usize,
    words: &mut [W],
    inputs: &[f32],
    steps: &[f64],
    rows: &mut [RowMut<'_>],
) -> Result<(), EncryptError> {
    let _part = Part::Arithmetic.mark();
    let (encode, limit) = (Encode::of(job.precision), job.precision.encodable());
    for (((token, row), input), &step) in (token..).zip(rows).zip(inputs.chunks_exact(job.features)).zip(steps) {
        job.half.load(job.first + token, 0, words);
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

/// An answer whose tiles have all come: it is decrypted row by row, by whoever goes through its rows anyway, so that each is written to
/// memory once, as what it is in the end.
pub(crate) struct Late {
    answer: SharedAnswer,
    tiles: Vec<ProductTile>,
    units: Units,
}

impl Late {
    pub(in crate::he) fn new(answer: SharedAnswer, tiles: Vec<ProductTile>, units: Units) -> Self {
        Self { answer, tiles, units }
    }

    /// Decrypts the rows from `token` on, as many as `out` has, `[row][column]`.
    pub(crate) fn rows(&self, token: usize, out: &mut [f32]) {
        if self.units.bits <= u32::BITS {
            decode_rows::<u32>(self, token, &mut Zeroizing::new(vec![0; self.answer.outer]), out);
        } else {
            decode_rows::<u64>(self, token, &mut Zeroizing::new(vec![0; self.answer.outer]), out);
        }
    }
}

vectorised! {
    fn decode_rows<W: RowWord>(late: &Late, token: usize, words: &mut [W], out: &mut [f32]) = decode_rows_body
}

#[inline(always)]
fn decode_rows_body<W: RowWord>(late: &Late, token: usize, words: &mut [W], out: &mut [f32]) {
    let _part = Part::Arithmetic.mark();
    let Late { answer, tiles, units: Units { bits, shifts, units } } = late;
    for (token, out) in (token..).zip(out.chunks_exact_mut(answer.outer)) {
        answer.half.load(answer.rows.start + token, 0, words);
        for tile in tiles {
            let (first, width) = (tile.first_column, tile.rows.columns());
            let (row, decode) = (packing::row(&tile.rows, token, 0, width), Decode::of(&tile.rows, *bits, *shifts));
            decode.row(units[token], row, &words[first..first + width], &mut out[first..first + width]);
        }
    }
}
