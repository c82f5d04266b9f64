//! The velum node as a library: what the binary `node` runs, one module a job.

pub mod demo;
pub mod report;
pub mod swarm;
