//! How a run begins: as a new one, in place of an earlier one, or where an earlier one was interrupted.

use std::fs;
use std::path::{Path, PathBuf};

use actors::checkpoint::{Found, Identity, Store};
use actors::trainer::{TrainState, snapshot_values};
use anyhow::{Context as _, bail, ensure};
use indicatif::HumanBytes;

use super::results::ADAPTER;
use crate::config::{Config, PrefixChoice};
use crate::disk;
use crate::report::{EVENTS_FOLDER, METRICS_FILE, PLOT_FILE, REPORT_FILE, remove_events};
use crate::swarm::{self, IdentityLock};

/// Name of the folder for the checkpoints in the folder for the results.
const CHECKPOINTS: &str = "checkpoints";
/// Name of the key file of the run's owner in the folder for the results.
const OWNER_KEY: &str = "owner.key";
/// What a checkpoint and a report take beside tensors, at least.
const SPARED_BYTES: u64 = 4 << 20;
/// What a step takes in a checkpoint, and in report, metrics and events together, at most.
const STEP_BYTES: (u64, u64) = (128, 1024);
/// What a pair's reference takes in a checkpoint, at most.
const REFERENCE_BYTES: u64 = 32;

/// How a run begins.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Start {
    /// As a new one, which leaves the results of an earlier one alone.
    #[default]
    Fresh,
    /// As a new one, in place of an earlier one.
    Overwrite,
    /// From a checkpoint: that of this path, or the newest in the folder for the results.
    Resume(Option<PathBuf>),
}

impl Start {
    /// Whether a run that begins like this may write to `out`.
    ///
    /// # Errors
    /// When there are results or checkpoints of an earlier run that nobody spoke of.
    pub(crate) fn check(&self, out: &Path) -> anyhow::Result<()> {
        let holds = match earlier(out)? {
            Some(holds) if *self == Self::Fresh => holds,
            _ => return Ok(()),
        };
        bail!(
            "{} holds an earlier run ({holds}): go on with it by --resume, replace it by --overwrite, or choose another \
             folder by --out",
            out.display()
        )
    }

    /// The checkpoint to go on from, whose run has so many trained values.
    ///
    /// # Errors
    /// When one was named and there is none, or none can be read.
    pub(super) fn checkpoint(&self, out: &Path, trained: usize) -> anyhow::Result<Option<Found<TrainState>>> {
        let values = snapshot_values(trained);
        match self {
            Self::Fresh | Self::Overwrite => Ok(None),
            Self::Resume(Some(path)) if path.is_dir() => {
                // The folder of the checkpoints, or the one that it is in.
                let inner = path.join(CHECKPOINTS);
                let folder = if inner.is_dir() { inner } else { path.clone() };
                let found = Store::new(folder, 1).latest(values)?;
                Ok(Some(found.with_context(|| format!("there is no checkpoint in {}", path.display()))?))
            }
            Self::Resume(Some(path)) => Ok(Some(Found::read(path, values)?)),
            Self::Resume(None) => {
                let found = store(out, 1).latest(values)?;
                ensure!(
                    found.is_some() || earlier(out)?.is_none(),
                    "{} holds an earlier run, but no checkpoint to go on from: replace it by --overwrite, or choose another \
                     folder by --out",
                    out.display()
                );
                Ok(found)
            }
        }
    }

    /// The name that workers know the run's owner by, and the lock of its file; one that was configured is taken as it is.
    ///
    /// A run has one of its own, which nobody can connect with other runs. It is kept with the results, since a run that
    /// goes on has to be the same owner to its workers: to them a new name is a stranger, who waits until the place of the
    /// old one is free.
    ///
    /// # Errors
    /// When the file cannot be read or written, or another process uses it.
    pub(super) fn owner(&self, config: &Config) -> anyhow::Result<(swarm::Identity, Option<IdentityLock>)> {
        if let Some(path) = &config.network.identity {
            return Ok((swarm::Identity::load_or_create(path)?, None));
        }
        let path = config.owner.out.join(OWNER_KEY);
        let lock = IdentityLock::take(&path)?;
        if !matches!(self, Self::Resume(_)) && path.exists() {
            fs::remove_file(&path).with_context(|| format!("{} cannot be removed", path.display()))?;
        }
        Ok((swarm::Identity::load_or_create(&path)?, Some(lock)))
    }

    /// Removes what a run that is replaced has left, once the new one begins.
    ///
    /// # Errors
    /// When something cannot be removed.
    pub(super) fn make_room(&self, out: &Path) -> anyhow::Result<()> {
        for folder in [out.to_path_buf(), out.join(ADAPTER), out.join(CHECKPOINTS)] {
            actors::files::sweep(&folder);
        }
        if *self != Self::Overwrite {
            return Ok(());
        }
        store(out, 1).clear()?;
        remove_events(out).with_context(|| format!("{} cannot be emptied", out.join(EVENTS_FOLDER).display()))?;
        let files = [REPORT_FILE, PLOT_FILE, METRICS_FILE].map(|name| out.join(name));
        let adapter = fs::read_dir(out.join(ADAPTER)).into_iter().flatten().flatten().map(|entry| entry.path());
        for path in files.into_iter().chain(adapter).filter(|path| path.exists()) {
            fs::remove_file(&path).with_context(|| format!("{} cannot be removed", path.display()))?;
        }
        Ok(())
    }
}

/// Removes the name of an owner that ended before its run began, unless there is a run that goes by it, or another process
/// that does.
pub(super) fn forget_owner(out: &Path) {
    let path = out.join(OWNER_KEY);
    if !path.exists() || !matches!(earlier(out), Ok(None)) {
        return;
    }
    let Ok(lock) = IdentityLock::take(&path) else { return };
    for file in [path, out.join(format!("{OWNER_KEY}.lock"))] {
        if let Err(error) = fs::remove_file(&file) {
            tracing::debug!(file = %file.display(), %error, "it stays");
        }
    }
    drop(lock);
}

/// The checkpoints of the run in `out`.
pub(super) fn store(out: &Path, keep: usize) -> Store {
    Store::new(out.join(CHECKPOINTS), keep)
}

/// What an earlier run has left in `out`.
fn earlier(out: &Path) -> anyhow::Result<Option<&'static str>> {
    if !store(out, 1).list()?.is_empty() {
        return Ok(Some(CHECKPOINTS));
    }
    let left = [REPORT_FILE, ADAPTER].into_iter().find(|name| match fs::read_dir(out.join(name)) {
        Ok(mut entries) => entries.next().is_some(),
        Err(_) => out.join(name).is_file(),
    });
    Ok(left)
}

/// What the run of a configuration is known by: all that its numbers follow from. Where products are computed is not among
/// it: encrypted and plain training are the same run but for the products' noise, so either may go on with the other's.
pub(super) fn identity(
    config: &Config,
    data_seed: u64,
    model: impl std::fmt::Display,
    training: impl std::fmt::Display,
    held_out: impl std::fmt::Display,
) -> anyhow::Result<Identity> {
    let identity = Identity::default()
        .with("model (digest)", model)
        .with("data to train on (digest of the tokens)", training)
        .with("data held out (digest of the tokens)", held_out)
        .with("training.data_seed", data_seed)
        // Losses do not depend on how many micro-batches are in flight.
        .with_settings("training", &config.training, &["training.in_flight", "training.strands", "training.data_seed"])?
        // Files may lie elsewhere; what is in them, and their weights, is in the digest.
        .with_settings("data", &config.data, &["data.files"])?
        .with_settings("encryption", &config.encryption, &[])?;
    // What is kept as it is changes no number.
    Ok(match config.owner.prefix_cache {
        PrefixChoice::Bf16 => identity.with("owner.prefix_cache", "bf16"),
        PrefixChoice::Off | PrefixChoice::F32 => identity,
    })
}

/// Refuses to go on from a checkpoint of another run.
///
/// # Errors
/// Names all that differs.
pub(super) fn refuse_other(found: &Found<TrainState>, identity: &Identity) -> anyhow::Result<()> {
    let differences = identity.differences(&found.checkpoint.identity);
    let lines: String = differences.iter().map(|difference| format!("\n  {difference}")).collect();
    ensure!(
        differences.is_empty(),
        "{} is of another run:{lines}\nGive what it was begun with, or begin a new run in another folder (--out)",
        found.path.display()
    );
    Ok(())
}

/// Whether the disk of the existing folder `out` has room for a run's checkpoints and results.
///
/// # Errors
/// When it has not.
pub(super) fn check_disk(config: &Config, trained: usize) -> anyhow::Result<()> {
    let out = &config.owner.out;
    let free = disk::free_bytes(out).with_context(|| format!("the disk of {} cannot be asked", out.display()))?;
    let needed = bytes_needed(config, trained);
    ensure!(
        free >= needed,
        "the run's checkpoints and results take up to {}, and the disk of {} has {} left: make room, choose another folder \
         by --out, or keep fewer (checkpoint.keep)",
        HumanBytes(needed),
        out.display(),
        HumanBytes(free)
    );
    Ok(())
}

/// Checkpoints that stay and the one that is being written, the adapter beside an older one, the report.
fn bytes_needed(config: &Config, trained: usize) -> u64 {
    let tensor = |values: usize| (values as u64).saturating_mul(4);
    let text = |step: u64| step.saturating_mul(config.training.steps() as u64).saturating_add(SPARED_BYTES);
    let checkpoint = tensor(snapshot_values(trained)).saturating_add(text(STEP_BYTES.0));
    let checkpoints = checkpoint.saturating_mul(config.checkpoint.keep as u64 + 1);
    // A pair that DPO has met is kept with its reference.
    let pairs = (config.training.steps() as u64).saturating_mul(config.training.batch() as u64);
    let references = if config.training.objective.of_pairs() { pairs.saturating_mul(REFERENCE_BYTES) } else { 0 };
    let checkpoints = checkpoints.saturating_add(references.saturating_mul(config.checkpoint.keep as u64 + 1));
    checkpoints.saturating_add(tensor(2 * trained)).saturating_add(text(STEP_BYTES.1))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn an_earlier_run_is_not_written_over_by_accident() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out");
        Start::Fresh.check(&out).unwrap();
        fs::create_dir_all(out.join(ADAPTER)).unwrap();
        fs::write(out.join("worker-1.log"), "").unwrap();
        Start::Fresh.check(&out).unwrap();
        for left in ["checkpoints/step-00000003.checkpoint", "adapter/adapter_config.json", "report.json"] {
            let path = out.join(left);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, "x").unwrap();
            let error = Start::Fresh.check(&out).unwrap_err().to_string();
            assert!(["--resume", "--overwrite", "--out"].iter().all(|way| error.contains(way)), "{error}");
            for start in [Start::Overwrite, Start::Resume(None)] {
                start.check(&out).unwrap();
            }
            let error = Start::Resume(None).checkpoint(&out, 1).unwrap_err().to_string();
            let expected =
                if left.ends_with("checkpoint") { "no checkpoint that can be used" } else { "no checkpoint to go" };
            assert!(error.contains(expected), "{left}: {error}");
            Start::Overwrite.make_room(&out).unwrap();
            assert!(!path.exists() && out.join("worker-1.log").exists());
            Start::Fresh.check(&out).unwrap();
        }
        assert!(Start::Resume(None).checkpoint(&out, 1).unwrap().is_none(), "nothing was begun there");
        let error = Start::Resume(Some(out.clone())).checkpoint(&out, 1).unwrap_err().to_string();
        assert!(error.contains("no checkpoint in"), "{error}");
        assert!(Start::Resume(Some(out.join("missing"))).checkpoint(&out, 1).is_err());
    }

    #[test]
    fn a_run_that_goes_on_is_the_same_owner_and_a_new_one_is_another() {
        let folder = tempfile::tempdir().unwrap();
        let mut config = Config::default();
        config.owner.out = folder.path().join("out");
        let peer = |start: &Start, config: &Config| start.owner(config).unwrap().0.peer_id();
        let first = peer(&Start::Fresh, &config);
        assert_eq!(peer(&Start::Resume(None), &config), first);
        assert_eq!(peer(&Start::Resume(Some(folder.path().join("elsewhere"))), &config), first);
        let second = peer(&Start::Overwrite, &config);
        assert!(second != first && peer(&Start::Resume(None), &config) == second);
        Start::Fresh.check(&config.owner.out).unwrap();
        let third = peer(&Start::Fresh, &config);
        assert!(![first, second].contains(&third));
        let held = Start::Resume(None).owner(&config).unwrap();
        let error = Start::Resume(None).owner(&config).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("another process"), "{error}");
        drop(held);
        config.network.identity = Some(folder.path().join("mine.key"));
        let mine = peer(&Start::Fresh, &config);
        assert_eq!(peer(&Start::Resume(None), &config), mine);
        assert_ne!(mine, third);
    }

    #[test]
    fn room_on_the_disk_is_asked_for() {
        let folder = tempfile::tempdir().unwrap();
        let mut config = Config::default();
        config.owner.out = folder.path().to_path_buf();
        check_disk(&config, 1000).unwrap();
        let error = check_disk(&config, usize::MAX / 8).unwrap_err().to_string();
        assert!(error.contains("checkpoint.keep") && error.contains("left"), "{error}");
        config.checkpoint.keep = 5;
        assert!(bytes_needed(&config, 1 << 20) > (6 * 12) << 20);
    }

    #[test]
    fn a_run_is_known_by_what_its_numbers_follow_from() {
        let of = |config: &Config| identity(config, 7, "m", "t", "h").unwrap();
        let config = Config::default();
        let mut other = config.clone();
        other.training.in_flight = 9;
        other.training.data_seed = Some(3);
        other.owner.workers = 5;
        other.checkpoint.save_every = 1;
        assert_eq!(of(&other), of(&config));
        other.training.lora.rank = 3;
        other.data.pad_to = 1;
        let said: Vec<String> = of(&other).differences(&of(&config)).iter().map(ToString::to_string).collect();
        assert_eq!(
            said,
            ["data.pad_to is 64 in the checkpoint and 1 now", "training.lora.rank is 8 in the checkpoint and 3 now"]
        );
    }
}
