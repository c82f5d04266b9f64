//! A worker process on this machine.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, bail};
use tokio::io::{AsyncBufReadExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};

use crate::link::Transport;
use crate::report;
use crate::roles::worker::LISTENING;
use crate::trace;

/// Time for a worker to read its model's digest, compile its GPUs' kernels, measure its speed and listen.
const START_TIME_OUT: Duration = Duration::from_secs(120);
/// Time for a worker to end once its standard input is closed.
const STOP_TIME_OUT: Duration = Duration::from_secs(5);

/// A worker process. It ends when its standard input closes, so that it cannot outlive its parent, however that ends.
pub(super) struct WorkerProcess {
    number: usize,
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
    log: PathBuf,
}

impl WorkerProcess {
    /// Starts worker `number` with a file of settings; its log and its key file go to `out`.
    pub(super) fn start(
        number: usize,
        model: &Path,
        settings: &Path,
        out: &Path,
        transport: Transport,
        trace: Option<&Path>,
    ) -> anyhow::Result<Self> {
        let log = out.join(format!("worker-{number}.log"));
        let log_file = File::create(&log).with_context(|| format!("{} cannot be written", log.display()))?;
        let mut command = Command::new(std::env::current_exe().context("the path of this program is not known")?);
        if let Some(trace) = trace {
            command.arg("--trace").arg(trace::of_process(trace, &format!("worker-{number}")));
        }
        let mut child = command
            .args(["--role", "worker", "--no-mdns", "--until-stdin-closes"])
            .args(["--listen", transport.listen()])
            .arg("--config")
            .arg(settings)
            .arg("--model")
            .arg(model)
            .arg("--identity")
            .arg(out.join(format!("worker-{number}.key")))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log_file)
            .kill_on_drop(true)
            .spawn()
            .context("a worker's process cannot be started")?;
        let stdout = child.stdout.take().context("a worker's process has no standard output")?;
        Ok(Self { number, child, lines: BufReader::new(stdout).lines(), log })
    }

    /// The address that it prints once it listens.
    pub(super) async fn address(&mut self) -> anyhow::Result<String> {
        let log = self.log.display();
        let number = self.number;
        let printed = tokio::time::timeout(START_TIME_OUT, async {
            while let Some(line) = self.lines.next_line().await? {
                if let Some(address) = line.strip_prefix(LISTENING) {
                    return Ok(Some(address.trim().to_owned()));
                }
            }
            anyhow::Ok(None)
        });
        match printed.await {
            Ok(Ok(Some(address))) => Ok(address),
            Ok(Ok(None)) => bail!("worker {number} ended before it listened; its log is {log}"),
            Ok(Err(error)) => Err(error).with_context(|| format!("worker {number}; its log is {log}")),
            Err(_) => bail!("worker {number} does not listen after {START_TIME_OUT:?}; its log is {log}"),
        }
    }

    /// The process's number; `None` where it is gone.
    pub(super) fn id(&self) -> Option<u32> {
        self.child.id()
    }

    /// Processor seconds that it has taken so far; `None` where it is gone or the system does not tell.
    pub(super) fn cpu_seconds(&self) -> Option<f64> {
        report::cpu_seconds_of(self.id()?)
    }

    /// Closes its standard input and waits; a worker that does not end by itself is killed.
    pub(super) async fn stop(mut self) {
        drop(self.child.stdin.take());
        if tokio::time::timeout(STOP_TIME_OUT, self.child.wait()).await.is_err() {
            tracing::warn!(worker = self.number, "the worker did not end by itself");
            // Killing fails only where the process is gone already.
            let _ = self.child.kill().await;
        }
    }
}
