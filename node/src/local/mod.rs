//! An owner and its workers on this machine, as processes that know nothing of each other but their addresses.
//!
//! 1. Start the workers, each a process and a libp2p peer of its own, and learn their addresses from what they print.
//! 2. Start the owner with these addresses, or with those of links to them.
//! 3. Stop the workers when it has ended.
//!
//! The workers are told the model and their own settings, and nothing else: data and adapters are arguments of the owner
//! alone.

mod worker;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context as _, ensure};
use libp2p::Multiaddr;
use tokio::process::Command;

use crate::config::{BackendChoice, Config, WorkerConfig};
use crate::link::{Line, Link, Route, Transport};
use crate::output;
use crate::report::{self, PARTS_VARIABLE};
use crate::roles::Start;
use crate::trace;
use worker::WorkerProcess;

/// What is run, and what is seen of it.
pub(crate) struct LocalRun {
    /// The owner's configuration, its model included; addresses are filled in. Logs, keys and results go to its folder
    /// for results, which exists.
    pub(crate) config: Config,
    /// How the owner's run begins.
    pub(crate) start: Start,
    /// What lies between the owner and each worker, besides this machine.
    pub(crate) route: Route,
    /// Every process writes a trace beside this name.
    pub(crate) trace: Option<PathBuf>,
    /// The owner counts its processor time by parts.
    pub(crate) parts: bool,
    /// Nothing is printed to standard output.
    pub(crate) quiet: bool,
}

impl LocalRun {
    /// Runs to the end of the owner. Gives the processor seconds that its workers took, from their start on; `None` where the
    /// system does not tell, or one had ended before.
    ///
    /// # Errors
    /// When a process cannot be started, or the owner fails.
    pub(crate) async fn run(self) -> anyhow::Result<Option<f64>> {
        let Self { mut config, start, route, trace, parts, quiet } = self;
        let (model, out) = (config.model()?.to_path_buf(), config.owner.out.clone());
        config.network.mdns = false;
        config.network.listen = vec![Transport::default().listen().into()];
        let say = |line: String| {
            if !quiet {
                output::print(line);
            }
        };
        let mut workers = LocalWorkers::default();
        if config.owner.backend == BackendChoice::Encrypted {
            workers = LocalWorkers::start(&config, &model, &out, route, trace.as_deref(), say).await?;
            config.network.peers.extend(workers.addresses.iter().cloned());
        }
        let settings = write(&out, "owner.toml", &toml::to_string(&config)?)?;
        let mut owner = Command::new(std::env::current_exe().context("the path of this program is not known")?);
        owner.args(["--role", "owner", "--config"]).arg(&settings);
        match start {
            Start::Fresh => {}
            Start::Overwrite => drop(owner.arg("--overwrite")),
            Start::Resume(path) => drop(owner.arg("--resume").args(path)),
        }
        if let Some(trace) = &trace {
            owner.arg("--trace").arg(trace::of_process(trace, "owner"));
        }
        if parts {
            owner.env(PARTS_VARIABLE, "1");
        }
        if quiet {
            owner.stdout(Stdio::null());
        }
        let status = owner.stdin(Stdio::null()).status().await.context("the owner's process cannot be started")?;
        let workers_cpu_seconds = workers.processes.iter().map(WorkerProcess::cpu_seconds).sum();
        workers.stop().await;
        ensure!(status.success(), "the owner ended with {status}; the workers' logs are in {}", out.display());
        Ok(workers_cpu_seconds)
    }
}

/// Workers of an owner on this machine, with what lies between.
#[derive(Default)]
pub(crate) struct LocalWorkers {
    processes: Vec<WorkerProcess>,
    links: Vec<Link>,
    /// Where each is reached.
    pub(crate) addresses: Vec<String>,
}

impl LocalWorkers {
    /// Starts as many as the owner's configuration waits for. Logs and keys go to `out`; `say` is told of each.
    ///
    /// # Errors
    /// When one cannot be started, or ends before it listens.
    pub(crate) async fn start(
        config: &Config,
        model: &Path,
        out: &Path,
        route: Route,
        trace: Option<&Path>,
        say: impl Fn(String),
    ) -> anyhow::Result<Self> {
        // The owner is a process of this run, under a name that it makes when it starts.
        let worker = WorkerConfig { owners: Vec::new(), ..config.worker.clone() };
        let settings = Config { worker, ..Config::default() };
        let settings = write(out, "worker.toml", &toml::to_string(&settings)?)?;
        say(format!("starting {} workers", config.owner.workers));
        let mut workers = Self::default();
        // One after the other: each measures its speed when it starts, and two at a time would measure each other.
        for number in 1..=config.owner.workers {
            let mut worker = WorkerProcess::start(number, model, &settings, out, route.transport, trace)?;
            let mut address = worker.address().await?;
            if let Some(line) = route.link {
                let (link, entrance) = over(&address, line).await?;
                workers.links.push(link);
                address = entrance;
            }
            say(format!("  worker {number}: {address}"));
            workers.addresses.push(address);
            workers.processes.push(worker);
        }
        Ok(workers)
    }

    /// What tells the processor seconds that all of them have taken, from their start on; `None` where the system does not tell, or one has
    /// ended.
    pub(crate) fn cpu_clock(&self) -> impl Fn() -> Option<f64> + Send + 'static {
        let processes: Option<Vec<u32>> = self.processes.iter().map(WorkerProcess::id).collect();
        move || processes.as_ref()?.iter().map(|&process| report::cpu_seconds_of(process)).sum()
    }

    /// Stops them, one after the other.
    pub(crate) async fn stop(self) {
        for worker in self.processes {
            worker.stop().await;
        }
    }
}

/// A link to a worker's address, and the address at which it is entered.
async fn over(address: &str, line: Line) -> anyhow::Result<(Link, String)> {
    let address: Multiaddr = address.parse().with_context(|| format!("a worker listens on `{address}`"))?;
    let over = Link::over(&address, line).await.context("no port for a link")?;
    let (link, entrance) = over.with_context(|| format!("no link leads to {address}"))?;
    Ok((link, entrance.to_string()))
}

/// Writes a file into an existing folder.
///
/// # Errors
/// When it cannot be written; the message names it.
pub(crate) fn write(folder: &Path, name: &str, text: &str) -> anyhow::Result<PathBuf> {
    let path = folder.join(name);
    fs::write(&path, text).with_context(|| format!("{} cannot be written", path.display()))?;
    Ok(path)
}
