//! Where the processor time of this process goes, by part of its work: many times a second, what each thread has used since
//! the last time is counted for what it is marked to be at ([`protocol::parts`]).

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use protocol::parts::{Part, marks};
use serde::{Deserialize, Serialize};

/// Set, it has an owner count its processor time by parts and say so in its report. That takes some hundredths more.
pub const PARTS_VARIABLE: &str = "VELUM_PARTS";

/// Between two looks: longer than a look takes, and shorter than most of what is told apart.
const PERIOD: Duration = Duration::from_millis(2);

/// Processor seconds by part of the work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Parts {
    /// The owner's own arithmetic in f32.
    pub own_f32: f64,
    /// Public masks.
    pub keystream: f64,
    /// Transforms, and the products between them.
    pub transforms: f64,
    /// Rotation, encoding, errors, rounding, packing, and back.
    pub arithmetic: f64,
    /// Sketches and checks.
    pub sketch: f64,
    /// Threads that compute nothing: sockets, their encryption, and the kernel's part of both; actors.
    pub transport: f64,
    /// What threads that compute do besides: memory that is fetched and wiped, waking and waiting.
    pub other: f64,
}

impl Parts {
    fn of(&mut self, part: Part) -> &mut f64 {
        match part {
            Part::Own => &mut self.own_f32,
            Part::Keystream => &mut self.keystream,
            Part::Transforms => &mut self.transforms,
            Part::Arithmetic => &mut self.arithmetic,
            Part::Sketch => &mut self.sketch,
        }
    }

    /// Each part by this function of it and that of another.
    #[must_use]
    pub fn with(&self, other: &Self, each: impl Fn(f64, f64) -> f64) -> Self {
        Self {
            own_f32: each(self.own_f32, other.own_f32),
            keystream: each(self.keystream, other.keystream),
            transforms: each(self.transforms, other.transforms),
            arithmetic: each(self.arithmetic, other.arithmetic),
            sketch: each(self.sketch, other.sketch),
            transport: each(self.transport, other.transport),
            other: each(self.other, other.other),
        }
    }
}

/// Counts until it is dropped.
pub struct Sampler {
    counted: Arc<Mutex<Parts>>,
}

impl Sampler {
    /// Begins to count, if [`PARTS_VARIABLE`] is set and the system tells what a thread has used.
    pub fn start() -> Option<Self> {
        std::env::var_os(PARTS_VARIABLE)?;
        let mut used = used_by_threads()?;
        let counted = Arc::<Mutex<Parts>>::default();
        let kept = Arc::downgrade(&counted);
        let look = move || {
            while let Some(counted) = Weak::upgrade(&kept) {
                let now = used_by_threads().unwrap_or_default();
                count(&mut counted.lock().unwrap_or_else(PoisonError::into_inner), &used, &now);
                used = now;
                drop(counted);
                thread::sleep(PERIOD);
            }
        };
        thread::Builder::new().name("parts".into()).spawn(look).ok()?;
        Some(Self { counted })
    }

    /// What was counted so far.
    pub fn read(&self) -> Parts {
        *self.counted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Counts what threads used from one look to the next.
fn count(counted: &mut Parts, before: &HashMap<u32, u64>, now: &HashMap<u32, u64>) {
    let marks: HashMap<u32, Option<Part>> = marks().into_iter().collect();
    for (thread, used) in now {
        let since = used.saturating_sub(before.get(thread).copied().unwrap_or(0)) as f64 * 1e-9;
        *match marks.get(thread) {
            Some(&Some(part)) => counted.of(part),
            Some(None) => &mut counted.other,
            None => &mut counted.transport,
        } += since;
    }
}

/// Nanoseconds that each thread of this process has had a processor; `None` where the system does not tell.
fn used_by_threads() -> Option<HashMap<u32, u64>> {
    let threads = std::fs::read_dir("/proc/self/task").ok()?;
    let used = |name: &str| {
        let line = std::fs::read_to_string(format!("/proc/self/task/{name}/schedstat")).ok()?;
        Some((name.parse().ok()?, line.split_ascii_whitespace().next()?.parse().ok()?))
    };
    let used: HashMap<u32, u64> = threads.filter_map(|thread| used(thread.ok()?.file_name().to_str()?)).collect();
    (!used.is_empty()).then_some(used)
}

#[cfg(test)]
#[cfg(target_os = "linux")]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::time::Instant;

    use super::*;

    #[test]
    fn time_is_counted_for_what_a_thread_is_marked_to_be_at() {
        let before = used_by_threads().unwrap();
        let (mut counted, began) = (Parts::default(), Instant::now());
        let section = Part::Sketch.mark();
        let own: u32 =
            std::fs::read_link("/proc/thread-self").unwrap().file_name().unwrap().to_str().unwrap().parse().unwrap();
        let mut spun = 0_u64;
        while used_by_threads().unwrap()[&own] < before[&own] + 20_000_000 {
            spun = std::hint::black_box(spun + 1);
            assert!(began.elapsed() < Duration::from_secs(60), "a thread's time is counted");
        }
        let mine = |used: HashMap<u32, u64>| HashMap::from([(own, used[&own])]);
        count(&mut counted, &mine(before), &mine(used_by_threads().unwrap()));
        drop(section);
        assert!(counted.sketch >= 0.02 && counted.own_f32 == 0.0 && counted.transport == 0.0, "{counted:?}");
    }
}
