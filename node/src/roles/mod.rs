//! What a process does in each role.

mod bans;
mod cluster;
pub mod owner;
mod progress;
mod results;
pub(crate) mod stop;
pub mod worker;
