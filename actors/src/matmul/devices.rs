//! Which GPUs a worker is asked to use, and what this machine has.
//!
//! The driver is loaded when it is asked for, so that one binary runs with and without it. This build multiplies on
//! the CPU only: a request for GPUs is answered with what was found.

use std::fmt;
use std::str::FromStr;

use cudarc::driver::{CudaContext, DriverError};

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

/// A GPU that the driver knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GpuInfo {
    /// The driver's number.
    pub number: u32,
    /// Its name.
    pub name: String,
    /// Compute capability, major and minor.
    pub compute_capability: (i32, i32),
    /// Its memory, bytes.
    pub memory_bytes: u64,
}

impl fmt::Display for GpuInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (major, minor) = self.compute_capability;
        let gibibytes = self.memory_bytes as f64 / f64::from(1 << 30);
        write!(f, "{}: {} (compute capability {major}.{minor}, {gibibytes:.1} GiB)", self.number, self.name)
    }
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
    /// The GPUs are there, the kernels are not.
    #[error("--gpus {request}: this build multiplies on the CPU only; found: {}; use --gpus none", listed(.found))]
    CpuOnly {
        /// What was asked for.
        request: GpuRequest,
        /// The GPUs that there are.
        found: Vec<GpuInfo>,
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
    /// The driver works and knows these.
    Found(Vec<GpuInfo>),
}

/// Asks the driver, if there is one, for its GPUs.
pub fn probe() -> GpuProbe {
    // SAFETY: this only opens the driver's library, which the system's loader finds under the driver's own name;
    // initialisers of a library of that name are trusted as every CUDA program trusts them.
    if !unsafe { cudarc::driver::sys::is_culib_present() } {
        return GpuProbe::NoDriver;
    }
    // cudarc panics where a library lacks a symbol, which an old or broken driver may.
    match std::panic::catch_unwind(list) {
        Ok(Ok(found)) => GpuProbe::Found(found),
        Ok(Err(error)) => GpuProbe::Failed(error.to_string()),
        Err(_) => GpuProbe::Failed("its library lacks a function that is needed".into()),
    }
}

fn list() -> Result<Vec<GpuInfo>, DriverError> {
    (0..u32::try_from(CudaContext::device_count()?).unwrap_or(0))
        .map(|number| {
            let context = CudaContext::new(number as usize)?;
            Ok(GpuInfo {
                number,
                name: context.name()?,
                compute_capability: context.compute_capability()?,
                memory_bytes: context.total_mem()? as u64,
            })
        })
        .collect()
}

/// Whether a request can be met by what was found: in this build, only a request for no GPU.
///
/// # Errors
/// For every request that names a GPU, with what was found.
pub fn check(request: &GpuRequest, probe: impl FnOnce() -> GpuProbe) -> Result<(), GpuError> {
    if *request == GpuRequest::None {
        return Ok(());
    }
    let request = request.clone();
    let found = match probe() {
        GpuProbe::NoDriver => return Err(GpuError::NoDriver { request }),
        GpuProbe::Failed(what) => return Err(GpuError::Driver { request, what }),
        GpuProbe::Found(found) if found.is_empty() => return Err(GpuError::NoGpu { request }),
        GpuProbe::Found(found) => found,
    };
    if let GpuRequest::List(numbers) = &request {
        let missing = numbers.iter().find(|&&number| found.iter().all(|gpu| gpu.number != number));
        if let Some(&missing) = missing {
            return Err(GpuError::Missing { request, missing, found });
        }
    }
    Err(GpuError::CpuOnly { request, found })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gpu(number: u32) -> GpuInfo {
        GpuInfo { number, name: "Test 9000".into(), compute_capability: (9, 0), memory_bytes: 80 << 30 }
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
        assert_eq!(check(&GpuRequest::None, || panic!("the driver was asked")), Ok(()));
    }

    #[test]
    fn a_request_for_gpus_says_what_was_found() {
        let list = GpuRequest::List(vec![0, 3]);
        let text = |request: &GpuRequest, probe: GpuProbe| check(request, || probe).expect_err("refused").to_string();
        assert!(text(&GpuRequest::All, GpuProbe::NoDriver).contains("no CUDA driver"));
        assert!(text(&list, GpuProbe::Failed("error 999".into())).contains("error 999"));
        assert!(text(&list, GpuProbe::Found(Vec::new())).contains("sees no GPU"));
        let missing = text(&list, GpuProbe::Found(vec![gpu(0), gpu(1)]));
        assert!(missing.contains("no GPU 3") && missing.contains("1: Test 9000 (compute capability 9.0, 80.0 GiB)"));
        let unused = text(&GpuRequest::All, GpuProbe::Found(vec![gpu(0)]));
        assert!(unused.contains("CPU only") && unused.contains("0: Test 9000"), "{unused}");
    }

    /// Whatever this machine has, asking does not panic, and a request for all GPUs is an error of this build.
    #[test]
    fn this_machine_can_be_probed() {
        let found = probe();
        let error = check(&GpuRequest::All, || found.clone()).expect_err("this build has no GPU kernels");
        match found {
            GpuProbe::NoDriver => assert!(matches!(error, GpuError::NoDriver { .. })),
            GpuProbe::Failed(_) => assert!(matches!(error, GpuError::Driver { .. })),
            GpuProbe::Found(gpus) if gpus.is_empty() => assert!(matches!(error, GpuError::NoGpu { .. })),
            GpuProbe::Found(_) => assert!(matches!(error, GpuError::CpuOnly { .. })),
        }
    }
}
