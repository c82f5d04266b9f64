//! Which faults come when: drawn from a seed, before the run.

use std::time::Duration;

/// A generator of the plan's numbers (SplitMix64): the same ones wherever it runs.
pub(crate) struct Draw(u64);

impl Draw {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Below one, and not below zero.
    pub(crate) fn fraction(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
    }

    pub(crate) fn below(&mut self, end: usize) -> usize {
        (self.fraction() * end as f64) as usize
    }

    pub(crate) fn seconds(&mut self, from: f64, to: f64) -> Duration {
        Duration::from_secs_f64(from + self.fraction() * (to - from))
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Kind {
    /// A worker is killed, and started again later as who it was.
    Restart,
    /// A worker is killed for good.
    Kill,
    /// A worker hangs.
    Stop,
    /// A worker's connections break, and it cannot be reached for a while.
    Cut,
    /// A worker's link is slow for a while.
    Slow,
    /// Another worker appears.
    Join,
    /// A worker's answers are wrong from now on.
    Lie,
}

const KINDS: [Kind; 7] = [Kind::Lie, Kind::Restart, Kind::Stop, Kind::Cut, Kind::Slow, Kind::Join, Kind::Kill];

#[derive(Clone, Copy, Debug)]
pub(crate) struct Fault {
    pub(crate) kind: Kind,
    /// It comes so long after so many steps are done.
    pub(crate) step: usize,
    pub(crate) later: Duration,
    /// How long it lasts, if it ends.
    pub(crate) lasts: Duration,
}

/// So many faults of all kinds in turn, spread over the steps but the first and the last, in the order in which they come.
pub(crate) fn faults(draw: &mut Draw, count: usize, steps: usize) -> Vec<Fault> {
    let mut kinds: Vec<_> = KINDS.into_iter().cycle().take(count).collect();
    for end in (1..count).rev() {
        kinds.swap(end, draw.below(end + 1));
    }
    let mut faults: Vec<_> = kinds
        .into_iter()
        .map(|kind| {
            let lasts = match kind {
                Kind::Stop => draw.seconds(5.0, 30.0),
                Kind::Slow => draw.seconds(5.0, 20.0),
                _ => draw.seconds(2.0, 12.0),
            };
            let step = 1 + draw.below(steps.saturating_sub(2).max(1));
            Fault { kind, step, later: draw.seconds(0.0, 4.0), lasts }
        })
        .collect();
    faults.sort_by_key(|fault| (fault.step, fault.later));
    faults
}
