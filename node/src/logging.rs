//! Log lines on standard error, of which `RUST_LOG` says how many, and the trace file where one is asked for.

use std::io::IsTerminal as _;
use std::path::Path;

use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _};

use crate::output::Unread;
use crate::trace::{self, TraceFile};

/// What is logged where `RUST_LOG` says nothing. What strangers send that is no HTTP is an error to actix, and to nobody else.
const DEFAULT_FILTER: &str = "warn,node=info,actors=info,protocol=info,actix_http=off";

/// Starts logging for the process, called `process` in its trace. A trace lasts until the value is dropped.
///
/// # Errors
/// When the trace file cannot be created.
pub fn start(trace: Option<(&Path, &str)>) -> anyhow::Result<Option<TraceFile>> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(DEFAULT_FILTER));
    let lines = tracing_subscriber::fmt::layer().with_writer(|| Unread(std::io::stderr())).with_target(false);
    let lines = lines.with_ansi(std::io::stderr().is_terminal()).with_filter(filter);
    let (file, spans) = match trace {
        Some((path, process)) => {
            let (file, spans) = trace::create(path, process)?;
            (Some(file), Some(spans))
        }
        None => (None, None),
    };
    // A second start (in tests) keeps the first one's settings.
    drop(tracing_subscriber::registry().with(lines).with(spans).try_init());
    Ok(file)
}
