//! The velum node as a library: what the binary `node` runs, one module a job.

pub mod cli;
pub mod config;
pub mod demo;
pub mod folders;
pub mod logging;
pub mod report;
pub mod roles;
pub mod swarm;

use cli::{Arguments, Role};
use config::Config;

/// Runs what the arguments ask for, to its end.
///
/// # Errors
/// Whatever stops a role before its work is done; the message says what to do about it.
pub fn run(arguments: Arguments) -> anyhow::Result<()> {
    let mut config = match (&arguments.config, arguments.role) {
        (Some(path), _) => Config::read(path)?,
        (None, Role::Demo) => demo::default_config()?,
        (None, Role::Owner | Role::Worker) => Config::default(),
    };
    arguments.apply(&mut config);
    config.validate()?;
    let runtime =
        || tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("the system has threads and timers");
    let system = actix::System::with_tokio_rt(runtime);
    system.block_on(async {
        match arguments.role {
            Role::Owner => roles::owner::run(config).await,
            Role::Worker => roles::worker::run(config, arguments.until_stdin_closes).await,
            Role::Demo => demo::run(config).await,
        }
    })
}
