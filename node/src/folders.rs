//! This user's folders, as the XDG base directory specification has them.

use std::path::PathBuf;

use anyhow::Context as _;

/// `velum/` in the user's cache folder: files that can be had again, and save time by being there. It need not exist
/// yet.
///
/// # Errors
/// When the environment names no such folder.
pub fn cache() -> anyhow::Result<PathBuf> {
    folder("XDG_CACHE_HOME", ".cache")
}

/// Where a GPU's compiled kernels are kept. It need not exist yet.
///
/// # Errors
/// When the environment names no such folder.
pub fn kernels() -> anyhow::Result<PathBuf> {
    Ok(cache()?.join("kernels"))
}

/// Where products of masks are kept from run to run, a folder for each model. It need not exist yet.
///
/// # Errors
/// When the environment names no such folder.
pub fn masks() -> anyhow::Result<PathBuf> {
    Ok(cache()?.join("masks"))
}

/// Where what is known of products is kept from run to run, a file for each model. It need not exist yet.
///
/// # Errors
/// When the environment names no such folder.
pub fn compensations() -> anyhow::Result<PathBuf> {
    Ok(cache()?.join("compensation"))
}

/// `velum/` in the user's configuration folder: what must not be lost, such as a worker's identity. It need not exist
/// yet.
///
/// # Errors
/// When the environment names no such folder.
pub fn configuration() -> anyhow::Result<PathBuf> {
    folder("XDG_CONFIG_HOME", ".config")
}

/// An absolute `$variable`, else the folder of this name in the user's home.
fn folder(variable: &str, at_home: &str) -> anyhow::Result<PathBuf> {
    let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    absolute(variable)
        .or_else(|| absolute("HOME").map(|home| home.join(at_home)))
        .map(|folder| folder.join("velum"))
        .with_context(|| format!("neither {variable} nor HOME names a folder: set one"))
}
