//! Products of a tile of mask columns by secrets: the inner loop of encryption and of decryption alike.

use zeroize::Zeroizing;

use super::lanes::{STRIP, TILE};
use super::ntt::{Digits, Ring};
use super::secret::OneTimeSecret;
use super::word::Word;
use super::{ParameterSet, Planes};

/// Working memory for tiles of mask columns, reused from tile to tile and wiped on drop: `<a, s>` beside a public
/// `a` gives the secret away.
pub(crate) struct MaskTile<W: Word> {
    ring: &'static Ring,
    size: usize,
    components: usize,
    limbs: usize,
    digits: Digits,
    /// Transformed digits of the masks, `[column][digit][component][N]`.
    transformed: Vec<u32>,
    /// One polynomial of sums in the transformed domain.
    sums: Zeroizing<Vec<u32>>,
    /// `[column][N + PADDING]`: coefficients of a mask on their way in, of the products on their way out.
    values: Zeroizing<Vec<W>>,
}

/// Values between two columns: columns a power of two apart would all compete for the same sets of the cache while
/// they are transposed.
const PADDING: usize = 16;

impl<W: Word> MaskTile<W> {
    /// Memory for masks whose values have `limbs` bytes.
    pub(crate) fn new(set: ParameterSet, limbs: usize) -> Self {
        let (size, components) = (set.polynomial_size(), set.glwe_dimension());
        let digits = Digits::of(limbs, set.mask_rows());
        Self {
            ring: Ring::of_size(size),
            size,
            components,
            limbs,
            digits,
            transformed: vec![0; TILE * digits.count * components * size],
            sums: Zeroizing::new(vec![0; size]),
            values: Zeroizing::new(vec![W::default(); TILE * (size + PADDING)]),
        }
    }

    /// The values of a column.
    #[inline(always)]
    pub(crate) fn column_mut(&mut self, column: usize) -> &mut [W] {
        let start = column * (self.size + PADDING);
        &mut self.values[start..start + self.size]
    }

    /// Takes `width` columns of keystream, `[column][limb][component][N]`.
    #[inline(always)]
    pub(crate) fn load_keystream(&mut self, keystream: &[u8], width: usize) {
        let (size, rows) = (self.size, self.size * self.components);
        for column in 0..width {
            let bytes = &keystream[column * self.limbs * rows..(column + 1) * self.limbs * rows];
            for component in 0..self.components {
                let values = self.column_mut(column);
                values.fill(W::default());
                for (limb, plane) in bytes.chunks_exact(rows).enumerate() {
                    for (value, &byte) in values.iter_mut().zip(&plane[component * size..]) {
                        *value = value.add(W::of_limb(byte, limb));
                    }
                }
                self.transform(column, component);
            }
        }
    }

    /// Takes columns `first..first + width` of planes of `limbs × n` rows.
    #[inline(always)]
    pub(crate) fn load_planes(&mut self, planes: &Planes, first: usize, width: usize) {
        let (size, stride) = (self.size, self.size + PADDING);
        let mut strip = [[W::default(); TILE]; STRIP];
        for component in 0..self.components {
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
            for column in 0..width {
                self.transform(column, component);
            }
        }
    }

    #[inline(always)]
    fn transform(&mut self, column: usize, component: usize) {
        let (size, count) = (self.size, self.digits.count);
        let start = column * (size + PADDING);
        let values = &self.values[start..start + size];
        for digit in 0..count {
            let at = ((column * count + digit) * self.components + component) * size;
            let out = &mut self.transformed[at..at + size];
            self.digits.split(digit, values, out);
            self.ring.forward(out);
        }
    }

    /// Leaves `<a_column, secret>` of the first `width` columns in `values`, right mod `2^(8·limbs)`.
    #[inline(always)]
    pub(crate) fn multiply(&mut self, secret: &OneTimeSecret, width: usize) {
        let (size, count, components) = (self.size, self.digits.count, self.components);
        for column in 0..width {
            let start = column * (size + PADDING);
            let values = &mut self.values[start..start + size];
            values.fill(W::default());
            for digit in 0..count {
                self.sums.fill(0);
                let at = (column * count + digit) * components * size;
                let masks = self.transformed[at..at + components * size].chunks_exact(size);
                for (component, mask) in masks.enumerate() {
                    self.ring.accumulate(&mut self.sums, mask, secret.component(component, size));
                }
                self.ring.inverse(&mut self.sums);
                self.digits.join(digit, &self.sums, values);
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
