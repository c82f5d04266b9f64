//! A run whose owner is killed again and again, and goes on.

use std::collections::HashMap;
use std::time::Duration;

use anyhow::{Context as _, bail};
use tokio::time::{Instant, sleep_until, timeout_at};

use crate::plan::Draw;
use crate::process::{Owner, Place, SILENCE, Way, Worker, free_port, step_of};
use crate::storm::Outcome;

/// Worker processes, which the owner dials.
const WORKERS: usize = 4;
/// Every so many-th kill comes while the owner that the one before has interrupted begins again.
const IN_THE_BEGINNING: usize = 5;

struct Kill {
    at: Instant,
    /// The step that was under way.
    step: usize,
}

/// Kills the owner so often, at moments all over the run, and starts it again at once.
pub(crate) async fn run(place: &Place, draw: &mut Draw, count: usize) -> anyhow::Result<Outcome> {
    let began = Instant::now();
    let (mut workers, mut ports) = (Vec::new(), Vec::new());
    for number in 1..=WORKERS {
        ports.push(free_port()?);
        let way = Way::Port(ports[number - 1]);
        workers.push(Worker::start(place, format!("worker-{number}"), way).await?);
    }
    let port = free_port()?;
    let mut moments: Vec<_> =
        (0..count).map(|_| (1 + draw.below(place.steps.saturating_sub(1)), draw.seconds(0.0, 4.0))).collect();
    moments.sort_unstable();
    let mut kills: Vec<Kill> = Vec::new();
    let mut done: HashMap<usize, Instant> = HashMap::new();
    loop {
        let mut owner = Owner::start(place, port, WORKERS, &ports)?;
        let next = moments.get(kills.len()).copied();
        let early = kills.len() % IN_THE_BEGINNING == IN_THE_BEGINNING - 1 && next.is_some();
        let mut at = early.then(|| Instant::now() + draw.seconds(0.5, 6.0));
        let ended = loop {
            let silent_at = Instant::now() + SILENCE;
            tokio::select! {
                line = timeout_at(silent_at, owner.line()) => match line.context("the owner says nothing any more")? {
                    Some(line) => {
                        let Some(step) = step_of(&line) else { continue };
                        done.entry(step).or_insert_with(Instant::now);
                        if at.is_none() && let Some((_, later)) = next.filter(|(after, _)| step >= *after) {
                            at = Some(Instant::now() + later);
                        }
                    }
                    None => break true,
                },
                () = sleep_until(at.unwrap_or(silent_at)), if at.is_some() => break false,
            }
        };
        if ended {
            let status = owner.end().await?;
            if !status.success() {
                bail!("the owner ended with {status}; see its log");
            }
            break;
        }
        let step = 1 + done.keys().max().copied().unwrap_or_default();
        kills.push(Kill { at: Instant::now(), step });
        owner.kill().await?;
    }
    tell(&kills, &done, began);
    Ok(Outcome { faults: kills.len(), lasted: began.elapsed(), workers: Vec::new() })
}

fn tell(kills: &[Kill], done: &HashMap<usize, Instant>, began: Instant) {
    let mut lost: Vec<Duration> = Vec::new();
    for Kill { at, step } in kills {
        let Some(again) = done.get(step) else { continue };
        lost.push(*again - *at);
        let (at, took) = ((*at - began).as_secs_f64(), (*again - *at).as_secs_f64());
        println!("{at:7.1} s  killed in step {step}, which was done {took:.1} s later");
    }
    lost.sort_unstable();
    if let (Some(middle), Some(most)) = (lost.get(lost.len() / 2), lost.last()) {
        println!("from a kill to the end of its step: median {middle:.1?}, at most {most:.1?}");
    }
}
