//! Yamux as libp2p has it, in frames that suit bodies and answers of megabytes.
//!
//! libp2p's own wrapper of the same library takes its defaults alone: frames of 16 KiB, each with a small write of its own
//! for its header, and windows that may grow to a gigabyte a connection. Here a frame fills three records of TLS, its header
//! goes with it, and what a peer can have lie unread is bounded more tightly. Peers with libp2p's wrapper understand it.
//!
//! A stream's window begins at 256 KiB, as the specification has it, and is doubled by the receiver as long as half of it is
//! used up within two round trips. It never shrinks: a stream that is used again ([`super::pool`]) has the window that
//! its link needs.

use std::collections::VecDeque;
use std::future::{Ready, ready};
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, Waker, ready};

use futures::io::{AsyncRead, AsyncWrite, BufWriter};
use libp2p::core::muxing::{StreamMuxer, StreamMuxerEvent};
use libp2p::core::upgrade::{InboundConnectionUpgrade, OutboundConnectionUpgrade, UpgradeInfo};
use yamux::{Connection, ConnectionError, Mode, Stream};

/// Bytes of a frame's header.
const HEADER: usize = 12;
/// Bytes of a frame at most, without its header: with it, three records of TLS.
const FRAME: usize = 3 * (16 << 10) - HEADER;
/// Streams of a connection: as many as may wait to be accepted.
const STREAMS: usize = 256;
/// Bytes that a peer may have sent on a connection while nobody reads: 64 MiB that its streams have from the beginning, and
/// what their windows grow by. A stream that once had a gigabit a second for itself, over a tenth of a second, has a window of 64 MiB
/// from then on. Once all is given out, other streams keep the window that they began with, over which a body of
/// megabytes takes seconds there: so it is more than the streams of a pool come to.
const WINDOW: usize = 640 << 20;

/// The upgrade of a secured connection to one of many streams.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Yamux;

impl Yamux {
    fn over<C: AsyncRead + AsyncWrite + Unpin>(socket: C, mode: Mode) -> Muxer<C> {
        let mut config = yamux::Config::default();
        config.set_max_num_streams(STREAMS).set_max_connection_receive_window(Some(WINDOW));
        // Like libp2p's: nothing is read after a connection's end.
        config.set_split_send_size(FRAME).set_read_after_close(false);
        let socket = BufWriter::with_capacity(HEADER + FRAME, socket);
        Muxer { connection: Connection::new(socket, config, mode), opened: VecDeque::new(), asking: None }
    }
}

impl UpgradeInfo for Yamux {
    type Info = &'static str;
    type InfoIter = std::iter::Once<Self::Info>;

    fn protocol_info(&self) -> Self::InfoIter {
        std::iter::once("/yamux/1.0.0")
    }
}

impl<C: AsyncRead + AsyncWrite + Unpin> InboundConnectionUpgrade<C> for Yamux {
    type Output = Muxer<C>;
    type Error = io::Error;
    type Future = Ready<io::Result<Muxer<C>>>;

    fn upgrade_inbound(self, socket: C, _: Self::Info) -> Self::Future {
        ready(Ok(Self::over(socket, Mode::Server)))
    }
}

impl<C: AsyncRead + AsyncWrite + Unpin> OutboundConnectionUpgrade<C> for Yamux {
    type Output = Muxer<C>;
    type Error = io::Error;
    type Future = Ready<io::Result<Muxer<C>>>;

    fn upgrade_outbound(self, socket: C, _: Self::Info) -> Self::Future {
        ready(Ok(Self::over(socket, Mode::Client)))
    }
}

/// A connection of many streams.
pub(super) struct Muxer<C> {
    connection: Connection<BufWriter<C>>,
    /// Streams that came while the connection was driven for others: yamux makes progress only by being asked for the next.
    opened: VecDeque<Stream>,
    /// Who waits for a stream.
    asking: Option<Waker>,
}

impl<C: AsyncRead + AsyncWrite + Unpin> Muxer<C> {
    fn next(&mut self, context: &mut Context<'_>) -> Poll<Result<Stream, ConnectionError>> {
        let next = ready!(self.connection.poll_next_inbound(context));
        Poll::Ready(next.unwrap_or(Err(ConnectionError::Closed)))
    }
}

impl<C: AsyncRead + AsyncWrite + Unpin> StreamMuxer for Muxer<C> {
    type Substream = Stream;
    type Error = ConnectionError;

    fn poll_inbound(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<Stream, ConnectionError>> {
        if let Some(stream) = self.opened.pop_front() {
            return Poll::Ready(Ok(stream));
        }
        let next = self.next(context);
        if next.is_pending() {
            self.asking = Some(context.waker().clone());
        }
        next
    }

    fn poll_outbound(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<Stream, ConnectionError>> {
        self.connection.poll_new_outbound(context)
    }

    fn poll_close(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<(), ConnectionError>> {
        self.connection.poll_close(context)
    }

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<StreamMuxerEvent, ConnectionError>> {
        let stream = ready!(self.next(context))?;
        if self.opened.len() < STREAMS {
            self.opened.push_back(stream);
            self.asking.take().into_iter().for_each(Waker::wake);
        } else {
            tracing::debug!(%stream, "a stream was dropped: too many wait to be accepted");
        }
        // There may be more to do.
        context.waker().wake_by_ref();
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::future::poll_fn;
    use std::pin::pin;

    use futures::future::{join, select};
    use futures::{AsyncReadExt as _, AsyncWriteExt as _};
    use libp2p::yamux as libp2ps;
    use tokio_util::compat::{Compat, TokioAsyncReadCompatExt as _};

    use super::*;

    type Socket = Compat<tokio::io::DuplexStream>;

    /// Several windows, and no multiple of a frame.
    const BYTES: usize = (1 << 20) + 7;

    async fn drive<M: StreamMuxer + Unpin>(mut muxer: M) {
        // It ends with the connection.
        let _ = poll_fn(|context| Pin::new(&mut muxer).poll(context)).await;
    }

    /// Sends bytes over a stream of two upgrades, to an end that sends all of them back.
    async fn there_and_back<D, L, A, B>(dialler: D, listener: L)
    where
        D: OutboundConnectionUpgrade<Socket, Output = A, Info = &'static str, Error = io::Error>,
        L: InboundConnectionUpgrade<Socket, Output = B, Info = &'static str, Error = io::Error>,
        A: StreamMuxer<Substream: Unpin, Error: std::fmt::Debug> + Unpin,
        B: StreamMuxer<Substream: Unpin, Error: std::fmt::Debug> + Unpin,
    {
        let (near, far) = tokio::io::duplex(1 << 16);
        let mut near = dialler.upgrade_outbound(near.compat(), "/yamux/1.0.0").await.unwrap();
        let mut far = listener.upgrade_inbound(far.compat(), "/yamux/1.0.0").await.unwrap();
        let asks = async {
            let stream = poll_fn(|context| Pin::new(&mut near).poll_outbound(context)).await.unwrap();
            let (mut from, mut to) = stream.split();
            let bytes: Vec<u8> = (0..BYTES).map(|at| (at * at) as u8).collect();
            let mut back = vec![0; BYTES];
            let sends = async {
                to.write_all(&bytes).await.unwrap();
                to.flush().await.unwrap();
            };
            let exchange = pin!(join(sends, from.read_exact(&mut back)));
            select(exchange, pin!(drive(near))).await;
            assert!(back == bytes);
        };
        let answers = async {
            let stream = poll_fn(|context| Pin::new(&mut far).poll_inbound(context)).await.unwrap();
            let (from, mut to) = stream.split();
            select(pin!(futures::io::copy(from, &mut to)), pin!(drive(far))).await;
        };
        join(asks, answers).await;
    }

    #[tokio::test]
    async fn large_bodies_go_both_ways_and_to_libp2ps_own_wrapper() {
        there_and_back(Yamux, Yamux).await;
        there_and_back(Yamux, libp2ps::Config::default()).await;
        there_and_back(libp2ps::Config::default(), Yamux).await;
    }
}
