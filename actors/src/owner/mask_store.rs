//! Products of masks that are kept from run to run, in a folder of the user's cache.
//!
//! They are public and large, and the same for as long as the masks are: so a model's masks have one seed for many runs
//! (`super::mask_seed`), and only the first of these asks workers for the products. Each product was verified when it
//! came, and stays true. What can happen to it on a disk is damage, and that is noticed by a checksum: verifying anew, the
//! owner would expand all masks and read all products again, which is most of what a fetch costs it. (Whoever can write
//! to the user's cache folder can write to the user's programs.) It is compared at every reading, for what a disk spoils in
//! the middle of a run would make an honest worker's products be refused, and the worker banned.
//!
//! A file is found by what its content follows from, all of it: the seed and what the masks are for, the first of the masks
//! themselves, the served matrix as it is multiplied, and the bytes that are kept of a value. So a program that makes
//! masks, or rounds weights, in another way finds nothing. Files appear whole or not at all; one that is damaged is
//! removed and made anew. The folders of other models make room, the one that was used longest ago first.

use std::collections::HashSet;
use std::fs::{self, File, Permissions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use protocol::he::mask::expand;
use protocol::he::{MaskDomain, MaskProduct, MaskSeed, Precision};
use protocol::ids::{Direction, LinearShape, ProductId};

use super::mask_seed::{SeedLedger, last_used};
use crate::files::sweep;

/// Name and version of the format.
const NAME: [u8; 16] = *b"velum masks 1\n\0\0";
const HASH: usize = 32;
const HEAD: usize = NAME.len() + 2 * HASH;
const SUFFIX: &str = ".masks";

/// All that a product of masks follows from.
pub(super) struct MaskKey {
    product: ProductId,
    precision: Precision,
    outer: usize,
    hash: [u8; HASH],
}

impl MaskKey {
    /// Of the masks of `seed` by the served matrix of this hash and shape, of whose values as many bytes are kept as the
    /// precision says.
    pub(super) fn new(
        seed: &MaskSeed,
        product: ProductId,
        precision: Precision,
        matrix: &[u8; HASH],
        shape: LinearShape,
    ) -> Self {
        let domain = MaskDomain { set: precision.set, product };
        let mut first = vec![0; domain.column_bytes()];
        expand(seed, &domain, 0..1, &mut first);
        let (inner, outer) = shape.along(product.direction);
        let mut hasher = blake3::Hasher::new_derive_key("velum mask product 1");
        hasher
            .update(&seed.to_bytes())
            .update(&domain.nonce())
            .update(&(first.len() as u64).to_le_bytes())
            .update(&first);
        hasher.update(matrix).update(&[precision.mask_limbs]);
        hasher.update(&(inner as u64).to_le_bytes()).update(&(outer as u64).to_le_bytes());
        Self { product, precision, outer, hash: hasher.finalize().into() }
    }

    fn bytes(&self) -> u64 {
        MaskProduct::memory_for(self.precision, self.outer) as u64
    }

    /// One for each product: what is of an earlier seed or precision is written over.
    fn file(&self) -> String {
        let direction = match self.product.direction {
            Direction::Forward => "forward",
            Direction::Backward => "backward",
        };
        format!("{} {direction}{SUFFIX}", self.product.linear).replace(' ', "-")
    }

    fn checksum(&self, content: &[u8]) -> [u8; HASH] {
        blake3::keyed_hash(&self.hash, content).into()
    }
}

/// See the module's documentation.
pub struct MaskStore {
    folder: PathBuf,
    ledger: Arc<SeedLedger>,
    state: Mutex<State>,
}

struct State {
    /// Products whose files were read or written by this process.
    known: HashSet<ProductId>,
    /// Bytes of the files of this model.
    bytes: u64,
    /// The folders of other models with their bytes, the one that was used last first.
    others: Vec<(PathBuf, u64)>,
    /// Most bytes of all; none any more, once some could not be written.
    limit: u64,
}

impl State {
    fn all(&self) -> u64 {
        self.bytes + self.others.iter().map(|(_, bytes)| bytes).sum::<u64>()
    }
}

/// What is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeptBytes {
    /// Of this model.
    pub model: u64,
    /// Of all models.
    pub all: u64,
}

impl MaskStore {
    /// What is kept of `model`, a name that is good for a folder, under `root`, which is made if it is not there; all
    /// models together have at most `limit_bytes`. `now` is in seconds since 1970. Blocks.
    ///
    /// # Errors
    /// When the folders cannot be read or written, or the operating system gives no random bytes.
    pub fn open(root: &Path, model: &str, limit_bytes: u64, now: u64) -> io::Result<Self> {
        let folder = root.join(model);
        fs::create_dir_all(&folder)?;
        let (ledger, new) = SeedLedger::open(&folder, now)?;
        if new {
            remove_products(&folder)?;
        }
        let mut others = Vec::new();
        for entry in fs::read_dir(root)? {
            let path = entry?.path();
            if path.is_dir() && path != folder {
                others.push((path.clone(), bytes_in(&path)));
            }
        }
        others.sort_by_cached_key(|(path, _)| std::cmp::Reverse(last_used(path)));
        let state = State { known: HashSet::new(), bytes: bytes_in(&folder), others, limit: limit_bytes };
        let store = Self { folder, ledger: Arc::new(ledger), state: Mutex::new(state) };
        store.make_room(&mut store.state(), 0);
        Ok(store)
    }

    /// What is kept now.
    pub fn kept(&self) -> KeptBytes {
        let state = self.state();
        KeptBytes { model: state.bytes, all: state.all() }
    }

    /// What the run's calls are counted in.
    pub(super) fn ledger(&self) -> Arc<SeedLedger> {
        Arc::clone(&self.ledger)
    }

    /// The seed of the masks.
    pub(super) fn seed(&self) -> MaskSeed {
        self.ledger.seed()
    }

    /// Whether a product was read or written before.
    pub(super) fn knows(&self, product: ProductId) -> bool {
        self.state().known.contains(&product)
    }

    /// Reads a product, if it is there. Blocks.
    ///
    /// # Errors
    /// When there is a file that cannot be read or is damaged; it is gone then.
    pub(super) fn read(&self, key: &MaskKey) -> io::Result<Option<MaskProduct>> {
        let path = self.folder.join(key.file());
        let mut file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let size = file.metadata()?.len();
        let mut head = [0; HEAD];
        let is_ours = file.read_exact(&mut head).is_ok()
            && head[..NAME.len()] == NAME
            && head[NAME.len()..NAME.len() + HASH] == key.hash;
        if !is_ours {
            // Of another seed, precision or program: it is written over.
            return Ok(None);
        }
        let read = || {
            let damaged = || io::Error::new(io::ErrorKind::InvalidData, "it is damaged");
            if size != HEAD as u64 + key.bytes() {
                return Err(damaged());
            }
            let product = MaskProduct::mapped(key.precision, key.outer, &file, HEAD as u64)?;
            if head[NAME.len() + HASH..] == key.checksum(product.bytes()) { Ok(product) } else { Err(damaged()) }
        };
        let read = read();
        let mut state = self.state();
        match read {
            Ok(product) => {
                state.known.insert(key.product);
                Ok(Some(product))
            }
            Err(error) => {
                state.known.remove(&key.product);
                if fs::remove_file(&path).is_ok() {
                    state.bytes = state.bytes.saturating_sub(size);
                }
                Err(io::Error::new(error.kind(), format!("{}: {error}", path.display())))
            }
        }
    }

    /// Writes a product, if there is room or other models can make it. Blocks; what a crash of the machine tears is noticed
    /// when it is read.
    ///
    /// # Errors
    /// When it cannot be written, perhaps since the disk is full. Nothing more is written then.
    pub(super) fn write(&self, key: &MaskKey, product: &MaskProduct) -> io::Result<()> {
        let path = self.folder.join(key.file());
        let (bytes, before) = (HEAD as u64 + key.bytes(), fs::metadata(&path).map_or(0, |file| file.len()));
        {
            let mut state = self.state();
            state.bytes = state.bytes.saturating_sub(before);
            if !self.make_room(&mut state, bytes) {
                state.bytes += before;
                return Ok(());
            }
            state.bytes += bytes;
        }
        let written = || -> io::Result<()> {
            let mode = Permissions::from_mode(0o600);
            let mut file = tempfile::Builder::new().prefix(".velum-").permissions(mode).tempfile_in(&self.folder)?;
            let content = product.bytes();
            file.write_all(&[&NAME[..], &key.hash, &key.checksum(content)].concat())?;
            file.write_all(content)?;
            file.persist(&path)?;
            Ok(())
        };
        let written = written();
        let mut state = self.state();
        match written {
            Ok(()) => drop(state.known.insert(key.product)),
            Err(_) => (state.limit, state.bytes) = (0, (state.bytes + before).saturating_sub(bytes)),
        }
        written
    }

    /// Whether so many more bytes fit, after other models have made room where that helps.
    fn make_room(&self, state: &mut State, more: u64) -> bool {
        if state.bytes.saturating_add(more) > state.limit {
            return false;
        }
        while state.all().saturating_add(more) > state.limit {
            let Some((oldest, _)) = state.others.pop() else { return false };
            tracing::info!("{} makes room for the products of the masks of this model", oldest.display());
            if let Err(error) = fs::remove_dir_all(&oldest) {
                tracing::warn!("{} cannot be removed: {error}", oldest.display());
            }
        }
        true
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic while it was locked has at worst miscounted some bytes.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Removes the products of an earlier seed, and what a killed process left.
fn remove_products(folder: &Path) -> io::Result<()> {
    sweep(folder);
    products(folder).try_for_each(|entry| fs::remove_file(entry.path()))
}

/// Bytes of the products in a folder.
fn bytes_in(folder: &Path) -> u64 {
    products(folder).filter_map(|entry| entry.metadata().ok()).map(|file| file.len()).sum()
}

fn products(folder: &Path) -> impl Iterator<Item = fs::DirEntry> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_name().to_string_lossy().ends_with(SUFFIX))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use protocol::he::ParameterSet;
    use protocol::ids::{Group, LinearId};

    use super::*;

    const SHAPE: LinearShape = LinearShape { d_in: 3, d_out: 2 };

    fn key(store: &MaskStore, layer: u16, matrix: u8) -> MaskKey {
        let product = LinearId { layer, group: Group::Qkv }.along(Direction::Forward);
        MaskKey::new(&store.seed(), product, Precision::standard(ParameterSet::P24), &[matrix; HASH], SHAPE)
    }

    fn product(key: &MaskKey, byte: u8) -> MaskProduct {
        let size = MaskProduct::memory_for(key.precision, key.outer);
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&(0..size).map(|index| (index as u8).wrapping_mul(byte)).collect::<Vec<_>>()).unwrap();
        MaskProduct::mapped(key.precision, key.outer, &file, 0).unwrap()
    }

    fn open(root: &Path, model: &str, now: u64) -> MaskStore {
        MaskStore::open(root, model, 1 << 30, now).unwrap()
    }

    #[test]
    fn a_later_run_finds_what_an_earlier_one_kept_and_nothing_else() {
        let root = tempfile::tempdir().unwrap();
        let store = open(root.path(), "model", 1);
        let first = key(&store, 4, 7);
        assert!(store.read(&first).unwrap().is_none() && !store.knows(first.product));
        store.write(&first, &product(&first, 5)).unwrap();
        assert!(store.knows(first.product));
        let later = open(root.path(), "model", 2);
        assert_eq!(later.seed(), store.seed());
        let kept = later.kept();
        assert!(kept.model > first.bytes() && kept.all == kept.model, "{kept:?}");
        let read = later.read(&key(&later, 4, 7)).unwrap().unwrap();
        assert_eq!((read.bytes(), read.precision()), (product(&first, 5).bytes(), first.precision));
        // Another matrix, another layer, another model.
        assert!(later.read(&key(&later, 4, 8)).unwrap().is_none());
        assert!(later.read(&key(&later, 5, 7)).unwrap().is_none());
        let other = open(root.path(), "other", 3);
        assert!(other.seed() != store.seed() && other.read(&key(&other, 4, 7)).unwrap().is_none());
        let file = later.folder.join(first.file());
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(file.file_name().unwrap(), "layer-4-qkv-forward.masks");
    }

    #[test]
    fn damage_is_noticed_wherever_it_is() {
        let root = tempfile::tempdir().unwrap();
        let store = open(root.path(), "model", 1);
        let key = key(&store, 0, 1);
        let file = store.folder.join(key.file());
        store.write(&key, &product(&key, 3)).unwrap();
        let good = fs::read(&file).unwrap();
        let step = good.len() / 97;
        for at in (0..HEAD).chain((HEAD..good.len()).step_by(step)) {
            let mut bytes = good.clone();
            bytes[at] ^= 1;
            fs::write(&file, &bytes).unwrap();
            assert!(!matches!(store.read(&key), Ok(Some(_))), "byte {at}");
        }
        for end in (0..good.len()).step_by(step) {
            fs::write(&file, &good[..end]).unwrap();
            assert!(!matches!(store.read(&key), Ok(Some(_))), "cut at {end}");
        }
        fs::write(&file, [&good[..], &[0]].concat()).unwrap();
        let error = store.read(&key).err().unwrap().to_string();
        assert!(error.contains("layer-0-qkv-forward.masks: it is damaged") && !file.exists(), "{error}");
        store.write(&key, &product(&key, 3)).unwrap();
        assert!(store.read(&key).unwrap().is_some());
    }

    #[test]
    fn a_seed_that_was_used_often_enough_takes_its_products_with_it() {
        let root = tempfile::tempdir().unwrap();
        let store = open(root.path(), "model", 1);
        let first = key(&store, 0, 1);
        store.write(&first, &product(&first, 3)).unwrap();
        store.ledger().count(super::super::mask_seed::MOST_CALLS);
        let later = open(root.path(), "model", 2);
        assert!(later.seed() != store.seed() && later.kept().model < first.bytes());
        assert!(later.read(&key(&later, 0, 1)).unwrap().is_none());
    }

    #[test]
    fn other_models_make_room_the_oldest_first_and_the_limit_is_kept_to() {
        let root = tempfile::tempdir().unwrap();
        for (model, now) in [("new", 30), ("old", 10), ("middle", 20)] {
            let store = open(root.path(), model, now);
            let key = key(&store, 0, 1);
            store.write(&key, &product(&key, 3)).unwrap();
        }
        let here = || {
            let mut names: Vec<String> =
                fs::read_dir(root.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        };
        let one = open(root.path(), "new", 40).kept().model;
        // Room for three and a half, of which three are others.
        let store = MaskStore::open(root.path(), "mine", 3 * one + one / 2, 50).unwrap();
        assert_eq!(here(), ["middle", "mine", "new", "old"]);
        for (layer, left) in [(0, vec!["middle", "mine", "new"]), (1, vec!["mine", "new"]), (2, vec!["mine"])] {
            let key = key(&store, layer, 1);
            store.write(&key, &product(&key, 3)).unwrap();
            assert_eq!(here(), left);
        }
        let fourth = key(&store, 3, 1);
        store.write(&fourth, &product(&fourth, 3)).unwrap();
        assert!(!store.knows(fourth.product) && store.read(&fourth).unwrap().is_none());
        assert!(store.kept().all <= 3 * one + one / 2);
        // What cannot be written is an error once, and is not tried again.
        let store = MaskStore::open(root.path(), "mine", 1 << 30, 60).unwrap();
        fs::remove_dir_all(&store.folder).unwrap();
        assert!(store.write(&fourth, &product(&fourth, 3)).is_err());
        store.write(&fourth, &product(&fourth, 3)).unwrap();
    }
}
