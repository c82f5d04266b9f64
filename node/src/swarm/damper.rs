//! Logs that a stranger can cause stay short: one line now and then says how many it stands for.

use std::time::{Duration, Instant};

/// Time between two lines about the same kind of thing.
const INTERVAL: Duration = Duration::from_secs(30);

/// Lets a line pass now and then.
#[derive(Debug, Default)]
pub(super) struct Damper {
    last: Option<Instant>,
    held_back: u64,
}

impl Damper {
    /// Whether something that happens now is to be told; if so, how often it happened untold since the last time.
    pub(super) fn pass(&mut self, now: Instant) -> Option<u64> {
        if self.last.is_some_and(|last| now.saturating_duration_since(last) < INTERVAL) {
            self.held_back += 1;
            return None;
        }
        self.last = Some(now);
        Some(std::mem::take(&mut self.held_back))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_told_in_few_lines() {
        let (mut damper, start) = (Damper::default(), Instant::now());
        let told: Vec<u64> = (0..1000).filter_map(|i| damper.pass(start + i * INTERVAL / 400)).collect();
        assert_eq!(told, [0, 399, 399]);
        assert_eq!(damper.pass(start + 10 * INTERVAL), Some(199));
    }
}
