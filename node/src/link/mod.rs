//! A TCP link with a delay and a rate, on this machine, that can be cut: what a distance does to a run is measured and
//! tested where there is none.
//!
//! Each connection that enters it is passed on to one port. A direction is a queue of pieces, each with the time at which
//! it arrives (`line`); what is on its way is bounded, and beyond that the sender is not read from, as on a link that is
//! full. A link that only delays holds more than any sender has under way, so it takes nothing off the rate.

mod line;

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::task::JoinSet;

pub use line::{Line, LineError};
use line::{MOST_ON_THE_WAY, Pace};

/// Bytes that are read at once, and the most that a limited rate passes on at once.
const PIECE: usize = 64 << 10;
/// Pieces that one direction holds, however small they are.
const PIECES: usize = 1 << 14;

/// What a link does with what comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It passes it on.
    Open(Line),
    /// Connections are dropped, and new ones too.
    Cut,
}

/// A link on this machine; it is gone with the value.
pub struct Link {
    port: u16,
    state: watch::Sender<State>,
    _passing: JoinSet<()>,
}

impl Link {
    /// A link to a port of this machine, where nobody need listen yet.
    ///
    /// # Errors
    /// When there is no port for its entrance.
    pub async fn to(port: u16, line: Line) -> std::io::Result<Self> {
        let entrance = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let at = entrance.local_addr()?.port();
        let (state, current) = watch::channel(State::Open(line));
        let mut passing = JoinSet::new();
        passing.spawn(accept(entrance, (Ipv4Addr::LOCALHOST, port).into(), current));
        Ok(Self { port: at, state, _passing: passing })
    }

    /// Where it is entered, on this machine.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// What it does from now on; pieces on their way arrive as they would have.
    pub fn set(&self, state: State) {
        self.state.send_replace(state);
    }
}

async fn accept(entrance: TcpListener, to: SocketAddr, state: watch::Receiver<State>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            Ok((from, _)) = entrance.accept() => {
                if *state.borrow() != State::Cut {
                    connections.spawn(pass(from, to, state.clone()));
                }
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

/// Passes on until either side closes or the link is cut; then both are closed.
async fn pass(from: TcpStream, to: SocketAddr, mut state: watch::Receiver<State>) {
    let Ok(to) = TcpStream::connect(to).await else { return };
    // Without it the link would only be slower.
    let _ = (from.set_nodelay(true), to.set_nodelay(true));
    let ((from_read, from_write), (to_read, to_write)) = (from.into_split(), to.into_split());
    let (up, down) = (state.clone(), state.clone());
    tokio::select! {
        _ = state.wait_for(|state| *state == State::Cut) => {}
        () = direction(from_read, to_write, up) => {}
        () = direction(to_read, from_write, down) => {}
    }
}

/// Bytes on their way, and the room that they take.
struct Piece {
    arrives: Instant,
    bytes: Vec<u8>,
    _room: OwnedSemaphorePermit,
}

/// Passes one direction on, to its end and to the last byte. A socket that breaks ends it: who stood at its ends sees that.
async fn direction(from: OwnedReadHalf, to: OwnedWriteHalf, state: watch::Receiver<State>) {
    let (sender, pieces) = mpsc::channel(PIECES);
    let departing = async {
        let _ = depart(from, sender, state).await;
        std::future::pending::<()>().await
    };
    tokio::select! {
        _ = arrive(pieces, to) => {}
        () = departing => {}
    }
}

async fn depart(
    mut from: OwnedReadHalf,
    pieces: mpsc::Sender<Piece>,
    state: watch::Receiver<State>,
) -> std::io::Result<()> {
    let (mut pace, mut buffer) = (Pace::default(), vec![0; PIECE]);
    let room = Arc::new(Semaphore::new(MOST_ON_THE_WAY));
    loop {
        let State::Open(line) = *state.borrow() else { return Ok(()) };
        // What a line has less room than the longest is kept back.
        let wanted = MOST_ON_THE_WAY - line.on_the_way() + PIECE;
        let Ok(mut free) = Arc::clone(&room).acquire_many_owned(wanted as u32).await else { return Ok(()) };
        let length = from.read(&mut buffer).await?;
        let Some(taken) = free.split(length).filter(|_| length > 0) else { return Ok(()) };
        let piece = Piece {
            arrives: pace.arrival(line, length, Instant::now()),
            bytes: buffer[..length].to_vec(),
            _room: taken,
        };
        if pieces.send(piece).await.is_err() {
            return Ok(());
        }
    }
}

async fn arrive(mut pieces: mpsc::Receiver<Piece>, mut to: OwnedWriteHalf) -> std::io::Result<()> {
    while let Some(piece) = pieces.recv().await {
        tokio::time::sleep_until(piece.arrives.into()).await;
        to.write_all(&piece.bytes).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::time::Duration;

    use super::*;

    /// Somebody who sends everything back, and a connection to them over a link.
    async fn echo(line: &str) -> (Link, TcpStream) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let (mut from, mut to) = socket.into_split();
                tokio::spawn(async move { tokio::io::copy(&mut from, &mut to).await });
            }
        });
        let link = Link::to(port, line.parse().unwrap()).await.unwrap();
        let socket = TcpStream::connect((Ipv4Addr::LOCALHOST, link.port())).await.unwrap();
        (link, socket)
    }

    /// Sends so many bytes there and back, all at once; how long that took.
    async fn there_and_back(socket: &mut TcpStream, length: usize) -> Duration {
        let bytes: Vec<u8> = (0..length).map(|at| (at * at) as u8).collect();
        let (mut back, start) = (vec![0; length], Instant::now());
        let (mut from, mut to) = socket.split();
        let (sent, received) = tokio::join!(to.write_all(&bytes), from.read_exact(&mut back));
        sent.unwrap();
        received.unwrap();
        assert!(back == bytes);
        start.elapsed()
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_link_delays_and_takes_nothing_off_the_rate() {
        let (_link, mut socket) = echo("400ms").await;
        let delay = Duration::from_millis(400);
        assert!(there_and_back(&mut socket, 1).await >= delay);
        // A window of 64 KiB, or of what a socket holds, would take many times as long.
        let took = there_and_back(&mut socket, 32 << 20).await;
        assert!(took >= delay && took < 5 * delay, "{took:?}");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_link_keeps_to_its_rate_and_can_be_cut() {
        let (link, mut socket) = echo("0ms,8mbit").await;
        let took = there_and_back(&mut socket, 500_000).await;
        assert!(took >= Duration::from_millis(499), "{took:?}");
        link.set(State::Open("0ms".parse().unwrap()));
        there_and_back(&mut socket, 1_000_000).await;
        link.set(State::Cut);
        assert!(matches!(socket.read(&mut [0]).await, Ok(0) | Err(_)));
        let mut later = TcpStream::connect((Ipv4Addr::LOCALHOST, link.port())).await.unwrap();
        assert!(matches!(later.read(&mut [0]).await, Ok(0) | Err(_)));
    }
}
