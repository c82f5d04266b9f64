//! The demo: a whole private fine-tuning on one machine, with processes that know nothing of each other but their
//! addresses.
//!
//! 1. fetch a small real model, once;
//! 2. run workers and an owner with the example data;
//! 3. say what came out, with what the model answered before and after.

pub mod fetch;
mod summary;

use std::fs;
use std::path::PathBuf;

use anyhow::Context as _;

use crate::config::Config;
use crate::link::Route;
use crate::local::{LocalRun, write};
use crate::roles::Start;

/// The example data: questions and answers from the handbook of a company that does not exist.
const HANDBOOK: &str = include_str!("../../../configs/handbook.jsonl");
/// The demo's settings, the same file that a user can copy.
const SETTINGS: &str = include_str!("../../../configs/demo.toml");

/// Marks a folder whose results a demo may replace; without it they are a run of the user's own.
const MARK: &str = "DEMO";

/// Settings of the demo before flags are laid over them.
///
/// # Errors
/// When the built-in file is not valid, which a test excludes.
pub fn default_config() -> anyhow::Result<Config> {
    toml::from_str(SETTINGS).context("configs/demo.toml")
}

/// Runs the demo to its end; every process writes a trace beside `trace`, where one is asked for.
///
/// # Errors
/// When the model cannot be had, a process cannot be started, or the owner fails.
pub async fn run(mut config: Config, start: Start, trace: Option<PathBuf>) -> anyhow::Result<()> {
    let out = config.owner.out.clone();
    let start = match start {
        Start::Fresh if out.join(MARK).is_file() => Start::Overwrite,
        start => start,
    };
    start.check(&out)?;
    fs::create_dir_all(&out).with_context(|| format!("the folder {} cannot be created", out.display()))?;
    if !matches!(start, Start::Resume(_)) {
        write(&out, MARK, "The results in this folder are the demo's: the next demo replaces them.\n")?;
    }
    if config.model.is_none() {
        config.model = Some(tokio::task::spawn_blocking(fetch::smollm2).await??);
    }
    if config.owner.data.is_none() && config.data.files.is_empty() {
        config.owner.data = Some(write(&out, "handbook.jsonl", HANDBOOK)?);
    }
    let data: Vec<PathBuf> = config.data_files()?.into_iter().map(|file| file.path).collect();
    LocalRun { config, start, route: Route::default(), trace, parts: false, quiet: false }.run().await?;
    summary::print(&out, &data)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    #[test]
    fn the_built_in_settings_are_valid() {
        super::default_config().unwrap().validate().unwrap();
    }
}
