//! The velum node as a library: what the binary `node` runs, one module a job.

pub mod bench;
pub mod cli;
pub mod config;
pub mod data;
pub mod demo;
pub mod disk;
mod eval;
pub mod export;
pub mod folders;
pub mod generate;
mod http;
pub mod link;
mod local;
pub mod logging;
pub mod output;
mod protect;
pub mod report;
pub mod roles;
pub mod swarm;
pub mod synth;
pub mod trace;

use std::future::Future;

use anyhow::Context as _;
use cli::{Arguments, Bench, Data, Export, Role, Tool};
use config::Config;

/// Runs what the arguments ask for, to its end.
///
/// # Errors
/// Whatever stops it before its work is done; the message says what to do about it.
pub fn run(arguments: Arguments) -> anyhow::Result<()> {
    match arguments.tool {
        Some(Tool::Bench { what: Bench::Linear(linear) }) => bench::linear::run(&linear.into()),
        Some(Tool::Bench { what: Bench::Step(step) }) => block_on(bench::step::run(step.into())),
        Some(Tool::Bench { what: Bench::Account(account) }) => block_on(bench::account::run(account.into())),
        Some(Tool::Bench { what: Bench::Generate(generate) }) => block_on(bench::generate::run(generate.into())),
        Some(Tool::Bench { what: Bench::Exactness(exactness) }) => bench::exactness::run(&exactness.into()),
        Some(Tool::Bench { what: Bench::Gpu(gpu) }) if gpu.floor => {
            bench::floor::run(gpu.model_shape, &gpu.tokens, gpu.json)
        }
        Some(Tool::Bench { what: Bench::Gpu(gpu) }) => bench::gpu::run(&gpu.into()),
        Some(Tool::Data { what: Data::Show(show) }) => data::show(&show.into()),
        Some(Tool::Serve(serve)) => block_on(roles::serve::run(serve.into_options()?)),
        Some(Tool::Eval(eval)) => block_on(eval::run(eval.into_options()?)),
        Some(Tool::Export { what: Export::Merged(merged) }) => export::merged(&merged.into()),
        Some(Tool::Export { what: Export::Gguf(gguf) }) => export::gguf(&gguf.export.into(), gguf.numbers),
        Some(Tool::Export { what: Export::GgufAdapter(adapter) }) => export::gguf_adapter(&adapter.into()),
        Some(Tool::Export { what: Export::Ollama(ollama) }) => {
            export::ollama(&ollama.model, ollama.adapter.as_deref(), &ollama.out, cli::existing(ollama.force))
        }
        Some(Tool::Generate(generate)) => block_on(generate::run(generate.options()?)),
        Some(Tool::Chat(chat)) => block_on(generate::chat(chat.options()?)),
        Some(Tool::Synth(synth)) => block_on(synth::run(synth.into())),
        None => run_role(arguments),
    }
}

fn run_role(arguments: Arguments) -> anyhow::Result<()> {
    let role = arguments.role.context("no role: give --role")?;
    let mut config = match (&arguments.config, role) {
        (Some(path), _) => Config::read(path)?,
        (None, Role::Demo) => demo::default_config()?,
        (None, Role::Owner | Role::Worker) => Config::default(),
    };
    arguments.apply(&mut config);
    config.validate()?;
    match role {
        Role::Owner => block_on(roles::owner::run(config, arguments.start())),
        Role::Worker => block_on(roles::worker::run(config, arguments.until_stdin_closes)),
        Role::Demo => block_on(demo::run(config, arguments.start(), arguments.trace)),
    }
}

/// Runs a future on this thread as an actix system, with a pool of threads beside it.
fn block_on(work: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    let runtime =
        || tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("the system has threads and timers");
    actix::System::with_tokio_rt(runtime).block_on(work)
}
