//! A node's identity: an Ed25519 key in a file that only its owner may read.
//!
//! The file holds libp2p's protobuf encoding of the key. It is written beside its place and linked there whole, so
//! that it is never seen half-written, with mode 0600 from its first byte, and never replaces another key.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use libp2p::PeerId;
use libp2p::identity::{KeyType, Keypair};
use zeroize::Zeroizing;

/// Largest key file that is read: an encoded Ed25519 key is 68 bytes.
const MAX_KEY_BYTES: u64 = 1024;

/// A node's key pair. Its secret half is not printed, and erased when dropped.
pub struct Identity(Keypair);

/// The right to use an identity file, which one process at a time has. The system takes it back when the process ends,
/// however it ends.
#[derive(Debug)]
pub struct IdentityLock(#[expect(dead_code, reason = "the lock lasts as long as the file is open")] File);

impl IdentityLock {
    /// Takes the lock that lies beside an identity file, which need not exist yet.
    ///
    /// # Errors
    /// [`IdentityError::InUse`] if another process has it; [`IdentityError::File`].
    pub fn take(identity: &Path) -> Result<Self, IdentityError> {
        let mut path = identity.as_os_str().to_owned();
        path.push(".lock");
        let path = PathBuf::from(path);
        let failed = |source| IdentityError::File { action: "lock", path: path.clone(), source };
        std::fs::create_dir_all(folder_of(&path)).map_err(failed)?;
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path).map_err(failed)?;
        match file.try_lock() {
            Ok(()) => Ok(Self(file)),
            Err(TryLockError::WouldBlock) => Err(IdentityError::InUse { path: identity.into() }),
            Err(TryLockError::Error(source)) => Err(failed(source)),
        }
    }
}

/// The folder that a file lies in.
fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Why there is no identity.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IdentityError {
    /// The file cannot be read or made.
    #[error("cannot {action} the identity file {path}: {source}")]
    File {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// Another process is this peer already: two of one name would each get some of what is meant for the other.
    #[error(
        "the identity {path} is in use by another process: stop that one, or give this one a name of its own with \
         --identity FILE"
    )]
    InUse {
        /// The identity file.
        path: PathBuf,
    },
    /// Others may read or write the file.
    #[error("the identity file {path} has mode {mode:04o}, so others may use this node's name: run `chmod 600 {path}`")]
    Permissions {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// The file holds no Ed25519 key.
    #[error("the identity file {path} holds no Ed25519 key ({why}): move it away, and a new identity will be made")]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
}

impl Identity {
    /// A new identity that is kept nowhere.
    pub fn ephemeral() -> Self {
        Self(Keypair::generate_ed25519())
    }

    /// The identity in a file; if there is no such file, a new identity, which is written there.
    ///
    /// # Errors
    /// [`IdentityError`], naming the file and what to do.
    pub fn load_or_create(path: &Path) -> Result<Self, IdentityError> {
        match File::open(path) {
            Ok(file) => Self::load(path, file),
            Err(error) if error.kind() == ErrorKind::NotFound => Self::create(path),
            Err(source) => Err(IdentityError::File { action: "open", path: path.into(), source }),
        }
    }

    /// The public name that peers know the node by.
    pub fn peer_id(&self) -> PeerId {
        self.0.public().to_peer_id()
    }

    /// The key pair, for the swarm.
    pub(super) fn into_keypair(self) -> Keypair {
        self.0
    }

    fn load(path: &Path, file: File) -> Result<Self, IdentityError> {
        let failed = |source| IdentityError::File { action: "read", path: path.into(), source };
        let corrupt = |why: String| IdentityError::Corrupt { path: path.into(), why };
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.is_file() {
            return Err(corrupt("it is no regular file".into()));
        }
        check_mode(path, &metadata)?;
        let mut bytes = Zeroizing::new(Vec::with_capacity(MAX_KEY_BYTES as usize + 1));
        file.take(MAX_KEY_BYTES + 1).read_to_end(&mut bytes).map_err(failed)?;
        let key = Keypair::from_protobuf_encoding(&bytes).map_err(|error| corrupt(error.to_string()))?;
        match key.key_type() {
            KeyType::Ed25519 => Ok(Self(key)),
            other => Err(corrupt(format!("it is a key of type {other}"))),
        }
    }

    fn create(path: &Path) -> Result<Self, IdentityError> {
        let failed = |source| IdentityError::File { action: "create", path: path.into(), source };
        let identity = Self::ephemeral();
        let encoded = identity.0.to_protobuf_encoding().map_err(|error| failed(std::io::Error::other(error)))?;
        let encoded = Zeroizing::new(encoded);
        let folder = folder_of(path);
        std::fs::create_dir_all(folder).map_err(failed)?;
        // A temporary file is created with mode 0600 on Unix.
        let mut file = tempfile::Builder::new().prefix(".identity").tempfile_in(folder).map_err(failed)?;
        file.write_all(&encoded).and_then(|()| file.as_file().sync_all()).map_err(failed)?;
        match file.persist_noclobber(path) {
            Ok(_) => Ok(identity),
            // Another process was faster: its key counts.
            Err(error) if error.error.kind() == ErrorKind::AlreadyExists => {
                Self::load(path, File::open(path).map_err(failed)?)
            }
            Err(error) => Err(failed(error.error)),
        }
    }
}

#[cfg(unix)]
fn check_mode(path: &Path, metadata: &std::fs::Metadata) -> Result<(), IdentityError> {
    use std::os::unix::fs::PermissionsExt;
    let mode = metadata.permissions().mode() & 0o7777;
    if mode & 0o077 == 0 { Ok(()) } else { Err(IdentityError::Permissions { path: path.into(), mode }) }
}

#[cfg(not(unix))]
fn check_mode(_: &Path, _: &std::fs::Metadata) -> Result<(), IdentityError> {
    Ok(())
}

#[cfg(all(test, unix))]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn fails(path: &Path) -> IdentityError {
        Identity::load_or_create(path).err().unwrap()
    }

    #[test]
    fn an_identity_is_made_once_for_its_owner_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keys/identity");
        let made = Identity::load_or_create(&path).unwrap().peer_id();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "a temporary file was left");
        assert_eq!(Identity::load_or_create(&path).unwrap().peer_id(), made);
    }

    #[test]
    fn one_process_at_a_time_has_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keys/identity");
        let lock = IdentityLock::take(&path).unwrap();
        let error = IdentityLock::take(&path).unwrap_err();
        assert!(matches!(error, IdentityError::InUse { .. }), "{error}");
        assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
        IdentityLock::take(&folder.path().join("another")).unwrap();
        drop(lock);
        IdentityLock::take(&path).unwrap();
    }

    #[test]
    fn others_may_not_read_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("identity");
        Identity::load_or_create(&path).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
        let error = fails(&path);
        assert!(matches!(error, IdentityError::Permissions { mode: 0o640, .. }), "{error}");
        assert!(error.to_string().contains("chmod 600"), "{error}");
    }

    #[test]
    fn a_corrupt_file_is_named_and_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("identity");
        let other_type = b"\x08\x02\x12\x01\x00".to_vec();
        for bytes in [vec![], vec![7; 68], vec![0; 1 << 16], other_type] {
            fs::write(&path, &bytes).unwrap();
            fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
            let error = fails(&path);
            assert!(matches!(error, IdentityError::Corrupt { .. }), "{error}");
            assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
            assert_eq!(fs::read(&path).unwrap(), bytes);
        }
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        assert!(matches!(fails(&path), IdentityError::Corrupt { .. }));
    }
}
