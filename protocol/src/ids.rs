//! Names and dimensions that every other room of this crate speaks of: which model, which of its matrices, which way it
//! is multiplied. A leaf: it imports no other room.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What a served matrix is: a fused group of projections of one transformer layer, or a slice of the head. One encrypted
/// product each way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Group {
    /// `q_proj | k_proj | v_proj`, concatenated along the output.
    Qkv,
    /// `o_proj`.
    O,
    /// `gate_proj | up_proj`, concatenated along the output.
    GateUp,
    /// `down_proj`.
    Down,
    /// A slice of the head.
    Head,
}

impl Group {
    /// The groups of a transformer layer in the order of the forward pass.
    pub const ALL: [Self; 4] = [Self::Qkv, Self::O, Self::GateUp, Self::Down];
}

/// One served matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct LinearId {
    /// Transformer layer, from 0; slices of the head are counted on, after the last layer.
    pub layer: u16,
    /// Which group of it.
    pub group: Group,
}

impl LinearId {
    /// The product of this matrix in a direction.
    pub const fn along(self, direction: Direction) -> ProductId {
        ProductId { linear: self, direction }
    }
}

impl fmt::Display for LinearId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let group = match self.group {
            Group::Qkv => "qkv",
            Group::O => "o",
            Group::GateUp => "gate_up",
            Group::Down => "down",
            Group::Head => "head",
        };
        write!(f, "layer {} {group}", self.layer)
    }
}

/// Which way a product goes: `X·W`, or `dY·Wᵀ`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// Activations times the weights.
    Forward,
    /// Output gradients times the transposed weights.
    Backward,
}

impl Direction {
    /// Both ways.
    pub const BOTH: [Self; 2] = [Self::Forward, Self::Backward];
}

/// Dimensions of a served matrix, `d_in × d_out`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct LinearShape {
    /// Features that go in on the forward pass.
    pub d_in: usize,
    /// Features that come out on the forward pass.
    pub d_out: usize,
}

impl LinearShape {
    /// `(inner, outer)` dimension of the product in a direction: what is summed over, what comes out.
    pub fn along(self, direction: Direction) -> (usize, usize) {
        match direction {
            Direction::Forward => (self.d_in, self.d_out),
            Direction::Backward => (self.d_out, self.d_in),
        }
    }
}

/// One product that a worker can be asked for: a served matrix, and which way it is multiplied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ProductId {
    /// The served matrix.
    pub linear: LinearId,
    /// `X·W`, or `dY·Wᵀ`.
    pub direction: Direction,
}

impl fmt::Display for ProductId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let direction = match self.direction {
            Direction::Forward => "forward",
            Direction::Backward => "backward",
        };
        write!(f, "{} {direction}", self.linear)
    }
}

/// Digest of a model: its weights and all that changes the served matrices.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ModelDigest(pub [u8; 32]);

impl fmt::Display for ModelDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for ModelDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ModelDigest({self})")
    }
}
