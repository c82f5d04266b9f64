//! Control messages on request-response: one frame each way.

use std::io;
use std::sync::Arc;

use async_trait::async_trait;
use futures::io::{AsyncRead, AsyncWrite};
use libp2p::{StreamProtocol, request_response};
use protocol::wire::messages::{ControlReply, ControlRequest};

use super::io::{Counters, LinkError, read_message, write_message};

/// Reads and writes the frames of control messages, and counts their bytes.
#[derive(Clone)]
pub(super) struct ControlCodec {
    pub(super) counters: Arc<Counters>,
}

/// As libp2p wants it; [`io::ErrorKind::InvalidData`] marks a peer that broke the protocol.
fn as_io(error: LinkError) -> io::Error {
    match error {
        LinkError::Broken(error) => error,
        LinkError::Closed => io::Error::new(io::ErrorKind::UnexpectedEof, error),
        LinkError::TimedOut(..) => io::Error::new(io::ErrorKind::TimedOut, error),
        LinkError::Frame(error) => io::Error::new(io::ErrorKind::InvalidData, error),
    }
}

#[async_trait]
impl request_response::Codec for ControlCodec {
    type Protocol = StreamProtocol;
    type Request = ControlRequest;
    type Response = ControlReply;

    async fn read_request<T>(&mut self, _: &StreamProtocol, io: &mut T) -> io::Result<ControlRequest>
    where
        T: AsyncRead + Unpin + Send,
    {
        read_message(io, &self.counters).await.map_err(as_io)
    }

    async fn read_response<T>(&mut self, _: &StreamProtocol, io: &mut T) -> io::Result<ControlReply>
    where
        T: AsyncRead + Unpin + Send,
    {
        read_message(io, &self.counters).await.map_err(as_io)
    }

    async fn write_request<T>(&mut self, _: &StreamProtocol, io: &mut T, request: ControlRequest) -> io::Result<()>
    where
        T: AsyncWrite + Unpin + Send,
    {
        write_message(io, &request, &self.counters).await.map_err(as_io)
    }

    async fn write_response<T>(&mut self, _: &StreamProtocol, io: &mut T, reply: ControlReply) -> io::Result<()>
    where
        T: AsyncWrite + Unpin + Send,
    {
        write_message(io, &reply, &self.counters).await.map_err(as_io)
    }
}
