//! Serving a model and its adapters to people, over HTTP, while its base products are computed here or by workers.

use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::Arc;

use actors::generation::{Engine, EngineConfig};
use actors::lora::LoraAdapters;
use anyhow::{Context as _, anyhow, bail, ensure};
use zeroize::Zeroizing;

use super::chat_style::ChatStyle;
use super::progress::Progress;
use super::ready::{Ready, Used};
use super::stop::StopSignals;
use crate::http::{Gate, Http, Limits, Models, Token};
use crate::{output, protect};

/// The environment's name for the token.
const TOKEN_VARIABLE: &str = "VELUM_TOKEN";
/// What is printed before the address at which the server can be asked.
pub const SERVING: &str = "serving on ";

/// What is served, and how.
pub(crate) struct ServeOptions {
    pub(crate) used: Used,
    pub(crate) http: SocketAddr,
    /// Adapters by name.
    pub(crate) adapters: Vec<(String, PathBuf)>,
    pub(crate) token_file: Option<PathBuf>,
    /// Names of this machine.
    pub(crate) names: Vec<String>,
    /// Answers that are written or waited for at a time.
    pub(crate) most_answers: usize,
    /// Texts that are written side by side.
    pub(crate) at_once: usize,
    /// Memory for keys and values of texts, in MiB.
    pub(crate) text_memory_mib: u64,
    /// Longest text in tokens.
    pub(crate) context: Option<usize>,
}

/// Serves until Ctrl-C or SIGTERM: answers under way are then finished, and a second signal ends them.
///
/// # Errors
/// When the address cannot be served on, the model or an adapter cannot be read, or no workers are found.
pub(crate) async fn run(options: ServeOptions) -> anyhow::Result<()> {
    protect::shut_memory();
    let mut stop = StopSignals::listen()?;
    let progress = Progress::new();
    let gate = Gate { token: token(&options)?, names: options.names.clone() };
    ensure!(
        options.http.ip().is_loopback() || gate.token.is_some(),
        "--http {} can be reached from other machines, and whoever reaches it may ask: give a token (--token-file FILE, or \
         {TOKEN_VARIABLE} in the environment), or serve on 127.0.0.1",
        options.http
    );
    let base = Ready::name(&options.used.config)?;
    check_names(&base, &options.adapters)?;
    // The port is taken before anything slow is done: a mistake shows at once.
    let listener = TcpListener::bind(options.http).with_context(|| format!("--http {}", options.http))?;
    let address = listener.local_addr()?;
    let folders = options.adapters.iter().map(|(_, folder)| folder.clone()).collect();
    let prepared = tokio::select! {
        prepared = Ready::prepare(&options.used, folders, &progress) => prepared,
        () = stop.next() => Err(anyhow!("stopped before anything was served")),
    };
    let ready = prepared?;
    let served = serve(&options, base, gate, listener, address, &ready, &progress, &mut stop).await;
    progress.finish();
    ready.stop().await;
    served
}

#[allow(clippy::too_many_arguments, reason = "what `run` has made, each once")]
async fn serve(
    options: &ServeOptions,
    base: String,
    gate: Gate,
    listener: TcpListener,
    address: SocketAddr,
    ready: &Ready,
    progress: &Progress,
    stop: &mut StopSignals,
) -> anyhow::Result<()> {
    let names = options.adapters.iter().map(|(name, _)| name.clone());
    let adapters: Vec<(String, Arc<LoraAdapters>)> = names.zip(ready.adapters.iter().cloned()).collect();
    progress.status("preparing to answer");
    let settings = EngineConfig {
        sequences: options.at_once,
        waiting: options.most_answers,
        context: options.context,
        memory: options.text_memory_mib << 20,
        reuse: true,
        ..EngineConfig::default()
    };
    let starting = Arc::clone(&ready.llama);
    let engine = tokio::task::spawn_blocking(move || Engine::start(starting, settings));
    let engine = engine.await.context("preparing to answer")??;
    let style = ChatStyle::of(&options.used.config.data, engine.tokenizer())?;
    let token = gate.token.is_some();
    let limits = Limits { answers: options.most_answers, ..Limits::default() };
    let models = Models { engine, base, adapters, style };
    let names = models.names().join(", ");
    let (http, server) = Http::start(listener, models, gate, limits)?;
    let mut server = tokio::spawn(server);
    output::print(format_args!("{SERVING}http://{address}/"));
    output::print(format_args!("models: {names}{}", if token { " (for who has the token)" } else { "" }));
    tokio::select! {
        ended = &mut server => return Ok(ended.context("the server's task")??),
        () = stop.next() => {}
    }
    progress.note("no more requests are taken; answers under way are finished, once more ends them");
    tokio::select! {
        () = http.drain() => {}
        () = stop.next() => http.abort().await,
    }
    Ok(server.await.context("the server's task")??)
}

/// The token that clients must send, of the file or the environment.
fn token(options: &ServeOptions) -> anyhow::Result<Option<Token>> {
    let (text, source) = match (&options.token_file, std::env::var(TOKEN_VARIABLE)) {
        (Some(path), _) => {
            let text = std::fs::read_to_string(path);
            (text.with_context(|| format!("--token-file {}", path.display()))?, path.display().to_string())
        }
        (None, Ok(text)) => (text, TOKEN_VARIABLE.to_owned()),
        (None, Err(std::env::VarError::NotPresent)) => return Ok(None),
        // The error itself would show the token.
        (None, Err(std::env::VarError::NotUnicode(_))) => bail!("{TOKEN_VARIABLE} is no text"),
    };
    let text = Zeroizing::new(text);
    let token = Token::new(text.trim()).map_err(|why| anyhow!("the token of {source} {why}"))?;
    Ok(Some(token))
}

/// Refuses a name for two models.
fn check_names(base: &str, adapters: &[(String, PathBuf)]) -> anyhow::Result<()> {
    for (number, (name, _)) in adapters.iter().enumerate() {
        ensure!(name != base, "--adapter {name}=…: the base model is called so");
        ensure!(adapters[..number].iter().all(|(other, _)| other != name), "--adapter {name}=… is given twice");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn each_model_has_a_name_of_its_own() {
        let adapters =
            |names: &[&str]| names.iter().map(|name| ((*name).to_owned(), PathBuf::new())).collect::<Vec<_>>();
        check_names("base", &adapters(&["one", "two"])).unwrap();
        assert!(check_names("base", &adapters(&["base"])).unwrap_err().to_string().contains("base model"));
        assert!(check_names("base", &adapters(&["one", "one"])).unwrap_err().to_string().contains("twice"));
    }
}
