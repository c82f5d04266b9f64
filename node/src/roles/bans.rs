//! Workers that lied to this user, kept from run to run in a file that a person can read and mend.

use std::collections::HashMap;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use actors::files::{Readers, write_atomically};
use actors::transport::PeerName;
use anyhow::Context as _;
use serde::{Deserialize, Serialize};

use crate::folders;

/// Name of the file in the user's configuration folder.
const FILE: &str = "bans.json";

/// One worker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Ban {
    peer: String,
    /// Seconds since 1970.
    when: u64,
    why: String,
}

/// The list and its file.
pub(super) struct Bans {
    /// Where the environment names no configuration folder, nothing is kept.
    path: Option<PathBuf>,
}

impl Bans {
    /// This user's bans.
    pub(super) fn of_user() -> Self {
        Self { path: folders::configuration().ok().map(|folder| folder.join(FILE)) }
    }

    /// Every banned worker, with what it did and how to lift the ban.
    ///
    /// # Errors
    /// When the file cannot be read or understood.
    pub(super) fn read(&self) -> anyhow::Result<HashMap<PeerName, String>> {
        let Some(path) = &self.path else { return Ok(HashMap::new()) };
        let named = read(path)?.into_iter().map(|ban| {
            let why = format!("it is banned: {}; to allow it again, remove it from {}", ban.why, path.display());
            (PeerName::from(ban.peer.as_str()), why)
        });
        Ok(named.collect())
    }

    /// Adds a worker, whose ban other runs heed from then on.
    ///
    /// # Errors
    /// When the file cannot be read or written, or there is no place for it.
    pub(super) fn add(&self, peer: &PeerName, why: &str) -> anyhow::Result<()> {
        let path = self.path.as_ref().context("neither XDG_CONFIG_HOME nor HOME names a folder for it")?;
        // What another run wrote meanwhile is kept.
        let mut bans = read(path)?;
        if bans.iter().any(|ban| *ban.peer == *peer.0) {
            return Ok(());
        }
        let when = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        bans.push(Ban { peer: peer.to_string(), when, why: why.to_owned() });
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).with_context(|| format!("{} cannot be made", folder.display()))?;
        }
        let mut json = serde_json::to_vec_pretty(&bans).context("the list of bans")?;
        json.push(b'\n');
        Ok(write_atomically(path, &json, Readers::Owner)?)
    }
}

fn read(path: &Path) -> anyhow::Result<Vec<Ban>> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("the bans in {} cannot be read", path.display())),
    };
    serde_json::from_slice(&bytes)
        .with_context(|| format!("the bans in {} cannot be understood: mend or remove the file", path.display()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn bans_are_kept_and_a_damaged_file_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("velum").join(FILE);
        let bans = Bans { path: Some(path.clone()) };
        assert!(bans.read().unwrap().is_empty());
        let (one, two) = (PeerName::from("one"), PeerName::from("two"));
        bans.add(&one, "its products are wrong").unwrap();
        bans.add(&two, "its products are wrong").unwrap();
        bans.add(&one, "again").unwrap();
        let read = bans.read().unwrap();
        assert_eq!(read.len(), 2);
        assert!(read[&one].contains("its products are wrong") && read[&one].contains("bans.json"), "{read:?}");
        fs::write(&path, "[{").unwrap();
        let error = format!("{:#}", bans.read().unwrap_err());
        assert!(error.contains("bans.json") && error.contains("remove"), "{error}");
    }
}
