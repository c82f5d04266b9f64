//! Frames: how one small message is written.
//!
//! | bytes | what |
//! |---|---|
//! | 4 | [`PROTOCOL_VERSION`], u32 little-endian |
//! | 4 | length of the payload, u32 little-endian, at most [`MAX_PAYLOAD_BYTES`] |
//! | length | the message: bincode 2, standard configuration (little-endian, variable-length integers) |
//!
//! The version stands outside the payload, so that a peer whose messages have other fields is refused by its
//! version, not by whatever its bytes happen to decode to.

use bincode::config::{Configuration, Limit, LittleEndian, Varint};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::messages::{ControlReply, ControlRequest, Operand, PROTOCOL_VERSION, ProductHeader, ProductReply, Refusal};
use super::text::make_printable;

/// Bytes before a payload: version and length.
pub const PREFIX_BYTES: usize = 8;

/// Largest payload that is read or written. The largest message is an offer: this has room for a hundred
/// devices with long names.
pub const MAX_PAYLOAD_BYTES: usize = 16 * 1024;

/// Bincode stops by itself at the same limit, so that a length inside of a payload cannot ask for more either.
const BINCODE: Configuration<LittleEndian, Varint, Limit<MAX_PAYLOAD_BYTES>> =
    bincode::config::standard().with_limit::<MAX_PAYLOAD_BYTES>();

/// Largest speed that a device is believed to have, multiply-accumulates a second: some ten times the fastest that there
/// are. What a peer says of itself goes into sums and shares, of which a larger number would take all.
pub const MOST_MACS_PER_SECOND: f64 = 1e16;

/// Why bytes are not a message, or a message cannot be sent.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// The peer speaks another version.
    #[error("the peer speaks protocol version {theirs}, this node version {PROTOCOL_VERSION}: update the older one")]
    Version {
        /// What the peer says.
        theirs: u32,
    },
    /// The payload is longer than any message.
    #[error("a message of {length} bytes, where {MAX_PAYLOAD_BYTES} are allowed")]
    TooLong {
        /// What the prefix says, or what was to be sent.
        length: usize,
    },
    /// The payload is no message of the expected kind.
    #[error("the bytes are no {expected}: {why}")]
    Malformed {
        /// Kind of message.
        expected: &'static str,
        /// What the decoder met.
        why: String,
    },
    /// Bytes are left behind the message.
    #[error("{count} bytes are left behind a {expected}")]
    Trailing {
        /// Kind of message.
        expected: &'static str,
        /// How many.
        count: usize,
    },
    /// The message decodes but contradicts itself.
    #[error("a {expected} that contradicts itself: {why}")]
    Contradiction {
        /// Kind of message.
        expected: &'static str,
        /// What is wrong.
        why: &'static str,
    },
}

/// A message that may stand in a frame.
pub trait Message: Serialize + DeserializeOwned {
    /// Its name in errors.
    const NAME: &'static str;

    /// What makes a decoded message senseless whatever the receiver knows.
    ///
    /// # Errors
    /// In words, the first thing that is wrong.
    fn check(&self) -> Result<(), &'static str>;

    /// Makes harmless what a peer may say as it likes: texts, which somebody will print, and amounts that are compared
    /// with others'. [`decode`] does so, that nobody behind it has to remember.
    fn sanitise(&mut self) {}
}

/// The whole frame of a message: prefix and payload.
///
/// # Errors
/// [`FrameError::TooLong`], or [`FrameError::Contradiction`] for a message that no receiver would take.
pub fn encode<M: Message>(message: &M) -> Result<Vec<u8>, FrameError> {
    message.check().map_err(|why| FrameError::Contradiction { expected: M::NAME, why })?;
    let mut frame = vec![0; PREFIX_BYTES];
    // The limit of `BINCODE` is for decoding; when encoding, the length is known and checked below.
    let length = bincode::serde::encode_into_std_write(message, &mut frame, bincode::config::standard())
        .map_err(|error| FrameError::Malformed { expected: M::NAME, why: error.to_string() })?;
    let stated = u32::try_from(length).ok().filter(|_| length <= MAX_PAYLOAD_BYTES);
    let stated = stated.ok_or(FrameError::TooLong { length })?;
    frame[..4].copy_from_slice(&PROTOCOL_VERSION.to_le_bytes());
    frame[4..PREFIX_BYTES].copy_from_slice(&stated.to_le_bytes());
    Ok(frame)
}

/// Length of the payload that follows a prefix; at most [`MAX_PAYLOAD_BYTES`].
///
/// # Errors
/// [`FrameError::Version`] and [`FrameError::TooLong`].
pub fn payload_length(prefix: [u8; PREFIX_BYTES]) -> Result<usize, FrameError> {
    let [v0, v1, v2, v3, l0, l1, l2, l3] = prefix;
    let theirs = u32::from_le_bytes([v0, v1, v2, v3]);
    if theirs != PROTOCOL_VERSION {
        return Err(FrameError::Version { theirs });
    }
    let length = usize::try_from(u32::from_le_bytes([l0, l1, l2, l3])).unwrap_or(usize::MAX);
    if length > MAX_PAYLOAD_BYTES { Err(FrameError::TooLong { length }) } else { Ok(length) }
}

/// The message in a payload.
///
/// # Errors
/// Every [`FrameError`] but a foreign version, which [`payload_length`] finds.
pub fn decode<M: Message>(payload: &[u8]) -> Result<M, FrameError> {
    if payload.len() > MAX_PAYLOAD_BYTES {
        return Err(FrameError::TooLong { length: payload.len() });
    }
    let (mut message, used): (M, usize) = bincode::serde::decode_from_slice(payload, BINCODE)
        .map_err(|error| FrameError::Malformed { expected: M::NAME, why: error.to_string() })?;
    if used != payload.len() {
        return Err(FrameError::Trailing { expected: M::NAME, count: payload.len() - used });
    }
    message.check().map_err(|why| FrameError::Contradiction { expected: M::NAME, why })?;
    message.sanitise();
    Ok(message)
}

/// The error if `holds` does not.
fn require(holds: bool, otherwise: &'static str) -> Result<(), &'static str> {
    if holds { Ok(()) } else { Err(otherwise) }
}

impl Message for ControlRequest {
    const NAME: &'static str = "control request";

    fn check(&self) -> Result<(), &'static str> {
        match self {
            Self::Assign { layers, .. } => require(layers.start < layers.end, "it assigns no layer"),
            Self::Offer { .. } | Self::Health | Self::Release => Ok(()),
        }
    }
}

impl Message for ControlReply {
    const NAME: &'static str = "control reply";

    fn check(&self) -> Result<(), &'static str> {
        match self {
            Self::Offer(offer) => {
                let mut speeds = offer.devices.iter().map(|device| device.macs_per_second);
                require(speeds.all(|speed| is_amount(speed) && speed > 0.0), "the speed of a device is no speed")
            }
            Self::Health(health) => {
                require(health.layers.start <= health.layers.end, "its layers end before they begin")?;
                require(usize::from(health.loaded) <= health.layers.len(), "it loaded more layers than it has")?;
                require(is_amount(health.busy_seconds), "its seconds are no amount")
            }
            Self::Assigned | Self::Released | Self::Refused(_) => Ok(()),
        }
    }

    fn sanitise(&mut self) {
        match self {
            Self::Offer(offer) => {
                for device in &mut offer.devices {
                    make_printable(&mut device.name);
                    device.macs_per_second = device.macs_per_second.min(MOST_MACS_PER_SECOND);
                }
            }
            Self::Health(health) => health.failure.iter_mut().for_each(make_printable),
            Self::Refused(refusal) => sanitise_refusal(refusal),
            Self::Assigned | Self::Released => {}
        }
    }
}

impl Message for ProductHeader {
    const NAME: &'static str = "product header";

    fn check(&self) -> Result<(), &'static str> {
        require(self.precision.is_valid(), "its parameter set has no such numbers of bits and limbs")?;
        require(self.operand != Operand::Body { tokens: 0 }, "it has no tokens")
    }
}

impl Message for ProductReply {
    const NAME: &'static str = "product reply";

    fn check(&self) -> Result<(), &'static str> {
        match self {
            Self::Tile(tile) => require(tile.columns > 0, "a tile without columns"),
            Self::Refused(_) => Ok(()),
        }
    }

    fn sanitise(&mut self) {
        match self {
            Self::Tile(_) => {}
            Self::Refused(refusal) => sanitise_refusal(refusal),
        }
    }
}

fn sanitise_refusal(refusal: &mut Refusal) {
    match refusal {
        Refusal::Version(_) | Refusal::Model(_) => {}
        Refusal::Layers(text)
        | Refusal::Capacity(text)
        | Refusal::Malformed(text)
        | Refusal::Failed(text)
        | Refusal::Busy(text) => make_printable(text),
    }
}

/// Whether a foreign float can be compared and added up.
fn is_amount(value: f64) -> bool {
    value.is_finite() && value >= 0.0
}
