//! A link that carries streams, as TCP does: each connection that enters it is passed on by one of its own.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::task::JoinSet;

use super::line::{MOST_ON_THE_WAY, Pace};
use super::{PIECES, State};

/// Bytes that are read at once, and the most that a limited rate passes on at once.
const PIECE: usize = 64 << 10;

pub(super) async fn accept(entrance: TcpListener, to: SocketAddr, state: watch::Receiver<State>) {
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
