//! What the owner knows of one worker.
//!
//! A member is *here*, *gone* (it does not answer, and may come back), or *banned*. One that is here may be *unfit* for a
//! while: it refused its layers, or could not load them. It is not asked anything while a control exchange is under way,
//! so that an answer always belongs to the last question; only a release waits for none.

use std::collections::{BTreeSet, VecDeque};
use std::ops::Range;
use std::time::Duration;

use super::Now;
use super::speed::Speed;

/// How long a worker may take for one more layer: many times what a slow disk needs for the largest, so that only a
/// worker that hangs, or says that it loads and does not, is given up.
const LOADING_PATIENCE: Duration = Duration::from_secs(120);
/// How often a worker that loads its layers is asked how far it is.
const LOADING_POLL: Duration = Duration::from_millis(200);

/// How soon a worker that is gone is asked whether it is back; the wait doubles.
const RETURN_POLL: Duration = Duration::from_millis(500);
/// Longest wait between two such questions: somebody waits for the answer.
const LONGEST_RETURN_POLL: Duration = Duration::from_secs(8);

/// How long a worker that refused its layers, or failed, is left alone; the wait doubles.
const UNFIT: Duration = Duration::from_secs(5);
/// Longest such wait: the reason may have gone away by then.
const LONGEST_UNFIT: Duration = Duration::from_secs(120);

/// Failures in a row after which a worker is unfit.
const FAILURES: u32 = 3;

/// Products within which a second strike bans a worker: an honest one has none in a run, and one that lies rarely enough
/// to stay below this is asked again for each of its lies.
const STRIKE_WINDOW: u64 = 300;

/// Whether a worker can be asked.
#[derive(Clone, Debug, PartialEq)]
pub enum Presence {
    /// It answers.
    Here,
    /// It does not, since then.
    Gone(Duration),
    /// It is never asked again.
    Banned(String),
}

/// See the module's documentation.
#[derive(Clone, Debug)]
pub(super) struct Member {
    pub(super) presence: Presence,
    pub(super) device: String,
    /// What it says of its speed.
    pub(super) claimed: f64,
    pub(super) speed: Speed,
    /// Layers that it can take.
    pub(super) room: u16,
    /// Whether that is to be asked again: it may be another process than it was.
    pub(super) doubted: bool,
    /// Layers that it was told to serve; empty for a spare.
    pub(super) assigned: Range<u16>,
    /// Layers of these that it has loaded, as far as is known.
    pub(super) held: BTreeSet<u16>,
    /// Layers that it is to serve when all have moved.
    pub(super) target: Range<u16>,
    /// What it served before an assignment that it has not answered.
    pub(super) before: Option<(Range<u16>, BTreeSet<u16>)>,
    /// Whether it has layers for this owner that it was not told to serve, such as an earlier run's.
    pub(super) stray: bool,
    /// Control exchanges under way.
    pub(super) exchanges: u8,
    /// When it is to be asked how it does.
    pub(super) ask_at: Option<Now>,
    /// Questions without an answer since it was last here.
    silences: u32,
    /// When loading last came on, while it loads.
    pub(super) loading_since: Option<Now>,
    /// Until when it gets no layers.
    pub(super) unfit_until: Option<Now>,
    unfit_times: u32,
    failures: u32,
    pub(super) in_flight: u32,
    /// Products that came back whole.
    pub(super) calls: u64,
    strikes: VecDeque<u64>,
    /// Every layer that it ever served, from the first to the last.
    pub(super) served: Range<u16>,
}

impl Member {
    pub(super) fn new(room: u16, claimed: f64, device: String) -> Self {
        Self {
            presence: Presence::Here,
            device,
            claimed,
            speed: Speed::default(),
            room,
            doubted: false,
            assigned: 0..0,
            held: BTreeSet::new(),
            target: 0..0,
            before: None,
            stray: false,
            exchanges: 0,
            ask_at: None,
            silences: 0,
            loading_since: None,
            unfit_until: None,
            unfit_times: 0,
            failures: 0,
            in_flight: 0,
            calls: 0,
            strikes: VecDeque::new(),
            served: 0..0,
        }
    }

    pub(super) fn is_here(&self) -> bool {
        self.presence == Presence::Here
    }

    pub(super) fn is_banned(&self) -> bool {
        matches!(self.presence, Presence::Banned(_))
    }

    /// Whether a control exchange is under way.
    pub(super) fn is_busy(&self) -> bool {
        self.exchanges > 0
    }

    /// A control exchange has ended.
    pub(super) fn answered(&mut self) {
        self.exchanges = self.exchanges.saturating_sub(1);
    }

    /// Whether it may be given layers.
    pub(super) fn is_fit(&self) -> bool {
        self.is_here() && self.unfit_until.is_none()
    }

    pub(super) fn is_loaded(&self) -> bool {
        self.held.len() == self.assigned.len()
    }

    /// Layers that it serves, as long as it is here.
    pub(super) fn serves(&self, layer: u16) -> bool {
        self.is_here() && self.held.contains(&layer)
    }

    /// It is told to serve these: what it holds of them it goes on to serve.
    pub(super) fn assign(&mut self, layers: Range<u16>, now: Now) {
        self.before = Some((self.assigned.clone(), self.held.clone()));
        self.held.retain(|layer| layers.contains(layer));
        self.served = match self.served.is_empty() {
            true => layers.clone(),
            false => self.served.start.min(layers.start)..self.served.end.max(layers.end),
        };
        (self.assigned, self.stray) = (layers, false);
        (self.ask_at, self.loading_since) = (None, Some(now));
        self.exchanges += 1;
    }

    /// It has, or will have, no layers of ours.
    pub(super) fn forget_layers(&mut self) {
        (self.assigned, self.before, self.loading_since) = (0..0, None, None);
        self.held.clear();
    }

    /// It said that it serves these layers, of which so many are loaded; whether that is what it was told.
    pub(super) fn take_progress(&mut self, layers: &Range<u16>, loaded: u16, now: Now) -> bool {
        self.before = None;
        if *layers != self.assigned {
            self.forget_layers();
            return false;
        }
        let (known, loaded) = (self.held.len(), usize::from(loaded).min(layers.len()));
        if loaded < known {
            // Others than was thought; layers are loaded in their order.
            self.held = layers.clone().take(loaded).collect();
        } else {
            let missing: Vec<u16> = layers.clone().filter(|layer| !self.held.contains(layer)).collect();
            self.held.extend(missing.into_iter().take(loaded - known));
        }
        if loaded > known || self.loading_since.is_none() {
            self.loading_since = Some(now);
        }
        if self.is_loaded() {
            (self.loading_since, self.ask_at, self.unfit_times) = (None, None, 0);
        } else {
            self.ask_at = Some(now + LOADING_POLL);
        }
        true
    }

    /// Whether it says that it loads, and does not.
    pub(super) fn is_stalled(&self, now: Now) -> bool {
        self.is_here() && self.loading_since.is_some_and(|since| now.saturating_sub(since) > LOADING_PATIENCE)
    }

    /// It does not answer.
    pub(super) fn leave(&mut self, now: Now) {
        (self.presence, self.in_flight, self.silences) = (Presence::Gone(now), 0, 0);
        (self.loading_since, self.doubted) = (None, true);
        self.ask_at = Some(now + RETURN_POLL);
    }

    /// It did not answer a question, while it was gone.
    pub(super) fn stay_away(&mut self, now: Now) {
        (self.silences, self.doubted) = (self.silences.saturating_add(1), true);
        self.ask_at = Some(now + LONGEST_RETURN_POLL.min(RETURN_POLL * (1 << self.silences.min(10))));
    }

    /// It is given no layers for a while.
    pub(super) fn rest(&mut self, now: Now) {
        self.unfit_until = Some(now + LONGEST_UNFIT.min(UNFIT * (1 << self.unfit_times.min(10))));
        self.unfit_times = self.unfit_times.saturating_add(1);
        (self.failures, self.in_flight) = (0, 0);
        self.forget_layers();
    }

    /// A product came back whole.
    pub(super) fn succeeded(&mut self) {
        self.calls += 1;
        self.failures = 0;
    }

    /// It failed; whether once too often.
    pub(super) fn failed(&mut self) -> bool {
        self.failures += 1;
        self.failures >= FAILURES
    }

    /// It misbehaved; whether for the second time within some products.
    pub(super) fn strike(&mut self) -> bool {
        self.strikes.retain(|&at| at + STRIKE_WINDOW > self.calls);
        self.strikes.push_back(self.calls);
        self.strikes.len() > 1
    }
}
