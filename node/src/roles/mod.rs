//! What a process does in each role.

mod adapter;
mod bans;
mod cluster;
mod masks;
mod model_name;
pub mod owner;
mod prefix;
mod progress;
mod results;
mod start;
pub(crate) mod stop;
pub mod worker;

pub use start::Start;
