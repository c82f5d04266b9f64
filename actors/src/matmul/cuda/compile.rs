//! The kernels' way from source to what a device runs, by NVRTC, at the worker's start.
//!
//! NVRTC is a library of its own, which comes with the CUDA toolkit, with PyTorch and as a Python package; the driver
//! does not bring it. It compiles for the very device ("cubin"). One that is older than the device compiles for the newest
//! architecture that it knows, into PTX, which the driver translates.

use std::any::Any;
use std::ffi::{CString, c_char, c_int};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use cudarc::nvrtc::result::{NvrtcError, compile_program, create_program, destroy_program, get_program_log, get_ptx};
use cudarc::nvrtc::sys;

use super::cache::{Cache, Key};
use super::source::{HOPPER_KERNELS, KERNELS, SOURCE, has_hopper_kernels, options};

/// Why there are no compiled kernels.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CompileError {
    /// NVRTC is not on this machine, or not where it is looked for.
    #[error(
        "no CUDA compiler library (libnvrtc) was found; a CUDA toolkit has it, or `pip install nvidia-cuda-nvrtc-cu12`, \
         whose folder nvidia/cuda_nvrtc/lib must then be named in LD_LIBRARY_PATH"
    )]
    NoLibrary,
    /// A library that does not work.
    #[error("the CUDA compiler library (libnvrtc) was found but does not work: {0}")]
    Broken(String),
    /// It compiles for no architecture that a device runs.
    #[error("NVRTC {major}.{minor} compiles for nothing that a device of compute capability {capability} runs")]
    Architecture {
        /// Its version.
        major: i32,
        /// Its version's second part.
        minor: i32,
        /// The device's.
        capability: String,
    },
    /// The source does not compile.
    #[error("the kernels do not compile for {architecture}:\n{log}")]
    Source {
        /// What for.
        architecture: String,
        /// The compiler's words.
        log: String,
    },
}

/// What NVRTC made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// A cubin, or PTX with its final zero.
    pub bytes: Vec<u8>,
    /// Whether it was read from the cache.
    pub cached: bool,
    /// What the compiler said: warnings. Nothing of a cached image.
    pub log: String,
}

/// For what a device's kernels are compiled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    /// For the device itself.
    Cubin((u32, u32)),
    /// For an older one; the driver translates.
    Ptx((u32, u32)),
}

impl Target {
    /// The best for a device where the compiler knows some architectures, `[80, 90, 100]`.
    fn of(capability: (u32, u32), known: &[u32]) -> Option<Self> {
        let number = 10 * capability.0 + capability.1;
        if known.contains(&number) {
            return Some(Self::Cubin(capability));
        }
        // Code with the instructions of one architecture alone is for no other.
        let capability = |number: u32| (number / 10, number % 10);
        let portable = |&known: &u32| known < number && !has_hopper_kernels(capability(known));
        Some(Self::Ptx(capability(known.iter().copied().filter(portable).max()?)))
    }

    fn capability(self) -> (u32, u32) {
        let (Self::Cubin(capability) | Self::Ptx(capability)) = self;
        capability
    }

    fn name(self) -> String {
        match self {
            Self::Cubin((major, minor)) => format!("sm_{major}{minor}"),
            Self::Ptx((major, minor)) => format!("compute_{major}{minor}"),
        }
    }
}

/// The compiler library.
#[derive(Clone, Debug)]
pub struct Nvrtc {
    version: (i32, i32),
    /// As `10 · major + minor`.
    architectures: Vec<u32>,
}

impl Nvrtc {
    /// Looks for the library.
    ///
    /// # Errors
    /// When it is not found, or does not work.
    pub fn find() -> Result<Self, CompileError> {
        // SAFETY: this only opens a library that the system's loader finds under NVRTC's own name; its initialisers are
        // trusted as every program that compiles kernels trusts them.
        if !unsafe { sys::is_culib_present() } {
            return Err(CompileError::NoLibrary);
        }
        unpanicked(|| {
            let (mut major, mut minor, mut count) = (0, 0, 0);
            // SAFETY: each function is given valid pointers to integers, which it writes.
            unsafe {
                sys::nvrtcVersion(&raw mut major, &raw mut minor).result().map_err(broken)?;
                sys::nvrtcGetNumSupportedArchs(&raw mut count).result().map_err(broken)?;
            }
            let mut numbers: Vec<c_int> = vec![0; usize::try_from(count).unwrap_or(0)];
            // SAFETY: the function writes as many integers as it said before, and there is room for them.
            unsafe { sys::nvrtcGetSupportedArchs(numbers.as_mut_ptr()) }.result().map_err(broken)?;
            let architectures = numbers.into_iter().filter_map(|number| u32::try_from(number).ok()).collect();
            Ok(Self { version: (major, minor), architectures })
        })
    }

    /// Its version, that of the CUDA toolkit it belongs to.
    pub fn version(&self) -> (i32, i32) {
        self.version
    }

    /// The kernels for a device, from the cache's folder if they are there.
    ///
    /// # Errors
    /// When they do not compile.
    pub fn image(&self, capability: (u32, u32), cache: Option<&Path>) -> Result<Image, CompileError> {
        let target = Target::of(capability, &self.architectures).ok_or_else(|| CompileError::Architecture {
            major: self.version.0,
            minor: self.version.1,
            capability: format!("{}.{}", capability.0, capability.1),
        })?;
        let (options, architecture) = (options(target.capability()), target.name());
        let key = Key { source: SOURCE, options: &options, compiler: self.version, architecture: &architecture };
        let cache = cache.map(Cache::new);
        if let Some(bytes) = cache.as_ref().and_then(|cache| cache.read(&key)) {
            return Ok(Image { bytes, cached: true, log: String::new() });
        }
        let (bytes, log) = unpanicked(|| compile(target, &options))?;
        if let Some(cache) = cache {
            cache.write(&key, &bytes);
        }
        Ok(Image { bytes, cached: false, log })
    }

    /// Compiles the kernels for an architecture that the compiler itself must know, and is content only if it has
    /// nothing to say and every kernel is there.
    ///
    /// # Errors
    /// When they do not compile, or not without a warning.
    pub fn check(&self, capability: (u32, u32)) -> Result<Image, CompileError> {
        let image = self.image(capability, None)?;
        let architecture = Target::Cubin(capability).name();
        if image.log.contains("warning") {
            return Err(CompileError::Source { architecture, log: image.log });
        }
        let has = |name: &str| image.bytes.windows(name.len()).any(|window| window == name.as_bytes());
        let hopper = if has_hopper_kernels(capability) { HOPPER_KERNELS } else { &[] };
        match KERNELS.iter().chain(hopper).find(|name| !has(name)) {
            None => Ok(image),
            Some(missing) => Err(CompileError::Source {
                architecture,
                log: format!("there is no kernel {missing} in what was compiled"),
            }),
        }
    }
}

/// A program of NVRTC's, destroyed at the end.
struct Program {
    program: sys::nvrtcProgram,
    _source: CString,
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: the program was created by `create_program` and is destroyed nowhere else. A failure leaks it.
        let _ = unsafe { destroy_program(self.program) };
    }
}

fn compile(target: Target, options: &[String]) -> Result<(Vec<u8>, String), CompileError> {
    let text = |what: &str| CompileError::Broken(what.to_owned());
    let source = CString::new(SOURCE).map_err(|_| text("the source has a zero in it"))?;
    let program = create_program(&source, Some(c"velum.cu")).map_err(broken)?;
    let program = Program { program, _source: source };
    // SAFETY: the program lives, and no option has a zero in it, since they are ours.
    let compiled = unsafe { compile_program(program.program, options) };
    // SAFETY: the program lives and was compiled, with whatever success.
    let log = unsafe { get_program_log(program.program) }.map_err(broken)?;
    let log = String::from_utf8_lossy(&bytes(&log)).trim_matches(|c: char| c == '\0' || c.is_whitespace()).to_owned();
    if let Err(error) = compiled {
        let log = if log.is_empty() { error.to_string() } else { log };
        return Err(CompileError::Source { architecture: target.name(), log });
    }
    let image = match target {
        // SAFETY: the program lives and was compiled.
        Target::Ptx(_) => bytes(&unsafe { get_ptx(program.program) }.map_err(broken)?),
        Target::Cubin(_) => cubin(&program)?,
    };
    Ok((image, log))
}

fn cubin(program: &Program) -> Result<Vec<u8>, CompileError> {
    let mut size = 0;
    // SAFETY: the program lives and was compiled; the size is written to a valid pointer.
    unsafe { sys::nvrtcGetCUBINSize(program.program, &raw mut size) }.result().map_err(broken)?;
    if size == 0 {
        return Err(CompileError::Broken("it made no cubin".to_owned()));
    }
    let mut image = vec![0_u8; size];
    // SAFETY: as before, and the buffer has as many bytes as were asked for.
    unsafe { sys::nvrtcGetCUBIN(program.program, image.as_mut_ptr().cast()) }.result().map_err(broken)?;
    Ok(image)
}

fn bytes(chars: &[c_char]) -> Vec<u8> {
    chars.iter().map(|&c| c as u8).collect()
}

fn broken(error: NvrtcError) -> CompileError {
    CompileError::Broken(error.to_string())
}

/// Runs what calls a library of which cudarc panics if a function is missing.
fn unpanicked<T>(call: impl FnOnce() -> Result<T, CompileError>) -> Result<T, CompileError> {
    catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|panic| Err(CompileError::Broken(panic_text(panic.as_ref()))))
}

/// What a panic says.
pub(crate) fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("it panicked").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_gets_what_it_runs() {
        let known = [75, 80, 86, 89, 90, 100];
        assert_eq!(Target::of((9, 0), &known), Some(Target::Cubin((9, 0))));
        assert_eq!(Target::of((8, 6), &known), Some(Target::Cubin((8, 6))));
        assert_eq!(Target::of((12, 0), &known), Some(Target::Ptx((10, 0))));
        assert_eq!(Target::of((10, 0), &[80, 89, 90]), Some(Target::Ptx((8, 9))));
        assert_eq!(Target::of((8, 7), &known), Some(Target::Ptx((8, 6))));
        assert_eq!(Target::of((7, 0), &known), None);
        assert_eq!(Target::of((9, 0), &[]), None);
        assert_eq!(Target::Cubin((9, 0)).name(), "sm_90");
        assert_eq!(Target::Ptx((10, 0)).name(), "compute_100");
    }

    #[test]
    fn a_library_that_lacks_a_function_is_an_error() {
        let lacking = unpanicked::<()>(|| panic!("Missing symbol {}", "nvrtcVersion"));
        assert_eq!(lacking, Err(CompileError::Broken("Missing symbol nvrtcVersion".to_owned())));
    }

    /// Whether or not this machine has NVRTC, looking for it does not panic; where it has, the kernels compile.
    #[test]
    fn kernels_compile_where_there_is_a_compiler() {
        match Nvrtc::find() {
            Err(CompileError::NoLibrary | CompileError::Broken(_)) => {}
            Err(error) => panic!("{error}"),
            Ok(nvrtc) => {
                let folder = tempfile::tempdir().expect("a folder");
                let first = nvrtc.image((8, 0), Some(folder.path())).expect("compiled");
                let second = nvrtc.image((8, 0), Some(folder.path())).expect("read");
                assert!(!first.cached && second.cached && first.bytes == second.bytes);
            }
        }
    }
}
