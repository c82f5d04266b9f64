//! The seed of the masks that are used with a model in run after run, and how often it was used.
//!
//! Masks are public, and each call has secrets of its own under them; but all secrets under one mask share a lattice, so that one
//! reduction of it would serve against all of them. So a seed is given up after [`MOST_CALLS`] calls: then the most that
//! one reduction could break is 2^20 calls, and an attack that guesses gains no more than that factor by having so many
//! targets, which leaves 2^113 of the 2^133 operations that one takes. Asking for the products of new masks every 2^20 calls
//! costs less than a thousandth of the bytes of the calls themselves.
//!
//! Calls are counted on the disk before they are made, some thousands at a time, so that a process that is killed has counted
//! too many and never too few. Whether there were enough is asked when a run begins, which ends with the seed that it
//! began with.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use protocol::he::MaskSeed;
use rand::TryRngCore as _;
use rand::rngs::OsRng;
use serde::{Deserialize, Serialize};

use crate::files::{Readers, read_bounded, write_atomically};

/// Calls under one seed, after which the next run draws another.
pub(super) const MOST_CALLS: u64 = 1 << 20;
/// Calls that are counted at a time.
const COUNTED: u64 = 4096;
/// The file in the model's folder.
const FILE: &str = "seed.json";
/// What a process holds while it changes that.
const LOCK: &str = "lock";
const MAX_BYTES: u64 = 4096;

/// The file's content.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Kept {
    seed: [u8; 32],
    /// Calls under it, at most.
    calls: u64,
    /// When a run last began with it, in seconds since 1970.
    used: u64,
}

/// See the module's documentation.
pub(crate) struct SeedLedger {
    folder: PathBuf,
    seed: MaskSeed,
    /// Calls of this process that are counted, or owed.
    counted: AtomicU64,
    /// Those that could not be written.
    owed: Mutex<u64>,
}

impl SeedLedger {
    /// The seed of an existing folder, at `now` in seconds since 1970; and whether it is a new one, with which nothing was made
    /// yet.
    ///
    /// # Errors
    /// When the folder cannot be read or written, or the operating system gives no random bytes.
    pub(super) fn open(folder: &Path, now: u64) -> io::Result<(Self, bool)> {
        let mut new = [0; 32];
        OsRng.try_fill_bytes(&mut new).map_err(io::Error::other)?;
        let kept = change(folder, |kept| match kept {
            Some(kept) if kept.calls < MOST_CALLS => Kept { used: now, ..kept },
            _ => Kept { seed: new, calls: 0, used: now },
        })?;
        let seed = MaskSeed::from_bytes(kept.seed);
        let (counted, owed) = (AtomicU64::new(0), Mutex::new(0));
        Ok((Self { folder: folder.to_owned(), seed, counted, owed }, kept.seed == new))
    }

    /// The seed.
    pub(super) fn seed(&self) -> MaskSeed {
        self.seed
    }

    /// Notes that this process makes its call of this number, from 0 on. Blocks now and then for as long as a small file
    /// takes to be written.
    pub(super) fn count(&self, number: u64) {
        if number < self.counted.load(Ordering::Acquire) {
            return;
        }
        let mut owed = self.owed.lock().unwrap_or_else(PoisonError::into_inner);
        let counted = self.counted.load(Ordering::Acquire);
        if number < counted {
            return;
        }
        let more = (number + 1 - counted).next_multiple_of(COUNTED);
        *owed += more;
        let calls = *owed;
        match change(&self.folder, |kept| match kept {
            Some(kept) => Kept { calls: kept.calls.saturating_add(calls), ..kept },
            // Somebody removed it: what follows is counted all the same.
            None => Kept { seed: self.seed.to_bytes(), calls, used: 0 },
        }) {
            Ok(_) => *owed = 0,
            Err(error) => {
                let folder = self.folder.display();
                tracing::warn!(
                    "the calls under the kept masks cannot be counted in {folder}, and are tried again: {error}"
                );
            }
        }
        self.counted.store(counted + more, Ordering::Release);
    }
}

/// When a run last began with the masks of a folder, in seconds since 1970; 0 where that is not known.
pub(super) fn last_used(folder: &Path) -> u64 {
    read(folder).map_or(0, |kept| kept.used)
}

/// Replaces what is kept while no other process does. Something that cannot be understood is as good as nothing.
fn change(folder: &Path, to: impl FnOnce(Option<Kept>) -> Kept) -> io::Result<Kept> {
    let lock = File::options().write(true).create(true).truncate(false).open(folder.join(LOCK))?;
    lock.lock()?;
    let kept = to(read(folder));
    let json = serde_json::to_vec(&kept)?;
    write_atomically(&folder.join(FILE), &json, Readers::Owner).map_err(io::Error::other)?;
    Ok(kept)
}

fn read(folder: &Path) -> Option<Kept> {
    let path = folder.join(FILE);
    match read_bounded(&path, MAX_BYTES) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .inspect_err(|error| tracing::warn!("{} is not understood, and begun anew: {error}", path.display()))
            .ok(),
        Err(error) if error.is_not_found() => None,
        Err(error) => {
            tracing::warn!("{error}");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::fs;

    use super::*;

    fn calls(folder: &Path) -> u64 {
        read(folder).unwrap().calls
    }

    #[test]
    fn a_seed_is_used_again_until_it_was_used_often_enough() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let (first, new) = SeedLedger::open(folder, 5).unwrap();
        assert!(new && last_used(folder) == 5);
        for number in [0, 1, COUNTED - 1] {
            first.count(number);
            assert_eq!(calls(folder), COUNTED, "counted before they are made");
        }
        first.count(COUNTED);
        assert_eq!(calls(folder), 2 * COUNTED);
        let (second, new) = SeedLedger::open(folder, 9).unwrap();
        assert!(!new && second.seed() == first.seed() && last_used(folder) == 9);
        second.count(0);
        // Two processes at a time count together.
        first.count(5 * COUNTED);
        assert_eq!(calls(folder), 7 * COUNTED);
        second.count(MOST_CALLS);
        let (third, new) = SeedLedger::open(folder, 10).unwrap();
        assert!(new && third.seed() != first.seed() && calls(folder) == 0);
        fs::write(folder.join(FILE), b"{\"seed\": 3}").unwrap();
        let (fourth, new) = SeedLedger::open(folder, 11).unwrap();
        assert!(new && fourth.seed() != third.seed());
    }

    #[test]
    fn what_could_not_be_counted_is_counted_later() {
        let outer = tempfile::tempdir().unwrap();
        let folder = outer.path().join("model");
        fs::create_dir(&folder).unwrap();
        let (ledger, _) = SeedLedger::open(&folder, 1).unwrap();
        fs::rename(&folder, outer.path().join("away")).unwrap();
        ledger.count(0);
        fs::rename(outer.path().join("away"), &folder).unwrap();
        ledger.count(1);
        assert_eq!(calls(&folder), 0);
        ledger.count(COUNTED);
        assert_eq!(calls(&folder), 2 * COUNTED);
    }
}
