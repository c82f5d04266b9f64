//! A file of records that are found by a key.
//!
//! Records are written at the end and read where they lie; none is changed. Each has a head with the checksum of its content,
//! and one of its own, that is written last: after a kill the file ends in whole records, and what is behind them is cut
//! off. The layout: the name of the format and the file's identity, then of each record its head (key, length, checksum
//! of the content, checksum of the head) and its content.
//!
//! All that fails here is said in the log, once a file or a record, and nothing more: whatever is not there is made again.

use std::collections::HashMap;
use std::fs::{File, TryLockError};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Name and version of the format.
const NAME: [u8; 16] = *b"velum records 1\n";
const HASH: usize = 32;
/// Bytes of the file before its first record.
const START: u64 = (NAME.len() + HASH) as u64;
/// Bytes of a record's head: key, length, two checksums.
const HEAD: usize = HASH + 8 + HASH + HASH;

/// What a record is found by.
pub(super) type Key = [u8; HASH];

/// See the module's documentation.
pub(super) struct Records {
    file: File,
    path: PathBuf,
    identity: [u8; HASH],
    state: Mutex<State>,
}

struct State {
    index: HashMap<Key, Place>,
    /// Where the next record goes.
    end: u64,
    /// Most bytes of the file; none any more, once some could not be written.
    limit: u64,
}

#[derive(Clone, Copy)]
struct Place {
    start: u64,
    length: u64,
    checksum: [u8; HASH],
}

impl Records {
    /// The file at `path`, made (mode 0600) if it is not there, and emptied if it is of another identity.
    ///
    /// # Errors
    /// When it cannot be made or read, or another process uses it.
    pub(super) fn open(path: &Path, identity: [u8; HASH], limit: u64) -> io::Result<Self> {
        let file = File::options().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
        file.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => io::Error::other("another process uses it"),
            TryLockError::Error(error) => error,
        })?;
        let state = Mutex::new(State { index: HashMap::new(), end: START, limit });
        let records = Self { file, path: path.to_owned(), identity, state };
        let mut start = [0; START as usize];
        let is_ours = records.file.read_exact_at(&mut start, 0).is_ok()
            && start[..NAME.len()] == NAME
            && start[NAME.len()..] == identity;
        if is_ours {
            records.find()?;
        } else {
            records.file.set_len(0)?;
            records.file.write_all_at(&[&NAME[..], &identity].concat(), 0)?;
        }
        Ok(records)
    }

    /// Records that can be read, as far as is known.
    pub(super) fn len(&self) -> usize {
        self.state().index.len()
    }

    /// Reads a record's content, if it is there, whole, and as long as `content`.
    pub(super) fn read(&self, key: &Key, content: &mut [u8]) -> bool {
        let Some(place) = self.state().index.get(key).copied() else { return false };
        if place.length != content.len() as u64 {
            return false;
        }
        let why = match self.file.read_exact_at(content, place.start) {
            Ok(()) if self.checksum(key, content) == place.checksum => return true,
            Ok(()) => "it is damaged".to_owned(),
            Err(error) => error.to_string(),
        };
        tracing::warn!("a record of {} cannot be used, and is made anew: {why}", self.path.display());
        self.state().index.remove(key);
        false
    }

    /// Writes a record, if it is not there and there is room.
    pub(super) fn write(&self, key: &Key, content: &[u8]) {
        let mut state = self.state();
        let (start, length) = (state.end + HEAD as u64, content.len() as u64);
        let end = start.saturating_add(length);
        if state.index.contains_key(key) || end > state.limit {
            return;
        }
        let checksum = self.checksum(key, content);
        let head = self.head(key, length, &checksum);
        // The head last: a record that has one has all of it.
        let written = self.file.write_all_at(content, start).and_then(|()| self.file.write_all_at(&head, state.end));
        if let Err(error) = written {
            tracing::warn!(
                "{} takes no more, and what it would hold is computed each time: {error}",
                self.path.display()
            );
            state.limit = 0;
            // Room for what matters more. If that fails, too, the next to open it cuts it off.
            let _ = self.file.set_len(state.end);
            return;
        }
        state.end = end;
        state.index.insert(*key, Place { start, length, checksum });
    }

    /// Notes where the whole records are, and cuts off what is behind them.
    fn find(&self) -> io::Result<()> {
        let size = self.file.metadata()?.len();
        let mut state = self.state();
        let mut bytes = [0; HEAD];
        while state.end.saturating_add(HEAD as u64) <= size {
            self.file.read_exact_at(&mut bytes, state.end)?;
            let (key, rest) = bytes.split_at(HASH);
            let (length, rest) = rest.split_at(8);
            let take = |from: &[u8]| <[u8; HASH]>::try_from(&from[..HASH]).unwrap_or_default();
            let (key, checksum) = (take(key), take(rest));
            let length = u64::from_le_bytes(length.try_into().unwrap_or_default());
            let start = state.end + HEAD as u64;
            let whole = start.checked_add(length).filter(|&end| end <= size);
            let (Some(end), true) = (whole, self.head(&key, length, &checksum) == bytes) else { break };
            state.end = end;
            state.index.insert(key, Place { start, length, checksum });
        }
        if state.end < size {
            tracing::debug!(path = %self.path.display(), bytes = size - state.end, "what is behind its whole records is cut off");
            self.file.set_len(state.end)?;
        }
        Ok(())
    }

    fn head(&self, key: &Key, length: u64, checksum: &[u8; HASH]) -> [u8; HEAD] {
        let mut head = [0; HEAD];
        head[..HASH].copy_from_slice(key);
        head[HASH..HASH + 8].copy_from_slice(&length.to_le_bytes());
        head[HASH + 8..2 * HASH + 8].copy_from_slice(checksum);
        let own = self.checksum(key, &head[..2 * HASH + 8]);
        head[2 * HASH + 8..].copy_from_slice(&own);
        head
    }

    /// Of a record's content: another's, or that of another file, has another.
    fn checksum(&self, key: &Key, content: &[u8]) -> [u8; HASH] {
        blake3::Hasher::new_keyed(&self.identity).update(key).update(content).finalize().into()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic while it was locked has at worst left a record that nobody finds.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    const IDENTITY: [u8; HASH] = [5; HASH];

    fn open(path: &Path) -> Records {
        Records::open(path, IDENTITY, 1 << 20).unwrap()
    }

    /// Records of these numbers that can be read.
    fn whole(records: &Records) -> Vec<u8> {
        (0..9)
            .filter(|&n| {
                let mut content = [0; 40];
                let found = records.read(&[n; HASH], &mut content);
                assert!(!found || content == [n ^ 0x5a; 40], "a record is never wrong");
                found
            })
            .collect()
    }

    /// What is there already is looked for first, as whoever writes has done.
    fn filled(path: &Path, numbers: std::ops::Range<u8>) {
        let records = open(path);
        whole(&records);
        numbers.for_each(|n| records.write(&[n; HASH], &[n ^ 0x5a; 40]));
    }

    #[test]
    fn any_damage_is_noticed_and_what_is_whole_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("records");
        filled(&path, 0..3);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let good = fs::read(&path).unwrap();
        assert_eq!(good.len() as u64, START + 3 * (HEAD as u64 + 40));
        assert_eq!(whole(&open(&path)), [0, 1, 2]);
        for at in (0..good.len()).step_by(3) {
            let mut bytes = good.clone();
            bytes[at] ^= 0x10;
            fs::write(&path, &bytes).unwrap();
            let records = open(&path);
            let hit = (at as u64).checked_sub(START).map(|at| (at / (HEAD as u64 + 40)) as u8);
            let left = whole(&records);
            assert!(
                hit.is_none_or(|hit| !left.contains(&hit) && (0..hit).all(|n| left.contains(&n))),
                "byte {at}: {left:?}"
            );
            drop(records);
            // What was lost is written again, and nothing else is in its way.
            filled(&path, 0..4);
            assert_eq!(whole(&open(&path)), [0, 1, 2, 3], "byte {at}");
        }
        for end in (0..good.len()).step_by(7) {
            fs::write(&path, &good[..end]).unwrap();
            filled(&path, 0..3);
            assert_eq!(fs::read(&path).unwrap(), good, "cut at {end}");
        }
    }

    #[test]
    fn the_limit_and_the_disk_are_kept_to() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("records");
        let records = Records::open(&path, IDENTITY, START + 2 * (HEAD as u64 + 40) + 39).unwrap();
        for n in [0, 1, 1, 2] {
            records.write(&[n; HASH], &[n ^ 0x5a; 40]);
        }
        assert_eq!((whole(&records), records.len()), (vec![0, 1], 2));
        let error = Records::open(&path, IDENTITY, 0).err().unwrap().to_string();
        assert!(error.contains("another process"), "{error}");
        drop(records);
        // A file that cannot be written to is read all the same.
        let mut records = open(&path);
        records.file = File::open(&path).unwrap();
        records.write(&[2; HASH], &[2 ^ 0x5a; 40]);
        records.write(&[3; HASH], &[3 ^ 0x5a; 40]);
        assert_eq!((whole(&records), records.state().limit), (vec![0, 1], 0));
    }
}
