//! A peer that speaks the protocol by hand, so that it can break every rule of it.

use anyhow::{Context as _, anyhow};
use futures::{AsyncReadExt as _, AsyncWriteExt as _, StreamExt as _};
use libp2p::swarm::SwarmEvent;
use libp2p::{Multiaddr, PeerId, Stream, StreamProtocol, SwarmBuilder, noise, tcp, yamux};
use protocol::wire::messages::{ControlReply, ControlRequest};
use protocol::wire::{PREFIX_BYTES, decode, encode, payload_length};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

const CONTROL: StreamProtocol = StreamProtocol::new("/velum/control/1");
const PRODUCT: StreamProtocol = StreamProtocol::new("/velum/product/2");

/// A connected peer. Dropping it closes the connection.
pub(super) struct Hostile {
    worker: PeerId,
    streams: libp2p_stream::Control,
    swarm: JoinHandle<()>,
}

impl Drop for Hostile {
    fn drop(&mut self) {
        self.swarm.abort();
    }
}

impl Hostile {
    /// Connects to a worker under a new name.
    pub(super) async fn connect(address: &Multiaddr) -> anyhow::Result<Self> {
        let worker = address.iter().find_map(|part| match part {
            libp2p::multiaddr::Protocol::P2p(peer) => Some(peer),
            _ => None,
        });
        let worker = worker.context("the address names no peer")?;
        let mut swarm = SwarmBuilder::with_new_identity()
            .with_tokio()
            .with_tcp(tcp::Config::default().nodelay(true), noise::Config::new, yamux::Config::default)?
            .with_behaviour(|_| libp2p_stream::Behaviour::new())?
            .with_swarm_config(|config| config.with_idle_connection_timeout(std::time::Duration::from_secs(600)))
            .build();
        let streams = swarm.behaviour().new_control();
        swarm.dial(address.clone())?;
        let (connected, connection) = oneshot::channel();
        let swarm = tokio::spawn(async move {
            let mut connected = Some(connected);
            loop {
                let outcome = match swarm.select_next_some().await {
                    SwarmEvent::ConnectionEstablished { .. } => Ok(()),
                    SwarmEvent::OutgoingConnectionError { error, .. } => Err(anyhow!("{error}")),
                    _ => continue,
                };
                if let Some(connected) = connected.take() {
                    // Whoever waits may have given up.
                    let _ = connected.send(outcome);
                }
            }
        });
        let hostile = Self { worker, streams, swarm };
        connection.await??;
        Ok(hostile)
    }

    /// A stream for a product, on which nothing has been said.
    pub(super) async fn product(&self) -> anyhow::Result<Stream> {
        Ok(self.streams.clone().open_stream(self.worker, PRODUCT).await?)
    }

    /// Asks and waits for the answer.
    pub(super) async fn ask(&self, request: &ControlRequest) -> anyhow::Result<ControlReply> {
        let mut stream = self.streams.clone().open_stream(self.worker, CONTROL).await?;
        stream.write_all(&encode(request)?).await?;
        stream.close().await?;
        let mut prefix = [0; PREFIX_BYTES];
        stream.read_exact(&mut prefix).await?;
        let mut payload = vec![0; payload_length(prefix)?];
        stream.read_exact(&mut payload).await?;
        Ok(decode(&payload)?)
    }
}
