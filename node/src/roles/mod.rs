//! What a process does in each role.

mod cluster;
pub mod owner;
mod progress;
mod results;
mod stop;
pub mod worker;
