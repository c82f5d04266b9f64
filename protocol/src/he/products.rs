//! Products of mask columns by secrets: the inner loop of encryption and of decryption alike.
//!
//! A column of masks is what the keystream is made of, and what a mask product is kept as: bytes `[limb][component][N]`.

use super::ParameterSet;
use super::fft::{Digits, Ring, accumulate};
use super::lanes::{STRIP, TILE};
use super::secret::OneTimeSecret;
use super::word::Word;
use crate::buffer::Reused;
use crate::wiped::Wiped;

/// What a column of masks becomes: `k` polynomials cut into digits, each transformed.
#[derive(Clone, Copy)]
pub(crate) struct MaskTransform {
    ring: &'static Ring,
    size: usize,
    components: usize,
    limbs: usize,
    digits: Digits,
}

/// Working memory for one column, wiped on drop.
pub(crate) struct Working<W: Word> {
    /// Coefficients of one polynomial.
    values: Wiped<W>,
    /// A sum of products in the transformed domain.
    sum: Wiped<f64>,
    /// The transform's own.
    transform: Wiped<f64>,
}

impl MaskTransform {
    /// The transform of masks of a set whose values have `limbs` bytes.
    pub(crate) fn new(set: ParameterSet, limbs: usize) -> Self {
        let (size, components) = (set.polynomial_size(), set.glwe_dimension());
        Self { ring: Ring::of_size(size), size, components, limbs, digits: Digits::of(limbs) }
    }

    /// Bytes of a column.
    pub(crate) fn column_bytes(&self) -> usize {
        self.limbs * self.components * self.size
    }

    /// Numbers of a transformed column, `[digit][component][N]`.
    pub(crate) fn column_numbers(&self) -> usize {
        self.digits.count * self.components * self.size
    }

    /// Memory for [`Self::transform`] and [`Self::multiply`].
    pub(crate) fn working<W: Word>(&self) -> Working<W> {
        Working {
            values: Wiped::zeros(self.size),
            sum: Wiped::zeros(self.size),
            transform: Wiped::zeros(self.ring.working_numbers()),
        }
    }

    /// Transforms a column of bytes.
    #[inline(always)]
    pub(crate) fn transform<W: Word>(&self, bytes: &[u8], working: &mut Working<W>, column: &mut [f64]) {
        for component in 0..self.components {
            let values = &mut working.values;
            match self.limbs {
                1 => load::<W, 1>(bytes, component, values),
                2 => load::<W, 2>(bytes, component, values),
                3 => load::<W, 3>(bytes, component, values),
                4 => load::<W, 4>(bytes, component, values),
                5 => load::<W, 5>(bytes, component, values),
                _ => load::<W, 6>(bytes, component, values),
            }
            for digit in 0..self.digits.count {
                let at = (digit * self.components + component) * self.size;
                let out = &mut column[at..at + self.size];
                self.digits.split(self.ring, digit, values, out);
                self.ring.forward(out, &mut working.transform);
            }
        }
    }

    /// Writes `<a, secret>` for a transformed column to `values`, right mod `2^(8·limbs)`.
    #[inline(always)]
    pub(crate) fn multiply<W: Word>(
        &self,
        column: &[f64],
        secret: &OneTimeSecret,
        working: &mut Working<W>,
        values: &mut [W],
    ) {
        let Working { sum, transform, .. } = working;
        for (digit, masks) in column.chunks_exact(self.components * self.size).enumerate() {
            for (component, mask) in masks.chunks_exact(self.size).enumerate() {
                accumulate(sum, mask, secret.component(component, self.size), component == 0);
            }
            self.ring.inverse(sum, transform);
            self.digits.join(self.ring, digit, sum, values);
        }
    }
}

/// Puts the bytes of one component of a column together.
#[inline(always)]
fn load<W: Word, const LIMBS: usize>(bytes: &[u8], component: usize, values: &mut [W]) {
    let (rows, size) = (bytes.len() / LIMBS, values.len());
    let planes: [&[u8]; LIMBS] = std::array::from_fn(|limb| &bytes[limb * rows + component * size..][..size]);
    for (i, value) in values.iter_mut().enumerate() {
        *value = planes.iter().enumerate().fold(W::default(), |sum, (limb, plane)| sum.add(W::of_limb(plane[i], limb)));
    }
}

/// Polynomials of a tile of columns, reused from tile to tile and from call to call, and wiped between steps: `<a, s>` beside
/// a public `a` gives the secret away.
pub(crate) struct Polynomials<W: Word> {
    size: usize,
    /// `[column][N + PADDING]`, of earlier use.
    values: Reused<W>,
}

/// Values between two columns: columns a power of two apart would all compete for the same sets of the cache while
/// they are transposed.
const PADDING: usize = 16;

impl<W: Word> Polynomials<W> {
    /// Memory for [`TILE`] polynomials, each to be written before it is read.
    pub(crate) fn new(set: ParameterSet) -> Self {
        let size = set.polynomial_size();
        Self { size, values: Reused::scratch(TILE * (size + PADDING)) }
    }

    /// Wipes them, where what they hold is of use for longer than a step.
    pub(crate) fn wipe(&mut self) {
        <[W] as zeroize::Zeroize>::zeroize(&mut self.values);
    }

    /// The coefficients of a column.
    #[inline(always)]
    pub(crate) fn column_mut(&mut self, column: usize) -> &mut [W] {
        let start = column * (self.size + PADDING);
        &mut self.values[start..start + self.size]
    }

    /// Copies coefficients `row..row + STRIP` of the first `width` columns, rounded up to a multiple of 8, to
    /// `[row][column]`.
    #[inline(always)]
    pub(crate) fn transpose_strip(&self, row: usize, width: usize, strip: &mut [[W; TILE]; STRIP]) {
        let stride = self.size + PADDING;
        let strip = strip.as_flattened_mut();
        for column in (0..width).step_by(8) {
            for part in (0..STRIP).step_by(8) {
                let from = &self.values[column * stride + row + part..];
                W::transpose(from, stride, &mut strip[part * TILE + column..], TILE);
            }
        }
    }
}
