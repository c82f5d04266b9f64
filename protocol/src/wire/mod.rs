//! What travels between owner and worker.

pub mod messages;
