//! QUIC, as libp2p has it, for peers that TCP does not lead to.
//!
//! Both carry products equally well over a distance, each for one round trip, but QUIC costs more processor time at either
//! end. And what a UDP socket holds is fixed: where the system gives it little ([`Sockets`]), a body of megabytes
//! overflows it, what is lost is sent again, and a step takes several times as long. libp2p takes the system's default and
//! lets nobody choose another. So where a peer is known by addresses of both kinds, all of which are dialled at once, TCP has
//! a head start.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::future::{BoxFuture, FutureExt as _};
use libp2p::core::Endpoint;
use libp2p::core::transport::{DialOpts, ListenerId, Transport, TransportError, TransportEvent};
use libp2p::identity::Keypair;
use libp2p::multiaddr::Protocol;
use libp2p::{Multiaddr, quic};

/// How much later QUIC dials: TCP, TLS and what is agreed on after it take five round trips, here of 200 ms.
const HEAD_START: Duration = Duration::from_secs(1);

/// Bytes that a UDP socket should hold: of four million, none were lost with bodies of three million on a busy machine.
const ENOUGH: u64 = 4 << 20;

type Inner = quic::tokio::Transport;

/// QUIC that dials after the head start of others.
pub(super) struct LateQuic(Inner);

impl LateQuic {
    pub(super) fn new(keypair: &Keypair) -> Self {
        Self(Inner::new(quic::Config::new(keypair)))
    }
}

impl Transport for LateQuic {
    type Output = <Inner as Transport>::Output;
    type Error = <Inner as Transport>::Error;
    type ListenerUpgrade = <Inner as Transport>::ListenerUpgrade;
    type Dial = BoxFuture<'static, Result<Self::Output, Self::Error>>;

    fn listen_on(&mut self, id: ListenerId, address: Multiaddr) -> Result<(), TransportError<Self::Error>> {
        self.0.listen_on(id, address)
    }

    fn remove_listener(&mut self, id: ListenerId) -> bool {
        self.0.remove_listener(id)
    }

    fn dial(&mut self, address: Multiaddr, options: DialOpts) -> Result<Self::Dial, TransportError<Self::Error>> {
        // One that listens meanwhile has agreed on the moment with the other end.
        let at_once = options.role == Endpoint::Listener;
        let dial = self.0.dial(address, options)?;
        if at_once {
            return Ok(dial);
        }
        Ok(async {
            tokio::time::sleep(HEAD_START).await;
            dial.await
        }
        .boxed())
    }

    fn poll(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<TransportEvent<Self::ListenerUpgrade, Self::Error>> {
        Pin::new(&mut self.0).poll(context)
    }
}

/// Says once that what a system gives its UDP sockets makes QUIC slow.
#[derive(Debug, Default)]
pub(super) struct Sockets {
    looked: bool,
}

impl Sockets {
    /// A connection leads to an address.
    pub(super) fn connected(&mut self, address: &Multiaddr) {
        if is_quic(address)
            && !std::mem::replace(&mut self.looked, true)
            && let Some(bytes) = small_sockets()
        {
            tracing::warn!(
                "a UDP socket of this system holds {} KiB (net.core.rmem_default), so that a product over QUIC takes several \
                 times as long as over TCP: `sysctl -w net.core.rmem_default={ENOUGH}` before this program starts helps, or TCP",
                bytes >> 10
            );
        }
    }
}

/// Whether an address is one of QUIC.
fn is_quic(address: &Multiaddr) -> bool {
    address.iter().any(|part| matches!(part, Protocol::Quic | Protocol::QuicV1))
}

/// Bytes that a UDP socket of this system holds, where they are few for QUIC; `None` where they are enough or not told.
fn small_sockets() -> Option<u64> {
    few(&std::fs::read_to_string("/proc/sys/net/core/rmem_default").ok()?)
}

fn few(default: &str) -> Option<u64> {
    default.trim().parse().ok().filter(|&bytes| bytes < ENOUGH)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::sync::Arc;

    use futures::StreamExt as _;
    use libp2p::Swarm;
    use libp2p::swarm::SwarmEvent;
    use libp2p::swarm::dial_opts::DialOpts;

    use super::super::behaviour::{Behaviour, Parts, build};
    use super::super::config::SwarmRole;
    use super::super::gate::{Gate, GateLimits};
    use super::*;

    fn swarm() -> Swarm<Behaviour> {
        let gate = Gate::new(GateLimits::default(), Arc::default());
        let parts = Parts { role: SwarmRole::Owner, mdns: false, kademlia: false, gate };
        build(Keypair::generate_ed25519(), parts, Arc::default()).unwrap()
    }

    /// Listens at addresses; where it is reached by each.
    async fn listening(swarm: &mut Swarm<Behaviour>, at: &[&str]) -> Vec<Multiaddr> {
        for address in at {
            swarm.listen_on(address.parse().unwrap()).unwrap();
        }
        let mut addresses = Vec::new();
        while addresses.len() < at.len() {
            if let SwarmEvent::NewListenAddr { address, .. } = swarm.select_next_some().await {
                addresses.push(address);
            }
        }
        addresses
    }

    #[tokio::test]
    async fn tcp_comes_before_quic_and_quic_where_there_is_no_other() {
        let mut far = swarm();
        let at = ["/ip4/127.0.0.1/udp/0/quic-v1", "/ip4/127.0.0.1/tcp/0"];
        let addresses = listening(&mut far, &at).await;
        let peer = *far.local_peer_id();
        let answers = tokio::spawn(async move { while far.next().await.is_some() {} });
        let over = async |addresses: Vec<Multiaddr>| {
            let mut near = swarm();
            near.dial(DialOpts::peer_id(peer).addresses(addresses).build()).unwrap();
            loop {
                if let SwarmEvent::ConnectionEstablished { endpoint, .. } = near.select_next_some().await {
                    return is_quic(endpoint.get_remote_address());
                }
            }
        };
        assert!(!over(addresses.clone()).await);
        assert!(over(addresses.into_iter().filter(is_quic).collect()).await);
        answers.abort();
    }

    #[test]
    fn what_the_system_gives_a_socket_is_judged() {
        assert_eq!(few("212992\n"), Some(212_992));
        assert_eq!(few("4194304\n"), None);
        assert_eq!(few("many"), None);
    }
}
