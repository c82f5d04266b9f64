//! The demo: a real model, an owner and three workers on one machine, with nothing to prepare.

pub mod fetch;
