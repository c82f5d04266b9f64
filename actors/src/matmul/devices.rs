//! Which GPUs a worker is asked to use, and what this machine has.
//!
//! The driver is loaded when it is asked for, so that one binary runs with and without it. A request that cannot be met
//! is answered with what was found and what to do about it.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use cudarc::driver::result::{device, init};
use cudarc::driver::sys::CUdevice_attribute::{
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
};
use cudarc::driver::{DriverError, sys};

use super::cuda::CudaDevice;
use super::cuda::compile::{CompileError, Nvrtc, panic_text};
use super::cuda::memory::set_aside;
use super::cuda::source::LEAST_CAPABILITY;
use super::{Device, DeviceError};

/// The oldest driver, by the CUDA version that it is made for: the oldest that runs what a compiler of CUDA 12 makes.
const OLDEST_DRIVER: CudaVersion = CudaVersion { major: 12, minor: 0 };

/// The argument of `--gpus`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum GpuRequest {
    /// `none`: CPU only.
    #[default]
    None,
    /// `all`: every GPU of the machine.
    All,
    /// `0,1`: these, by the driver's numbers.
    List(Vec<u32>),
}

/// A text that is no `--gpus` argument.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} names no GPUs: write none, all, or numbers such as 0,1")]
pub struct ParseGpuRequestError {
    text: String,
}

impl FromStr for GpuRequest {
    type Err = ParseGpuRequestError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.trim() {
            "none" => return Ok(Self::None),
            "all" => return Ok(Self::All),
            _ => {}
        }
        let numbers: Result<Vec<u32>, _> = text.split(',').map(|number| number.trim().parse()).collect();
        let mut numbers = numbers.map_err(|_| ParseGpuRequestError { text: text.to_owned() })?;
        numbers.sort_unstable();
        numbers.dedup();
        Ok(Self::List(numbers))
    }
}

impl fmt::Display for GpuRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::All => f.write_str("all"),
            Self::List(numbers) => {
                let numbers: Vec<String> = numbers.iter().map(u32::to_string).collect();
                f.write_str(&numbers.join(","))
            }
        }
    }
}

/// A version of CUDA.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct CudaVersion {
    /// First number.
    pub major: u32,
    /// Second number.
    pub minor: u32,
}

impl CudaVersion {
    /// As the driver has it, `12040` for 12.4.
    fn of_number(number: i32) -> Self {
        let number = u32::try_from(number).unwrap_or(0);
        Self { major: number / 1000, minor: number % 1000 / 10 }
    }
}

impl fmt::Display for CudaVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// A GPU that the driver knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GpuInfo {
    /// The driver's number.
    pub number: u32,
    /// Its name.
    pub name: String,
    /// Compute capability, major and minor.
    pub compute_capability: (u32, u32),
    /// Its memory, bytes.
    pub memory_bytes: u64,
}

impl fmt::Display for GpuInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (major, minor) = self.compute_capability;
        let memory = gibibytes(self.memory_bytes);
        write!(f, "{}: {} (compute capability {major}.{minor}, {memory})", self.number, self.name)
    }
}

fn gibibytes(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30))
}

/// Why a request for GPUs cannot be met.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GpuError {
    /// No driver library.
    #[error("--gpus {request}: no CUDA driver (libcuda) was found on this machine; use --gpus none")]
    NoDriver {
        /// What was asked for.
        request: GpuRequest,
    },
    /// A driver that does not work.
    #[error("--gpus {request}: the CUDA driver was found but does not work: {what}; use --gpus none")]
    Driver {
        /// What was asked for.
        request: GpuRequest,
        /// What the driver said.
        what: String,
    },
    /// A driver that is too old for the kernels, or for the compiler that makes them.
    #[error(
        "--gpus {request}: the driver is made for CUDA {found}, and CUDA {needed} is needed by {by}; install a newer \
         driver{}", if *.needed > OLDEST_DRIVER { ", or an older libnvrtc" } else { "" }
    )]
    OldDriver {
        /// What was asked for.
        request: GpuRequest,
        /// The driver's version.
        found: CudaVersion,
        /// The version that it has to have.
        needed: CudaVersion,
        /// What needs it.
        by: &'static str,
    },
    /// A driver without GPUs.
    #[error("--gpus {request}: the CUDA driver works but sees no GPU; use --gpus none")]
    NoGpu {
        /// What was asked for.
        request: GpuRequest,
    },
    /// Numbers that no GPU has.
    #[error("--gpus {request}: there is no GPU {missing}; found: {}", listed(.found))]
    Missing {
        /// What was asked for.
        request: GpuRequest,
        /// The first number that no GPU has.
        missing: u32,
        /// The GPUs that there are.
        found: Vec<GpuInfo>,
    },
    /// A GPU without the instructions that the kernels use.
    #[error(
        "--gpus {request}: GPU {gpu} is too old, compute capability {}.{} (Ampere) is needed; found: {}",
        LEAST_CAPABILITY.0, LEAST_CAPABILITY.1, listed(.found)
    )]
    OldGpu {
        /// What was asked for.
        request: GpuRequest,
        /// The first GPU that is too old.
        gpu: Box<GpuInfo>,
        /// The GPUs that there are.
        found: Vec<GpuInfo>,
    },
    /// The kernels cannot be compiled.
    #[error("--gpus {request}: {source}")]
    Compiler {
        /// What was asked for.
        request: GpuRequest,
        /// Why.
        source: CompileError,
    },
    /// No memory is left to matrices.
    #[error(
        "--gpus {request}: GPU {gpu} has {} free, and {} are set aside for products and others, so that nothing is left \
         for layers; end what else uses it, or use another",
        gibibytes(*.free), gibibytes(*.needed)
    )]
    Memory {
        /// What was asked for.
        request: GpuRequest,
        /// The GPU.
        gpu: Box<GpuInfo>,
        /// Its free bytes.
        free: u64,
        /// Bytes that are set aside.
        needed: u64,
    },
    /// A GPU that does not work.
    #[error("--gpus {request}: {source}")]
    Device {
        /// What was asked for.
        request: GpuRequest,
        /// Why.
        source: DeviceError,
    },
}

fn listed(found: &[GpuInfo]) -> String {
    found.iter().map(GpuInfo::to_string).collect::<Vec<_>>().join("; ")
}

/// What the driver says about this machine's GPUs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GpuProbe {
    /// No driver library.
    NoDriver,
    /// The driver failed, with its words.
    Failed(String),
    /// The driver works.
    Found(FoundGpus),
}

/// A driver that works.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundGpus {
    /// The version of CUDA that it is made for.
    pub driver: CudaVersion,
    /// The GPUs that it knows.
    pub gpus: Vec<GpuInfo>,
}

/// Asks the driver, if there is one, for its GPUs.
pub fn probe() -> GpuProbe {
    // SAFETY: this only opens the driver's library, which the system's loader finds under the driver's own name;
    // initialisers of a library of that name are trusted as every CUDA program trusts them.
    if !unsafe { sys::is_culib_present() } {
        return GpuProbe::NoDriver;
    }
    // cudarc panics where a library lacks a symbol, which an old or broken driver may.
    match catch_unwind(list) {
        Ok(Ok(found)) => GpuProbe::Found(found),
        Ok(Err(error)) => GpuProbe::Failed(error.to_string()),
        Err(_) => GpuProbe::Failed("its library lacks a function that is needed".into()),
    }
}

fn list() -> Result<FoundGpus, DriverError> {
    init()?;
    let mut driver = 0;
    // SAFETY: the version is written to a valid pointer.
    unsafe { sys::cuDriverGetVersion(&raw mut driver) }.result()?;
    let gpus = (0..device::get_count()?).map(|number| {
        let gpu = device::get(number)?;
        // SAFETY: the handle is one that the driver has just given.
        let attribute = |which| unsafe { device::get_attribute(gpu, which) };
        let major = attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        Ok(GpuInfo {
            number: number.unsigned_abs(),
            name: device::get_name(gpu)?,
            compute_capability: (major.unsigned_abs(), minor.unsigned_abs()),
            // SAFETY: as above.
            memory_bytes: unsafe { device::total_mem(gpu) }? as u64,
        })
    });
    Ok(FoundGpus { driver: CudaVersion::of_number(driver), gpus: gpus.collect::<Result<_, DriverError>>()? })
}

/// The GPUs that a request names, and the driver's version, if the request can be met by what was found: none for a
/// request for no GPU.
///
/// # Errors
/// When there is no such GPU, or it or its driver is too old, with what was found.
pub fn check(request: &GpuRequest, probe: impl FnOnce() -> GpuProbe) -> Result<FoundGpus, GpuError> {
    if *request == GpuRequest::None {
        return Ok(FoundGpus { driver: OLDEST_DRIVER, gpus: Vec::new() });
    }
    let request = request.clone();
    let FoundGpus { driver, gpus: found } = match probe() {
        GpuProbe::NoDriver => return Err(GpuError::NoDriver { request }),
        GpuProbe::Failed(what) => return Err(GpuError::Driver { request, what }),
        GpuProbe::Found(found) => found,
    };
    if driver < OLDEST_DRIVER {
        return Err(GpuError::OldDriver { request, found: driver, needed: OLDEST_DRIVER, by: "the kernels" });
    }
    if found.is_empty() {
        return Err(GpuError::NoGpu { request });
    }
    let asked: Vec<GpuInfo> = match &request {
        GpuRequest::List(numbers) => {
            let missing = numbers.iter().find(|&&number| found.iter().all(|gpu| gpu.number != number));
            if let Some(&missing) = missing {
                return Err(GpuError::Missing { request, missing, found });
            }
            found.iter().filter(|gpu| numbers.contains(&gpu.number)).cloned().collect()
        }
        _ => found.clone(),
    };
    if let Some(gpu) = asked.iter().find(|gpu| gpu.compute_capability < LEAST_CAPABILITY) {
        return Err(GpuError::OldGpu { request, gpu: Box::new(gpu.clone()), found });
    }
    Ok(FoundGpus { driver, gpus: asked })
}

/// Whether a driver runs what a compiler makes: any of its own major version, or an older one.
fn check_compiler(request: &GpuRequest, driver: CudaVersion, compiler: (i32, i32)) -> Result<(), GpuError> {
    let major = u32::try_from(compiler.0).unwrap_or(0);
    if driver.major >= major {
        return Ok(());
    }
    let needed = CudaVersion { major, minor: 0 };
    Err(GpuError::OldDriver { request: request.clone(), found: driver, needed, by: "libnvrtc" })
}

/// Opens the GPUs that a request names, in the order of their numbers: each compiles its kernels, or reads them from the
/// folder `cache`, and proves that it multiplies rightly. Blocks for seconds.
///
/// # Errors
/// When a GPU, the driver, or the compiler library is missing, too old, too small, or does not work.
pub fn open(request: &GpuRequest, cache: Option<&Path>) -> Result<Vec<Arc<dyn Device>>, GpuError> {
    let gpus = open_cuda(request, cache)?;
    Ok(gpus.into_iter().map(|gpu| Arc::new(gpu) as Arc<dyn Device>).collect())
}

/// As [`open`], for what only GPUs can be asked.
///
/// # Errors
/// As of [`open`].
pub fn open_cuda(request: &GpuRequest, cache: Option<&Path>) -> Result<Vec<CudaDevice>, GpuError> {
    let FoundGpus { driver, gpus } = check(request, probe)?;
    if gpus.is_empty() {
        return Ok(Vec::new());
    }
    let nvrtc = Nvrtc::find().map_err(|source| GpuError::Compiler { request: request.clone(), source })?;
    check_compiler(request, driver, nvrtc.version())?;
    let open = |gpu: GpuInfo| {
        let opened = catch_unwind(AssertUnwindSafe(|| CudaDevice::open(&gpu, &nvrtc, cache)));
        let opened = opened.unwrap_or_else(|panic| {
            Err(DeviceError::Failed { device: gpu.to_string(), what: panic_text(panic.as_ref()) })
        });
        let device = opened.map_err(|source| GpuError::Device { request: request.clone(), source })?;
        if device.own_memory() == Some(0) {
            let (free, needed) = (device.free_memory(), set_aside(gpu.memory_bytes));
            return Err(GpuError::Memory { request: request.clone(), gpu: Box::new(gpu), free, needed });
        }
        Ok(device)
    };
    gpus.into_iter().map(open).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gpu(number: u32) -> GpuInfo {
        GpuInfo { number, name: "Test 9000".into(), compute_capability: (9, 0), memory_bytes: 80 << 30 }
    }

    fn found(gpus: Vec<GpuInfo>) -> GpuProbe {
        GpuProbe::Found(FoundGpus { driver: CudaVersion { major: 12, minor: 4 }, gpus })
    }

    #[test]
    fn requests_are_parsed() {
        assert_eq!("none".parse(), Ok(GpuRequest::None));
        assert_eq!(" all ".parse(), Ok(GpuRequest::All));
        assert_eq!("1, 0,1".parse(), Ok(GpuRequest::List(vec![0, 1])));
        for text in ["", "every", "0,", "-1", "0;1", "4294967296", "none,0"] {
            let error = text.parse::<GpuRequest>().expect_err(text);
            assert!(error.to_string().contains(&format!("{text:?}")), "{error}");
        }
        for text in ["none", "all", "0,1"] {
            assert_eq!(text.parse::<GpuRequest>().map(|request| request.to_string()), Ok(text.to_owned()));
        }
    }

    #[test]
    fn a_request_for_no_gpu_asks_no_driver() {
        let none = check(&GpuRequest::None, || panic!("the driver was asked"));
        assert_eq!(none.map(|found| found.gpus), Ok(Vec::new()));
        assert!(matches!(open(&GpuRequest::None, None), Ok(devices) if devices.is_empty()));
    }

    #[test]
    fn a_request_that_can_be_met_names_its_gpus() {
        let gpus = |request: &GpuRequest| {
            let found = check(request, || found(vec![gpu(0), gpu(1), gpu(2)])).expect("there are such GPUs");
            found.gpus.iter().map(|gpu| gpu.number).collect::<Vec<_>>()
        };
        assert_eq!(gpus(&GpuRequest::All), [0, 1, 2]);
        assert_eq!(gpus(&GpuRequest::List(vec![0, 2])), [0, 2]);
    }

    #[test]
    fn a_request_for_gpus_says_what_was_found() {
        let list = GpuRequest::List(vec![0, 3]);
        let text = |request: &GpuRequest, probe: GpuProbe| check(request, || probe).expect_err("refused").to_string();
        assert!(text(&GpuRequest::All, GpuProbe::NoDriver).contains("no CUDA driver"));
        assert!(text(&list, GpuProbe::Failed("error 999".into())).contains("error 999"));
        assert!(text(&list, found(Vec::new())).contains("sees no GPU"));
        let missing = text(&list, found(vec![gpu(0), gpu(1)]));
        assert!(missing.contains("no GPU 3") && missing.contains("1: Test 9000 (compute capability 9.0, 80.0 GiB)"));
        let old = FoundGpus { driver: CudaVersion::of_number(11080), gpus: vec![gpu(0)] };
        let old = text(&GpuRequest::All, GpuProbe::Found(old));
        assert!(old.contains("CUDA 11.8") && old.contains("CUDA 12.0") && old.contains("newer driver"), "{old}");
        let turing = GpuInfo { compute_capability: (7, 5), ..gpu(1) };
        let old = text(&GpuRequest::All, found(vec![gpu(0), turing.clone()]));
        assert!(old.contains("1: Test 9000 (compute capability 7.5") && old.contains("8.0 (Ampere)"), "{old}");
        assert!(
            check(&GpuRequest::List(vec![0]), || found(vec![gpu(0), turing])).is_ok(),
            "the old one is not asked for"
        );
    }

    #[test]
    fn a_compiler_newer_than_the_driver_is_refused() {
        let driver = CudaVersion { major: 12, minor: 2 };
        assert_eq!(check_compiler(&GpuRequest::All, driver, (12, 9)), Ok(()));
        assert_eq!(check_compiler(&GpuRequest::All, driver, (11, 8)), Ok(()));
        let text = check_compiler(&GpuRequest::All, driver, (13, 0)).expect_err("newer").to_string();
        assert!(text.contains("CUDA 12.2") && text.contains("13.0") && text.contains("older libnvrtc"), "{text}");
    }

    #[test]
    fn a_missing_compiler_says_how_to_get_it() {
        let error = GpuError::Compiler { request: GpuRequest::All, source: CompileError::NoLibrary };
        let text = error.to_string();
        assert!(text.contains("pip install nvidia-cuda-nvrtc-cu12") && text.contains("LD_LIBRARY_PATH"), "{text}");
    }

    #[test]
    fn too_little_memory_is_told_in_figures() {
        let (request, gpu) = (GpuRequest::List(vec![1]), Box::new(gpu(1)));
        let text = GpuError::Memory { request, gpu, free: 1 << 30, needed: 5 << 29 }.to_string();
        assert!(
            text.contains("GPU 1: Test 9000") && text.contains("1.0 GiB free, and 2.5 GiB are set aside"),
            "{text}"
        );
    }

    /// Whatever this machine has, asking does not panic; where there is no GPU, the request for one is an error.
    #[test]
    fn this_machine_can_be_probed() {
        let probed = probe();
        let checked = check(&GpuRequest::All, || probed.clone());
        match probed {
            GpuProbe::NoDriver => assert!(matches!(checked, Err(GpuError::NoDriver { .. }))),
            GpuProbe::Failed(_) => assert!(matches!(checked, Err(GpuError::Driver { .. }))),
            GpuProbe::Found(found) if found.gpus.is_empty() => assert!(checked.is_err()),
            GpuProbe::Found(_) => {}
        }
    }
}
