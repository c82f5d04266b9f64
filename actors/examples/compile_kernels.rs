//! Compiles the GPU kernels with NVRTC, for every architecture that they are tested for, and fails on an error or a
//! warning. No GPU is needed; `.ci/run` runs it.

use std::process::ExitCode;

use actors::matmul::cuda::compile::{CompileError, Nvrtc};

/// Ampere and Hopper data centre GPUs.
const CAPABILITIES: [(u32, u32); 2] = [(8, 0), (9, 0)];

fn compile() -> Result<(), CompileError> {
    let nvrtc = Nvrtc::find()?;
    let (major, minor) = nvrtc.version();
    for capability in CAPABILITIES {
        let image = nvrtc.check(capability)?;
        println!("NVRTC {major}.{minor}, sm_{}{}: {} bytes", capability.0, capability.1, image.bytes.len());
        if !image.log.is_empty() {
            println!("{}", image.log);
        }
    }
    Ok(())
}

fn main() -> ExitCode {
    match compile() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
