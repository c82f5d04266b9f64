//! Where the processor time of this process goes, by part of its work: for each few milliseconds that it spends, the system
//! interrupts one of the threads that spend it, and what that one is marked to be at ([`protocol::parts`]) is counted.

use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};

use protocol::parts::{Part, here};
use serde::{Deserialize, Serialize};

/// Set, it has an owner count its processor time by parts and say so in its report.
pub const PARTS_VARIABLE: &str = "VELUM_PARTS";

/// Microseconds of processor time from one interruption to the next: as often as most systems' clocks tick.
const PERIOD_MICROS: i64 = 4000;

/// Interruptions so far, by part.
static COUNTED: [AtomicU64; Part::ALL.len()] = [const { AtomicU64::new(0) }; Part::ALL.len()];

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
    /// So many seconds, divided as these counts are.
    fn of(counts: [u64; Part::ALL.len()], seconds: f64) -> Self {
        let all: u64 = counts.iter().sum();
        let part = |part: Part| seconds * counts[part as usize] as f64 / all.max(1) as f64;
        Self {
            own_f32: part(Part::Own),
            keystream: part(Part::Keystream),
            transforms: part(Part::Transforms),
            arithmetic: part(Part::Arithmetic),
            sketch: part(Part::Sketch),
            transport: part(Part::Elsewhere),
            other: part(Part::Other),
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

/// Counts from one look to the next.
pub struct Sampler {
    seen: [u64; Part::ALL.len()],
}

impl Sampler {
    /// Begins to count, if [`PARTS_VARIABLE`] is set and the system can.
    pub fn start() -> Option<Self> {
        std::env::var_os(PARTS_VARIABLE)?;
        interrupt().then_some(Self { seen: counted() })
    }

    /// What was counted since the last look, as parts of so many processor seconds.
    pub fn since_last(&mut self, seconds: f64) -> Parts {
        let now = counted();
        let since = std::array::from_fn(|part| now[part] - self.seen[part]);
        self.seen = now;
        Parts::of(since, seconds)
    }
}

fn counted() -> [u64; Part::ALL.len()] {
    std::array::from_fn(|part| COUNTED[part].load(Ordering::Relaxed))
}

extern "C" fn count(_signal: libc::c_int) {
    COUNTED[here() as usize].fetch_add(1, Ordering::Relaxed);
}

/// Has the system interrupt this process for each period of processor time, from now on. Whether it does.
fn interrupt() -> bool {
    let handler: extern "C" fn(libc::c_int) = count;
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    let period = libc::timeval { tv_sec: 0, tv_usec: PERIOD_MICROS as libc::suseconds_t };
    let timer = libc::itimerval { it_interval: period, it_value: period };
    // SAFETY: `action` is of numbers and pointers, for all of which zeros are values; `sigemptyset` and the fields make it what
    // `sigaction` takes. The handler does what a handler may: it reads a thread-local that is made when a thread is and has no
    // destructor, and adds to an atomic number; the signal is used by nobody else here. System calls that it interrupts
    // are begun again, or told so, which the standard library and the runtime expect of any signal. `timer` is read only.
    unsafe {
        let action = &mut *action.as_mut_ptr();
        action.sa_sigaction = handler as *const () as usize;
        action.sa_flags = libc::SA_RESTART;
        libc::sigemptyset(&raw mut action.sa_mask) == 0
            && libc::sigaction(libc::SIGPROF, action, ptr::null_mut()) == 0
            && libc::setitimer(libc::ITIMER_PROF, &raw const timer, ptr::null_mut()) == 0
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn time_is_counted_for_what_a_thread_is_marked_to_be_at() {
        assert!(interrupt());
        let (mut sampler, began) = (Sampler { seen: counted() }, Instant::now());
        let section = Part::Sketch.mark();
        let (mut spun, seen) = (0_u64, sampler.seen[Part::Sketch as usize]);
        while counted()[Part::Sketch as usize] < seen + 5 {
            spun = std::hint::black_box(spun + 1);
            assert!(began.elapsed() < Duration::from_secs(60), "a thread's time is counted");
        }
        drop(section);
        // Other tests spend time meanwhile, none of it on sketches of an owner.
        let parts = sampler.since_last(1.0);
        assert!(parts.sketch > 0.0, "{parts:?}");
        let sum = parts.own_f32 + parts.keystream + parts.transforms + parts.arithmetic + parts.sketch;
        assert!((sum + parts.transport + parts.other - 1.0).abs() < 1e-9, "{parts:?}");
    }
}
