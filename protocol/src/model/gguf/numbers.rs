//! Number formats that weights are written in.

use std::fmt;
use std::str::FromStr;

/// Numbers of a block of `Q8_0`, and its bytes: a 16-bit scale and a byte for each number.
pub const Q8_0_BLOCK: (usize, usize) = (32, 34);

/// How the matrices of a GGUF file are stored; its vectors are always 32-bit floats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GgufNumbers {
    /// 32-bit floats.
    F32,
    /// 16-bit floats.
    F16,
    /// 16-bit brain floats.
    Bf16,
    /// Bytes in blocks of 32 with a scale each.
    Q8_0,
}

impl GgufNumbers {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::F32, Self::F16, Self::Bf16, Self::Q8_0];

    /// Its name in commands and in llama.cpp's own.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Q8_0 => "q8_0",
        }
    }

    /// Bytes of a row of so many numbers.
    pub fn row_bytes(self, columns: usize) -> usize {
        match self {
            Self::F32 => 4 * columns,
            Self::F16 | Self::Bf16 => 2 * columns,
            Self::Q8_0 => columns / Q8_0_BLOCK.0 * Q8_0_BLOCK.1,
        }
    }

    /// The format of a tensor with rows of so many numbers where this one is asked for: what does not fill the blocks is
    /// stored in 16-bit floats.
    pub(super) fn fitting(self, columns: usize) -> Self {
        if self == Self::Q8_0 && !columns.is_multiple_of(Q8_0_BLOCK.0) { Self::F16 } else { self }
    }

    /// Its code in the table of tensors.
    pub(super) fn code(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q8_0 => 8,
            Self::Bf16 => 30,
        }
    }

    /// The code of a file that is mostly stored so (`general.file_type`).
    pub(super) fn file_type(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q8_0 => 7,
            Self::Bf16 => 32,
        }
    }
}

impl fmt::Display for GgufNumbers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A name that no format has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it is none of f32, f16, bf16 and q8_0")]
pub struct UnknownNumbers;

impl FromStr for GgufNumbers {
    type Err = UnknownNumbers;

    fn from_str(name: &str) -> Result<Self, UnknownNumbers> {
        Self::ALL.into_iter().find(|numbers| numbers.name() == name.to_ascii_lowercase()).ok_or(UnknownNumbers)
    }
}
