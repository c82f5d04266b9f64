//! A processor that says of itself what a test wants, and that runs out of memory when it is told.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use protocol::ids::LinearShape;

use crate::matmul::{CpuDevice, Device, DeviceError, HeldMatrix, Kernel, ProductTask, TileSink};

/// What tests look at and set while a device serves.
#[derive(Default)]
pub(crate) struct Switches {
    /// No matrix is taken.
    pub(crate) refuse_to_hold: AtomicBool,
    /// No product is computed.
    pub(crate) refuse_to_multiply: AtomicBool,
    /// Bytes of the matrices that are held.
    pub(crate) held_bytes: AtomicU64,
    /// Products, or parts of them, that were asked for.
    pub(crate) products: AtomicU64,
}

/// See the module's documentation.
pub(crate) struct TestDevice {
    cpu: CpuDevice,
    pub(crate) name: &'static str,
    pub(crate) speed: f64,
    pub(crate) own_memory: Option<u64>,
    pub(crate) switches: Arc<Switches>,
}

impl TestDevice {
    pub(crate) fn new(name: &'static str, kernel: Arc<dyn Kernel>, speed: f64, own_memory: Option<u64>) -> Self {
        Self { cpu: CpuDevice::new(kernel), name, speed, own_memory, switches: Arc::default() }
    }
}

fn out_of_memory(device: &str) -> DeviceError {
    DeviceError::OutOfMemory { device: device.into(), needed: 1234, free: 56 }
}

impl Device for TestDevice {
    fn name(&self) -> String {
        self.name.into()
    }

    fn own_memory(&self) -> Option<u64> {
        self.own_memory
    }

    fn memory_for(&self, shape: LinearShape) -> u64 {
        self.cpu.memory_for(shape)
    }

    fn hold(&self, shape: LinearShape, values: &[i8]) -> Result<Arc<dyn HeldMatrix>, DeviceError> {
        if self.switches.refuse_to_hold.load(Ordering::SeqCst) {
            return Err(out_of_memory(self.name));
        }
        let held = self.cpu.hold(shape, values)?;
        self.switches.held_bytes.fetch_add(held.memory_bytes(), Ordering::SeqCst);
        Ok(Arc::new(TestMatrix { held, device: self.name, switches: Arc::clone(&self.switches) }))
    }

    fn measure_speed(&self) -> Result<f64, DeviceError> {
        Ok(self.speed)
    }
}

struct TestMatrix {
    held: Arc<dyn HeldMatrix>,
    device: &'static str,
    switches: Arc<Switches>,
}

impl HeldMatrix for TestMatrix {
    fn shape(&self) -> LinearShape {
        self.held.shape()
    }

    fn memory_bytes(&self) -> u64 {
        self.held.memory_bytes()
    }

    fn multiply(&self, task: &ProductTask, tile_columns: usize, sink: TileSink<'_>) -> Result<(), DeviceError> {
        self.switches.products.fetch_add(1, Ordering::SeqCst);
        if self.switches.refuse_to_multiply.load(Ordering::SeqCst) {
            return Err(out_of_memory(self.device));
        }
        self.held.multiply(task, tile_columns, sink)
    }
}

impl Drop for TestMatrix {
    fn drop(&mut self) {
        self.switches.held_bytes.fetch_sub(self.held.memory_bytes(), Ordering::SeqCst);
    }
}
