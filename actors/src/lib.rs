//! The actors of an owner and of a worker. They know no sockets: the network is a [`transport::Transport`].

pub mod adapter;
pub mod backend;
pub mod checkpoint;
pub mod compensation;
pub mod data;
pub mod export;
pub mod files;
pub mod generation;
mod heavy;
pub mod lora;
pub mod matmul;
pub mod owner;
pub mod prefix;
mod shares;
#[cfg(test)]
mod testing;
pub mod trace;
pub mod trainer;
pub mod transformer;
pub mod transport;
pub mod worker;
