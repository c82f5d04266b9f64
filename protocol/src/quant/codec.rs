//! The owner's two ends of a product: rows to what is encrypted, decrypted values to outputs.
//!
//! Forward, `Y = X·W`: rotate by `Q_in`, choose steps, (encrypt, multiply, decrypt,) multiply by the column scales,
//! un-rotate by `Q_outᵀ`. Backward, `dX = dY·Wᵀ`: rotate by `Q_out`, multiply by the scales, which belong to rotated
//! columns, choose steps, (…,) un-rotate by `Q_inᵀ`.
//!
//! A row's step is the provable one of [`super::encoding`], or, where a sketch of the matrix tells how large the outputs
//! will be, a finer one at which an output wraps rarely ([`Step::Sketched`]): the sketch notices it and takes it back.
//!
//! Each row is first brought to a largest magnitude in [1, 2) by a power of two, which is exact and is taken back
//! at the very end. Thus rows of denormals or of 1e38 neither vanish nor overflow inside the transforms.

use std::sync::Arc;

use rayon::prelude::*;
use zeroize::Zeroizing;

use super::encoding::{SKETCHED_BOUND, Step, message_room, not_finite, room_for, sketched_room, step_of};
use super::{LinearMeta, QuantError, Rotation, largest_magnitude};
use crate::buffer::Buffer;
use crate::he::{Precision, RowTask, vectorised};
use crate::ids::Direction;
use crate::parts::Part;
use crate::sketch::{COLUMNS, Expected, Sketch};

/// Values that are worth a task of their own.
const VALUES_PER_TASK: usize = 1 << 14;

/// Rows that a task takes at a time: few enough to stay in a core's cache between rotation and sketch.
const ROWS_PER_TASK: usize = 24;

/// Turns rows into what is encrypted, and decrypted values into outputs, for one served matrix in one direction.
/// Cheap to keep: rotations are shared.
#[derive(Clone, Debug)]
pub struct ProductCodec {
    direction: Direction,
    inner: Arc<Rotation>,
    outer: Arc<Rotation>,
    /// The matrix's scales over `2^scale_exponent`, so that the largest is in [1, 2).
    scales: Vec<f32>,
    scale_exponent: i32,
    max_norm: f64,
    precision: Precision,
    /// For a message at the provable step, and at the sketched one.
    room: f64,
    sketched_room: f64,
    /// How much coarser the provable step would be in the bits of the sketched one. Not positive where they leave nothing.
    coarser: f64,
    /// `q/2`.
    half: f64,
}

/// Rows ready to be encrypted. They are private, so they cannot be printed, and are wiped: the rows with all buffers at the
/// end of a step, the rest on drop.
pub struct Prepared {
    /// `tokens × inner`, row-major: rotated and scaled rows.
    pub rows: Buffer,
    /// κ of each of these rows: the message is `round(κ·row)` in f64, and a decrypted value over κ is a value of the
    /// product. 0 for a row of zeros.
    pub steps: Zeroizing<Vec<f64>>,
    /// What [`ProductCodec::finish`] needs to know of the rows.
    pub scales: RowScales,
}

/// The power of two that was taken out of each row; 0 for a row of zeros, whose result is exact zeros. As private as
/// the rows, and not printed either.
pub struct RowScales(Zeroizing<Vec<f64>>);

impl Prepared {
    /// Of rows and the step and scale of each.
    fn new(rows: Buffer, steps_and_scales: &[(f64, f64)]) -> Self {
        let (steps, scales): (Vec<f64>, Vec<f64>) = steps_and_scales.iter().copied().unzip();
        Self { rows, steps: steps.into(), scales: RowScales(scales.into()) }
    }
}

impl RowScales {
    /// Rows that they belong to.
    pub fn tokens(&self) -> usize {
        self.0.len()
    }
}

impl ProductCodec {
    /// The codec of one served matrix in one direction, whose products are planned at this precision.
    ///
    /// # Errors
    /// Metadata that contradicts itself, or a precision that leaves no room for a message at either step.
    pub fn new(meta: &LinearMeta, direction: Direction, precision: Precision) -> Result<Self, QuantError> {
        let (inner, outer) = meta.shape.along(direction);
        if inner == 0 || outer == 0 {
            return Err(QuantError::Metadata("a dimension is zero"));
        }
        if meta.scales.len() != meta.shape.d_out {
            let (found, expected) = (meta.scales.len(), meta.shape.d_out);
            return Err(QuantError::Length { what: "the scales", found, expected });
        }
        if meta.scales.iter().any(|scale| !(scale.is_finite() && *scale >= 0.0)) {
            return Err(QuantError::Metadata("a scale is negative or no finite number"));
        }
        let max_norm = meta.max_norm(direction);
        let room = room_for(Step::Provable.precision(precision), inner, max_norm)?;
        let planned = Step::Sketched.precision(precision);
        let sketched_room = sketched_room(planned, max_norm);
        let coarser = message_room(planned, inner, max_norm) / room;
        if !planned.is_valid() || sketched_room.max(coarser) <= 0.0 {
            return Err(QuantError::NoRoom { precision, inner });
        }
        let scale_exponent = exponent(largest_magnitude(&meta.scales));
        let down = power_of_two(-scale_exponent);
        let scales = meta.scales.iter().map(|&scale| (f64::from(scale) * down) as f32).collect();
        let (inner, outer) = (Rotation::cached(inner), Rotation::cached(outer));
        let half = f64::from(precision.set.modulus_bits() - 1).exp2();
        Ok(Self {
            direction,
            inner,
            outer,
            scales,
            scale_exponent,
            max_norm,
            precision,
            room,
            sketched_room,
            coarser,
            half,
        })
    }

    /// How a product at this step is encrypted.
    pub fn precision(&self, step: Step) -> Precision {
        step.precision(self.precision)
    }

    /// `rows` (`tokens × inner` row-major) to what is encrypted, at the provable step.
    ///
    /// # Errors
    /// A length other than `tokens·inner`; a row with NaN or an infinity, by its number.
    pub fn prepare(&self, rows: &[f32], tokens: usize) -> Result<Prepared, QuantError> {
        let inner = self.inner.dimension();
        check_length("the rows", rows.len(), tokens, inner)?;
        let mut prepared = Buffer::scratch(rows.len());
        let steps_and_scales: Vec<(f64, f64)> = prepared
            .par_chunks_mut(inner)
            .zip(rows.par_chunks(inner))
            .enumerate()
            .with_min_len((VALUES_PER_TASK / inner).max(1))
            .map(|(row, (to, from))| {
                let _part = Part::Arithmetic.mark();
                prepare_row(self, from, to).ok_or_else(|| not_finite(row, from))
            })
            .collect::<Result<_, _>>()?;
        Ok(Prepared::new(prepared, &Zeroizing::new(steps_and_scales)))
    }

    /// [`Self::prepare`] for an answer that will be verified: also says what it has to agree with.
    ///
    /// # Errors
    /// Those of [`Self::prepare`].
    ///
    /// # Panics
    /// If the sketch is not one of this matrix in this direction.
    pub fn prepare_expecting(
        &self,
        rows: &[f32],
        tokens: usize,
        sketch: &Sketch,
        step: Step,
    ) -> Result<(Prepared, Expected), QuantError> {
        let mut prepared = Buffer::scratch(rows.len());
        let mut steps = Zeroizing::new(vec![0.0; tokens]);
        let inner = self.inner.dimension();
        let ((), scales, expected) = self.preparing(rows, tokens, sketch, step, |tasks| {
            let to = prepared.par_chunks_mut(ROWS_PER_TASK * inner).zip(steps.par_chunks_mut(ROWS_PER_TASK));
            tasks.into_par_iter().zip(to).try_for_each(|(task, (to, steps))| task.make(to, steps))
        })?;
        Ok((Prepared { rows: prepared, steps, scales }, expected))
    }

    /// The same for encryption that makes rows where it needs them: `run` gets tasks that make some rows each, and has to have them do
    /// so; with what it returns comes what is to be known of the rows.
    ///
    /// # Errors
    /// A length other than `tokens·inner`, and those of `run`; each task refuses rows with NaN or an infinity.
    ///
    /// # Panics
    /// If the sketch is not one of this matrix in this direction.
    pub fn preparing<T, E: From<QuantError>>(
        &self,
        rows: &[f32],
        tokens: usize,
        sketch: &Sketch,
        step: Step,
        run: impl FnOnce(Vec<Preparing<'_>>) -> Result<T, E>,
    ) -> Result<(T, RowScales, Expected), E> {
        let inner = self.inner.dimension();
        assert!(sketch.inner() == inner && sketch.outer() == self.outer.dimension(), "a sketch of this matrix");
        check_length("the rows", rows.len(), tokens, inner)?;
        let (mut expected, mut scales) = (Expected::of(tokens), RowScales(vec![0.0; tokens].into()));
        let tasks = rows
            .chunks(ROWS_PER_TASK * inner)
            .zip(expected.rows_mut().chunks_mut(ROWS_PER_TASK))
            .zip(scales.0.chunks_mut(ROWS_PER_TASK))
            .enumerate()
            .map(|(task, ((from, expected), scales))| Preparing {
                codec: self,
                sketch,
                step,
                first: task * ROWS_PER_TASK,
                from,
                expected,
                scales,
            });
        let done = run(tasks.collect())?;
        Ok((done, scales, expected))
    }

    /// The finer of the provable step, as it is in the bits of the sketched one, and that, for a row of this largest magnitude
    /// whose outputs have this root mean square.
    fn finer(&self, provable: f64, output_rms: f64, largest: f32) -> f64 {
        if provable == 0.0 {
            return 0.0;
        }
        // A row that the matrix nearly cancels still has to be encoded.
        let encodable = self.half / (2.0 * f64::from(largest));
        (provable * self.coarser).max((self.sketched_room / (SKETCHED_BOUND * output_rms)).min(encodable))
    }

    /// Step and scale of a row, which goes to `to`; `None` if it is not finite.
    #[inline(always)]
    fn prepare_row(&self, from: &[f32], to: &mut [f32]) -> Option<(f64, f64)> {
        let top = largest_magnitude(from);
        if !top.is_finite() {
            return None;
        }
        if top == 0.0 {
            to.fill(0.0);
            return Some((0.0, 0.0));
        }
        let taken = exponent(top);
        let down = power_of_two(-taken);
        to.iter_mut().zip(from).for_each(|(to, &from)| *to = (f64::from(from) * down) as f32);
        self.inner.rotate(to);
        if self.direction == Direction::Backward {
            to.iter_mut().zip(&self.scales).for_each(|(value, scale)| *value *= scale);
        }
        let step = step_of(to, self.max_norm, self.room)?;
        Some((step, if step == 0.0 { 0.0 } else { power_of_two(taken + self.scale_exponent) }))
    }

    /// What takes the decrypted values of a row over κ, by its number, to the product's outputs, in place; for
    /// [`Sketch::verify`], which has each row at hand.
    ///
    /// It panics if there is no such row, or it is of another width: whoever keeps answer and scales together cannot bring
    /// that about.
    pub fn decoder(&self, scales: &RowScales) -> impl Fn(usize, &mut [f32]) + Sync {
        |row, values| {
            assert_eq!(values.len(), self.outer.dimension(), "a row of this product");
            finish_row(self, values, scales.0[row]);
        }
    }

    /// Decrypted values over κ (`tokens × outer` row-major) to the product's outputs, in place.
    ///
    /// # Errors
    /// A length other than `tokens·outer`.
    pub fn finish(&self, out: &mut [f32], scales: &RowScales) -> Result<(), QuantError> {
        let outer = self.outer.dimension();
        check_length("the product", out.len(), scales.tokens(), outer)?;
        let decode = self.decoder(scales);
        out.par_chunks_mut(outer)
            .enumerate()
            .with_min_len((VALUES_PER_TASK / outer).max(1))
            .for_each(|(row, values)| decode(row, values));
        Ok(())
    }

    #[inline(always)]
    fn finish_row(&self, row: &mut [f32], row_scale: f64) {
        if row_scale == 0.0 {
            row.fill(0.0);
            return;
        }
        if self.direction == Direction::Forward {
            row.iter_mut().zip(&self.scales).for_each(|(value, scale)| *value *= scale);
        }
        self.outer.rotate_back(row);
        row.iter_mut().for_each(|value| *value = (f64::from(*value) * row_scale) as f32);
    }
}

/// Some rows on their way to be encrypted. See [`ProductCodec::preparing`].
pub struct Preparing<'a> {
    codec: &'a ProductCodec,
    sketch: &'a Sketch,
    step: Step,
    /// The number of the first row.
    first: usize,
    from: &'a [f32],
    expected: &'a mut [[f64; COLUMNS]],
    scales: &'a mut [f64],
}

impl RowTask for Preparing<'_> {
    type Error = QuantError;

    fn rows(&self) -> usize {
        self.scales.len()
    }

    fn make(self, to: &mut [f32], steps: &mut [f64]) -> Result<(), QuantError> {
        let _part = Part::Arithmetic.mark();
        let Self { codec, sketch, step, first, from, expected, scales } = self;
        let inner = codec.inner.dimension();
        let rows = to.chunks_exact_mut(inner).zip(from.chunks_exact(inner)).zip(steps.iter_mut().zip(scales));
        for (row, ((to, from), chosen)) in rows.enumerate() {
            let prepared = prepare_row(codec, from, to).ok_or_else(|| not_finite(first + row, from))?;
            (*chosen.0, *chosen.1) = prepared;
        }
        let sketching = Part::Sketch.mark();
        sketch.expect(to, expected);
        drop(sketching);
        if step == Step::Sketched {
            for ((to, expected), step) in to.chunks_exact(inner).zip(&*expected).zip(steps) {
                *step = codec.finer(*step, sketch.output_rms(expected), largest_magnitude(to));
            }
        }
        Ok(())
    }
}

vectorised! {
    fn prepare_row<>(codec: &ProductCodec, from: &[f32], to: &mut [f32]) -> Option<(f64, f64)> = ProductCodec::prepare_row
}

vectorised! {
    fn finish_row<>(codec: &ProductCodec, row: &mut [f32], row_scale: f64) = ProductCodec::finish_row
}

fn check_length(what: &'static str, found: usize, tokens: usize, width: usize) -> Result<(), QuantError> {
    let expected = tokens.saturating_mul(width);
    if found == expected { Ok(()) } else { Err(QuantError::Length { what, found, expected }) }
}

/// `⌊log2 v⌋` of a positive number, 0 of zero.
fn exponent(v: f32) -> i32 {
    // Every positive f32, denormals too, is a normal f64.
    if v == 0.0 { 0 } else { (f64::from(v).to_bits() >> 52) as i32 - 1023 }
}

/// `2^e`, `|e| ≤ 1022`.
fn power_of_two(e: i32) -> f64 {
    f64::from_bits(((1023 + e) as u64) << 52)
}

#[cfg(test)]
mod tests;
