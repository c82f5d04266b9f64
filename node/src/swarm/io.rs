//! Frames and planes on a stream: the asynchronous shell around `protocol::wire`.
//!
//! Planes go between the socket and their buffer in chunks, without a copy of their own. Each chunk has a time
//! limit, which bounds how long a peer can hold a buffer by sending slowly.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use actors::transport::Traffic;
use futures::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use protocol::he::Planes;
use protocol::wire::{FrameError, Message, PREFIX_BYTES, PlanesShape, decode, encode, payload_length};
use tokio::time::timeout;

/// Bytes that are read or written under one time limit.
const CHUNK_BYTES: usize = 256 * 1024;

/// Bytes of planes that are copied to go with the message before them: a frame of the connection takes them both.
const FEW_BYTES: usize = 32 * 1024;

/// Bytes that a node sent and received, headers included.
#[derive(Debug, Default)]
pub(super) struct Counters {
    sent: AtomicU64,
    received: AtomicU64,
}

impl Counters {
    /// The totals so far.
    pub(super) fn traffic(&self) -> Traffic {
        Traffic { up: self.sent.load(Ordering::Relaxed), down: self.received.load(Ordering::Relaxed) }
    }

    fn add_sent(&self, bytes: usize) {
        self.sent.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    fn add_received(&self, bytes: usize) {
        self.received.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

/// Why a stream cannot go on.
#[derive(Debug, thiserror::Error)]
pub(super) enum LinkError {
    /// The peer closed it where a message could have begun.
    #[error("the stream was closed")]
    Closed,
    /// It broke.
    #[error("the stream broke: {0}")]
    Broken(#[from] io::Error),
    /// The peer is too slow.
    #[error("nothing was {0} for {1:?}")]
    TimedOut(&'static str, Duration),
    /// The peer sent something else.
    #[error(transparent)]
    Frame(#[from] FrameError),
}

/// Reads one message. There is no time limit: the caller knows what it waits for.
pub(super) async fn read_message<M: Message, R: AsyncRead + Unpin>(
    reader: &mut R,
    counters: &Counters,
) -> Result<M, LinkError> {
    let mut prefix = [0; PREFIX_BYTES];
    let first = reader.read(&mut prefix).await?;
    if first == 0 {
        return Err(LinkError::Closed);
    }
    reader.read_exact(&mut prefix[first..]).await?;
    let mut payload = vec![0; payload_length(prefix)?];
    reader.read_exact(&mut payload).await?;
    counters.add_received(PREFIX_BYTES + payload.len());
    Ok(decode(&payload)?)
}

/// Writes one message.
pub(super) async fn write_message<M: Message, W: AsyncWrite + Unpin>(
    writer: &mut W,
    message: &M,
    counters: &Counters,
) -> Result<(), LinkError> {
    let frame = encode(message)?;
    writer.write_all(&frame).await?;
    counters.add_sent(frame.len());
    Ok(())
}

/// Writes one message and the planes behind it, if there are any: in one piece where they are few, so that both travel, and
/// wake up whoever reads them, together. `stall` is the limit for the message and for each chunk.
pub(super) async fn write_with_planes<M: Message, W: AsyncWrite + Unpin>(
    writer: &mut W,
    message: &M,
    planes: Option<&Planes>,
    stall: Duration,
    counters: &Counters,
) -> Result<(), LinkError> {
    let mut frame = encode(message)?;
    let (few, many) = match planes {
        Some(planes) if planes.bytes().len() <= FEW_BYTES => (planes.bytes(), None),
        planes => (&[][..], planes),
    };
    frame.extend_from_slice(few);
    timeout(stall, writer.write_all(&frame)).await.map_err(|_| LinkError::TimedOut("accepted", stall))??;
    counters.add_sent(frame.len());
    match many {
        Some(planes) => write_planes(writer, planes, stall, counters).await,
        None => Ok(()),
    }
}

/// Reads planes into a buffer of their shape; `stall` is the limit for each chunk.
pub(super) async fn read_planes<R: AsyncRead + Unpin>(
    reader: &mut R,
    shape: PlanesShape,
    stall: Duration,
    counters: &Counters,
) -> Result<Planes, LinkError> {
    let mut planes = shape.allocate();
    for chunk in planes.bytes_mut().chunks_mut(CHUNK_BYTES) {
        let length = chunk.len();
        timeout(stall, reader.read_exact(chunk)).await.map_err(|_| LinkError::TimedOut("received", stall))??;
        counters.add_received(length);
    }
    Ok(planes)
}

/// Writes planes; `stall` is the limit for each chunk.
async fn write_planes<W: AsyncWrite + Unpin>(
    writer: &mut W,
    planes: &Planes,
    stall: Duration,
    counters: &Counters,
) -> Result<(), LinkError> {
    for chunk in planes.bytes().chunks(CHUNK_BYTES) {
        timeout(stall, writer.write_all(chunk)).await.map_err(|_| LinkError::TimedOut("accepted", stall))??;
        counters.add_sent(chunk.len());
    }
    Ok(())
}
