//! The sketch of a matrix, and the check of its products of bodies.

use std::ops::DerefMut;

use rayon::prelude::*;
use zeroize::Zeroizing;

use super::kernel::multiply;
use super::project::Weights;
use super::wrap::{Found, look_for_wrap};
use super::{COLUMNS, WINDOW};
use crate::he::{Decrypted, Late, Precision, SecretRng, noise};
use crate::parts::Part;

/// Rows from which on the energy of a call's noise is looked at.
const ROWS_WITH_ENERGY: usize = 64;

/// Honest energy is 1; what it is computed to be may be off by so much, since columns of `V` have norms of their own.
const ENERGY: f64 = 1.25;

/// Standard deviations of the mean energy of a call beyond [`ENERGY`]: those of its rows, whose columns may be correlated.
const ENERGY_DEVIATIONS: f64 = 12.0;

/// Share of a call's rows that may have wrapped more than once, and how many may in any call, where it cannot be told from a lie.
const WRAPPED_SHARE: usize = 8;

/// A call of wrong rows is taken for one of wrapped rows this often, at most, where any number of rows may have wrapped.
const MISTAKEN: f64 = 1.0 / 16.0;

/// Relative error of sums in f32, generously: it matters where the modulus has more bits than an f32.
const FLOAT_ERROR: f64 = 1.0 / (1_u64 << 21) as f64;

/// What f32 adds is left out of a row's variances where it is less than this share of the smallest.
const NEGLIGIBLE: f64 = 1.0 / 1024.0;

/// Mean square of an entry of `R`: uniform over ±1 … ±8.
const MEAN_SQUARE: f64 = 25.5;

/// Rows that a task checks at a time.
const ROWS: usize = 24;

/// The secret columns `R` of one matrix in one direction, and the matrix times these.
pub struct Sketch {
    /// `R`, `[outer][column]`.
    columns: Zeroizing<Vec<[i8; COLUMNS]>>,
    /// `V = W·R`, `[inner][column]`.
    products: Zeroizing<Vec<[f32; COLUMNS]>>,
    /// `‖R_c‖²`.
    column_squares: [f64; COLUMNS],
    /// `‖V_c‖²`.
    product_squares: [f64; COLUMNS],
}

/// What an honest answer to some rows has to agree with: `x·V` of each. As private as the rows.
pub struct Expected(Zeroizing<Vec<[f64; COLUMNS]>>);

impl Expected {
    /// Room for so many rows; each is given by [`Sketch::expect`].
    pub(crate) fn of(tokens: usize) -> Self {
        Self(Zeroizing::new(vec![[0.0; COLUMNS]; tokens]))
    }

    /// Rows.
    pub fn tokens(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn rows_mut(&mut self) -> &mut [[f64; COLUMNS]] {
        &mut self.0
    }
}

/// An answer that agrees with the sketch, but for rows that wrapped more than once: those are zeros here, and have to be asked
/// for anew. Only [`Sketch::verify`] makes one.
#[derive(Debug)]
pub struct Checked<T> {
    values: T,
    again: Vec<usize>,
    corrected: usize,
}

/// All rows of an answer, verified: made of a [`Checked`] that lacks none, and of nothing else.
#[derive(Debug)]
pub struct Verified<T>(T);

impl<T: DerefMut<Target = [f32]>> Checked<T> {
    /// Rows to be asked for anew, with the provable step, at which none wraps.
    pub fn again(&self) -> &[usize] {
        &self.again
    }

    /// Rows in which a single wrap was corrected.
    pub fn corrected(&self) -> usize {
        self.corrected
    }

    /// The values: zeros where rows are missing.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// All rows, if none is missing.
    ///
    /// # Errors
    /// The answer as it is, where some are.
    pub fn complete(self) -> Result<Verified<T>, Self> {
        if self.again.is_empty() { Ok(Verified(self.values)) } else { Err(self) }
    }

    /// Puts in what is [missing](Self::again): the answer to exactly these rows, in this order.
    ///
    /// # Panics
    /// If it has another number of rows, which whoever asked for them cannot bring about.
    pub fn fill(mut self, missing: Verified<T>) -> Verified<T> {
        let outer = missing.0.len().checked_div(self.again.len()).unwrap_or(0);
        assert_eq!(missing.0.len(), outer * self.again.len(), "one row for each that is missing");
        for (row, values) in self.again.iter().zip(missing.0.chunks_exact(outer.max(1))) {
            self.values[row * outer..][..outer].copy_from_slice(values);
        }
        Verified(self.values)
    }
}

impl<T> Verified<T> {
    /// The values.
    pub fn into_values(self) -> T {
        self.0
    }
}

/// An answer that is not the product that was asked for. Nothing of it is kept.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Refuted {
    /// A row is off by more than noise can be.
    #[error("row {row} of {rows} is not the product asked for: it is off by more than {WINDOW} times the noise")]
    Row {
        /// The first such row.
        row: usize,
        /// Rows of the call.
        rows: usize,
    },
    /// The rows are noisier than an honest product.
    #[error("the product is too noisy: {energy:.2} times what the encryption explains, where {limit:.2} is allowed")]
    Energy {
        /// Mean square of the noise over what is expected.
        energy: f64,
        /// What is allowed.
        limit: f64,
    },
    /// More rows wrapped than can by accident, or some at a step at which none can.
    #[error("{wrapped} of {rows} rows wrapped more often than an honest product's can")]
    Wraps {
        /// How many did.
        wrapped: usize,
        /// Rows of the call.
        rows: usize,
    },
}

/// What a row turned out to be.
#[derive(Clone, Copy)]
enum Row {
    /// Zeros: nothing was asked.
    Empty,
    /// As it should be, with this mean square of its noise.
    Fine(f64),
    /// The same, after a wrap was corrected.
    Corrected(f64),
    /// Several wraps.
    Several,
    /// None of these.
    Forged,
}

impl Sketch {
    /// Fresh secret columns for a matrix.
    pub(super) fn draw(weights: &Weights<'_>, rng: &mut SecretRng) -> Self {
        let (_, outer) = weights.dimensions();
        let mut columns = Zeroizing::new(vec![[0_i8; COLUMNS]; outer]);
        let mut bytes = Zeroizing::new(vec![0_u8; outer * COLUMNS / 2]);
        rng.fill(&mut bytes);
        for (entry, nibble) in columns.as_flattened_mut().iter_mut().zip(bytes.iter().flat_map(|b| [b & 15, b >> 4])) {
            // 1 to 8, and the highest bit of the nibble as the sign: 1 or −1.
            *entry = ((nibble & 7) as i8 + 1) * (1 - 2 * (nibble >> 3) as i8);
        }
        let products = weights.times([&columns], |[sums]| sums.map(|sum| sum as f32));
        let (column_squares, product_squares) = (squares(&columns, f64::from), squares(&products, f64::from));
        Self { columns, products: products.into(), column_squares, product_squares }
    }

    /// Features that are summed over.
    pub fn inner(&self) -> usize {
        self.products.len()
    }

    /// Features that come out.
    pub fn outer(&self) -> usize {
        self.columns.len()
    }

    /// Bytes of memory that it takes.
    pub fn memory_bytes(&self) -> usize {
        size_of_val(&self.columns[..]) + size_of_val(&self.products[..])
    }

    /// What the outputs of some rows, `any × inner`, have to agree with.
    ///
    /// # Panics
    /// If the rows are not as many as `expected`.
    pub fn expect(&self, rows: &[f32], expected: &mut [[f64; COLUMNS]]) {
        assert_eq!(rows.len(), expected.len() * self.inner());
        multiply(rows, &self.products, expected);
    }

    /// The root mean square of a row's outputs, estimated from what they have to agree with: by a factor of 0.4 to 1.7 of
    /// the truth, 16 columns being few.
    pub fn output_rms(&self, expected: &[f64; COLUMNS]) -> f64 {
        let square: f64 = expected.iter().map(|z| z * z).sum();
        (square / (MEAN_SQUARE * (COLUMNS * self.outer()) as f64)).sqrt()
    }

    /// Variance of `ρ_c` of an honest product at `precision`, for each column, without what f32 adds.
    fn variances(&self, precision: Precision) -> [f64; COLUMNS] {
        std::array::from_fn(|c| noise::sketch_variance(precision, self.product_squares[c], self.column_squares[c]))
    }

    /// Accepts decrypted values, `tokens × outer` over κ, as the product of the rows that `expected` was computed of, or
    /// refuses them. Single wraps are corrected on the way.
    ///
    /// What is to be done with each row, by its number, `decode` does in place right after its check, while it is in the
    /// processor's cache; nobody sees what comes of that before all rows are accepted.
    ///
    /// # Errors
    /// Why the answer is refused. Values and expectation are gone then.
    ///
    /// # Panics
    /// If the values are not of `expected` rows of this matrix, which whoever keeps the two together cannot bring about.
    pub fn verify<T: DerefMut<Target = [f32]>>(
        &self,
        decrypted: Decrypted<T>,
        expected: &Expected,
        decode: impl Fn(usize, &mut [f32]) + Sync,
    ) -> Result<Checked<T>, Refuted> {
        let (mut values, steps, precision, late) = decrypted.into_parts();
        let (outer, tokens) = (self.outer(), expected.tokens());
        assert!(values.len() == tokens * outer && steps.len() == tokens, "the answer to the rows expected");
        let rows = self.check((&mut values, late), expected, &steps, precision, decode);
        let again = judge(&rows, self.noise(precision).mistaken())?;
        for &row in &again {
            values[row * outer..][..outer].fill(0.0);
        }
        let corrected = rows.iter().filter(|row| matches!(row, Row::Corrected(_))).count();
        Ok(Checked { values, again, corrected })
    }

    /// Mean square of the noise of a call over its prediction.
    #[cfg(test)]
    pub(super) fn energy(&self, decrypted: Decrypted<Vec<f32>>, expected: &Expected) -> f64 {
        let (mut values, steps, precision, late) = decrypted.into_parts();
        let rows = self.check((&mut values, late), expected, &steps, precision, |_, _| ());
        let energies = rows.iter().map(|row| if let Row::Fine(energy) = row { *energy } else { f64::NAN });
        energies.sum::<f64>() / rows.len() as f64
    }

    /// An entry of `R`.
    #[cfg(test)]
    pub(super) fn entry(&self, output: usize, column: usize) -> i8 {
        self.columns[output][column]
    }

    /// What rows of an honest product at `precision` may be off by, without what f32 adds.
    fn noise(&self, precision: Precision) -> Noise {
        Noise::new(self.variances(precision), f64::from(precision.set.modulus_bits()).exp2())
    }

    /// What each row is, decrypted first where it is not yet; `decode` gets every row.
    fn check(
        &self,
        (values, late): (&mut [f32], Option<Late>),
        expected: &Expected,
        steps: &[f64],
        precision: Precision,
        decode: impl Fn(usize, &mut [f32]) + Sync,
    ) -> Vec<Row> {
        let (noise, outer) = (self.noise(precision), self.outer());
        let mut rows = vec![Row::Empty; expected.tokens()];
        let tasks = values.par_chunks_mut(ROWS * outer).zip(expected.0.par_chunks(ROWS)).zip(steps.par_chunks(ROWS));
        tasks.zip(rows.par_chunks_mut(ROWS)).enumerate().for_each(|(task, (((values, expected), steps), rows))| {
            late.iter().for_each(|late| late.rows(task * ROWS, values));
            let mut sums = Zeroizing::new([[0.0; COLUMNS]; ROWS]);
            let _part = Part::Sketch.mark();
            let sums = &mut sums[..expected.len()];
            multiply(values, &self.columns, sums);
            let each = values.chunks_exact_mut(outer).zip(expected).zip(steps).zip(&*sums).zip(rows);
            for (at, ((((values, expected), &step), sums), row)) in each.enumerate() {
                if step > 0.0 {
                    *row = self.check_row(values, expected, sums, step, &noise);
                }
                let _part = Part::Arithmetic.mark();
                decode(task * ROWS + at, values);
            }
        });
        rows
    }

    fn check_row(
        &self,
        values: &mut [f32],
        expected: &[f64; COLUMNS],
        sums: &[f64; COLUMNS],
        step: f64,
        noise: &Noise,
    ) -> Row {
        let noise = noise.with_float(step, expected);
        let mut off: [f64; COLUMNS] = std::array::from_fn(|c| (sums[c] - expected[c]) * step);
        if let Some(energy) = noise.within(&off) {
            return Row::Fine(energy);
        }
        match look_for_wrap(&off, &noise.variances, noise.modulus, &self.columns) {
            Found::Single { output, sign } => {
                values[output] -= (sign * noise.modulus / step) as f32;
                let wrapped = self.columns[output];
                off.iter_mut().zip(wrapped).for_each(|(off, r)| *off -= sign * noise.modulus * f64::from(r));
                noise.within(&off).map_or(Row::Forged, Row::Corrected)
            }
            Found::Several => Row::Several,
            Found::Nothing => Row::Forged,
        }
    }
}

/// What an honest row may be off by, in units of the encoded message.
#[derive(Clone, Copy)]
struct Noise {
    variances: [f64; COLUMNS],
    /// Their reciprocals. A matrix of zeros at a step without any rounding has no noise at all, and no energy either.
    inverse: [f64; COLUMNS],
    smallest: f64,
    modulus: f64,
}

impl Noise {
    fn new(variances: [f64; COLUMNS], modulus: f64) -> Self {
        let inverse = variances.map(|variance| if variance > 0.0 { 1.0 / variance } else { 0.0 });
        Self { variances, inverse, smallest: variances.iter().copied().fold(f64::INFINITY, f64::min), modulus }
    }

    /// How often sums that are anything at all are all near multiples of the modulus, as those of a row that wrapped are.
    fn mistaken(&self) -> f64 {
        self.variances.iter().map(|variance| (2.0 * WINDOW * variance.sqrt() / self.modulus).min(1.0)).product()
    }

    /// The same for a row whose sums have an error of f32.
    fn with_float(self, step: f64, expected: &[f64; COLUMNS]) -> Self {
        let square = expected.iter().map(|z| z * z).sum::<f64>() / COLUMNS as f64;
        let float = (step * FLOAT_ERROR).powi(2) * square;
        if float <= NEGLIGIBLE * self.smallest {
            return self;
        }
        Self::new(self.variances.map(|variance| variance + float), self.modulus)
    }

    /// The mean square of a row's noise over what is expected, if all of it is within the window. What is not a number is
    /// not.
    fn within(&self, off: &[f64; COLUMNS]) -> Option<f64> {
        let (mut energy, mut inside) = (0.0, true);
        for ((off, variance), inverse) in off.iter().zip(&self.variances).zip(&self.inverse) {
            let square = off * off;
            inside &= square <= WINDOW * WINDOW * variance;
            energy += square * inverse;
        }
        inside.then_some(energy / COLUMNS as f64)
    }
}

/// The verdict on a call: the rows that wrapped more than once, if it is accepted. `mistaken` says how often any other row is taken
/// for one of these.
fn judge(rows: &[Row], mistaken: f64) -> Result<Vec<usize>, Refuted> {
    let count = rows.len();
    if let Some(row) = rows.iter().position(|row| matches!(row, Row::Forged)) {
        return Err(Refuted::Row { row, rows: count });
    }
    let several = |(at, row): (usize, &Row)| matches!(row, Row::Several).then_some(at);
    let again: Vec<usize> = rows.iter().enumerate().filter_map(several).collect();
    if again.len() > 1 + count / WRAPPED_SHARE && mistaken > MISTAKEN {
        return Err(Refuted::Wraps { wrapped: again.len(), rows: count });
    }
    let energies = rows.iter().filter_map(|row| match *row {
        Row::Fine(energy) | Row::Corrected(energy) => Some(energy),
        _ => None,
    });
    let (sum, checked) = energies.fold((0.0, 0_usize), |(sum, count), energy| (sum + energy, count + 1));
    if checked >= ROWS_WITH_ENERGY {
        let (energy, limit) = (sum / checked as f64, ENERGY + ENERGY_DEVIATIONS * (2.0 / checked as f64).sqrt());
        if energy > limit {
            return Err(Refuted::Energy { energy, limit });
        }
    }
    Ok(again)
}

fn squares<T: Copy>(columns: &[[T; COLUMNS]], value: impl Fn(T) -> f64) -> [f64; COLUMNS] {
    columns.iter().fold([0.0; COLUMNS], |sums, row| std::array::from_fn(|c| sums[c] + value(row[c]).powi(2)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of 40 rows, so many wrapped more than once.
    fn verdict(wrapped: usize, mistaken: f64) -> Result<Vec<usize>, Refuted> {
        let rows: Vec<Row> = (0..40).map(|at| if at < wrapped { Row::Several } else { Row::Fine(1.0) }).collect();
        judge(&rows, mistaken)
    }

    #[test]
    fn rows_may_all_have_wrapped_only_where_that_is_no_lie() {
        for mistaken in [0.0, MISTAKEN, 0.5, 1.0] {
            assert_eq!(verdict(6, mistaken), Ok((0..6).collect()));
        }
        for wrapped in [7, 40] {
            assert_eq!(verdict(wrapped, MISTAKEN), Ok((0..wrapped).collect()));
            assert_eq!(verdict(wrapped, 2.0 * MISTAKEN), Err(Refuted::Wraps { wrapped, rows: 40 }));
        }
        // One row that is wrong in another way is enough.
        assert!(matches!(judge(&[Row::Several, Row::Forged], 0.0), Err(Refuted::Row { row: 1, rows: 2 })));
    }
}
