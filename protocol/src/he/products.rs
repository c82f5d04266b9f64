//! Products of mask columns by secrets: the inner loop of encryption and of decryption alike.

use zeroize::Zeroizing;

use super::lanes::{STRIP, TILE};
use super::ntt::{Digits, Ring};
use super::secret::OneTimeSecret;
use super::word::Word;
use super::{ParameterSet, Planes};

/// What a mask column becomes: `k` polynomials cut into digits, each transformed.
#[derive(Clone, Copy)]
pub(crate) struct MaskTransform {
    ring: &'static Ring,
    size: usize,
    components: usize,
    digits: Digits,
}

impl MaskTransform {
    /// The transform of masks of a set whose values are cut into these digits.
    pub(crate) fn new(set: ParameterSet, digits: Digits) -> Self {
        let (size, components) = (set.polynomial_size(), set.glwe_dimension());
        Self { ring: Ring::of_size(size), size, components, digits }
    }

    /// Residues of a transformed column, `[digit][component][N]`.
    pub(crate) fn column_residues(&self) -> usize {
        self.digits.count * self.components * self.size
    }

    /// Transforms one component of a mask column into its places of `column`.
    #[inline(always)]
    pub(crate) fn transform<W: Word>(&self, component: usize, values: &[W], column: &mut [u32]) {
        for digit in 0..self.digits.count {
            let at = (digit * self.components + component) * self.size;
            let out = &mut column[at..at + self.size];
            self.digits.split(digit, values, out);
            self.ring.forward(out);
        }
    }

    /// Writes `<a, secret>` for a transformed column to `values`, right mod `2^total_bits` of the digits. `sums` is
    /// working memory of `N` residues.
    #[inline(always)]
    pub(crate) fn multiply<W: Word>(&self, column: &[u32], secret: &OneTimeSecret, sums: &mut [u32], values: &mut [W]) {
        values.fill(W::default());
        for (digit, masks) in column.chunks_exact(self.components * self.size).enumerate() {
            sums.fill(0);
            for (component, mask) in masks.chunks_exact(self.size).enumerate() {
                self.ring.accumulate(sums, mask, secret.component(component, self.size));
            }
            self.ring.inverse(sums);
            self.digits.join(digit, sums, values);
        }
    }
}

/// Polynomials of a tile of columns, reused from tile to tile and wiped on drop: `<a, s>` beside a public `a` gives the
/// secret away.
pub(crate) struct Polynomials<W: Word> {
    size: usize,
    /// `[column][N + PADDING]`.
    values: Zeroizing<Vec<W>>,
}

/// Values between two columns: columns a power of two apart would all compete for the same sets of the cache while
/// they are transposed.
const PADDING: usize = 16;

impl<W: Word> Polynomials<W> {
    /// Memory for [`TILE`] polynomials.
    pub(crate) fn new(set: ParameterSet) -> Self {
        let size = set.polynomial_size();
        Self { size, values: Zeroizing::new(vec![W::default(); TILE * (size + PADDING)]) }
    }

    /// The coefficients of a column.
    #[inline(always)]
    pub(crate) fn column_mut(&mut self, column: usize) -> &mut [W] {
        let start = column * (self.size + PADDING);
        &mut self.values[start..start + self.size]
    }

    /// Takes one component of a column of keystream, `[limb][component][N]`.
    #[inline(always)]
    pub(crate) fn load_keystream(&mut self, column: usize, keystream: &[u8], rows: usize, component: usize) {
        let size = self.size;
        let values = self.column_mut(column);
        values.fill(W::default());
        for (limb, plane) in keystream.chunks_exact(rows).enumerate() {
            for (value, &byte) in values.iter_mut().zip(&plane[component * size..]) {
                *value = value.add(W::of_limb(byte, limb));
            }
        }
    }

    /// Takes one component of columns `first..first + width` of planes of `k·N` rows.
    #[inline(always)]
    pub(crate) fn load_planes(&mut self, planes: &Planes, component: usize, first: usize, width: usize) {
        let (size, stride) = (self.size, self.size + PADDING);
        let mut strip = [[W::default(); TILE]; STRIP];
        for row in (0..size).step_by(STRIP) {
            // All rows are fetched before any is used, so that their cache misses overlap.
            for (i, values) in strip.iter_mut().enumerate() {
                gather_row(planes, component * size + row + i, first, &mut values[..width]);
            }
            for (column, values) in self.values.chunks_exact_mut(stride).enumerate().take(width) {
                for (value, strip) in values[row..row + STRIP].iter_mut().zip(&strip) {
                    *value = strip[column];
                }
            }
        }
    }

    /// Copies coefficients `row..row + STRIP` of each of the first `width` columns to `[row][column]`.
    #[inline(always)]
    pub(crate) fn transpose_strip(&self, row: usize, width: usize, strip: &mut [[W; TILE]; STRIP]) {
        for (column, values) in self.values.chunks_exact(self.size + PADDING).enumerate().take(width) {
            for (strip, &value) in strip.iter_mut().zip(&values[row..row + STRIP]) {
                strip[column] = value;
            }
        }
    }
}

/// Reads the values of one row of planes from column `first` on.
#[inline(always)]
pub(crate) fn gather_row<W: Word>(planes: &Planes, row: usize, first: usize, out: &mut [W]) {
    let start = row * planes.columns() + first;
    out.fill(W::default());
    for limb in 0..planes.limbs() {
        let bytes = &planes.plane(limb)[start..start + out.len()];
        for (value, &byte) in out.iter_mut().zip(bytes) {
            *value = value.add(W::of_limb(byte, limb));
        }
    }
}
