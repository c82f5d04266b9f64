//! Products on NVIDIA GPUs.
//!
//! The driver, the compiler library NVRTC and cuBLASLt are loaded when they are asked for, so that one binary runs with
//! and without them ([`super::devices`] says clearly what is missing). From the bottom up:
//!
//! 1. [`source`], [`geometry`]: the kernels in CUDA C++ (`kernels/`), and how many threads run them on what. Their bytes
//!    are those of the portable kernel: without a GPU the tests compile the very same source for the processor (`host/`)
//!    and compare it, all but the instructions of `kernels/ptx.cuh`, which only a GPU has;
//! 2. [`compile`]: NVRTC, with a cache on disk; `launch`: the kernels as functions with checked arguments;
//! 3. [`memory`]: what memory is for, pieces of a product; `buffers`: memory itself, and copies;
//! 4. `engine`: three ways of multiplying: a fused product for every device from compute capability 8.0 on, one with the
//!    instructions of 9.0, and cuBLASLt's int8 product (`blas`) between the steps of `kernels/biased.cu`. What bounds them
//!    is written down in `kernels/product.cu`;
//! 5. `pipeline`: a product from rows to tiles; `matrix`: a matrix on its way to the device;
//! 6. [`device`]: a GPU as a worker's device, whose engine has proven on it that it gives the portable kernel's bytes;
//!    [`measure`]: what it takes for a product.

mod base;
mod blas;
mod buffers;
mod cache;
pub mod compile;
pub mod device;
mod engine;
mod fault;
pub mod geometry;
#[cfg(test)]
mod host;
mod launch;
mod matrix;
pub mod measure;
pub mod memory;
mod pipeline;
pub mod source;
#[cfg(test)]
mod tests;
mod tiles;
mod timing;

pub use device::CudaDevice;
