//! The kernels' source on the processor: compiled by the system's C++ compiler, run by a program of its own.
//!
//! The program (`host/`) takes launches from a pipe and gives back the buffers. It is compiled with the compiler's
//! sanitizers where there are any, so that a byte read or written outside of a buffer ends it.
#![allow(clippy::unwrap_used)]

use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::OnceLock;

use super::geometry::Launch;
use super::source::FILES;

/// What every compiler is told, and what finds stray accesses.
const FLAGS: &[&str] = &["-std=c++17", "-O2", "-g1", "-Wno-unknown-pragmas"];
const SANITIZERS: &[&str] = &["-fsanitize=address,undefined", "-fno-sanitize-recover=all"];

/// An argument of a kernel.
pub(super) enum Argument<'a> {
    /// Memory of the device, which the kernel may change.
    Buffer(&'a mut [u8]),
    /// Memory that it only reads.
    Input(&'a [u8]),
    /// An integer.
    Number(u32),
    /// Anything else that goes by value.
    Value(Vec<u8>),
}

/// The running program.
pub(super) struct Host {
    program: Child,
    requests: Option<ChildStdin>,
    answers: ChildStdout,
}

impl Host {
    /// Compiles the program, unless this very source was compiled before, and starts it.
    pub(super) fn start() -> Self {
        static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
        let program = PROGRAM.get_or_init(compiled);
        let mut program = Command::new(program)
            .env("ASAN_OPTIONS", "detect_leaks=0:detect_stack_use_after_return=0")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (requests, answers) = (program.stdin.take(), program.stdout.take().unwrap());
        Self { program, requests, answers }
    }

    /// Runs a kernel; `seed` draws the order in which its threads take turns. Panics where the program ends, having said
    /// why.
    pub(super) fn launch(&mut self, kernel: &str, launch: &Launch, seed: u64, arguments: &mut [Argument<'_>]) {
        let outcome = self.request(kernel, launch, seed, arguments).and_then(|()| {
            for argument in arguments {
                match argument {
                    Argument::Buffer(bytes) => self.answers.read_exact(bytes)?,
                    Argument::Input(bytes) => {
                        let mut same = vec![0; bytes.len()];
                        self.answers.read_exact(&mut same)?;
                        assert!(same == *bytes, "{kernel} changes what it only reads");
                    }
                    Argument::Number(_) | Argument::Value(_) => {}
                }
            }
            Ok(())
        });
        outcome.unwrap_or_else(|error| panic!("{kernel} with seed {seed}, {launch:?}: {error}; see above"));
    }

    fn request(&mut self, kernel: &str, launch: &Launch, seed: u64, arguments: &[Argument<'_>]) -> io::Result<()> {
        let requests = self.requests.as_mut().ok_or(io::ErrorKind::BrokenPipe)?;
        let mut head = (kernel.len() as u64).to_ne_bytes().to_vec();
        head.extend_from_slice(kernel.as_bytes());
        let sizes = launch.grid.iter().chain(&launch.block).chain([&launch.shared_bytes]).map(|&size| u64::from(size));
        for number in sizes.chain([seed, arguments.len() as u64]) {
            head.extend_from_slice(&number.to_ne_bytes());
        }
        requests.write_all(&head)?;
        for argument in arguments {
            let number;
            let (kind, bytes): (u64, &[u8]) = match argument {
                Argument::Buffer(bytes) => (0, bytes),
                Argument::Input(bytes) => (0, bytes),
                Argument::Number(value) => {
                    number = value.to_ne_bytes();
                    (1, &number)
                }
                Argument::Value(bytes) => (1, bytes),
            };
            requests.write_all(&kind.to_ne_bytes())?;
            requests.write_all(&(bytes.len() as u64).to_ne_bytes())?;
            requests.write_all(bytes)?;
        }
        requests.flush()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // The program ends with its input.
        drop(self.requests.take());
        let _ = self.program.wait();
    }
}

/// The whole program: the kernels with the processor's version of their instructions.
fn unit() -> String {
    let mut unit = String::new();
    let own = [
        ("fiber.h", include_str!("host/fiber.h")),
        ("shim.h", include_str!("host/shim.h")),
        ("ptx.h", include_str!("host/ptx.h")),
    ];
    let kernels = FILES.iter().copied().filter(|(name, _)| *name != "ptx.cuh");
    let end = [("harness.cpp", include_str!("host/harness.cpp"))];
    for (name, text) in own.into_iter().chain(kernels).chain(end) {
        unit.push_str(&format!("#line 1 \"{name}\"\n{text}"));
    }
    unit
}

/// The program's file, named by its content, in the build's folder for temporary files.
fn compiled() -> PathBuf {
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
    let unit = unit();
    let mut hasher = DefaultHasher::new();
    (&compiler, FLAGS, SANITIZERS, &unit).hash(&mut hasher);
    let test = std::env::current_exe().unwrap();
    let folder = test.ancestors().nth(2).unwrap_or(Path::new(".")).join("kernels");
    let program = folder.join(format!("{:016x}", hasher.finish()));
    if program.exists() {
        return program;
    }
    std::fs::create_dir_all(&folder).unwrap();
    // Tests may be processes of their own that compile at once: each moves a whole program into place.
    let scratch = tempfile::tempdir_in(&folder).unwrap();
    let (source, fresh) = (scratch.path().join("kernels.cpp"), scratch.path().join("kernels"));
    std::fs::write(&source, unit).unwrap();
    let compile = |flags: &[&str]| {
        let mut command = Command::new(&compiler);
        command.args(FLAGS).args(flags).arg(&source).arg("-o").arg(&fresh);
        command.output().unwrap_or_else(|error| {
            panic!("these tests need a C++17 compiler: {compiler} cannot be started ({error}); set CXX")
        })
    };
    let mut output = compile(SANITIZERS);
    if !output.status.success() {
        eprintln!("{compiler} has no sanitizers: {}", String::from_utf8_lossy(&output.stderr));
        output = compile(&[]);
    }
    assert!(output.status.success(), "{compiler}: {}", String::from_utf8_lossy(&output.stderr));
    std::fs::rename(&fresh, &program).unwrap();
    program
}
