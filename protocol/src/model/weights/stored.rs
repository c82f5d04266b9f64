//! One tensor as it lies in the file, and its way to f32.

use std::borrow::Cow;

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
    pub(crate) dtype: GgmlDType,
    /// Exactly the tensor's bytes; checked against shape and format when the file was opened.
    pub(crate) bytes: &'a [u8],
    /// How the rows lie in the file.
    pub(crate) rows: Rows,
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
    pub(crate) fn row(&self, row: usize, out: &mut [f32]) -> Result<(), ModelError> {
        let row = self.rows.in_file(row);
        let row_bytes = self.bytes_of(out.len());
        self.decode(&self.bytes[row * row_bytes..(row + 1) * row_bytes], out)
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
        numbers / self.dtype.block_size() * self.dtype.type_size()
    }

    fn decode(&self, bytes: &[u8], out: &mut [f32]) -> Result<(), ModelError> {
        match self.dtype {
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
