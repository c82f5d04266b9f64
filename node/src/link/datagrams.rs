//! A link that carries datagrams, as QUIC sends them.
//!
//! Each address that sends to the entrance has a socket of its own towards the far end, by which answers find back. Datagrams
//! are taken and passed on in the runs in which the kernel keeps them (`quinn-udp`), as the ends themselves do it, so that
//! the link takes little of the machine that it is measured on. What finds no room on the way is lost.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io::{self, IoSliceMut};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use quinn_udp::{EcnCodepoint, RecvMeta, Transmit, UdpSocketState};
use tokio::io::Interest;
use tokio::net::UdpSocket;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::task::JoinSet;

use super::line::{MOST_ON_THE_WAY, Pace};
use super::{PIECES, State};

/// Bytes of the longest run of datagrams.
const LONGEST_RUN: usize = 64 << 10;
/// Runs that are taken at once.
const RUNS: usize = 8;
/// What a socket holds of what was not taken yet, as far as the system allows: an end of the link sends a whole window at once.
const SOCKET_BUFFER: usize = 4 << 20;

/// Datagrams of one length that follow each other; the last may be shorter.
struct Run {
    bytes: Vec<u8>,
    /// Bytes of each.
    each: usize,
    ecn: Option<EcnCodepoint>,
}

/// A socket that takes and sends runs.
pub(super) struct Socket {
    socket: UdpSocket,
    state: UdpSocketState,
}

impl Socket {
    /// At any free port of this machine.
    pub(super) async fn bind() -> io::Result<Self> {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let state = UdpSocketState::new((&socket).into())?;
        // Smaller buffers make the link lose more, which the ends see to.
        let _ = state.set_recv_buffer_size((&socket).into(), SOCKET_BUFFER);
        let _ = state.set_send_buffer_size((&socket).into(), SOCKET_BUFFER);
        Ok(Self { socket, state })
    }

    pub(super) fn address(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// Takes what has come: at least one run, each with who sent it.
    async fn take(&self, buffers: &mut Buffers) -> io::Result<Vec<(SocketAddr, Run)>> {
        let mut slices = buffers.0.each_mut().map(|buffer| IoSliceMut::new(buffer));
        let mut of = [RecvMeta::default(); RUNS];
        let receive = || self.state.recv((&self.socket).into(), &mut slices, &mut of);
        let count = self.socket.async_io(Interest::READABLE, receive).await?;
        let run = |(of, buffer): (&RecvMeta, &Vec<u8>)| {
            (of.addr, Run { bytes: buffer[..of.len].to_vec(), each: of.stride, ecn: of.ecn })
        };
        Ok(of[..count].iter().zip(&buffers.0).map(run).collect())
    }

    async fn send(&self, destination: SocketAddr, run: &Run) -> io::Result<()> {
        let each = run.each.max(1);
        for contents in run.bytes.chunks(each * self.state.max_gso_segments().max(1)) {
            let segment_size = (contents.len() > each).then_some(each);
            let transmit = Transmit { destination, ecn: run.ecn, contents, segment_size, src_ip: None };
            let send = || self.state.try_send((&self.socket).into(), &transmit);
            self.socket.async_io(Interest::WRITABLE, send).await?;
        }
        Ok(())
    }
}

/// Where a socket's runs are taken to.
struct Buffers([Vec<u8>; RUNS]);

impl Buffers {
    fn new() -> Self {
        Self(std::array::from_fn(|_| vec![0; LONGEST_RUN]))
    }
}

/// The sending end of a direction.
struct Departure {
    state: watch::Receiver<State>,
    pace: Pace,
    room: Arc<Semaphore>,
    runs: mpsc::Sender<Departed>,
}

/// A run on its way, and the room that it takes.
struct Departed {
    arrives: Instant,
    run: Run,
    _room: OwnedSemaphorePermit,
}

impl Departure {
    /// A direction from here to an address, whose runs leave a socket there.
    fn towards(to: SocketAddr, by: Arc<Socket>, state: watch::Receiver<State>, tasks: &mut JoinSet<()>) -> Self {
        let (runs, mut departed) = mpsc::channel::<Departed>(PIECES);
        tasks.spawn(async move {
            while let Some(Departed { arrives, run, _room }) = departed.recv().await {
                tokio::time::sleep_until(arrives.into()).await;
                // What cannot be sent is lost, like any datagram.
                let _ = by.send(to, &run).await;
            }
        });
        Self { state, pace: Pace::default(), room: Arc::new(Semaphore::new(MOST_ON_THE_WAY)), runs }
    }

    /// Sends a run on its way, or loses it.
    fn depart(&mut self, run: Run) {
        let State::Open(line) = *self.state.borrow() else { return };
        let length = run.bytes.len();
        // What a line has less room than the longest is kept back.
        let wanted = MOST_ON_THE_WAY - line.on_the_way() + length;
        let Ok(mut free) = Arc::clone(&self.room).try_acquire_many_owned(wanted as u32) else { return };
        let (Some(_room), Ok(place)) = (free.split(length), self.runs.try_reserve()) else { return };
        let arrives = self.pace.arrival(line, length, Instant::now());
        place.send(Departed { arrives, run, _room });
    }
}

/// Passes datagrams on, those of each address by a socket of its own, and answers back.
pub(super) async fn pass(entrance: Socket, to: SocketAddr, state: watch::Receiver<State>) {
    let entrance = Arc::new(entrance);
    let (mut flows, mut tasks, mut buffers) = (HashMap::<SocketAddr, Departure>::new(), JoinSet::new(), Buffers::new());
    while let Ok(runs) = entrance.take(&mut buffers).await {
        for (from, run) in runs {
            let flow = match flows.entry(from) {
                Entry::Occupied(flow) => flow.into_mut(),
                Entry::Vacant(place) => {
                    let Ok(exit) = Socket::bind().await.map(Arc::new) else { continue };
                    let back = Departure::towards(from, Arc::clone(&entrance), state.clone(), &mut tasks);
                    tasks.spawn(answers(Arc::clone(&exit), back));
                    place.insert(Departure::towards(to, exit, state.clone(), &mut tasks))
                }
            };
            flow.depart(run);
        }
    }
}

/// What comes back to one address.
async fn answers(exit: Arc<Socket>, mut back: Departure) {
    let mut buffers = Buffers::new();
    while let Ok(runs) = exit.take(&mut buffers).await {
        runs.into_iter().for_each(|(_, run)| back.depart(run));
    }
}
