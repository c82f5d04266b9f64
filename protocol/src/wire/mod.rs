//! What travels between owner and worker, as bytes and without a socket.
//!
//! [`messages`] are the small parts: serde types, written by bincode inside a [`frame`] that carries the
//! protocol's version and a length. Ciphertexts are not messages: they are raw planes whose size the
//! receiver works out on its own ([`shape`]) and whose place in an answer it keeps book of ([`tiles`]), so that
//! no length said by a peer is ever believed. Whoever owns a connection moves these bytes; nothing here blocks.

pub mod frame;
pub mod messages;
pub mod shape;
pub mod text;
pub mod tiles;

pub use frame::{FrameError, MAX_PAYLOAD_BYTES, Message, PREFIX_BYTES, decode, encode, payload_length};
pub use shape::{PlanesShape, ShapeError};
pub use text::printable;
pub use tiles::{TileError, TileLedger, TileShape};

#[cfg(test)]
mod tests;
