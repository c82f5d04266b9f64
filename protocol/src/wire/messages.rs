//! Versioned messages. Small ones (offer, assign, health) are one request and one reply; a product is a stream:
//! a [`ProductHeader`] and the body's planes, if it has a body, one way, [`TileHeader`]s with their planes, or an
//! error, the other; after a whole answer the same stream may carry another product.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::he::Precision;
use crate::ids::{ModelDigest, ProductId};

/// Version of every message in this module; peers of another version are refused by name.
pub const PROTOCOL_VERSION: u32 = 5;

/// What an owner asks of a worker outside of products.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum ControlRequest {
    /// What do you serve, and how fast?
    Offer {
        /// [`PROTOCOL_VERSION`] of the owner.
        version: u32,
    },
    /// Load these layers and serve them to me.
    Assign {
        /// The model that the owner means.
        model: ModelDigest,
        /// Contiguous transformer layers.
        layers: Range<u16>,
    },
    /// How far is the loading, and what have you done?
    Health,
    /// I no longer need my layers.
    Release,
}

/// A worker's answer to a [`ControlRequest`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum ControlReply {
    /// Answer to `Offer`.
    Offer(WorkerOffer),
    /// Answer to `Assign`: loading has begun (or is done already); ask `Health` for its progress.
    Assigned,
    /// Answer to `Health`.
    Health(WorkerHealth),
    /// Answer to `Release`.
    Released,
    /// The request is refused.
    Refused(Refusal),
}

/// What a worker offers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WorkerOffer {
    /// [`PROTOCOL_VERSION`] of the worker.
    pub version: u32,
    /// The model that it has on disk.
    pub model: ModelDigest,
    /// Transformer layers of that model.
    pub layers: u16,
    /// Layers that its devices have memory for, beside those that are assigned already. Only the worker knows what a
    /// layer takes of a device, and how it spreads layers over several.
    pub room: u16,
    /// Where products are computed.
    pub devices: Vec<DeviceOffer>,
}

/// One device of a worker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeviceOffer {
    /// Its name, e.g. `cpu (avx2)`.
    pub name: String,
    /// Memory free for layers, bytes. Devices without memory of their own share the worker's.
    pub memory_bytes: u64,
    /// Measured speed of the integer product: multiply-accumulates of a value mod 2^24 by an int8 weight, per second.
    pub macs_per_second: f64,
}

/// How a worker does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WorkerHealth {
    /// Layers assigned to this owner.
    pub layers: Range<u16>,
    /// Layers of them that are loaded; serving begins when all are.
    pub loaded: u16,
    /// Why loading failed, if it did.
    pub failure: Option<String>,
    /// Products served so far.
    pub calls: u64,
    /// Seconds spent in products so far.
    pub busy_seconds: f64,
    /// Largest resident memory of the process so far, bytes.
    pub peak_rss_bytes: u64,
}

/// Why a worker refuses a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    /// Other protocol version.
    #[error("the worker speaks protocol version {0}")]
    Version(u32),
    /// Other model.
    #[error("the worker serves model {0}")]
    Model(ModelDigest),
    /// Layers that the model does not have, or that are not assigned, or that are still loading.
    #[error("the worker does not serve {0}")]
    Layers(String),
    /// More than it can ever take: not enough memory, too many owners; or it is about to leave.
    #[error("the worker has no capacity: {0}")]
    Capacity(String),
    /// A header that contradicts itself or the model.
    #[error("the worker refused the request: {0}")]
    Malformed(String),
    /// Something failed on the worker's side.
    #[error("the worker failed: {0}")]
    Failed(String),
    /// More than it can take at the moment: the same, sent anew, may be served a little later.
    #[error("the worker is busy: {0}")]
    Busy(String),
}

/// What a served matrix is multiplied by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Operand {
    /// The public mask, which the worker expands from its seed. An owner asks for this product once, and decrypts with
    /// it the products of all bodies that it encrypts under the same seed.
    Masks {
        /// Seed of the mask.
        seed: [u8; 32],
    },
    /// The body of a ciphertext, `tokens × inner` values of `precision.body_bits`: its planes follow the header.
    Body {
        /// Rows of the body.
        tokens: u32,
    },
}

/// Head of a product: everything that the worker needs but a body's planes, which follow it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ProductHeader {
    /// [`PROTOCOL_VERSION`] of the owner.
    pub version: u32,
    /// The owner's number of this call.
    pub call: u64,
    /// The served matrix, and which way.
    pub product: ProductId,
    /// Parameter set, and bits of a value on its way there and back.
    pub precision: Precision,
    /// What is multiplied.
    pub operand: Operand,
}

impl ProductHeader {
    /// Rows of the operand and of its product: `n` of a mask, tokens of a body.
    pub fn rows(&self) -> usize {
        match self.operand {
            Operand::Masks { .. } => self.precision.set.mask_rows(),
            Operand::Body { tokens } => usize::try_from(tokens).unwrap_or(usize::MAX),
        }
    }

    /// Bits of a value of what is multiplied, as it travels or is expanded.
    pub fn operand_bits(&self) -> u32 {
        match self.operand {
            Operand::Masks { .. } => self.precision.set.modulus_bits(),
            Operand::Body { .. } => self.precision.body_bits.into(),
        }
    }

    /// Bits of a value of the answer.
    pub fn answer_bits(&self) -> u32 {
        match self.operand {
            Operand::Masks { .. } => 8 * u32::from(self.precision.mask_limbs),
            Operand::Body { .. } => self.precision.output_bits.into(),
        }
    }

    /// Byte limbs of a value while it is multiplied.
    pub fn operand_limbs(&self) -> usize {
        self.operand_bits().div_ceil(8) as usize
    }

    /// Byte limbs in which a value of the answer has room.
    pub fn answer_limbs(&self) -> usize {
        self.answer_bits().div_ceil(8) as usize
    }
}

/// Head of one tile of a product's answer; the tile's planes follow it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TileHeader {
    /// The call that this answers.
    pub call: u64,
    /// First output column.
    pub first_column: u32,
    /// Number of output columns.
    pub columns: u32,
}

/// What comes before each part of a product's answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum ProductReply {
    /// A tile follows.
    Tile(TileHeader),
    /// The product is refused or failed; nothing follows.
    Refused(Refusal),
}
