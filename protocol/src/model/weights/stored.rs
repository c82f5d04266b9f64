//! One tensor as it lies in the file, and its way to f32.

use std::borrow::Cow;
use std::fmt;

use candle_core::CpuStorage;
use candle_core::quantized::GgmlDType;
use rayon::prelude::*;

use super::MappedFile;
use crate::model::error::ModelError;

/// Rows that are converted at a time, so that a tensor is never held twice in f32.
const ROWS_AT_ONCE: usize = 32;

/// A tensor in a memory map: `rows × columns`, a vector being one row.
pub(crate) struct Stored<'a> {
    /// The file.
    pub(crate) file: &'a MappedFile,
    /// Its name in the file, for messages.
    pub(crate) name: String,
    /// Dimensions, outermost first.
    pub(crate) shape: &'a [usize],
    /// How numbers are stored.
    pub(crate) format: Format,
    /// Exactly the tensor's bytes; checked against shape and format when the file was opened.
    pub(crate) bytes: &'a [u8],
    /// How the rows lie in the file.
    pub(crate) rows: Rows,
    /// What numbers are multiplied by, where they are 8-bit floats with scales.
    pub(crate) scales: Option<Scales>,
}

/// How numbers are stored.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    /// One of ggml's, the usual floats among them.
    Ggml(GgmlDType),
    /// 64-bit floats.
    F64,
    /// 8-bit floats with 4 bits of exponent, without infinity.
    F8E4M3,
    /// 8-bit floats with 5 bits of exponent.
    F8E5M2,
}

impl Format {
    /// Numbers of a block, and its bytes.
    fn block(self) -> (usize, usize) {
        match self {
            Self::Ggml(dtype) => (dtype.block_size(), dtype.type_size()),
            Self::F64 => (1, 8),
            Self::F8E4M3 | Self::F8E5M2 => (1, 1),
        }
    }
}

impl fmt::Debug for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ggml(dtype) => dtype.fmt(f),
            Self::F64 => f.write_str("F64"),
            Self::F8E4M3 => f.write_str("F8E4M3"),
            Self::F8E5M2 => f.write_str("F8E5M2"),
        }
    }
}

/// Scales of a matrix' blocks: one for all of it, for each row, or for each rectangle.
pub(crate) struct Scales {
    pub(crate) values: Vec<f32>,
    /// Blocks side by side.
    across: usize,
    /// Rows and columns of a block.
    block: (usize, usize),
}

/// Side of the blocks that most quantisers cut a matrix into.
const USUAL_BLOCK: usize = 128;

impl Scales {
    /// Those of a matrix of the shape `of`; `None` where they do not fit it.
    pub(crate) fn new(values: Vec<f32>, shape: &[usize], of: &[usize]) -> Option<Self> {
        let &[rows, columns] = of else { return None };
        let (down, across) = match *shape {
            [] | [1] | [1, 1] => (1, 1),
            [down] => (down, 1),
            [down, across] => (down, across),
            _ => return None,
        };
        let side = |length: usize, parts: usize| match parts {
            0 => None,
            1 => Some(length.max(1)),
            _ if length.div_ceil(USUAL_BLOCK) == parts => Some(USUAL_BLOCK),
            _ => length.checked_div(parts).filter(|side| side * parts == length && *side > 0),
        };
        Some(Self { values, across, block: (side(rows, down)?, side(columns, across)?) })
    }

    fn apply(&self, row: usize, out: &mut [f32]) {
        let scales = &self.values[row / self.block.0 * self.across..][..self.across];
        for (out, scale) in out.chunks_mut(self.block.1).zip(scales) {
            out.iter_mut().for_each(|value| *value *= scale);
        }
    }
}

/// Order of a tensor's rows in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rows {
    /// As the model means them.
    Plain,
    /// llama.cpp's order of query and key rows: within each head the two halves that rotary positions turn against
    /// each other are interleaved.
    Interleaved {
        /// Rows of a head.
        head_dim: usize,
    },
}

impl Rows {
    /// Where row `row` of the model lies in the file.
    pub(crate) fn in_file(self, row: usize) -> usize {
        match self {
            Self::Plain => row,
            Self::Interleaved { head_dim } => {
                let (head, within, half) = (row / head_dim, row % head_dim, head_dim / 2);
                head * head_dim + 2 * (within % half) + within / half
            }
        }
    }

    /// Which row of the model lies in row `row` of the file.
    pub(crate) fn of_file(self, row: usize) -> usize {
        match self {
            Self::Plain => row,
            Self::Interleaved { head_dim } => {
                let (head, within, half) = (row / head_dim, row % head_dim, head_dim / 2);
                head * head_dim + within % 2 * half + within / 2
            }
        }
    }
}

impl Stored<'_> {
    /// Number of rows and numbers in a row.
    pub(crate) fn dimensions(&self) -> (usize, usize) {
        match self.shape {
            [] => (1, 1),
            [columns] => (1, *columns),
            [rows, rest @ ..] => (*rows, rest.iter().product()),
        }
    }

    /// The whole tensor in f32, row-major.
    pub(crate) fn to_f32(&self) -> Result<Vec<f32>, ModelError> {
        let (rows, columns) = self.dimensions();
        let mut out = vec![0.0; rows * columns];
        out.par_chunks_mut((columns * ROWS_AT_ONCE).max(1)).enumerate().try_for_each(|(chunk, out)| {
            for (offset, out) in out.chunks_mut(columns).enumerate() {
                self.row(chunk * ROWS_AT_ONCE + offset, out)?;
            }
            Ok(())
        })?;
        Ok(out)
    }

    /// One row in f32; `out` holds exactly a row.
    ///
    /// # Errors
    /// When it cannot be decoded, or holds a number that is none.
    pub(crate) fn row(&self, row: usize, out: &mut [f32]) -> Result<(), ModelError> {
        if let ([_], Rows::Interleaved { .. }) = (self.shape, self.rows) {
            return self.interleaved_vector(out);
        }
        let in_file = self.rows.in_file(row);
        let row_bytes = self.bytes_of(out.len());
        self.decode(&self.bytes[in_file * row_bytes..(in_file + 1) * row_bytes], out)?;
        if let Some(scales) = &self.scales {
            scales.apply(in_file, out);
        }
        if all_finite(out) { Ok(()) } else { Err(self.not_finite(row)) }
    }

    /// A bias, whose numbers lie in the order of the rows that they are added to.
    fn interleaved_vector(&self, out: &mut [f32]) -> Result<(), ModelError> {
        let mut in_file = vec![0.0; out.len()];
        self.decode(&self.bytes[..self.bytes_of(out.len())], &mut in_file)?;
        out.iter_mut().enumerate().for_each(|(row, out)| *out = in_file[self.rows.in_file(row)]);
        if all_finite(out) { Ok(()) } else { Err(self.not_finite(0)) }
    }

    /// Looks for numbers that are none in a tensor of the usual floats, at the speed of memory. Other formats are looked at
    /// when they are decoded.
    ///
    /// # Errors
    /// Names a row that has one.
    pub(crate) fn check_floats(&self) -> Result<(), ModelError> {
        const BLOCK: usize = 1 << 16;
        let (size, exponent) = match self.format {
            Format::Ggml(GgmlDType::F32) => (4, 0x7f80_0000),
            Format::Ggml(GgmlDType::BF16) => (2, 0x7f80),
            Format::Ggml(GgmlDType::F16) => (2, 0x7c00),
            _ => return Ok(()),
        };
        let found = self.bytes.par_chunks(BLOCK * size).enumerate().find_map_first(|(block, bytes)| {
            let place = if size == 4 {
                let word = |bytes: &[u8; 4]| u32::from_le_bytes(*bytes) & exponent == exponent;
                // First whether there is any, which vectorises.
                let words = bytes.as_chunks::<4>().0;
                words.iter().fold(false, |any, bytes| any | word(bytes)).then(|| words.iter().position(word))
            } else {
                let exponent = exponent as u16;
                let word = |bytes: &[u8; 2]| u16::from_le_bytes(*bytes) & exponent == exponent;
                let words = bytes.as_chunks::<2>().0;
                words.iter().fold(false, |any, bytes| any | word(bytes)).then(|| words.iter().position(word))
            };
            place.flatten().map(|place| block * BLOCK + place)
        });
        found.map_or(Ok(()), |place| Err(self.not_finite(place / self.dimensions().1.max(1))))
    }

    fn not_finite(&self, row: usize) -> ModelError {
        ModelError::NotFinite { path: self.file.path.clone(), name: self.name.clone(), row }
    }

    /// Lets the operating system take the tensor's memory back, since nobody will read it soon. It is the file's, so
    /// nothing is lost; but as long as it is mapped it counts as this process's.
    pub(crate) fn release(&self) {
        self.file.release(self.bytes);
    }

    /// As [`release`](Self::release) for some rows.
    pub(crate) fn release_rows(&self, first: usize, rows: usize) {
        let row_bytes = self.bytes_of(self.dimensions().1);
        self.file.release(&self.bytes[first * row_bytes..(first + rows) * row_bytes]);
    }

    fn bytes_of(&self, numbers: usize) -> usize {
        let (numbers_each, bytes_each) = self.format.block();
        numbers / numbers_each * bytes_each
    }

    fn decode(&self, bytes: &[u8], out: &mut [f32]) -> Result<(), ModelError> {
        let quantised = match self.format {
            Format::Ggml(dtype) => dtype,
            Format::F64 => {
                for (out, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
                    *out = f64::from_le_bytes(*bytes) as f32;
                }
                return Ok(());
            }
            Format::F8E4M3 => {
                out.iter_mut().zip(bytes).for_each(|(out, &byte)| *out = f8e4m3(byte));
                return Ok(());
            }
            Format::F8E5M2 => {
                // The upper half of an f16's bits.
                let wide = |byte: u8| half::f16::from_bits(u16::from(byte) << 8).to_f32();
                out.iter_mut().zip(bytes).for_each(|(out, &byte)| *out = wide(byte));
                return Ok(());
            }
        };
        match quantised {
            GgmlDType::F32 => {
                for (out, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
                    *out = f32::from_le_bytes(*bytes);
                }
            }
            GgmlDType::F16 => {
                for (out, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
                    *out = half::f16::from_le_bytes(*bytes).to_f32();
                }
            }
            GgmlDType::BF16 => {
                for (out, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
                    // The upper half of an f32's bits; written so because it vectorises.
                    *out = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
                }
            }
            quantised => {
                let copy;
                let bytes = if bytes.as_ptr().addr().is_multiple_of(align_of::<u32>()) {
                    bytes
                } else {
                    copy = realigned(bytes);
                    &bytemuck::cast_slice(&copy)[..bytes.len()]
                };
                match quantised.from_data(Cow::Borrowed(bytes)).dequantize(out.len()) {
                    Ok(CpuStorage::F32(values)) => out.copy_from_slice(&values),
                    Ok(_) => {
                        return Err(ModelError::corrupt(
                            &self.file.path,
                            format!("{quantised:?} did not decode to f32"),
                        ));
                    }
                    Err(error) => return Err(ModelError::corrupt(&self.file.path, error.to_string())),
                }
            }
        }
        Ok(())
    }
}

/// An 8-bit float with 4 bits of exponent, biased by 7, and 3 of mantissa; all ones is no number.
fn f8e4m3(byte: u8) -> f32 {
    let (exponent, mantissa) = (byte >> 3 & 15, byte & 7);
    let size = match (exponent, mantissa) {
        (15, 7) => f32::NAN,
        (0, _) => f32::from(mantissa) * (-9f32).exp2(),
        _ => f32::from(8 + mantissa) * f32::from(i16::from(exponent) - 10).exp2(),
    };
    if byte & 0x80 == 0 { size } else { -size }
}

/// Whether no value is infinite or no number; written so because it vectorises.
fn all_finite(values: &[f32]) -> bool {
    const EXPONENT: u32 = 0x7f80_0000;
    values.iter().fold(false, |found, value| found | (value.to_bits() & EXPONENT == EXPONENT)) ^ true
}

/// The bytes copied to an address that block formats can be read from: they hold f16 and f32 scales.
fn realigned(bytes: &[u8]) -> Vec<u32> {
    let mut words = vec![0u32; bytes.len().div_ceil(size_of::<u32>())];
    bytemuck::cast_slice_mut(&mut words)[..bytes.len()].copy_from_slice(bytes);
    words
}

/// Adds `source`, row-major `d_out × d_in`, transposed, to a row-major matrix of `width` columns from column `first`
/// on: `out[i · width + first + j] = source[j · d_in + i]`.
pub(crate) fn transpose_into(source: &[f32], d_in: usize, out: &mut [f32], width: usize, first: usize) {
    let d_out = source.len() / d_in;
    out.par_chunks_mut(width * ROWS_AT_ONCE).enumerate().for_each(|(chunk, out)| {
        // A band of rows of `out` is a band of columns of `source`: read those once, line by line.
        for j in 0..d_out {
            let band = &source[j * d_in + chunk * ROWS_AT_ONCE..(j + 1) * d_in];
            for (out, &value) in out.chunks_exact_mut(width).zip(band) {
                out[first + j] = value;
            }
        }
    });
}
