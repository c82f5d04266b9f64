//! A `node` process under test.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Read};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

/// Longer than any of the processes under test takes on a busy machine; reaching it fails the test.
const PATIENCE: Duration = Duration::from_secs(180);

/// A running process. Dropping it kills it.
pub struct Node {
    child: Child,
    stdout: Receiver<String>,
    stderr: Receiver<String>,
    seen: Vec<String>,
    said: Vec<String>,
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

impl Finished {
    /// It ended well.
    ///
    /// # Panics
    /// When it did not.
    pub fn succeeded(self) -> Self {
        assert_eq!(self.code, Some(0), "{}\n{}", self.stdout, self.stderr);
        self
    }

    /// It ended with an error that is meant for people; what it said.
    ///
    /// # Panics
    /// When it did not.
    pub fn refused(self) -> String {
        assert_eq!(self.code, Some(1), "{}\n{}", self.stdout, self.stderr);
        assert!(self.stderr.contains("error: ") && !self.stderr.contains("panicked"), "{}", self.stderr);
        self.stderr
    }
}

impl Node {
    /// The binary that `cargo test` or `cargo build` built beside the tests.
    ///
    /// # Panics
    /// When it was not built.
    pub fn binary() -> PathBuf {
        let mut path = std::env::current_exe().expect("a test knows its own path");
        path.pop();
        if path.ends_with("deps") || path.ends_with("examples") {
            path.pop();
        }
        let binary = path.join(format!("node{}", std::env::consts::EXE_SUFFIX));
        assert!(binary.exists(), "{} is missing: build it with `cargo build --release -p node`", binary.display());
        binary
    }

    /// Starts `node` with these arguments.
    pub fn start<S: AsRef<std::ffi::OsStr>>(arguments: impl IntoIterator<Item = S>) -> Self {
        Self::of(command(arguments))
    }

    /// Starts `node` with a folder of its own for the user's configuration.
    pub fn start_in<S: AsRef<std::ffi::OsStr>>(folder: &Path, arguments: impl IntoIterator<Item = S>) -> Self {
        let mut command = command(arguments);
        command.env("XDG_CONFIG_HOME", folder).env("XDG_CACHE_HOME", folder.join("cache"));
        Self::of(command)
    }

    /// Starts `node` so that [`Node::fill_disk`] does not end it: where a file may grow no further, the signal that says so
    /// is ignored, which leaves an error.
    pub fn start_on_a_small_disk<S: AsRef<std::ffi::OsStr>>(arguments: impl IntoIterator<Item = S>) -> Self {
        let mut shell = Command::new("sh");
        shell.args(["-c", "trap '' XFSZ; exec \"$0\" \"$@\""]).arg(Self::binary());
        Self::of(with_pipes(shell, arguments))
    }

    fn of(mut command: Command) -> Self {
        let mut child = command.spawn().expect("the binary starts");
        let stdout = lines(child.stdout.take().expect("standard output is piped"));
        let stderr = lines(child.stderr.take().expect("standard error is piped"));
        Self { child, stdout, stderr, seen: Vec::new(), said: Vec::new() }
    }

    /// Starts `node` with pipes for standard output and standard error that nobody reads: both are closed.
    pub fn start_unread<S: AsRef<std::ffi::OsStr>>(arguments: impl IntoIterator<Item = S>) -> Self {
        let mut child = command(arguments).spawn().expect("the binary starts");
        drop((child.stdout.take(), child.stderr.take()));
        let (stdout, stderr) = (mpsc::channel().1, mpsc::channel().1);
        Self { child, stdout, stderr, seen: Vec::new(), said: Vec::new() }
    }

    /// Waits for a line of standard output that begins with `prefix`; returns the rest of it.
    ///
    /// # Panics
    /// When the process ends without it, or takes too long.
    pub fn expect_line(&mut self, prefix: &str) -> String {
        expect(&self.stdout, &mut self.seen, prefix)
    }

    /// The same with standard error.
    ///
    /// # Panics
    /// When the process ends without it, or takes too long.
    pub fn expect_note(&mut self, prefix: &str) -> String {
        expect(&self.stderr, &mut self.said, prefix)
    }

    /// Waits for a line of standard error that has `text` in it.
    ///
    /// # Panics
    /// When the process ends without it, or takes too long.
    pub fn expect_log(&mut self, text: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.stderr.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => {
                    self.said.push(line.clone());
                    if line.contains(text) {
                        return line;
                    }
                }
                Err(_) => panic!("no line with `{text}` in the log: {:#?}", self.said),
            }
        }
    }

    /// Sends SIGINT, as Ctrl-C does.
    pub fn interrupt(&self) {
        self.signal("INT");
    }

    /// Sends a signal, named without its SIG.
    ///
    /// # Panics
    /// When the process has ended.
    pub fn signal(&self, name: &str) {
        let status = Command::new("kill").args([&format!("-{name}"), &self.child.id().to_string()]).status();
        assert!(status.expect("kill runs").success(), "the process takes signals");
    }

    /// From now on all that it writes to files fails, or no longer does: by a limit on their length, which needs no rights to
    /// be set, as a small disk would.
    ///
    /// # Panics
    /// When the process has ended.
    pub fn fill_disk(&self, full: bool) {
        let process = self.child.id() as libc::pid_t;
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: the pointers are to one `rlimit` each, or null, which `prlimit` allows, and live for the calls.
        let set = unsafe {
            let known = libc::prlimit(process, libc::RLIMIT_FSIZE, std::ptr::null(), &raw mut limit) == 0;
            limit.rlim_cur = if full { 0 } else { limit.rlim_max };
            known && libc::prlimit(process, libc::RLIMIT_FSIZE, &raw const limit, std::ptr::null_mut()) == 0
        };
        assert!(set, "the process takes a limit: {}", std::io::Error::last_os_error());
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
        for (lines, seen) in [(&self.stdout, &mut self.seen), (&self.stderr, &mut self.said)] {
            while let Ok(line) = lines.recv_timeout(Duration::from_secs(5)) {
                seen.push(line);
            }
        }
        Finished { code: status.code(), stdout: self.seen.join("\n"), stderr: self.said.join("\n") }
    }
}

/// The binary with pipes.
fn command<S: AsRef<std::ffi::OsStr>>(arguments: impl IntoIterator<Item = S>) -> Command {
    with_pipes(Command::new(Node::binary()), arguments)
}

fn with_pipes<S: AsRef<std::ffi::OsStr>>(mut command: Command, arguments: impl IntoIterator<Item = S>) -> Command {
    command.args(arguments).env("RUST_LOG", "info").env("NO_COLOR", "1");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// The lines of a pipe as they come; what a process that dies in the middle of one has written of it is the last.
fn lines(pipe: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, lines) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(pipe).split(b'\n').map_while(Result::ok) {
            if sender.send(String::from_utf8_lossy(&line).into_owned()).is_err() {
                break;
            }
        }
    });
    lines
}

/// Waits for a line that begins with `prefix`; returns the rest of it.
fn expect(lines: &Receiver<String>, seen: &mut Vec<String>, prefix: &str) -> String {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => {
                seen.push(line.clone());
                if let Some(rest) = line.strip_prefix(prefix) {
                    return rest.trim().to_owned();
                }
            }
            Err(_) => panic!("no line `{prefix}…`; printed: {seen:#?}"),
        }
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
