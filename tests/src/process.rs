//! A `node` process under test.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Longer than any of the processes under test takes on a busy machine; reaching it fails the test.
const PATIENCE: Duration = Duration::from_secs(180);

/// A running process. Dropping it kills it.
pub struct Node {
    child: Child,
    stdout: Receiver<String>,
    /// Its log, as it is written; the thread returns all of it.
    log: Receiver<String>,
    stderr: Option<JoinHandle<String>>,
    seen: Vec<String>,
}

/// How a process ended.
#[derive(Debug)]
pub struct Finished {
    /// Exit code; `None` where a signal ended it.
    pub code: Option<i32>,
    /// All that it printed to standard output.
    pub stdout: String,
    /// All that it printed to standard error.
    pub stderr: String,
}

/// The binary that `cargo test` or `cargo build` built beside the tests.
fn binary() -> PathBuf {
    let mut path = std::env::current_exe().expect("a test knows its own path");
    path.pop();
    if path.ends_with("deps") || path.ends_with("examples") {
        path.pop();
    }
    let binary = path.join(format!("node{}", std::env::consts::EXE_SUFFIX));
    assert!(binary.exists(), "{} is missing: build it with `cargo build --release -p node`", binary.display());
    binary
}

impl Node {
    /// Starts `node` with these arguments.
    pub fn start<S: AsRef<std::ffi::OsStr>>(arguments: impl IntoIterator<Item = S>) -> Self {
        let mut child = Command::new(binary())
            .args(arguments)
            .env("RUST_LOG", "info")
            .env("NO_COLOR", "1")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary starts");
        let (sender, stdout) = mpsc::channel();
        let out = child.stdout.take().expect("standard output is piped");
        thread::spawn(move || {
            for line in BufReader::new(out).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        let mut err = BufReader::new(child.stderr.take().expect("standard error is piped"));
        let (sender, log) = mpsc::channel();
        let stderr = thread::spawn(move || {
            let mut text = String::new();
            let mut line = Vec::new();
            // A process that dies in the middle of a line still leaves what it wrote before.
            while err.read_until(b'\n', &mut line).is_ok_and(|read| read > 0) {
                let said = String::from_utf8_lossy(&line).into_owned();
                text.push_str(&said);
                // Nobody may wait for it.
                let _ = sender.send(said);
                line.clear();
            }
            text
        });
        Self { child, stdout, log, stderr: Some(stderr), seen: Vec::new() }
    }

    /// Waits for a line of standard output that begins with `prefix`; returns the rest of it.
    ///
    /// # Panics
    /// When the process ends without it, or takes too long.
    pub fn expect_line(&mut self, prefix: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.stdout.recv_timeout(left) {
                Ok(line) => {
                    self.seen.push(line.clone());
                    if let Some(rest) = line.strip_prefix(prefix) {
                        return rest.trim().to_owned();
                    }
                }
                Err(_) => panic!("no line `{prefix}…`; printed: {:#?}", self.seen),
            }
        }
    }

    /// Waits for a line of standard error that has `text` in it.
    ///
    /// # Panics
    /// When the process ends without it, or takes too long.
    pub fn expect_log(&mut self, text: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        let mut seen = Vec::new();
        loop {
            match self.log.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) if line.contains(text) => return line,
                Ok(line) => seen.push(line),
                Err(_) => panic!("no line with `{text}` in the log: {seen:#?}"),
            }
        }
    }

    /// Sends SIGINT, as Ctrl-C does.
    pub fn interrupt(&self) {
        self.signal("INT");
    }

    /// Sends a signal by its name, such as `STOP`.
    ///
    /// # Panics
    /// When the process cannot be sent signals.
    pub fn signal(&self, name: &str) {
        let status = Command::new("kill").args([&format!("-{name}"), &self.child.id().to_string()]).status();
        assert!(status.expect("kill runs").success(), "the process takes signals");
    }

    /// Process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Whether a text stands anywhere in the process's memory.
    ///
    /// # Panics
    /// When the memory cannot be read, which takes the rights of a debugger.
    pub fn remembers(&self, text: &str) -> bool {
        let folder = PathBuf::from(format!("/proc/{}", self.child.id()));
        let maps = fs::read_to_string(folder.join("maps")).expect("the process runs");
        let memory = File::open(folder.join("mem")).expect("a parent may read its child's memory");
        let mut buffer = Vec::new();
        maps.lines().filter_map(private_region).any(|(start, length)| {
            buffer.resize(length, 0);
            // Some regions, such as the kernel's own, cannot be read.
            memory.read_exact_at(&mut buffer, start).is_ok() && contains(&buffer, text.as_bytes())
        })
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits for the end.
    ///
    /// # Panics
    /// When that takes too long.
    pub fn finish(mut self) -> Finished {
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            match self.child.try_wait().expect("a child can be waited for") {
                Some(status) => break status,
                None if Instant::now() > deadline => panic!("the process does not end; printed: {:#?}", self.seen),
                None => thread::sleep(Duration::from_millis(20)),
            }
        };
        while let Ok(line) = self.stdout.recv_timeout(Duration::from_secs(5)) {
            self.seen.push(line);
        }
        let stderr = self.stderr.take().expect("taken once").join().expect("the reader does not panic");
        Finished { code: status.code(), stdout: self.seen.join("\n"), stderr }
    }
}

/// Start and length of a region that the process can write, from its line in `/proc/PID/maps`.
fn private_region(line: &str) -> Option<(u64, usize)> {
    let mut words = line.split_whitespace();
    let (range, rights) = (words.next()?, words.next()?);
    let (start, end) = range.split_once('-')?;
    let (start, end) = (u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?);
    rights.starts_with("rw").then_some((start, usize::try_from(end - start).ok()?))
}

fn contains(bytes: &[u8], needle: &[u8]) -> bool {
    let (first, rest) = (needle[0], &needle[1..]);
    let mut left = bytes;
    while let Some(at) = left.iter().position(|&byte| byte == first) {
        left = &left[at + 1..];
        if left.starts_with(rest) {
            return true;
        }
    }
    false
}

impl Drop for Node {
    fn drop(&mut self) {
        // Both fail only where the process has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
