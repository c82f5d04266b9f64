//! The worker's product on an NVIDIA GPU.
//!
//! The kernels are CUDA C++ (`kernels/`), compiled at start for the device that is found ([`source`]); how many
//! threads run them on what is decided here ([`geometry`]). Their bytes are those of the portable kernel: without a GPU
//! the tests compile the very same source for the processor (`host/`) and compare it, all but the instructions of
//! `kernels/ptx.cuh`, which only a GPU has.
//!
//! There are three ways to multiply: the fused product for every device from compute capability 8.0 on, the fused product
//! with the instructions of 9.0, and a library's int8 product between the steps of `kernels/biased.cu`. What bounds them
//! is written down in `kernels/product.cu`.

pub mod geometry;
pub mod source;

#[cfg(test)]
mod host;
#[cfg(test)]
mod tests;
