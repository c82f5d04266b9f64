//! A TCP link that can be cut and slowed.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// Bytes that are passed on at once: small, so that a slow link's rate is even.
const PIECE: usize = 16 << 10;

/// What a link does with what comes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum State {
    Open,
    /// Connections are dropped, and new ones too.
    Cut,
    /// So many bytes a second in each direction of each connection.
    Slow(u32),
}

/// A link on this machine; it is gone with the value.
pub(crate) struct Link {
    /// Where it is entered.
    pub(crate) port: u16,
    state: watch::Sender<State>,
    _passing: JoinSet<()>,
}

impl Link {
    /// A link to a port of this machine, where nobody need listen yet.
    pub(crate) async fn to(port: u16) -> std::io::Result<Self> {
        let entrance = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let at = entrance.local_addr()?.port();
        let (state, current) = watch::channel(State::Open);
        let mut passing = JoinSet::new();
        passing.spawn(accept(entrance, (Ipv4Addr::LOCALHOST, port).into(), current));
        Ok(Self { port: at, state, _passing: passing })
    }

    pub(crate) fn set(&self, state: State) {
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
        _ = copy(from_read, to_write, up) => {}
        _ = copy(to_read, from_write, down) => {}
    }
}

async fn copy(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, state: watch::Receiver<State>) -> std::io::Result<()> {
    let mut piece = vec![0; PIECE];
    loop {
        let length = from.read(&mut piece).await?;
        if length == 0 {
            return Ok(());
        }
        to.write_all(&piece[..length]).await?;
        let now = *state.borrow();
        if let State::Slow(rate) = now {
            tokio::time::sleep(Duration::from_secs_f64(length as f64 / f64::from(rate))).await;
        }
    }
}
