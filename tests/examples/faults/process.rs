//! The processes of a run: workers, and the owner.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Write as _;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use node::link::Link;
use serde_json::Value;
use tests::Node;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::mpsc;
use tokio::time::timeout;

/// A worker has measured itself and read the model long before.
const STARTS: Duration = Duration::from_secs(60);

/// An owner says something more often, whatever befalls its workers: every step, and when it begins to wait for one.
pub(crate) const SILENCE: Duration = Duration::from_secs(300);

/// Small products, so that a step takes seconds.
const SETTINGS: &str = "
[owner]
discovery_seconds = 60
patience_seconds = 120
[data]
max_tokens = 64
[training]
micro_batch = 4
accumulation = 1
learning_rate = 1e-4
warmup_steps = 2
[training.lora]
rank = 8
[checkpoint]
save_every = 1
";

/// A port that nobody listens on.
pub(crate) fn free_port() -> std::io::Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}

/// What every process of a run is started with.
pub(crate) struct Place {
    /// For settings, keys, logs and results. The list of bans is here too, so that the user's own stays as it is.
    pub(crate) folder: PathBuf,
    pub(crate) model: PathBuf,
    pub(crate) data: PathBuf,
    pub(crate) steps: usize,
    pub(crate) seed: u64,
}

impl Place {
    fn node(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(Node::binary());
        command.args(arguments).arg("--no-mdns").arg("--model").arg(&self.model);
        command.env("XDG_CONFIG_HOME", self.folder.join("config")).env("XDG_CACHE_HOME", self.folder.join("cache"));
        command.env("RUST_LOG", "info").env("NO_COLOR", "1");
        command.stdin(Stdio::null()).kill_on_drop(true);
        command
    }

    fn log(&self, name: &str) -> anyhow::Result<File> {
        let path = self.folder.join(format!("{name}.log"));
        File::options().create(true).append(true).open(&path).with_context(|| format!("{}", path.display()))
    }

    fn settings(&self, name: &str, text: &str) -> anyhow::Result<PathBuf> {
        let path = self.folder.join(name);
        fs::write(&path, text).with_context(|| format!("{}", path.display()))?;
        Ok(path)
    }
}

/// How a worker and its owner come together.
pub(crate) enum Way {
    /// The worker dials, over a link of its own, and can be reached in no other way.
    Over(Link),
    /// The owner dials this port.
    Port(u16),
}

/// A worker process; killed with the value.
pub(crate) struct Worker {
    pub(crate) name: String,
    /// Its name on the network, which its key file keeps.
    pub(crate) peer: String,
    pub(crate) way: Way,
    child: Option<Child>,
}

impl Worker {
    pub(crate) async fn start(place: &Place, name: String, way: Way) -> anyhow::Result<Self> {
        let mut worker = Self { name, peer: String::new(), way, child: None };
        worker.restart(place).await?;
        Ok(worker)
    }

    /// Starts the process, as what it was before.
    pub(crate) async fn restart(&mut self, place: &Place) -> anyhow::Result<()> {
        let key = place.folder.join(format!("{}.key", self.name));
        let (listen, dial) = match &self.way {
            Way::Over(link) => (Vec::new(), vec![format!("/ip4/127.0.0.1/tcp/{}", link.port())]),
            Way::Port(port) => (vec![format!("/ip4/127.0.0.1/tcp/{port}")], Vec::new()),
        };
        let network = format!("[network]\nlisten = {listen:?}\npeers = {dial:?}\n");
        let settings = place.settings(&format!("{}.toml", self.name), &network)?;
        // However this program ends, none is left behind.
        let mut command = place.node(&["--role", "worker", "--until-stdin-closes"]);
        command.stdin(Stdio::piped());
        command.arg("--config").arg(settings).arg("--identity").arg(key);
        let mut child = command.stdout(Stdio::piped()).stderr(place.log(&self.name)?).spawn()?;
        let mut said = BufReader::new(child.stdout.take().context("standard output is piped")?).lines();
        self.child = Some(child);
        loop {
            let line = timeout(STARTS, said.next_line()).await.context("a worker does not start")??;
            let line = line.with_context(|| format!("{} ends; see its log", self.name))?;
            if let Some(peer) = line.strip_prefix("worker ") {
                self.peer = peer.to_owned();
            } else if line.starts_with("serving") {
                return Ok(());
            }
        }
    }

    pub(crate) async fn kill(&mut self) -> anyhow::Result<()> {
        if let Some(mut child) = self.child.take() {
            child.kill().await.with_context(|| format!("{} cannot be killed", self.name))?;
        }
        Ok(())
    }

    /// Sends a signal, named without its SIG.
    pub(crate) async fn signal(&self, signal: &str) -> anyhow::Result<()> {
        let id = self.child.as_ref().and_then(Child::id).with_context(|| format!("{} has ended", self.name))?;
        let sent = Command::new("kill").arg(format!("-{signal}")).arg(id.to_string()).status().await?;
        ensure!(sent.success(), "{} takes no signal", self.name);
        Ok(())
    }
}

/// A running owner; killed with the value.
pub(crate) struct Owner {
    child: Child,
    lines: mpsc::Receiver<String>,
}

impl Owner {
    /// Starts it, or has it go on where it was interrupted, with so many workers: they dial `port`, or it dials them.
    pub(crate) fn start(place: &Place, port: u16, workers: usize, dial: &[u16]) -> anyhow::Result<Self> {
        let settings = place.settings("owner.toml", SETTINGS)?;
        let mut command = place.node(&["--role", "owner", "--resume"]);
        command.arg("--config").arg(settings).arg("--data").arg(&place.data);
        command.arg("--out").arg(place.folder.join("out")).args(["--listen", &format!("/ip4/127.0.0.1/tcp/{port}")]);
        for (flag, number) in [("--steps", place.steps), ("--workers", workers)] {
            command.arg(flag).arg(number.to_string());
        }
        command.arg("--seed").arg(place.seed.to_string());
        command.args(dial.iter().flat_map(|port| ["--peer".into(), format!("/ip4/127.0.0.1/tcp/{port}")]));
        let mut child = command.stdout(place.log("owner")?).stderr(Stdio::piped()).spawn()?;
        let mut said = BufReader::new(child.stderr.take().context("standard error is piped")?).lines();
        let (sender, lines) = mpsc::channel(64);
        let mut log = place.log("owner")?;
        tokio::spawn(async move {
            while let Ok(Some(line)) = said.next_line().await {
                // What cannot be written to the log is still heeded.
                let _ = writeln!(log, "{line}");
                if sender.send(line).await.is_err() {
                    break;
                }
            }
        });
        Ok(Self { child, lines })
    }

    /// The next line of its log; none after the last one.
    ///
    /// # Cancel safety
    /// No line is lost.
    pub(crate) async fn line(&mut self) -> Option<String> {
        self.lines.recv().await
    }

    pub(crate) async fn end(mut self) -> anyhow::Result<ExitStatus> {
        timeout(SILENCE, self.child.wait()).await.context("the owner does not end")?.context("waiting for the owner")
    }

    pub(crate) async fn kill(mut self) -> anyhow::Result<()> {
        self.child.kill().await.context("the owner cannot be killed")
    }
}

/// The step that a line says is done.
pub(crate) fn step_of(line: &str) -> Option<usize> {
    line.strip_prefix("step ")?.split('/').next()?.parse().ok()
}

/// Losses of a run's steps.
pub(crate) fn losses(place: &Place) -> anyhow::Result<Vec<f64>> {
    let report = report(&place.folder.join("out"))?;
    let steps = report["steps"].as_array().context("a report has steps")?;
    let losses: Vec<f64> = steps.iter().filter_map(|step| step["loss"].as_f64()).collect();
    if losses.len() != place.steps {
        bail!("{} of {} steps are in the report", losses.len(), place.steps);
    }
    Ok(losses)
}

/// What became of each worker, by its name in this program.
pub(crate) fn states(place: &Place, names: &HashMap<String, String>) -> anyhow::Result<Vec<String>> {
    let report = report(&place.folder.join("out"))?;
    let state = |worker: &Value| {
        let peer = worker["peer_id"].as_str().unwrap_or_default();
        let name = names.get(peer).map_or(peer, String::as_str);
        format!("{name}: {} calls, {}", worker["calls"], worker["state"].as_str().unwrap_or_default())
    };
    Ok(report["workers"].as_array().into_iter().flatten().map(state).collect())
}

fn report(out: &Path) -> anyhow::Result<Value> {
    let path = out.join("report.json");
    let bytes = fs::read(&path).with_context(|| format!("{}", path.display()))?;
    serde_json::from_slice(&bytes).with_context(|| format!("{}", path.display()))
}
