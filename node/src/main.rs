//! The velum node. See `node --help`.

use std::process::ExitCode;

use clap::Parser as _;
use node::cli::Arguments;

fn main() -> ExitCode {
    // Candle adds large tensors on a pool whose caller spins until the pool's threads run; our own work is on rayon,
    // and owner and workers may share the cores.
    // SAFETY: no other thread has been started yet, so none can read the environment while it changes.
    unsafe { std::env::set_var("CANDLE_NUM_THREADS", "1") };
    let arguments = Arguments::parse();
    // The trace is finished when it is dropped, after everything else has ended, in whatever way.
    let ended = node::logging::start(arguments.trace()).and_then(|_trace| node::run(arguments));
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            node::output::note(format_args!("error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}
