//! A GPU as a worker's device.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use protocol::ids::{Direction, LinearShape};

use super::base::{Base, off_pool};
use super::blas::Blas;
use super::compile::Nvrtc;
use super::engine::{CublasLt, Engine, Fused};
use super::fault::Fault;
use super::launch::Side;
use super::memory::Sizes;
use super::{matrix, memory, pipeline};
use crate::matmul::devices::GpuInfo;
use crate::matmul::{Device, DeviceError, HeldMatrix, ProductTask, TileSink, exactness, measure_device_speed};

/// Most that a product may sum over: as many products of a byte by an int8 do not overflow 32 bits.
const MOST_INNER: usize = 65_000;
/// The product by which engines are compared: large enough that it is the tensor cores that are measured.
const COMPARED: Sizes = Sizes { rows: 1024, inner: 2048, outer: 4096, limbs: 3, output_limbs: 2 };
/// Time for each.
const COMPARISON: Duration = Duration::from_millis(50);

/// The variable of the environment that names the engines that may be used, `fused,cublaslt`; all, where it is not set. A
/// kernel that goes beyond its memory breaks the GPU for the whole process, and then nothing else helps.
pub const ENGINES_VARIABLE: &str = "VELUM_GPU_ENGINES";

fn is_allowed(allowed: Option<&str>, engine: &str) -> bool {
    allowed.is_none_or(|allowed| allowed.split(',').any(|name| name.trim() == engine))
}

/// A GPU whose engine has proven itself on it.
pub struct CudaDevice {
    base: Arc<Base>,
    engine: Arc<dyn Engine>,
    /// Engines that are slower, and what is wrong with those that are not sound.
    others: Vec<Result<Arc<dyn Engine>, String>>,
    blas: Option<Arc<Blas>>,
    own_memory: u64,
    free_memory: u64,
}

impl CudaDevice {
    /// Opens a GPU, compiles its kernels or reads them from the folder `cache`, and lets each engine prove that it gives
    /// the portable kernel's bytes; the fastest of those that do serves. [`ENGINES_VARIABLE`] may leave some out.
    ///
    /// # Errors
    /// When the driver fails, the kernels do not compile, or no engine multiplies rightly.
    pub fn open(gpu: &GpuInfo, nvrtc: &Nvrtc, cache: Option<&Path>) -> Result<Self, DeviceError> {
        let (major, minor) = gpu.compute_capability;
        let name = format!("cuda:{} ({}, compute capability {major}.{minor})", gpu.number, gpu.name);
        let failed = |fault: Fault| DeviceError::Failed { device: name.clone(), what: fault.to_string() };
        let base = Base::open(name.clone(), gpu.number as usize, (major, minor), nvrtc, cache).map_err(failed)?;
        let base = Arc::new(base);
        let blas = match Blas::open(&base.compute) {
            Ok(Some(blas)) => Some(Arc::new(blas)),
            Ok(None) => {
                tracing::info!(device = %name, "cuBLASLt was not found and is not tried");
                None
            }
            Err(fault) => {
                tracing::warn!(device = %name, %fault, "cuBLASLt is not used");
                None
            }
        };
        let mut engines: Vec<Arc<dyn Engine>> = vec![Arc::new(Fused::Everywhere)];
        engines.extend(blas.iter().map(|blas| Arc::new(CublasLt::new(Arc::clone(blas))) as Arc<dyn Engine>));
        if base.functions.has_hopper() {
            engines.push(Arc::new(Fused::Hopper));
        }
        let allowed = std::env::var(ENGINES_VARIABLE).ok();
        engines.retain(|engine| is_allowed(allowed.as_deref(), engine.name()));
        let (mut sound, mut faults) = (Vec::new(), Vec::new());
        for engine in engines {
            let tried =
                Self { engine, own_memory: 0, free_memory: 0, blas: None, others: Vec::new(), base: Arc::clone(&base) };
            match tried.prove() {
                Ok(seconds) => {
                    let milliseconds = 1e3 * seconds;
                    tracing::info!(device = %base.name, engine = tried.engine(), milliseconds, "multiplies rightly");
                    sound.push((seconds, tried.engine));
                }
                Err(what) => {
                    tracing::error!(device = %base.name, engine = tried.engine(), what, "is not used");
                    faults.push(format!("{}: {what}", tried.engine()));
                    if let Err(fault) = base.synchronize() {
                        let engine = tried.engine();
                        let what = format!(
                            "engine {engine} broke it for this process ({what}; {fault}): leave {engine} out of \
                             {ENGINES_VARIABLE}, for example {ENGINES_VARIABLE}=fused,cublaslt"
                        );
                        return Err(DeviceError::Failed { device: name, what });
                    }
                }
            }
        }
        sound.sort_by(|(a, _), (b, _)| a.total_cmp(b));
        let mut engines = sound.into_iter().map(|(_, engine)| engine);
        let Some(engine) = engines.next() else {
            let what = match (&allowed, faults.is_empty()) {
                (Some(allowed), true) => format!("it has no engine of {ENGINES_VARIABLE}={allowed}"),
                _ => format!("no way of multiplying works on it: {}", faults.join("; ")),
            };
            return Err(DeviceError::Failed { device: name, what });
        };
        let (free, total) = base.release().and_then(|()| base.memory()).map_err(|fault| base.error(fault))?;
        let own_memory = memory::for_matrices(free, total);
        let others = engines.map(Ok).chain(faults.into_iter().map(Err)).collect();
        Ok(Self { base, engine, others, blas, own_memory, free_memory: free })
    }

    /// The device with each other engine, and what is wrong with those that are not sound: for whoever tries or measures
    /// all.
    pub fn others(&self) -> Vec<Result<Self, String>> {
        let with = |engine: &Arc<dyn Engine>| Self {
            base: Arc::clone(&self.base),
            engine: Arc::clone(engine),
            others: Vec::new(),
            blas: self.blas.clone(),
            own_memory: self.own_memory,
            free_memory: self.free_memory,
        };
        self.others.iter().map(|other| other.as_ref().map(with).map_err(String::clone)).collect()
    }

    /// Bytes that were free when it was opened.
    pub fn free_memory(&self) -> u64 {
        self.free_memory
    }

    /// Which engine serves: `fused`, `hopper` or `cublaslt`.
    pub fn engine(&self) -> &'static str {
        self.engine.name()
    }

    pub(crate) fn serving(&self) -> &dyn Engine {
        self.engine.as_ref()
    }

    /// cuBLASLt, if this machine has it.
    pub(crate) fn blas(&self) -> Option<&Arc<Blas>> {
        self.blas.as_ref()
    }

    pub(crate) fn base(&self) -> &Base {
        &self.base
    }

    /// Checks the engine, and measures it: seconds.
    fn prove(&self) -> Result<f64, String> {
        for case in exactness::Case::start_up() {
            case.check(self).map_err(|error| error.to_string())?;
        }
        let Sizes { inner: d_in, outer: d_out, .. } = COMPARED;
        let shape = LinearShape { d_in, d_out };
        let values: Vec<i8> = exactness::bytes(d_in * d_out).map(|byte| byte as i8).collect();
        let matrix = self.held(shape, &values).map_err(|error| error.to_string())?;
        self.product_seconds(&matrix, Direction::Forward, COMPARED, COMPARISON).map_err(|error| error.to_string())
    }

    /// Takes a matrix into the device's memory.
    ///
    /// # Errors
    /// As of [`Device::hold`].
    pub fn held(&self, shape: LinearShape, values: &[i8]) -> Result<CudaMatrix, DeviceError> {
        if shape.d_in.checked_mul(shape.d_out) != Some(values.len()) {
            return Err(DeviceError::Values { count: values.len(), shape });
        }
        if shape.d_in.max(shape.d_out) > MOST_INNER {
            let what = format!("{} × {} is more than {MOST_INNER} features", shape.d_in, shape.d_out);
            return Err(DeviceError::Failed { device: self.base.name.clone(), what });
        }
        let upload = || {
            let mut workspace = self.base.workspace()?;
            let uploader = &mut workspace.uploader;
            let forward = matrix::upload(&self.base, uploader, shape, values, Direction::Forward)?;
            let backward = matrix::upload(&self.base, uploader, shape, values, Direction::Backward)?;
            // What went wrong on the way shows here and not in a product.
            self.base.up.synchronize()?;
            self.base.compute.synchronize()?;
            Ok((forward, backward))
        };
        let (forward, backward) = off_pool(upload).map_err(|fault| self.base.error(fault))?;
        let (base, engine) = (Arc::clone(&self.base), Arc::clone(&self.engine));
        Ok(CudaMatrix { base, engine, shape, forward, backward })
    }
}

impl Device for CudaDevice {
    fn name(&self) -> String {
        self.base.name.clone()
    }

    fn own_memory(&self) -> Option<u64> {
        Some(self.own_memory)
    }

    fn memory_for(&self, shape: LinearShape) -> u64 {
        memory::matrix_bytes(shape)
    }

    fn hold(&self, shape: LinearShape, values: &[i8]) -> Result<Arc<dyn HeldMatrix>, DeviceError> {
        Ok(Arc::new(self.held(shape, values)?))
    }

    fn measure_speed(&self) -> Result<f64, DeviceError> {
        measure_device_speed(self)
    }
}

/// A matrix in a GPU's memory.
pub struct CudaMatrix {
    base: Arc<Base>,
    engine: Arc<dyn Engine>,
    shape: LinearShape,
    forward: Side,
    backward: Side,
}

impl CudaMatrix {
    /// Whether it lies in the memory of this GPU.
    pub(crate) fn is_of(&self, base: &Base) -> bool {
        std::ptr::eq(&*self.base, base)
    }

    pub(crate) fn side(&self, direction: Direction) -> &Side {
        match direction {
            Direction::Forward => &self.forward,
            Direction::Backward => &self.backward,
        }
    }
}

impl HeldMatrix for CudaMatrix {
    fn shape(&self) -> LinearShape {
        self.shape
    }

    fn memory_bytes(&self) -> u64 {
        memory::matrix_bytes(self.shape)
    }

    fn multiply(&self, task: &ProductTask, tile_columns: usize, sink: TileSink<'_>) -> Result<(), DeviceError> {
        let side = self.side(task.direction);
        let sizes = pipeline::sizes(task, side.inner, side.outer)?;
        let (base, engine) = (&*self.base, self.engine.as_ref());
        off_pool(|| pipeline::multiply(base, engine, side, (task, sizes), tile_columns, sink))
            .map_err(|fault| base.error(fault))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn engines_can_be_left_out() {
        assert!(is_allowed(None, "hopper"));
        assert!(is_allowed(Some("fused, hopper"), "hopper") && is_allowed(Some("fused"), "fused"));
        assert!(!is_allowed(Some("fused,cublaslt"), "hopper") && !is_allowed(Some(""), "fused"));
    }
}
