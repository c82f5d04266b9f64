//! Numbers as files store them, and how near a stored number can be to the one that was meant.

use half::{bf16, f16};
use protocol::model::{GgufNumbers, Q8_0_BLOCK};
use safetensors::tensor::Dtype;

/// A number format that weights are written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Numbers {
    F64,
    F32,
    F16,
    Bf16,
    /// Blocks of 32 bytes with a scale in F16.
    Q8_0,
}

impl From<GgufNumbers> for Numbers {
    fn from(numbers: GgufNumbers) -> Self {
        match numbers {
            GgufNumbers::F32 => Self::F32,
            GgufNumbers::F16 => Self::F16,
            GgufNumbers::Bf16 => Self::Bf16,
            GgufNumbers::Q8_0 => Self::Q8_0,
        }
    }
}

impl Numbers {
    /// That of a tensor in safetensors, if weights are written in it.
    pub(super) fn of(dtype: Dtype) -> Option<Self> {
        match dtype {
            Dtype::F64 => Some(Self::F64),
            Dtype::F32 => Some(Self::F32),
            Dtype::F16 => Some(Self::F16),
            Dtype::BF16 => Some(Self::Bf16),
            _ => None,
        }
    }

    /// Bytes of a row of so many numbers.
    pub(super) fn row_bytes(self, columns: usize) -> usize {
        match self {
            Self::F64 => 8 * columns,
            Self::F32 => 4 * columns,
            Self::F16 | Self::Bf16 => 2 * columns,
            Self::Q8_0 => columns / Q8_0_BLOCK.0 * Q8_0_BLOCK.1,
        }
    }

    /// Stores a row.
    pub(super) fn encode(self, row: &[f64], out: &mut [u8]) {
        match self {
            Self::F64 => each(row, out, f64::to_le_bytes),
            Self::F32 => each(row, out, |value| (value as f32).to_le_bytes()),
            Self::F16 => each(row, out, |value| f16::from_f64(value).to_le_bytes()),
            Self::Bf16 => each(row, out, |value| bf16::from_f64(value).to_le_bytes()),
            Self::Q8_0 => {
                for (block, out) in row.chunks_exact(Q8_0_BLOCK.0).zip(out.chunks_exact_mut(Q8_0_BLOCK.1)) {
                    let scale = f16::from_f64(largest(block) / 127.0);
                    let inverse = if scale.to_f64() == 0.0 { 0.0 } else { scale.to_f64().recip() };
                    out[..2].copy_from_slice(&scale.to_le_bytes());
                    for (value, out) in block.iter().zip(&mut out[2..]) {
                        *out = (value * inverse).round().clamp(-127.0, 127.0) as i8 as u8;
                    }
                }
            }
        }
    }

    /// Reads a row.
    pub(super) fn decode(self, bytes: &[u8], out: &mut [f64]) {
        match self {
            Self::F64 => numbers(bytes, out, f64::from_le_bytes),
            Self::F32 => numbers(bytes, out, |bytes| f32::from_le_bytes(bytes).into()),
            Self::F16 => numbers(bytes, out, |bytes| f16::from_le_bytes(bytes).to_f64()),
            Self::Bf16 => numbers(bytes, out, |bytes| bf16::from_le_bytes(bytes).to_f64()),
            Self::Q8_0 => {
                for (bytes, out) in bytes.chunks_exact(Q8_0_BLOCK.1).zip(out.chunks_exact_mut(Q8_0_BLOCK.0)) {
                    let scale = f16::from_le_bytes([bytes[0], bytes[1]]).to_f64();
                    out.iter_mut().zip(&bytes[2..]).for_each(|(out, &byte)| *out = scale * f64::from(byte as i8));
                }
            }
        }
    }

    /// The largest factor by which a row's numbers differ from what was meant, of what rounding explains: up to 1 is right.
    pub(super) fn off(self, meant: &[f64], found: &[f64]) -> f64 {
        let block = if self == Self::Q8_0 { Q8_0_BLOCK.0 } else { 1 };
        let off = |(meant, found): (&[f64], &[f64])| {
            let allowed = self.rounding(largest(meant));
            let lost = meant.iter().zip(found).map(|(a, b)| (a - b).abs());
            // A number that is none is never near.
            lost.fold(0.0_f64, |most, lost| if lost <= most { most } else { lost.min(f64::MAX) }) / allowed
        };
        meant.chunks(block).zip(found.chunks(block)).map(off).fold(0.0, f64::max)
    }

    /// The most that a number of a block whose largest is `size` is moved, and a hundredth of it for sums in other orders.
    fn rounding(self, size: f64) -> f64 {
        let (relative, smallest) = match self {
            Self::F64 => (f64::EPSILON / 2.0, f64::MIN_POSITIVE),
            Self::F32 => (f64::from(f32::EPSILON) / 2.0, f32::MIN_POSITIVE.into()),
            Self::F16 => (1.0 / 2048.0, f16::MIN_POSITIVE.to_f64()),
            Self::Bf16 => (1.0 / 256.0, f32::MIN_POSITIVE.into()),
            // Half a step, and what rounding the scale makes of 127 of them.
            Self::Q8_0 => (0.5 / 127.0 + 1.0 / 2048.0, 127.0 * f16::MIN_POSITIVE.to_f64()),
        };
        1.01 * relative * size.max(smallest)
    }
}

fn largest(values: &[f64]) -> f64 {
    values.iter().fold(0.0, |largest, value| value.abs().max(largest))
}

fn each<const N: usize>(row: &[f64], out: &mut [u8], encode: impl Fn(f64) -> [u8; N]) {
    row.iter().zip(out.chunks_exact_mut(N)).for_each(|(&value, out)| out.copy_from_slice(&encode(value)));
}

fn numbers<const N: usize>(bytes: &[u8], out: &mut [f64], decode: impl Fn([u8; N]) -> f64) {
    bytes.as_chunks().0.iter().zip(out).for_each(|(&bytes, out)| *out = decode(bytes));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_stored_is_as_near_as_is_said_and_no_nearer_than_it_must_be() {
        let row: Vec<f64> = (0..64).map(|i| f64::from(i * 37 % 64 - 31) * 0.013_37).collect();
        for numbers in [Numbers::F64, Numbers::F32, Numbers::F16, Numbers::Bf16, Numbers::Q8_0] {
            let (mut bytes, mut read) = (vec![0; numbers.row_bytes(row.len())], vec![0.0; row.len()]);
            numbers.encode(&row, &mut bytes);
            numbers.decode(&bytes, &mut read);
            let off = numbers.off(&row, &read);
            assert!(off <= 1.0 && (off > 0.3 || numbers == Numbers::F64), "{numbers:?}: {off}");
            // One number that is off by a few steps is noticed.
            read[5] *= 1.0 + 3.0 * numbers.rounding(1.0);
            assert!(numbers.off(&row, &read) > 1.0, "{numbers:?}");
            read[5] = f64::NAN;
            assert!(numbers.off(&row, &read) > 1.0, "{numbers:?}");
        }
        let mut bytes = vec![0; 2];
        let mut read = [0.0];
        Numbers::F16.encode(&[70_000.0], &mut bytes);
        Numbers::F16.decode(&bytes, &mut read);
        assert!(Numbers::F16.off(&[70_000.0], &read) > 1.0, "{read:?}");
    }
}
