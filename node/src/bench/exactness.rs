//! `node bench exactness`: random products on a device against the portable kernel, byte for byte, until the time is up
//! or a byte differs.
//!
//! On the processor every kernel of this machine is tried, on a GPU every engine.

use std::sync::Arc;
use std::time::{Duration, Instant};

use actors::matmul::exactness::Case;
use actors::matmul::{CpuDevice, Device as Multiplies, kernels};
use anyhow::{Context as _, bail};

use super::multiplier::{Device, open_gpu};

/// What is tried, and how long.
#[derive(Clone, Copy, Debug)]
pub struct ExactnessOptions {
    /// Where products are computed.
    pub device: Device,
    /// Time for random cases, after those with which every device is tried at a worker's start.
    pub seconds: u64,
    /// Of the first random case; each further one has the next number.
    pub seed: u64,
}

/// A way to multiply, by its name.
type Way = (String, Arc<dyn Multiplies>);

/// Tries products and prints how many were right. Blocks.
///
/// # Errors
/// When there is no such device, or at the first product that is not the portable kernel's, with its seed.
pub fn run(options: &ExactnessOptions) -> anyhow::Result<()> {
    let ways = ways(options.device)?;
    let began = Instant::now();
    let budget = Duration::from_secs(options.seconds);
    let fixed = Case::start_up();
    let random = (options.seed..).map(Case::random).take_while(|_| began.elapsed() < budget);
    let mut count = 0;
    for case in fixed.into_iter().chain(random) {
        for (name, device) in &ways {
            case.check(device.as_ref()).with_context(|| format!("{name} does not multiply exactly"))?;
        }
        count += 1;
    }
    for (name, _) in &ways {
        println!("{name}: {count} products, each byte the portable kernel's");
    }
    Ok(())
}

fn ways(device: Device) -> anyhow::Result<Vec<Way>> {
    let mut ways: Vec<Way> = Vec::new();
    match device {
        Device::Cpu => {
            let mut kernels = kernels();
            // The portable one, by which the others are judged.
            kernels.pop();
            if kernels.is_empty() {
                bail!("this processor has the portable kernel only, and there is nothing to compare with it");
            }
            ways.extend(kernels.into_iter().map(|kernel| {
                let device = CpuDevice::new(kernel);
                (device.name(), Arc::new(device) as _)
            }));
        }
        Device::Cuda(number) => {
            let gpu = open_gpu(number)?;
            for other in gpu.others() {
                let other = other.map_err(|what| anyhow::anyhow!("{}: {what}", gpu.name()))?;
                ways.push((format!("{}, {}", other.name(), other.engine()), Arc::new(other)));
            }
            ways.insert(0, (format!("{}, {}", gpu.name(), gpu.engine()), Arc::new(gpu)));
        }
    }
    Ok(ways)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_gpu_that_is_not_there_is_an_error_that_names_it() {
        let options = ExactnessOptions { device: Device::Cuda(9_999), seconds: 0, seed: 0 };
        assert!(format!("{:#}", run(&options).unwrap_err()).contains("cuda:9999"));
    }

    #[test]
    fn the_processor_has_a_way_for_each_kernel_but_the_portable_one() {
        let Ok(ways) = ways(Device::Cpu) else { return };
        assert_eq!(ways.len(), kernels().len() - 1);
        assert!(ways.iter().all(|(name, _)| name.starts_with("cpu (") && !name.contains("portable")));
    }
}
