//! What is written of a run while it lasts: `metrics.jsonl` and TensorBoard's event files.
//!
//! Neither is worth ending a run for: what cannot be written is warned of once, and tried again with the next step.

use std::path::Path;

use super::Report;
use super::events::Events;
use super::metrics::Metrics;

/// Both files.
pub struct Curves {
    metrics: Metrics,
    events: Events,
    failing: bool,
}

impl Curves {
    /// Those of the folder `out`, of a run whose report holds what is done already.
    pub fn new(out: &Path, report: &Report) -> Self {
        Self { metrics: Metrics::new(out), events: Events::new(out, report), failing: false }
    }

    /// Takes over what the report has to tell more than before.
    pub fn follow(&mut self, report: &Report) {
        // One that fails keeps nothing from the other.
        let results = [self.metrics.follow(report), self.events.follow(report)];
        let error = results.into_iter().find_map(Result::err);
        match &error {
            Some(error) if !self.failing => tracing::warn!("{error:#}; it is tried again with every step"),
            Some(error) => tracing::debug!("{error:#}"),
            None => {}
        }
        self.failing = error.is_some();
    }
}
