//! The worker's product on an NVIDIA GPU.
//!
//! The kernels are CUDA C++ (`kernels/`), compiled at start for the device that is found ([`source`]); how many
//! threads run them on what is decided here ([`geometry`]). Their bytes are those of the portable kernel: without a GPU
//! the tests compile the very same source for the processor (`host/`) and compare it, all but the instructions of
//! `kernels/ptx.cuh`, which only a GPU has.

pub mod geometry;
pub mod source;

#[cfg(test)]
mod host;
#[cfg(test)]
mod tests;
