//! `node generate` and `node chat`: texts from an owner's model.

mod answer;
mod chat;
mod prompts;

use std::io::{self, Read as _, Write as _};
use std::path::PathBuf;

use actors::generation::{Event, Events, Finished, Request, Sampling, Stops};
use anyhow::{Context as _, anyhow};

use self::answer::Answer;
use self::prompts::Prompt;
use crate::output::{self, Unread};
use crate::roles::GenerationSetup;
use crate::roles::generation::Generation;
use crate::roles::stop::StopSignals;

pub use self::chat::{ChatOptions, chat};

/// How answers are written.
#[derive(Clone, Debug)]
pub struct Writing {
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Most tokens of an answer.
    pub max_tokens: usize,
    /// What ends one.
    pub stops: Stops,
}

/// Where prompts come from.
#[derive(Clone, Debug)]
pub enum Source {
    /// The text itself, or `-` for standard input.
    Prompt(String),
    /// A file of JSON, a line for each.
    File(PathBuf),
}

/// What is to be written.
#[derive(Clone, Debug)]
pub struct GenerateOptions {
    /// By which model.
    pub setup: GenerationSetup,
    /// How.
    pub writing: Writing,
    /// What is to be answered.
    pub source: Source,
    /// The system's turn.
    pub system: Option<String>,
    /// Without the chat template.
    pub raw: bool,
    /// Print JSON.
    pub json: bool,
    /// How many of the likeliest tokens come with their log-probabilities, if any do.
    pub logprobs: Option<usize>,
}

/// Writes the answers to standard output.
///
/// # Errors
/// Whatever is wrong with the inputs, and whatever stops an answer; those before it are written.
pub async fn run(options: GenerateOptions) -> anyhow::Result<()> {
    let GenerateOptions { setup, writing, source, system, raw, json, logprobs } = options;
    let prompts = tokio::task::spawn_blocking(move || read(source)).await.context("reading the prompts")??;
    let mut stop = StopSignals::listen()?;
    let generation = Generation::start(setup, &mut stop).await?;
    let request = |prompt: &Prompt| {
        let tokens = prompt.tokens(generation.engine.tokenizer(), &generation.style, system.as_deref(), raw)?;
        anyhow::Ok(Request {
            sampling: writing.sampling,
            stops: writing.stops.clone(),
            adapter: generation.adapter.clone(),
            logprobs,
            ..Request::new(tokens, writing.max_tokens)
        })
    };
    // All are read before the first is answered: a line that is wrong is found at once.
    let requests = prompts.iter().map(request).collect::<anyhow::Result<Vec<_>>>();
    let ended = match requests {
        Err(error) => Err(error),
        Ok(requests) if json => answers(&generation, &prompts, requests, &mut stop).await,
        Ok(mut requests) => match requests.pop() {
            Some(request) => stream(&generation, request, &mut stop).await,
            None => Ok(()),
        },
    };
    generation.stop().await;
    ended
}

/// Reads what is to be answered. Blocks.
fn read(source: Source) -> anyhow::Result<Vec<Prompt>> {
    match source {
        Source::Prompt(text) if text == "-" => {
            let mut text = String::new();
            io::stdin().read_to_string(&mut text).context("standard input")?;
            Ok(vec![Prompt::of_text(text)])
        }
        Source::Prompt(text) => Ok(vec![Prompt::of_text(text)]),
        Source::File(path) => prompts::read(&path),
    }
}

/// Writes one answer as it comes.
async fn stream(generation: &Generation, request: Request, stop: &mut StopSignals) -> anyhow::Result<()> {
    let mut events = generation.engine.submit(request)?;
    let finished = show(&mut events, stop).await;
    output::print("");
    let finished = finished?.ok_or_else(|| anyhow!("stopped"))?.1;
    output::note(answer::summary(&finished));
    Ok(())
}

/// Shows an answer on standard output as it comes, and gives its whole text; `None` if it was stopped by a signal.
///
/// # Errors
/// When it cannot be finished.
async fn show(events: &mut Events, stop: &mut StopSignals) -> anyhow::Result<Option<(String, Finished)>> {
    let mut whole = String::new();
    let mut say = |text: &str| {
        whole.push_str(text);
        let mut out = Unread(io::stdout().lock());
        // A terminal that is gone loses it: see `Unread`.
        drop(out.write_all(text.as_bytes()).and_then(|()| out.flush()));
    };
    loop {
        let event = tokio::select! {
            event = events.next() => event,
            () = stop.next() => return Ok(None),
        };
        match event {
            Some(Event::Prompt(_)) => {}
            Some(Event::Token(token)) => say(&token.text),
            Some(Event::Finished(finished)) => {
                say(&finished.text);
                return Ok(Some((whole, finished)));
            }
            Some(Event::Failed(error)) => return Err(error.into()),
            None => return Err(anyhow!("the engine ended before the answer did")),
        }
    }
}

/// Writes a line of JSON for each prompt, in their order.
async fn answers(
    generation: &Generation,
    prompts: &[Prompt],
    requests: Vec<Request>,
    stop: &mut StopSignals,
) -> anyhow::Result<()> {
    // Waiting requests hold little; those that do not fit the engine's queue are handed in as others end.
    let mut waiting = requests.into_iter().enumerate();
    let mut under_way = std::collections::VecDeque::new();
    let tokenizer = generation.engine.tokenizer();
    loop {
        while under_way.len() < QUEUED
            && let Some((number, request)) = waiting.next()
        {
            let events = generation.engine.submit(request);
            under_way.push_back(events.with_context(|| prompts[number].name(number))?);
        }
        let Some(mut events) = under_way.pop_front() else { return Ok(()) };
        let number = prompts.len() - waiting.len() - under_way.len() - 1;
        let answer = tokio::select! {
            answer = Answer::of(&mut events) => answer.with_context(|| prompts[number].name(number))?,
            () = stop.next() => return Err(anyhow!("stopped after {number} of {} answers", prompts.len())),
        };
        output::print(answer.to_json(number, &prompts[number], tokenizer)?);
    }
}

/// Requests that are handed to the engine before their turn.
const QUEUED: usize = 64;
