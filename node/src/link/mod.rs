//! A link with a delay and a rate, on this machine, that can be cut: what a distance does to a run is measured and tested
//! where there is none.
//!
//! What enters it is passed on to one port: connections of TCP (`streams`) or datagrams of QUIC (`datagrams`). A direction is
//! a queue of pieces, each with the time at which it arrives (`line`). What is on its way is bounded; beyond that a sender of a
//! stream is not read from, and datagrams are lost, as on a link that is full. A link that only delays holds more than any
//! sender has under way, so it takes nothing off the rate.

mod datagrams;
mod line;
mod streams;

use std::net::Ipv4Addr;

use clap::ValueEnum;
use libp2p::Multiaddr;
use libp2p::multiaddr::Protocol;
use serde::Serialize;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;

pub use line::{Line, LineError};

/// Pieces that one direction holds, however small they are.
const PIECES: usize = 1 << 14;

/// What carries the connections between an owner and its workers on this machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// TCP, with TLS and Yamux on it.
    #[default]
    Tcp,
    /// QUIC, over UDP.
    Quic,
}

impl Transport {
    /// Where a worker on this machine listens for it: any free port.
    pub(crate) fn listen(self) -> &'static str {
        match self {
            Self::Tcp => "/ip4/127.0.0.1/tcp/0",
            Self::Quic => "/ip4/127.0.0.1/udp/0/quic-v1",
        }
    }
}

/// What lies between an owner and its workers on this machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Route {
    /// What carries their connections.
    pub transport: Transport,
    /// The link that they lead over.
    pub link: Option<Line>,
}

impl Route {
    /// It in words, where there is more to say than loopback and TCP.
    pub(crate) fn words(self) -> Option<String> {
        match self {
            Self { transport: Transport::Tcp, link } => Some(link?.to_string()),
            Self { transport: Transport::Quic, link: Some(link) } => Some(format!("{link}, QUIC")),
            Self { transport: Transport::Quic, link: None } => Some("QUIC".into()),
        }
    }
}

/// What a link does with what comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It passes it on.
    Open(Line),
    /// Connections are dropped, and new ones too; datagrams are lost.
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
    pub async fn to(port: u16, transport: Transport, line: Line) -> std::io::Result<Self> {
        let (state, current) = watch::channel(State::Open(line));
        let to = (Ipv4Addr::LOCALHOST, port).into();
        let mut passing = JoinSet::new();
        let entrance = match transport {
            Transport::Tcp => {
                let entrance = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
                let at = entrance.local_addr()?;
                passing.spawn(streams::accept(entrance, to, current));
                at
            }
            Transport::Quic => {
                let entrance = datagrams::Socket::bind().await?;
                let at = entrance.address()?;
                passing.spawn(datagrams::pass(entrance, to, current));
                at
            }
        };
        Ok(Self { port: entrance.port(), state, _passing: passing })
    }

    /// A link to where a node of this machine listens, and the address at which it is entered; `None` of an address
    /// without a port of TCP or QUIC.
    ///
    /// # Errors
    /// Those of [`to`](Self::to).
    pub async fn over(address: &Multiaddr, line: Line) -> std::io::Result<Option<(Self, Multiaddr)>> {
        let port = address.iter().find_map(|part| match part {
            Protocol::Tcp(port) => Some((Transport::Tcp, port)),
            Protocol::Udp(port) => Some((Transport::Quic, port)),
            _ => None,
        });
        let Some((transport, port)) = port else { return Ok(None) };
        let link = Self::to(port, transport, line).await?;
        let through = |part| match part {
            Protocol::Tcp(_) => Protocol::Tcp(link.port),
            Protocol::Udp(_) => Protocol::Udp(link.port),
            other => other,
        };
        let entrance = address.iter().map(through).collect();
        Ok(Some((link, entrance)))
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::time::{Duration, Instant};

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::{TcpStream, UdpSocket};

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
        let link = Link::to(port, Transport::Tcp, line.parse().unwrap()).await.unwrap();
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

    /// Somebody who sends every datagram back, and a socket whose datagrams go to them over a link.
    async fn echo_of_datagrams(line: &str) -> (Link, UdpSocket) {
        let far = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = far.local_addr().unwrap().port();
        tokio::spawn(async move {
            let mut buffer = [0; 2000];
            while let Ok((length, from)) = far.recv_from(&mut buffer).await {
                far.send_to(&buffer[..length], from).await.unwrap();
            }
        });
        let link = Link::to(port, Transport::Quic, line.parse().unwrap()).await.unwrap();
        let near = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        near.connect((Ipv4Addr::LOCALHOST, link.port())).await.unwrap();
        (link, near)
    }

    /// Sends so many datagrams of 1,000 bytes at once; how many came back within a time, unharmed and in order, and when the
    /// last of them did.
    async fn datagrams_back(socket: &UdpSocket, count: usize, within: Duration) -> (usize, Duration) {
        let start = Instant::now();
        for at in 0..count {
            socket.send(&[at as u8; 1000]).await.unwrap();
        }
        let (mut back, mut last, mut buffer) = (0, Duration::ZERO, [0; 2000]);
        while let Ok(length) = tokio::time::timeout(within, socket.recv(&mut buffer)).await {
            assert!(length.unwrap() == 1000 && buffer[..1000] == [back as u8; 1000]);
            (back, last) = (back + 1, start.elapsed());
        }
        (back, last)
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn datagrams_arrive_after_the_delay_and_at_the_rate() {
        let patience = Duration::from_secs(2);
        let (link, socket) = echo_of_datagrams("400ms").await;
        let (back, took) = datagrams_back(&socket, 50, patience).await;
        assert!(back == 50 && took >= Duration::from_millis(400), "{back} after {took:?}");
        link.set(State::Open("0ms,800kbit".parse().unwrap()));
        let (back, took) = datagrams_back(&socket, 50, patience).await;
        assert!(back == 50 && took >= Duration::from_millis(499), "{back} after {took:?}");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn datagrams_are_lost_where_a_link_is_full() {
        let (_link, socket) = echo_of_datagrams("0ms,8mbit").await;
        let sends = async {
            for _ in 0..30 {
                for _ in 0..100 {
                    socket.send(&[0; 1000]).await.unwrap();
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let receives = async {
            let (mut back, mut buffer) = (0, [0; 2000]);
            while let Ok(length) = tokio::time::timeout(Duration::from_millis(500), socket.recv(&mut buffer)).await {
                assert_eq!(length.unwrap(), 1000);
                back += 1;
            }
            back
        };
        // It holds a mebibyte, and passes a thousand on in a second.
        let ((), back) = tokio::join!(sends, receives);
        assert!((900..2500).contains(&back), "{back} came back");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn datagrams_are_lost_where_a_link_is_cut() {
        let (link, socket) = echo_of_datagrams("0ms").await;
        link.set(State::Cut);
        assert_eq!(datagrams_back(&socket, 5, Duration::from_millis(300)).await.0, 0);
        link.set(State::Open(Line::default()));
        assert_eq!(datagrams_back(&socket, 5, Duration::from_secs(2)).await.0, 5);
    }

    #[tokio::test]
    async fn an_address_leads_through_a_link_of_its_own_kind() {
        for (address, behind) in [("/ip4/127.0.0.1/tcp/77", ""), ("/ip4/127.0.0.1/udp/77/quic-v1", "/quic-v1")] {
            let (link, entrance) = Link::over(&address.parse().unwrap(), Line::default()).await.unwrap().unwrap();
            let kind = address.split('/').nth(3).unwrap();
            assert_eq!(entrance.to_string(), format!("/ip4/127.0.0.1/{kind}/{}{behind}", link.port()));
        }
        assert!(Link::over(&"/ip4/127.0.0.1".parse().unwrap(), Line::default()).await.unwrap().is_none());
    }
}
