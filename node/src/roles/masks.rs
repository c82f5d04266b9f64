//! Where an owner keeps the products of the masks: in memory, and on the disk of the user's cache folder, which only saves time
//! and so may fail.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use actors::owner::mask_file::{MaskDisk, MaskFile, MaskRoom};
use actors::owner::mask_store::MaskStore;
use anyhow::Context as _;
use indicatif::HumanBytes;
use protocol::ids::ModelDigest;

use super::progress::Progress;
use crate::config::OwnerConfig;
use crate::{disk, folders};

/// The room that the settings give, with what earlier runs kept for this model.
pub(super) fn room(config: &OwnerConfig, model: ModelDigest, progress: &Progress) -> MaskRoom {
    let memory_bytes = usize::try_from(config.mask_cache_mib << 20).unwrap_or(usize::MAX);
    if config.mask_file_mib == 0 {
        return MaskRoom::memory(memory_bytes);
    }
    let disk = match config.keep_masks {
        true => kept(config, model, progress),
        false => of_run(config),
    };
    let disk = disk.inspect_err(|error| {
        tracing::warn!("no disk for the products of the masks (owner.mask_file_mib): {error:#}");
    });
    MaskRoom { memory_bytes, disk: disk.ok() }
}

/// A file that is gone with the process.
fn of_run(config: &OwnerConfig) -> anyhow::Result<MaskDisk> {
    let folder = folders::cache()?;
    std::fs::create_dir_all(&folder).with_context(|| format!("{} cannot be made", folder.display()))?;
    let file = MaskFile::create(&folder, limit(config, &folder, 0)?);
    Ok(MaskDisk::Run(file.with_context(|| format!("in {}", folder.display()))?))
}

/// The folder that stays; what is in it is said.
fn kept(config: &OwnerConfig, model: ModelDigest, progress: &Progress) -> anyhow::Result<MaskDisk> {
    let root = folders::masks()?;
    std::fs::create_dir_all(&root).with_context(|| format!("{} cannot be made", root.display()))?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let open = |limit| {
        let store = MaskStore::open(&root, &model.to_string(), limit, now);
        store.with_context(|| format!("in {}", root.display()))
    };
    // What is there already is no reason to have less.
    let held = open(u64::MAX)?.kept().all;
    let store = open(limit(config, &root, held)?)?;
    let kept = store.kept();
    progress.note(&format!(
        "products of masks: {} of this model are kept from earlier runs, {} of all models in {} (remove that folder to free \
         them; owner.keep_masks = false keeps none)",
        HumanBytes(kept.model),
        HumanBytes(kept.all),
        root.display()
    ));
    Ok(MaskDisk::Kept(store))
}

/// Most bytes, of which so many are taken already.
fn limit(config: &OwnerConfig, folder: &Path, held: u64) -> anyhow::Result<u64> {
    let free = disk::free_bytes(folder).with_context(|| format!("the disk of {}", folder.display()))?;
    Ok((free.saturating_add(held) / 2).min(config.mask_file_mib << 20))
}
