//! Pads: rows encrypted ahead, so that a call of few rows costs no transform.
//!
//! The secret of a block covers its `N` coefficients, and each coefficient serves one row of one call, whichever call that is.
//! A call of a thousand rows uses them up at once. A call of one row would use one and throw the others away, after
//! the transforms of all of them. So the owner makes ahead of time, for the rows `r` of a block of one product, what encryption and
//! decryption add to them:
//!
//! ```text
//! P[r, i] = <a_i, s>[r] + e[r, i]     for the features that go up,
//! D[r, j] = <a'_j, s>[r]              for the columns that come back,
//! ```
//!
//! by the same transforms, and forgets the secret. A row of both is a [`PadRow`]. Encrypting with it adds the message to `P` and
//! rounds; decrypting subtracts `D`. The body is distributed as that of any other call, so that a worker cannot tell which
//! way it was made, and its work is the same.
//!
//! **Each row is used once.** That is in the type: a row cannot be copied or written down, encryption takes it by value, what it
//! leaves for the answer is in the [`PadTicket`], which is taken by value too, and both are wiped when they are dropped, used or not.
//! Under two messages the same row would give away their difference.
//!
//! **What it costs.** A row takes `L` bytes for each feature and the bytes of the mask product for each column. Neither is
//! rounded: an answer decrypted with pads is, bit for bit, what the secret would decrypt it to. A block costs its transforms however many of
//! its rows are kept, so that memory buys time:
//!
//! | rows kept of a block | memory, of SmolLM2-135M | transforms of a row, of those of a call of one row without pads |
//! |---|---|---|
//! | 16 | 10 MB | 1/16 |
//! | 64 | 39 MB | 1/64 |
//! | 256 | 155 MB | 1/256 |
//! | 1024 | 619 MB | 1/1024 |
//!
//! (A row of all its forward products: 97,920 features of three bytes, and 155,520 columns of the two that are planned for its mask
//! products.)

mod block;
pub(super) mod shared;

use std::ops::DerefMut;

use zeroize::Zeroizing;

use self::block::{Job, Layout, Source};
use super::decrypt::{DecryptError, Decryption, Key, Units};
use super::encrypt::{EncryptError, Plaintext, check};
use super::lanes::{TILE, vectorised};
use super::mask::{MaskDomain, MaskSeed};
use super::packing::{self, PlanesTile};
use super::rows::{Decode, Encode, RowWord};
use super::sampling::SecretRng;
use super::secret::OneTimeSecret;
use super::{MaskProduct, Planes, Precision, ProductTile};
use crate::parts::Part;
use crate::wiped::Wiped;

/// What one row of one call of a product is encrypted and decrypted with. It can be neither copied, printed nor serialised, and is wiped
/// on drop.
pub struct PadRow {
    domain: MaskDomain,
    /// `P`, `[limb][feature]`, all limbs of the modulus.
    inner: Wiped<u8>,
    outer: PadOuter,
}

/// What is left of a row when it was encrypted with: what its answer is decrypted with.
pub(super) struct PadOuter {
    /// Limbs of a value.
    limbs: u8,
    /// `D`, `[limb][column]`.
    values: Wiped<u8>,
}

impl PadRow {
    /// Bytes that a row of a product of this precision takes.
    pub const fn bytes_for(precision: Precision, features: usize, columns: usize) -> usize {
        let (up, down) = (precision.set.limbs(), precision.mask_limbs as usize);
        features.saturating_mul(up).saturating_add(columns.saturating_mul(down))
    }

    /// Makes `rows` rows for products of `features` by the matrix that `masks` is the mask product of, under a fresh secret
    /// that is gone afterwards.
    ///
    /// # Errors
    /// When a block does not have so many rows, the mask product is of another parameter set, or there is no randomness.
    pub fn prepare(
        seed: &MaskSeed,
        domain: &MaskDomain,
        masks: &MaskProduct,
        features: usize,
        rows: usize,
    ) -> Result<Vec<Self>, EncryptError> {
        let (set, precision) = (domain.set, masks.precision());
        if precision.set != set {
            return Err(EncryptError::Precision { precision, set });
        }
        let most = set.polynomial_size();
        if rows == 0 || rows > most || features == 0 {
            return Err(EncryptError::PadRows { rows, most, features });
        }
        let secret = OneTimeSecret::generate(set, &mut SecretRng::from_os().map_err(EncryptError::Randomness)?);
        let job = |source| Job { domain, secret: &secret, rows, source };
        let made = |source, columns| {
            let job = job(source);
            let layout = Layout::of(&job, columns);
            let mut block = Wiped::zeros(layout.bytes());
            block::write(&job, layout, &mut block).map(|()| (layout, block))
        };
        let (inner, inner_block) = made(Source::Masks(seed), features)?;
        let (outer, outer_block) = made(Source::Product(masks), masks.outer())?;
        let cut = |layout: Layout, block: &[u8], row| {
            let mut cut = Wiped::zeros(layout.row_bytes());
            layout.cut(block, row, &mut cut);
            cut
        };
        let row = |row| Self {
            domain: *domain,
            inner: cut(inner, &inner_block, row),
            outer: PadOuter { limbs: precision.mask_limbs, values: cut(outer, &outer_block, row) },
        };
        Ok((0..rows).map(row).collect())
    }

    /// Bytes of memory that it takes.
    pub fn bytes(&self) -> usize {
        self.inner.len() + self.outer.values.len()
    }

    /// `P` and `D` of a value each, unsigned.
    #[cfg(test)]
    pub(super) fn values(&self) -> [Vec<u64>; 2] {
        let words = |bytes: &[u8], limbs: usize| {
            let mut words = vec![0_u64; bytes.len() / limbs];
            load(bytes, limbs, 0, &mut words);
            words
        };
        [words(&self.inner, self.domain.set.limbs()), words(&self.outer.values, usize::from(self.outer.limbs))]
    }
}

/// Puts together values of `[limb][column]` of so many limbs from column `first` on, as many as `words` has.
#[inline(always)]
fn load<W: RowWord>(bytes: &[u8], limbs: usize, first: usize, words: &mut [W]) {
    match limbs {
        1 => load_limbs::<W, 1>(bytes, first, words),
        2 => load_limbs::<W, 2>(bytes, first, words),
        3 => load_limbs::<W, 3>(bytes, first, words),
        4 => load_limbs::<W, 4>(bytes, first, words),
        5 => load_limbs::<W, 5>(bytes, first, words),
        _ => load_limbs::<W, 6>(bytes, first, words),
    }
}

/// Puts together values of `[limb][column]` from column `first` on, as many as `words` has.
#[inline(always)]
fn load_limbs<W: RowWord, const LIMBS: usize>(bytes: &[u8], first: usize, words: &mut [W]) {
    let columns = bytes.len() / LIMBS;
    let planes: [&[u8]; LIMBS] = std::array::from_fn(|limb| &bytes[limb * columns + first..][..words.len()]);
    for (i, word) in words.iter_mut().enumerate() {
        *word = planes.iter().enumerate().fold(W::default(), |sum, (limb, plane)| sum.add(W::of_limb(plane[i], limb)));
    }
}

/// The only right to decrypt a product that was encrypted with pads. It cannot be copied or printed; opening it consumes it, and
/// dropping it wipes what it holds.
pub struct PadTicket {
    precision: Precision,
    rows: Vec<PadOuter>,
    steps: Zeroizing<Vec<f64>>,
}

/// Encrypts rows with one pad row each, on the calling thread: some nanoseconds a value, and no transform.
///
/// Returns the body, `tokens × features` values of `body_bits`, and the only ticket that opens the product. The rows of the pads are used up,
/// also where it fails.
///
/// # Errors
/// When sizes disagree, the pads are of another product, precision or number of rows, or a step or a value cannot be encoded.
pub fn encrypt_with_pads(
    pads: Vec<PadRow>,
    domain: &MaskDomain,
    precision: Precision,
    plaintext: Plaintext<'_>,
) -> Result<(Planes, PadTicket), EncryptError> {
    check(&plaintext)?;
    let set = domain.set;
    if precision.set != set || !precision.is_valid() {
        return Err(EncryptError::Precision { precision, set });
    }
    let Plaintext { tokens, features, steps, .. } = plaintext;
    let fits = |pad: &PadRow| {
        pad.domain == *domain && pad.inner.len() == features * set.limbs() && pad.outer.limbs == precision.mask_limbs
    };
    if pads.len() != tokens || !pads.iter().all(fits) {
        return Err(EncryptError::Pads { rows: pads.len(), tokens });
    }
    let mut body = Planes::scratch_of_bits(precision.body_bits.into(), tokens, features);
    let tiles = PlanesTile::cut(&mut body);
    if set.modulus_bits() <= u32::BITS {
        encode_tiles::<u32>(&pads, precision, plaintext, tiles)?;
    } else {
        encode_tiles::<u64>(&pads, precision, plaintext, tiles)?;
    }
    // What went up is wiped here.
    let rows = pads.into_iter().map(|PadRow { outer, .. }| outer).collect();
    Ok((body, PadTicket { precision, rows, steps: steps.to_vec().into() }))
}

fn encode_tiles<W: RowWord>(
    pads: &[PadRow],
    precision: Precision,
    plaintext: Plaintext<'_>,
    tiles: Vec<PlanesTile<'_>>,
) -> Result<(), EncryptError> {
    let mut words = Zeroizing::new([W::default(); TILE]);
    tiles.into_iter().try_for_each(|tile| encode_tile(pads, precision, plaintext, &mut words, tile))
}

vectorised! {
    fn encode_tile<W: RowWord>(
        pads: &[PadRow],
        precision: Precision,
        plaintext: Plaintext<'_>,
        words: &mut [W; TILE],
        tile: PlanesTile<'_>,
    ) -> Result<(), EncryptError> = encode_tile_body
}

#[inline(always)]
fn encode_tile_body<W: RowWord>(
    pads: &[PadRow],
    precision: Precision,
    plaintext: Plaintext<'_>,
    words: &mut [W; TILE],
    mut tile: PlanesTile<'_>,
) -> Result<(), EncryptError> {
    let _part = Part::Arithmetic.mark();
    let columns = tile.columns();
    let width = columns.len();
    let (encode, limit) = (Encode::of(precision), precision.encodable());
    for (token, (pad, &step)) in pads.iter().zip(plaintext.steps).enumerate() {
        load(&pad.inner, precision.set.limbs(), columns.start, &mut words[..width]);
        let input = &plaintext.rows[token * plaintext.features + columns.start..][..width];
        let largest = encode.row(step, &words[..width], input, &mut tile.row_mut(token));
        // NaN fails every comparison.
        let encodable = f64::from(f32::from_bits(largest)) * step < limit;
        if !encodable {
            return Err(EncryptError::Range { token });
        }
    }
    Ok(())
}

impl PadTicket {
    /// Precision that the product was encrypted for.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Rows of the product.
    pub fn tokens(&self) -> usize {
        self.steps.len()
    }

    /// Begins the decryption of the product. Values go to `out`, `tokens × outer`, row-major.
    ///
    /// # Errors
    /// When `out` has another size.
    pub fn open<T: DerefMut<Target = [f32]>>(self, out: T) -> Result<Decryption<T>, DecryptError> {
        let Self { precision, rows, steps } = self;
        let outer = rows.first().map_or(0, |row| row.values.len() / usize::from(row.limbs));
        if rows.len().checked_mul(outer) != Some(out.len()) {
            return Err(DecryptError::Output(out.len()));
        }
        Ok(Decryption::new(precision, steps, Key::Pads(rows), outer, out))
    }
}

/// Decrypts a tile of columns `first..`, whose rows are `out`, `tokens × outer`; one unit of a value of a row is worth its `units`.
pub(super) fn decrypt_tile(
    pads: &[PadOuter],
    tile: &ProductTile,
    Units { bits, shifts, units }: &Units,
    outer: usize,
    out: &mut [f32],
) {
    let (bits, shifts) = (*bits, *shifts);
    if bits <= u32::BITS {
        decode_rows::<u32>(pads, tile, Decode::of(&tile.rows, bits, shifts), units, outer, out);
    } else {
        decode_rows::<u64>(pads, tile, Decode::of(&tile.rows, bits, shifts), units, outer, out);
    }
}

fn decode_rows<W: RowWord>(
    pads: &[PadOuter],
    tile: &ProductTile,
    decode: Decode,
    units: &[f64],
    outer: usize,
    out: &mut [f32],
) {
    let mut words = Zeroizing::new([W::default(); TILE]);
    for (token, (pad, out)) in pads.iter().zip(out.chunks_exact_mut(outer)).enumerate() {
        let out = &mut out[tile.first_column..][..tile.rows.columns()];
        decode_row(pad, (tile, token), decode, units[token], &mut words, out);
    }
}

vectorised! {
    fn decode_row<W: RowWord>(
        pad: &PadOuter,
        row: (&ProductTile, usize),
        decode: Decode,
        unit: f64,
        words: &mut [W; TILE],
        out: &mut [f32],
    ) = decode_row_body
}

#[inline(always)]
fn decode_row_body<W: RowWord>(
    pad: &PadOuter,
    (tile, token): (&ProductTile, usize),
    decode: Decode,
    unit: f64,
    words: &mut [W; TILE],
    out: &mut [f32],
) {
    let _part = Part::Arithmetic.mark();
    for (at, out) in out.chunks_mut(TILE).enumerate() {
        let (first, width) = (at * TILE, out.len());
        load(&pad.values, usize::from(pad.limbs), tile.first_column + first, &mut words[..width]);
        decode.row(unit, packing::row(&tile.rows, token, first, width), &words[..width], out);
    }
}
