//! Log lines on standard error; `RUST_LOG` says how many.

use std::io::IsTerminal as _;

use tracing_subscriber::EnvFilter;

/// What is logged where `RUST_LOG` says nothing.
const DEFAULT_FILTER: &str = "warn,node=info,actors=info,protocol=info";

/// Starts logging for the process.
pub fn start() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(DEFAULT_FILTER));
    let subscriber = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false);
    let started = subscriber.with_ansi(std::io::stderr().is_terminal()).try_init();
    // A second start (in tests) keeps the first one's settings.
    drop(started);
}
