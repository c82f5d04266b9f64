//! A run whose workers are beset by faults.

use std::collections::HashMap;
use std::num::NonZeroU64;
use std::time::Duration;

use anyhow::{Context as _, bail};
use node::link::{Line, Link, State, Transport};
use tests::{Liar, Lie};
use tokio::time::{Instant, sleep_until, timeout_at};

use crate::plan::{Fault, Kind};
use crate::process::{Owner, Place, SILENCE, Way, Worker, free_port, states, step_of};

/// Worker processes at the beginning.
const WORKERS: usize = 4;
/// Worker processes that are left in peace at any time, at least: the run is to go on, if slowly.
const SPARED: usize = 1;
/// A fault that would leave fewer waits so long.
const WAITS: Duration = Duration::from_secs(2);
/// Bytes a second of a slow link.
const SLOW: Option<NonZeroU64> = NonZeroU64::new(512 << 10);

/// What became of a run.
pub(crate) struct Outcome {
    pub(crate) faults: usize,
    pub(crate) lasted: Duration,
    pub(crate) workers: Vec<String>,
}

struct Storm<'a> {
    place: &'a Place,
    port: u16,
    began: Instant,
    step: usize,
    workers: Vec<Member>,
    liars: Vec<(String, Liar)>,
    /// Names in this program, by those on the network.
    names: HashMap<String, String>,
    faults: usize,
}

struct Member {
    worker: Worker,
    condition: Condition,
}

#[derive(Clone, Copy)]
enum Condition {
    Well,
    /// Until then.
    Fault(Kind, Instant),
    Dead,
}

/// Trains with four worker processes, and a worker of this process if there is anything to lie about, to the end.
pub(crate) async fn run(place: &Place, faults: Vec<Fault>) -> anyhow::Result<Outcome> {
    let began = Instant::now();
    let mut storm = Storm {
        place,
        port: free_port()?,
        began,
        step: 0,
        workers: Vec::new(),
        liars: Vec::new(),
        names: HashMap::new(),
        faults: 0,
    };
    for _ in 0..WORKERS {
        storm.join().await?;
    }
    let lies = faults.iter().any(|fault| fault.kind == Kind::Lie);
    if lies {
        storm.welcome_liar().await?;
    }
    let owner = Owner::start(place, storm.port, WORKERS + usize::from(lies), &[])?;
    storm.weather(owner, faults).await?;
    for (name, liar) in &storm.liars {
        println!("{name} gave {} wrong answers", liar.lies());
    }
    Ok(Outcome { faults: storm.faults, lasted: began.elapsed(), workers: states(place, &storm.names)? })
}

impl Storm<'_> {
    fn say(&self, text: &str) {
        println!("{:7.1} s  step {:>3}  {text}", self.began.elapsed().as_secs_f64(), self.step + 1);
    }

    async fn join(&mut self) -> anyhow::Result<()> {
        let name = format!("worker-{}", self.workers.len() + 1);
        let link = Link::to(self.port, Transport::Tcp, Line::default()).await?;
        let worker = Worker::start(self.place, name.clone(), Way::Over(link)).await?;
        self.names.insert(worker.peer.clone(), name);
        self.workers.push(Member { worker, condition: Condition::Well });
        Ok(())
    }

    async fn welcome_liar(&mut self) -> anyhow::Result<()> {
        let name = format!("liar-{}", self.liars.len() + 1);
        let (port, model) = (self.port, self.place.model.clone());
        let liar = tokio::task::spawn_blocking(move || Liar::dialing(port, &model, Lie::OneEntry)).await?;
        self.names.insert(liar.peer.clone(), name.clone());
        self.liars.push((name, liar));
        Ok(())
    }

    /// Follows the owner to its end, and does to the workers what is planned.
    async fn weather(&mut self, mut owner: Owner, faults: Vec<Fault>) -> anyhow::Result<()> {
        let mut planned = faults.into_iter().peekable();
        let mut due: Vec<(Instant, Fault)> = Vec::new();
        let mut silent_at = Instant::now() + SILENCE;
        loop {
            let next = due.iter().map(|(at, _)| *at).chain(self.workers.iter().filter_map(Member::ends)).min();
            tokio::select! {
                line = timeout_at(silent_at, owner.line()) => match line.context("the owner says nothing any more")? {
                    Some(line) => {
                        silent_at = Instant::now() + SILENCE;
                        self.heed(&line);
                        while let Some(fault) = planned.next_if(|fault| fault.step <= self.step) {
                            due.push((Instant::now() + fault.later, fault));
                        }
                    }
                    None => break,
                },
                () = sleep_until(next.unwrap_or(silent_at)), if next.is_some() => self.act(&mut due).await?,
            }
        }
        let status = owner.end().await?;
        if !status.success() {
            bail!("the owner ended with {status}");
        }
        Ok(())
    }

    /// Notes how far the run is, and tells what it says of workers.
    fn heed(&mut self, line: &str) {
        if let Some(step) = step_of(line) {
            self.step = step;
        }
        let spoken_of = self.names.iter().filter(|(peer, _)| line.contains(peer.as_str()));
        let named = spoken_of.fold(line.to_owned(), |line, (peer, name)| line.replace(peer.as_str(), name));
        if named != line || line.contains("served") || line.contains("worker") || line.contains("ERROR") {
            // Without the time of the log, if it is one of its lines.
            let text = named.split_once(" INFO ").or(named.split_once(" WARN ")).map_or(&*named, |(_, text)| text);
            self.say(&format!("    owner: {}", text.trim()));
        }
    }

    /// Ends the faults whose time is over, and begins those whose time has come.
    async fn act(&mut self, due: &mut Vec<(Instant, Fault)>) -> anyhow::Result<()> {
        let now = Instant::now();
        for index in 0..self.workers.len() {
            if let Condition::Fault(kind, until) = self.workers[index].condition
                && until <= now
            {
                self.mend(index, kind).await?;
            }
        }
        for (at, fault) in std::mem::take(due) {
            if at > now {
                due.push((at, fault));
            } else if self.begin(fault).await? {
                self.faults += 1;
            } else {
                due.push((now + WAITS, fault));
            }
        }
        Ok(())
    }

    /// Begins a fault; whether that was possible.
    async fn begin(&mut self, fault: Fault) -> anyhow::Result<bool> {
        match fault.kind {
            Kind::Join => {
                self.join().await?;
                self.say(&format!("join: {}", self.workers[self.workers.len() - 1].worker.name));
            }
            Kind::Lie => {
                if self.liars.iter().all(|(_, liar)| liar.lies() > 0) {
                    self.welcome_liar().await?;
                }
                let (name, liar) = &self.liars[self.liars.len() - 1];
                liar.begin();
                self.say(&format!("lie: {name}"));
            }
            kind => return self.afflict(kind, fault.lasts).await,
        }
        Ok(true)
    }

    /// Does something to the worker that has been well for longest, if enough others are well.
    async fn afflict(&mut self, mut kind: Kind, lasts: Duration) -> anyhow::Result<bool> {
        let well = |member: &Member| matches!(member.condition, Condition::Well);
        let Some(index) = self.workers.iter().position(well) else { return Ok(false) };
        let others = self.workers.iter().filter(|member| well(member)).count() - 1;
        if others < SPARED {
            return Ok(false);
        }
        let living = self.workers.iter().filter(|member| !matches!(member.condition, Condition::Dead)).count();
        if kind == Kind::Kill && living <= SPARED + 1 {
            kind = Kind::Restart;
        }
        // Who comes back stands behind the others, so that faults go round.
        let mut member = self.workers.remove(index);
        let link = |member: &Member, state| match &member.worker.way {
            Way::Over(link) => link.set(state),
            Way::Port(_) => {}
        };
        let what = match kind {
            Kind::Restart | Kind::Kill => {
                member.worker.kill().await?;
                "kill"
            }
            Kind::Stop => {
                member.worker.signal("STOP").await?;
                "stop"
            }
            Kind::Cut => {
                link(&member, State::Cut);
                "cut"
            }
            _ => {
                link(&member, State::Open(Line { rate: SLOW, ..Line::default() }));
                "slow"
            }
        };
        let (until, ends) = if kind == Kind::Kill {
            (Condition::Dead, "for good".to_owned())
        } else {
            (Condition::Fault(kind, Instant::now() + lasts), format!("for {:.0} s", lasts.as_secs_f64()))
        };
        member.condition = until;
        self.say(&format!("{what}: {}, {ends}", member.worker.name));
        self.workers.push(member);
        Ok(true)
    }

    async fn mend(&mut self, index: usize, kind: Kind) -> anyhow::Result<()> {
        let Member { worker, condition } = &mut self.workers[index];
        *condition = Condition::Well;
        match (kind, &worker.way) {
            (Kind::Restart, _) => worker.restart(self.place).await?,
            (Kind::Stop, _) => worker.signal("CONT").await?,
            (_, Way::Over(link)) => link.set(State::Open(Line::default())),
            (_, Way::Port(_)) => {}
        }
        let name = worker.name.clone();
        self.say(&format!("over: {name} is well"));
        Ok(())
    }
}

impl Member {
    fn ends(&self) -> Option<Instant> {
        match self.condition {
            Condition::Fault(_, until) => Some(until),
            Condition::Well | Condition::Dead => None,
        }
    }
}
