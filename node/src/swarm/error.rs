//! Why a swarm does not start or no longer answers.

use libp2p::Multiaddr;

/// Why a swarm does not start or no longer answers.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SwarmError {
    /// An address cannot be listened on.
    #[error(
        "cannot listen on {address}: {why}. Choose another address or port (port 0 takes a free one), or end the \
         process that uses it"
    )]
    Listen {
        /// The address as configured.
        address: Multiaddr,
        /// What the system says.
        why: String,
    },
    /// A part of the swarm cannot be set up.
    #[error("cannot set up {part}: {why}")]
    Setup {
        /// Which part.
        part: &'static str,
        /// What it says.
        why: String,
    },
    /// A service is on the network already.
    #[error("this node serves already: a swarm takes one service")]
    AlreadyServing,
    /// The swarm's task has ended.
    #[error("the swarm has been shut down")]
    Closed,
}
