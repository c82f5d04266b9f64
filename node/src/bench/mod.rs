//! `node bench`: what this machine can do, as JSON or for people.

pub mod step;
