//! Time as the device counts it: between two events on its stream, without the computer's own part.

use std::time::{Duration, Instant};

use cudarc::driver::CudaEvent;
use cudarc::driver::sys::CUevent_flags::CU_EVENT_DEFAULT;

use super::base::Base;
use super::fault::Fault;

/// Fewest and most timed runs.
const RUNS: std::ops::Range<usize> = 5..200;

/// Median seconds of what `begin` begins on the compute stream, over runs that follow each other without a pause: as many
/// as fit `budget`, after one that warms up.
pub(crate) fn device_seconds(
    base: &Base,
    budget: Duration,
    mut begin: impl FnMut() -> Result<(), Fault>,
) -> Result<f64, Fault> {
    let event = || Ok::<CudaEvent, Fault>(base.context.new_event(Some(CU_EVENT_DEFAULT))?);
    begin()?;
    base.compute.synchronize()?;
    let started = Instant::now();
    begin()?;
    base.compute.synchronize()?;
    let once = started.elapsed();
    let fitting = budget.as_secs_f64() / once.as_secs_f64().max(1e-9);
    let runs = (fitting as usize).clamp(RUNS.start, RUNS.end);
    let events: Vec<CudaEvent> = (0..=runs).map(|_| event()).collect::<Result<_, _>>()?;
    let mut marks = events.iter();
    if let Some(mark) = marks.next() {
        mark.record(&base.compute)?;
    }
    for mark in marks {
        begin()?;
        mark.record(&base.compute)?;
    }
    let mut seconds = events
        .windows(2)
        .map(|pair| Ok(f64::from(pair[0].elapsed_ms(&pair[1])?) / 1e3))
        .collect::<Result<Vec<f64>, Fault>>()?;
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[seconds.len() / 2])
}
