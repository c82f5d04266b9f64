//! Training with encrypted products while everything goes wrong, beside the same training in peace: whether it ends by
//! itself, and how far the losses of its steps are from those of the other.
//!
//!     cargo build --release -p node && cargo run --release -p tests --example faults -- MODEL DATA [STEPS] [FAULTS] [SEED]
//!     cargo run --release -p tests --example faults -- MODEL DATA [STEPS] --owner-kills COUNT [SEED]
//!
//! Four worker processes on this machine, and where there are lies one more in this process, each of which dials the owner
//! over a link of its own: a worker that nobody can dial, behind a home's router say, can be cut off from its owner. Faults
//! come from the seed; what they hit depends on the machine. With `--owner-kills` it is the owner that is killed, and goes on
//! with `--resume`; there it dials the workers.

#![allow(missing_docs)]

mod kills;
mod plan;
mod process;
mod storm;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};

use plan::Draw;
use process::{Place, losses};
use storm::Outcome;

/// How far a step's loss may be from that of the run without faults.
const ALLOWED: f64 = 0.01;

const USAGE: &str = "faults MODEL DATA [STEPS=30] [FAULTS=20] [SEED=1], or faults MODEL DATA [STEPS] --owner-kills COUNT \
                     [SEED]";

struct Plan {
    model: PathBuf,
    data: PathBuf,
    steps: usize,
    faults: usize,
    owner: bool,
    seed: u64,
}

fn main() -> anyhow::Result<()> {
    let plan = plan(std::env::args().skip(1).collect()).context(USAGE)?;
    let runtime =
        || tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("the system has threads and timers");
    actix::System::with_tokio_rt(runtime).block_on(run(plan))
}

fn plan(mut arguments: Vec<String>) -> anyhow::Result<Plan> {
    let kills = arguments.iter().position(|argument| argument == "--owner-kills");
    if let Some(at) = kills {
        arguments.remove(at);
        while arguments.len() < 3 {
            arguments.insert(at, "30".to_owned());
        }
    }
    let number = |place: usize, otherwise: usize| match arguments.get(place) {
        Some(text) => text.parse().with_context(|| format!("`{text}` is no number")),
        None => Ok(otherwise),
    };
    ensure!(arguments.len() >= 2, "MODEL and DATA are missing");
    let (steps, faults, seed) = (number(2, 30)?, number(3, if kills.is_some() { 10 } else { 20 })?, number(4, 1)?);
    ensure!(steps >= 3, "at least 3 steps");
    let (model, data) = (PathBuf::from(&arguments[0]), PathBuf::from(&arguments[1]));
    Ok(Plan { model, data, steps, faults, owner: kills.is_some(), seed: seed as u64 })
}

async fn run(plan: Plan) -> anyhow::Result<()> {
    let folder = tempfile::Builder::new().prefix("faults-").tempdir()?.keep();
    println!("settings, logs and results are in {}", folder.display());
    let place = |name: &str| -> anyhow::Result<Place> {
        let folder = folder.join(name);
        std::fs::create_dir_all(&folder)?;
        let (model, data) = (absolute(&plan.model)?, absolute(&plan.data)?);
        Ok(Place { folder, model, data, steps: plan.steps, seed: plan.seed })
    };
    let (beset, peaceful) = (place("faults")?, place("peace")?);
    let mut draw = Draw::new(plan.seed);
    let faulty = if plan.owner {
        kills::run(&beset, &mut draw, plan.faults).await?
    } else {
        let faults = plan::faults(&mut draw, plan.faults, plan.steps);
        storm::run(&beset, faults).await?
    };
    println!("{} faults; the run ended by itself after {:.0} s", faulty.faults, faulty.lasted.as_secs_f64());
    faulty.workers.iter().for_each(|worker| println!("    {worker}"));
    println!("the same run in peace:");
    let calm = storm::run(&peaceful, Vec::new()).await?;
    compare(&losses(&beset)?, &losses(&peaceful)?, &faulty, &calm)?;
    std::fs::remove_dir_all(&folder).with_context(|| format!("{} cannot be removed", folder.display()))
}

fn absolute(path: &Path) -> anyhow::Result<PathBuf> {
    path.canonicalize().with_context(|| format!("{}", path.display()))
}

fn compare(beset: &[f64], peaceful: &[f64], faulty: &Outcome, calm: &Outcome) -> anyhow::Result<()> {
    let mut largest = (0.0, 0);
    println!("step     with faults  without  difference");
    for (step, (with, without)) in beset.iter().zip(peaceful).enumerate() {
        let difference = (with - without).abs() / without;
        println!("{:>4} {with:>15.4} {without:>8.4} {:>9.3} %", step + 1, 100.0 * difference);
        if difference > largest.0 {
            largest = (difference, step + 1);
        }
    }
    let seconds = |lasted: Duration| lasted.as_secs_f64();
    println!(
        "largest difference: {:.3} % in step {}; {:.0} s with {} faults, {:.0} s without",
        100.0 * largest.0,
        largest.1,
        seconds(faulty.lasted),
        faulty.faults,
        seconds(calm.lasted)
    );
    if largest.0 > ALLOWED {
        bail!("the losses differ by more than {} %", 100.0 * ALLOWED);
    }
    Ok(())
}
