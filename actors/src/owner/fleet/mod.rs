//! The fleet: which worker serves which layers, over time. Events and the time come in, commands go out; no socket, no
//! clock, no actor.
//!
//! - **Admission.** A worker that offers becomes a member. What it says of its speed only breaks ties; until its own
//!   products were timed it gets a capped share. Who is not needed is a spare.
//! - **Plan.** Whenever somebody joins, leaves, comes back, fails or is banned, and now and then for the sake of speed,
//!   `plan` is asked who is to serve what. It moves as little as it can.
//! - **Move.** A layer is loaded at its new place before it is given up at the old one, where memory allows that.
//! - **Loss.** A worker that does not answer is *gone*: its layers go to others at once, and it is asked now and then
//!   whether it is back; if it is, what it still holds is used again, if it is still useful.
//! - **Lies.** A second broken answer within some hundred products bans a worker, and so does one that no mistake explains.
//! - **Patience.** Where a layer is served by nobody, the run waits: as long as, within the patience, one more layer comes
//!   to be served than was before.

mod member;
mod messages;
mod plan;
mod speed;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
mod verdict;

use std::time::Duration;

use protocol::ids::ProductId;

use self::member::Member;
use self::plan::Planned;
use self::speed::Usual;
use self::verdict::{failed, leave, refused, release};
use super::assignment::NotEnoughMemory;
use crate::transport::PeerName;

pub use self::member::Presence;
pub use self::messages::FleetSettings;
pub(crate) use self::messages::{Command, Event, Failure, Health, Record};
pub(crate) use self::speed::Measured;

/// Time since the owner began.
pub(crate) type Now = Duration;

/// Members at a time: far more than a model has layers for. Who offers beyond that is not heard.
const MEMBERS: usize = 64;

/// How often layers may move for no other reason than speed: loading them takes a good part of that.
const SPEED_PAUSE: Duration = Duration::from_secs(60);

/// See the module's documentation.
pub(crate) struct Fleet {
    settings: FleetSettings,
    layers: u16,
    /// In the order in which they offered.
    members: Vec<(PeerName, Member)>,
    usual: Usual,
    begun: bool,
    planned_at: Now,
    /// Why there is no plan, if there is none.
    short: Option<NotEnoughMemory>,
    waiting: Option<Waiting>,
    ever_served: bool,
    given_up: Option<String>,
}

/// Some layer is served by nobody.
struct Waiting {
    /// When it began, or when last one more layer was served than ever since.
    since: Now,
    most_served: usize,
}

impl Fleet {
    pub(crate) fn new(layers: u16, settings: FleetSettings) -> Self {
        Self {
            settings,
            layers,
            members: Vec::new(),
            usual: Usual::default(),
            begun: false,
            planned_at: Duration::ZERO,
            short: None,
            waiting: None,
            ever_served: false,
            given_up: None,
        }
    }

    /// The worker for a product: of those that serve the layer the one that would be done first, or of those that it
    /// was not sent to, if there are any.
    pub(crate) fn route(&self, product: ProductId, except: &[PeerName]) -> Option<&PeerName> {
        let serves = |(_, member): &&(PeerName, Member)| member.serves(product.linear.layer);
        // Who was not measured is as fast as the fastest, so that it will be.
        let measured = self.members.iter().filter_map(|(_, member)| member.speed.measured());
        let fastest = measured.fold(f64::MIN_POSITIVE, f64::max);
        let done = |member: &Member| f64::from(member.in_flight + 1) / member.speed.measured().unwrap_or(fastest);
        let stays = |member: &Member| member.target.contains(&product.linear.layer);
        let holders = || self.members.iter().filter(serves).filter(|(peer, _)| !except.contains(peer));
        let best = holders().min_by(|(_, a), (_, b)| stays(b).cmp(&stays(a)).then(done(a).total_cmp(&done(b))));
        best.map(|(peer, _)| peer)
    }

    /// When a product of so many multiply-accumulates is slow.
    pub(crate) fn slow_after(&self, product: ProductId, macs: f64) -> Duration {
        self.usual.slow_after(product, macs)
    }

    /// Whether a worker can be asked.
    pub(crate) fn is_here(&self, peer: &PeerName) -> bool {
        self.find(peer).is_some_and(|member| self.members[member].1.is_here())
    }

    /// Whether every layer is served.
    pub(crate) fn serves_all(&self) -> bool {
        self.served() == usize::from(self.layers)
    }

    /// Why the run cannot go on, if it cannot.
    pub(crate) fn given_up(&self) -> Option<&str> {
        self.given_up.as_deref()
    }

    /// Why nobody is assigned anything, if so.
    pub(crate) fn short_of_memory(&self) -> Option<&NotEnoughMemory> {
        self.short.as_ref()
    }

    /// How long the run waits for a layer that nobody serves.
    pub(crate) fn patience(&self) -> Duration {
        self.settings.patience
    }

    /// Every worker that there was.
    pub(crate) fn records(&self) -> Vec<Record> {
        let record = |(peer, member): &(PeerName, Member)| Record {
            peer: peer.clone(),
            device: member.device.clone(),
            presence: member.presence.clone(),
            assigned: member.assigned.clone(),
            loaded: u16::try_from(member.held.len()).unwrap_or(u16::MAX),
            served: member.served.clone(),
            calls: member.calls,
        };
        self.members.iter().map(record).collect()
    }

    /// Takes in what happened.
    pub(crate) fn on(&mut self, event: Event, now: Now) -> Vec<Command> {
        let mut commands = Vec::new();
        let changed = self.take(event, now, &mut commands);
        if self.begun {
            if changed {
                self.plan(now);
            }
            self.settle(now, &mut commands);
            self.watch(now, &mut commands);
        }
        commands
    }

    fn find(&self, peer: &PeerName) -> Option<usize> {
        self.members.iter().position(|(name, _)| name == peer)
    }

    fn served(&self) -> usize {
        let is_served = |&layer: &u16| self.members.iter().any(|(_, member)| member.serves(layer));
        (0..self.layers).filter(is_served).count()
    }

    /// Enters an event; whether it takes another plan.
    fn take(&mut self, event: Event, now: Now, commands: &mut Vec<Command>) -> bool {
        let (peer, event) = match event {
            Event::Begin => return !std::mem::replace(&mut self.begun, true),
            Event::Tick => return self.tick(now, commands),
            Event::Offered { peer, room, claimed, device } => return self.offered(peer, room, claimed, device, now),
            Event::Lost { ref peer, .. }
            | Event::Health { ref peer, .. }
            | Event::Assigned { ref peer }
            | Event::Refused { ref peer, .. }
            | Event::Released { ref peer }
            | Event::Silent { ref peer, .. }
            | Event::Sent { ref peer }
            | Event::Done { ref peer, .. }
            | Event::Failed { ref peer, .. }
            | Event::Dropped { ref peer, .. }
            | Event::Slow { ref peer } => (peer.clone(), event),
        };
        let Some(index) = self.find(&peer) else { return false };
        let member = &mut self.members[index].1;
        if member.is_banned() {
            return false;
        }
        match event {
            Event::Lost { why, .. } => leave(&peer, member, &why, now, commands),
            Event::Health { health, .. } => self.health(index, health, now, commands),
            Event::Assigned { .. } => {
                member.answered();
                (member.ask_at, member.before) = (Some(now), None);
                false
            }
            Event::Refused { why, .. } => refused(&peer, member, &why, now, commands),
            Event::Released { .. } => {
                member.answered();
                false
            }
            Event::Silent { why, .. } => {
                member.answered();
                if member.is_here() {
                    return leave(&peer, member, &why, now, commands);
                }
                member.stay_away(now);
                false
            }
            Event::Sent { .. } => {
                member.in_flight += 1;
                false
            }
            Event::Dropped { waited, .. } => {
                member.in_flight = member.in_flight.saturating_sub(1);
                member.speed.waited(&waited);
                false
            }
            Event::Done { measured, .. } => {
                member.in_flight = member.in_flight.saturating_sub(1);
                member.succeeded();
                member.speed.record(&measured);
                self.usual.record(&measured);
                false
            }
            Event::Slow { .. } => {
                member.ask_at = Some(now);
                false
            }
            Event::Failed { layer, failure, why, .. } => {
                member.in_flight = member.in_flight.saturating_sub(1);
                failed(&peer, member, layer, failure, &why, now, commands)
            }
            Event::Begin | Event::Tick | Event::Offered { .. } => false,
        }
    }

    fn offered(&mut self, peer: PeerName, room: u16, claimed: f64, device: String, now: Now) -> bool {
        if self.settings.banned.contains(&peer) {
            return false;
        }
        let room = room.min(self.layers);
        match self.find(&peer) {
            Some(index) => {
                let member = &mut self.members[index].1;
                if !member.is_banned() {
                    (member.device, member.claimed) = (device, claimed);
                    (member.doubted, member.ask_at) = (true, Some(now));
                }
                false
            }
            None => {
                if self.members.len() >= MEMBERS && !self.forget_one(now) {
                    return false;
                }
                self.members.push((peer, Member::new(room, claimed, device)));
                true
            }
        }
    }

    /// Makes room for another member: one that left long ago and did nothing is forgotten; whether there was one.
    fn forget_one(&mut self, now: Now) -> bool {
        let patience = self.settings.patience;
        let idle = |(_, member): &(PeerName, Member)| {
            let long_gone = matches!(member.presence, Presence::Gone(since) if now.saturating_sub(since) > patience);
            long_gone && member.calls == 0 && !member.is_busy()
        };
        let forgotten = self.members.iter().position(idle).map(|index| self.members.remove(index));
        forgotten.is_some()
    }

    fn health(&mut self, index: usize, health: Health, now: Now, commands: &mut Vec<Command>) -> bool {
        let (all, Health { layers, loaded, failure, beside }) = (self.layers, health);
        let (peer, member) = &mut self.members[index];
        member.answered();
        member.ask_at = None;
        let back = !member.is_here();
        if back {
            member.presence = Presence::Here;
            if !member.served.is_empty() {
                commands.push(Command::Say(format!("{peer} is back")));
            }
        }
        let mut changed = back;
        if let Some(beside) = beside {
            let room = all.min(beside.saturating_add(layers.len() as u16));
            changed |= std::mem::replace(&mut member.room, room) != room;
        }
        if let Some(why) = failure.filter(|_| layers == member.assigned && !layers.is_empty()) {
            commands.push(Command::Say(format!("{peer} could not load its layers: {why}")));
            release(peer, member, commands);
            member.rest(now);
            return true;
        }
        let lost = !member.assigned.is_empty();
        member.stray = !lost && !layers.is_empty();
        let as_told = member.take_progress(&layers, loaded, now);
        if !as_told && lost && !back {
            commands.push(Command::Say(format!("{peer} has lost its layers, and is given layers again")));
        }
        changed || !as_told
    }

    /// Time went on: who is to be asked, who has loaded for too long, who may be tried again.
    fn tick(&mut self, now: Now, commands: &mut Vec<Command>) -> bool {
        let patience = self.settings.patience;
        let mut changed = false;
        for (peer, member) in &mut self.members {
            if member.is_banned() {
                continue;
            }
            if member.unfit_until.is_some_and(|until| until <= now) {
                member.unfit_until = None;
                changed = true;
            }
            if member.is_stalled(now) {
                commands.push(Command::Say(format!(
                    "{peer} says that it loads its layers, and does not: they go to others"
                )));
                release(peer, member, commands);
                member.rest(now);
                changed = true;
            }
            let given_up = matches!(member.presence, Presence::Gone(since) if now.saturating_sub(since) > patience);
            if !member.is_busy() && !given_up && member.ask_at.is_some_and(|at| at <= now) {
                member.ask_at = None;
                member.exchanges += 1;
                let offer = std::mem::take(&mut member.doubted);
                commands.push(Command::Ask { peer: peer.clone(), offer });
            }
        }
        let calm = self.begun && self.waiting.is_none();
        changed || (calm && now.saturating_sub(self.planned_at) > SPEED_PAUSE)
    }

    /// Says who is to serve what, if that can be said.
    fn plan(&mut self, now: Now) {
        self.planned_at = now;
        let fit = |&index: &usize| self.members[index].1.is_fit();
        let fit: Vec<usize> = (0..self.members.len()).filter(fit).collect();
        let planned = |&index: &usize| {
            let member = &self.members[index].1;
            let (held, assigned, room) = (&member.held, &member.assigned, member.room);
            Planned { held, assigned, room, speed: member.speed.measured(), claimed: member.claimed }
        };
        let workers: Vec<Planned<'_>> = fit.iter().map(planned).collect();
        match plan::plan(self.layers, self.settings.replicas, &workers) {
            Ok(ranges) => {
                self.short = None;
                for (index, range) in fit.into_iter().zip(ranges) {
                    self.members[index].1.target = range;
                }
            }
            // Who serves something goes on to.
            Err(short) => self.short = Some(short),
        }
    }

    /// Brings members closer to their targets: what is new is loaded before what is old is given up.
    fn settle(&mut self, now: Now, commands: &mut Vec<Command>) {
        if self.short.is_some() {
            return;
        }
        for index in 0..self.members.len() {
            let (_, member) = &self.members[index];
            if !member.is_fit() || member.is_busy() || (member.assigned == member.target && !member.stray) {
                continue;
            }
            let needed = |&&layer: &&u16| {
                let elsewhere =
                    |(other, (_, member)): (usize, &(PeerName, Member))| other != index && member.serves(layer);
                !member.target.contains(&layer) && !self.members.iter().enumerate().any(elsewhere)
            };
            let needed: Vec<u16> = member.held.iter().filter(needed).copied().collect();
            let wanted = match (needed.first(), needed.last()) {
                (Some(&first), Some(&last)) => {
                    let hull = match member.target.is_empty() {
                        true => first..last + 1,
                        false => member.target.start.min(first)..member.target.end.max(last + 1),
                    };
                    let covered = hull.start >= member.assigned.start && hull.end <= member.assigned.end;
                    if covered {
                        // Nothing to load, and something is still needed.
                        continue;
                    }
                    if hull.len() <= usize::from(member.room) { hull } else { member.target.clone() }
                }
                _ => member.target.clone(),
            };
            let (peer, member) = &mut self.members[index];
            if wanted.is_empty() {
                member.stray = false;
                member.exchanges += 1;
                member.forget_layers();
                commands.push(Command::Release { peer: peer.clone() });
            } else {
                member.assign(wanted.clone(), now);
                commands.push(Command::Assign { peer: peer.clone(), layers: wanted });
            }
        }
    }

    /// Watches over the patience.
    fn watch(&mut self, now: Now, commands: &mut Vec<Command>) {
        let (served, all) = (self.served(), usize::from(self.layers));
        if self.given_up.is_some() {
            return;
        }
        if served == all {
            if self.waiting.take().is_some() && self.ever_served {
                commands.push(Command::Say("every layer is served again".into()));
            }
            self.ever_served = true;
            return;
        }
        let patience = self.settings.patience;
        let Some(waiting) = &mut self.waiting else {
            self.waiting = Some(Waiting { since: now, most_served: served });
            if self.ever_served {
                let why = self.why_waiting();
                commands.push(Command::Say(format!("{why}: waiting up to {patience:?} for workers")));
            }
            return;
        };
        if served > waiting.most_served {
            *waiting = Waiting { since: now, most_served: served };
        } else if now.saturating_sub(waiting.since) >= patience {
            let why = format!("{} for {patience:?} (owner.patience_seconds)", self.why_waiting());
            self.given_up = Some(why.clone());
            commands.push(Command::GiveUp(why));
        }
    }

    /// What is missing.
    fn why_waiting(&self) -> String {
        let missing = usize::from(self.layers) - self.served();
        let here = self.members.iter().filter(|(_, member)| member.is_here()).count();
        match here {
            0 => "no worker is left".into(),
            _ => format!("{missing} of the model's {} layers are served by none of {here} worker(s)", self.layers),
        }
    }
}
