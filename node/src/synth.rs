//! `node synth`: a model of a published configuration with random weights, for measuring what its shape costs.
//!
//! The folder appears whole or not at all: it is written under another name beside its place, then renamed.

use std::fs::Permissions;
use std::io;
use std::ops::ControlFlow;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use indicatif::{HumanBytes, HumanCount, ProgressBar, ProgressStyle};
use protocol::model::ModelError;
use protocol::model::synthetic::{KnownModel, StoredAs, SyntheticLlama};

use crate::roles::stop::StopSignals;
use crate::{disk, output};

/// Room on the disk for what is written besides the weights.
const SPARED_BYTES: u64 = 16 << 20;
/// Weights are stored as most published ones are.
const STORED_AS: StoredAs = StoredAs::Bf16;

/// What is to be written.
#[derive(Clone, Debug)]
pub struct SynthOptions {
    /// Whose configuration.
    pub model: KnownModel,
    /// The folder, which must be empty if it exists.
    pub out: PathBuf,
    /// Seed of all weights.
    pub seed: u64,
    /// Another number of layers than the configuration's.
    pub layers: Option<usize>,
}

/// Writes the model, or nothing.
///
/// # Errors
/// When there is something at its place, the disk is too small, or the process is told to stop.
pub async fn run(options: SynthOptions) -> anyhow::Result<()> {
    let mut stop = StopSignals::listen()?;
    let stopping = Arc::new(AtomicBool::new(false));
    let mut writing = tokio::task::spawn_blocking({
        let stopping = Arc::clone(&stopping);
        move || write(&options, &stopping)
    });
    loop {
        tokio::select! {
            written = &mut writing => return written.context("writing the model")?,
            () = stop.next() => stopping.store(true, Ordering::Relaxed),
        }
    }
}

/// Writes the model, unless `stopping` becomes true before it is done. Blocks.
fn write(options: &SynthOptions, stopping: &AtomicBool) -> anyhow::Result<()> {
    let SynthOptions { model, out, seed, layers } = options;
    let mut llama = SyntheticLlama::known(*model, *seed);
    llama.config.layers = layers.unwrap_or(llama.config.layers);
    llama.config.validate(out)?;
    let parent = out.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    check_place(out, parent, llama.weight_bytes(STORED_AS))?;

    let cannot = || format!("a folder in {} cannot be created", parent.display());
    // The process's umask applies to these bits, as to any folder; the default of a temporary one is private.
    let folder = tempfile::Builder::new()
        .prefix(".velum-synth-")
        .permissions(Permissions::from_mode(0o777))
        .tempdir_in(parent)
        .with_context(cannot)?;
    let bar = bar(llama.weight_bytes(STORED_AS));
    let written = llama.write_folder_watched(folder.path(), STORED_AS, &mut |bytes| {
        bar.set_position(bytes);
        if stopping.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    bar.finish_and_clear();
    match written {
        Err(ModelError::Io { source, .. }) if source.kind() == io::ErrorKind::Interrupted => {
            bail!("stopped before the model was whole; nothing was written")
        }
        written => written?,
    }
    // An empty folder at this place is replaced.
    std::fs::rename(folder.path(), out).with_context(|| format!("{} cannot be created", out.display()))?;
    // There is nothing left to remove under the temporary name.
    drop(folder.keep());
    output::print(format_args!(
        "{}: {model} with random weights (seed {seed}), {} layers, {} parameters in bf16, {}",
        out.display(),
        llama.config.layers,
        HumanCount(llama.parameters()),
        HumanBytes(llama.weight_bytes(STORED_AS)),
    ));
    Ok(())
}

/// Whether a model can be put there.
fn check_place(out: &Path, parent: &Path, bytes: u64) -> anyhow::Result<()> {
    match std::fs::read_dir(out) {
        Ok(mut entries) => ensure!(entries.next().is_none(), "the folder {} exists and is not empty", out.display()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error).with_context(|| format!("{} is there and is no folder to use", out.display())),
    }
    std::fs::create_dir_all(parent).with_context(|| format!("the folder {} cannot be created", parent.display()))?;
    let free = disk::free_bytes(parent).with_context(|| format!("the disk of {} cannot be asked", parent.display()))?;
    let needed = bytes.saturating_add(SPARED_BYTES);
    ensure!(
        free >= needed,
        "the model takes {}, and the disk of {} has {} left",
        HumanBytes(needed),
        parent.display(),
        HumanBytes(free)
    );
    Ok(())
}

fn bar(bytes: u64) -> ProgressBar {
    let bar = ProgressBar::new(bytes);
    if let Ok(style) = ProgressStyle::with_template("{bytes} of {total_bytes} [{bar:30}] {bytes_per_sec}, {eta} left") {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.enable_steady_tick(Duration::from_millis(250));
    bar
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::fs;

    use protocol::model::Model;

    use super::*;

    fn options(out: PathBuf, seed: u64) -> SynthOptions {
        SynthOptions { model: KnownModel::Tiny, out, seed, layers: Some(3) }
    }

    fn written(options: &SynthOptions) -> anyhow::Result<()> {
        write(options, &AtomicBool::new(false))
    }

    #[test]
    fn a_model_is_written_whole_and_can_be_opened() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("models").join("tiny");
        written(&options(out.clone(), 7)).unwrap();
        let model = Model::open(&out).unwrap();
        assert_eq!(model.config().layers, 3);
        assert!(model.tokenizer().unwrap().chat_template().is_some());
        let left: Vec<_> = fs::read_dir(folder.path().join("models")).unwrap().collect();
        assert_eq!(left.len(), 1, "nothing but the model is left: {left:?}");
    }

    #[test]
    fn an_empty_folder_is_used_and_a_full_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("model");
        fs::create_dir(&out).unwrap();
        written(&options(out.clone(), 1)).unwrap();
        let error = written(&options(out.clone(), 2)).unwrap_err().to_string();
        assert!(error.contains("not empty") && error.contains("model"), "{error}");
        let file = folder.path().join("file");
        fs::write(&file, "x").unwrap();
        assert!(written(&options(file, 1)).is_err());
    }

    #[test]
    fn a_stopped_run_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let stopped = write(&options(folder.path().join("model"), 1), &AtomicBool::new(true));
        assert!(stopped.unwrap_err().to_string().contains("stopped"));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_disk_that_is_too_small_is_named_before_anything_is_written() {
        let folder = tempfile::tempdir().unwrap();
        let error = check_place(&folder.path().join("model"), folder.path(), u64::MAX).unwrap_err().to_string();
        assert!(error.contains("has") && error.contains("left"), "{error}");
    }
}
