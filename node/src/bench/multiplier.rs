//! What multiplies in a measurement: the fastest kernel of the processor, or a GPU.

use std::str::FromStr;
use std::sync::Arc;

use actors::matmul::cuda::CudaDevice;
use actors::matmul::devices::{self, GpuRequest};
use actors::matmul::{CpuDevice, Device as _, best_kernel};
use anyhow::Context as _;

use crate::folders;

/// Where a product is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// The fastest kernel of the processor.
    Cpu,
    /// A GPU, by the driver's number.
    Cuda(u32),
}

/// A text that names no device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no device: write cpu, or cuda:0")]
pub struct UnknownDevice(String);

impl FromStr for Device {
    type Err = UnknownDevice;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let number = |text: &str| text.strip_prefix("cuda:")?.parse().ok();
        match text {
            "cpu" => Ok(Self::Cpu),
            _ => number(text).map(Self::Cuda).ok_or_else(|| UnknownDevice(text.to_owned())),
        }
    }
}

/// A device, and what is known of it beside what every device tells.
pub struct Multiplier {
    /// What holds matrices and multiplies them.
    pub device: Arc<dyn actors::matmul::Device>,
    /// `cpu`, or the GPU's name.
    pub name: String,
    /// The processor's kernel, or the GPU's engine.
    pub kernel: String,
    /// Operations that a multiply-add of a byte takes.
    pub operations: usize,
    /// The most of these per second, on registers alone.
    pub peak_ops: Option<f64>,
}

impl Multiplier {
    /// The fastest kernel of the processor.
    pub fn cpu() -> Self {
        let kernel = best_kernel();
        Self {
            name: "cpu".to_owned(),
            kernel: kernel.name().to_owned(),
            operations: kernel.operations(1),
            peak_ops: kernel.peak_ops(),
            device: Arc::new(CpuDevice::new(kernel)),
        }
    }

    /// A device.
    ///
    /// # Errors
    /// When there is no such device, or it cannot be used.
    pub fn open(device: Device) -> anyhow::Result<Self> {
        match device {
            Device::Cpu => Ok(Self::cpu()),
            Device::Cuda(number) => {
                let gpu = open_gpu(number)?;
                Ok(Self {
                    name: gpu.name(),
                    kernel: gpu.engine().to_owned(),
                    operations: 2,
                    peak_ops: Some(gpu.peak_ops()?),
                    device: Arc::new(gpu),
                })
            }
        }
    }
}

/// A GPU, by the driver's number.
///
/// # Errors
/// When there is no such GPU, or it cannot be used.
pub fn open_gpu(number: u32) -> anyhow::Result<CudaDevice> {
    let wanted = || format!("--device cuda:{number}");
    let cache = folders::kernels().ok();
    let gpus = devices::open_cuda(&GpuRequest::List(vec![number]), cache.as_deref()).with_context(wanted)?;
    gpus.into_iter().next().with_context(wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_read() {
        assert_eq!("cpu".parse(), Ok(Device::Cpu));
        assert_eq!("cuda:1".parse(), Ok(Device::Cuda(1)));
        for text in ["cuda", "cuda:", "cuda:-1", "gpu"] {
            assert!(text.parse::<Device>().is_err(), "{text}");
        }
    }
}
