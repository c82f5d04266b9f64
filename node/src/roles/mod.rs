//! What a process does in each role.

mod adapter;
mod answers;
mod bans;
pub(crate) mod chat_style;
pub(crate) mod cluster;
pub(crate) mod generation;
mod masks;
mod model_name;
pub mod owner;
mod prefix;
pub(crate) mod progress;
pub(crate) mod ready;
mod results;
pub mod serve;
mod start;
pub(crate) mod stop;
pub mod worker;

pub use generation::GenerationSetup;
pub use ready::Used;
pub use start::Start;
