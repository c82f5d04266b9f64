//! `node chat`: a conversation in the terminal.

use std::io::{self, BufRead as _, IsTerminal as _, Write as _};
use std::thread;

use actors::generation::Request;
use anyhow::Context as _;
use protocol::model::ChatMessage;
use tokio::sync::mpsc;

use super::{Writing, answer, show};
use crate::output::{self, Unread};
use crate::roles::GenerationSetup;
use crate::roles::generation::Generation;
use crate::roles::stop::StopSignals;

/// What is said of the commands.
const HELP: &str = "/adapter off|on answers without or with the adapter, /clear forgets the conversation, /quit ends it; Ctrl-C stops an answer";

/// Who is talked to.
#[derive(Clone, Debug)]
pub struct ChatOptions {
    /// By which model answers are written.
    pub setup: GenerationSetup,
    /// How.
    pub writing: Writing,
    /// The system's turn.
    pub system: Option<String>,
}

/// What a line asks for.
#[derive(Debug, PartialEq, Eq)]
enum Line {
    Say(String),
    Adapter(bool),
    Clear,
    Quit,
    /// Something that is answered at once.
    Explain(String),
    Nothing,
}

impl Line {
    fn of(line: &str) -> Self {
        let line = line.trim();
        match (line, line.strip_prefix('/')) {
            ("", _) => Self::Nothing,
            (_, None) => Self::Say(line.to_owned()),
            ("/quit" | "/exit", _) => Self::Quit,
            ("/clear", _) => Self::Clear,
            ("/adapter on", _) => Self::Adapter(true),
            ("/adapter off", _) => Self::Adapter(false),
            ("/help", _) => Self::Explain(HELP.to_owned()),
            _ => Self::Explain(format!("there is no command `{line}`: {HELP}")),
        }
    }
}

/// Talks until the user ends it.
///
/// # Errors
/// Whatever is wrong with the inputs, and when workers are lost.
pub async fn chat(options: ChatOptions) -> anyhow::Result<()> {
    let ChatOptions { mut setup, writing, system } = options;
    // The next turn begins with all that was said.
    setup.engine.reuse = true;
    let mut stop = StopSignals::listen()?;
    let generation = Generation::start(setup, &mut stop).await?;
    let ended = talk(&generation, &writing, system, &mut stop).await;
    generation.stop().await;
    ended
}

async fn talk(
    generation: &Generation,
    writing: &Writing,
    system: Option<String>,
    stop: &mut StopSignals,
) -> anyhow::Result<()> {
    let beginning: Vec<ChatMessage> = system.map(|text| ChatMessage::new("system", text)).into_iter().collect();
    // A model that cannot chat is found before anything is typed.
    let first = [&beginning[..], &[ChatMessage::new("user", "?")]].concat();
    generation.style.prompt(generation.engine.tokenizer(), &first)?;
    let mut lines = lines()?;
    output::note(HELP);
    let (mut turns, mut adapted) = (beginning.clone(), true);
    loop {
        ask();
        let line = tokio::select! {
            line = lines.recv() => line,
            () = stop.next() => None,
        };
        match line.as_deref().map(Line::of) {
            None | Some(Line::Quit) => break,
            Some(Line::Nothing) => {}
            Some(Line::Explain(what)) => output::note(what),
            Some(Line::Clear) => {
                turns.clone_from(&beginning);
                output::note("the conversation begins anew");
            }
            Some(Line::Adapter(_)) if generation.adapter.is_none() => {
                output::note("there is no adapter: give one by --adapter when the chat begins");
            }
            Some(Line::Adapter(on)) => {
                adapted = on;
                output::note(if on { "answers are with the adapter" } else { "answers are without the adapter" });
            }
            Some(Line::Say(text)) => {
                turns.push(ChatMessage::new("user", text));
                match reply(generation, writing, &turns, adapted, stop).await? {
                    Some(answer) => turns.push(ChatMessage::new("assistant", answer)),
                    None => drop(turns.pop()),
                }
            }
        }
    }
    output::print("");
    Ok(())
}

/// Answers a conversation; `None` where nothing becomes part of it.
async fn reply(
    generation: &Generation,
    writing: &Writing,
    turns: &[ChatMessage],
    adapted: bool,
    stop: &mut StopSignals,
) -> anyhow::Result<Option<String>> {
    let engine = &generation.engine;
    let prompt = generation.style.prompt(engine.tokenizer(), turns)?;
    let request = Request {
        sampling: writing.sampling,
        stops: writing.stops.clone(),
        adapter: generation.adapter.clone().filter(|_| adapted),
        ..Request::new(prompt, writing.max_tokens)
    };
    let mut events = match engine.submit(request) {
        Ok(events) => events,
        Err(error) => {
            // A conversation grows until it does not fit any more.
            output::note(format_args!("{error}; /clear begins a new conversation"));
            return Ok(None);
        }
    };
    let shown = show(&mut events, stop).await;
    output::print("");
    match shown? {
        Some((text, finished)) => {
            output::note(format_args!("[{}]", answer::summary(&finished)));
            Ok(Some(text))
        }
        None => {
            output::note("[stopped: the question and what was answered are forgotten]");
            Ok(None)
        }
    }
}

/// Says that a line is waited for.
fn ask() {
    if io::stdin().is_terminal() {
        let mut out = Unread(io::stdout().lock());
        // A terminal that is gone loses it: see `Unread`.
        drop(out.write_all(b"> ").and_then(|()| out.flush()));
    }
}

/// Lines of standard input, read by a thread of its own: it ends with the process, since nothing can wake it.
fn lines() -> anyhow::Result<mpsc::Receiver<String>> {
    let (sender, lines) = mpsc::channel(16);
    let read = move || {
        for line in io::stdin().lock().lines().map_while(Result::ok) {
            if sender.blocking_send(line).is_err() {
                break;
            }
        }
    };
    thread::Builder::new().name("standard input".to_owned()).spawn(read).context("the system has no thread")?;
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_said_or_are_commands() {
        assert_eq!(Line::of("  what is 7/8? "), Line::Say("what is 7/8?".into()));
        assert_eq!((Line::of("/quit"), Line::of(" /clear "), Line::of("")), (Line::Quit, Line::Clear, Line::Nothing));
        assert_eq!((Line::of("/adapter off"), Line::of("/adapter on")), (Line::Adapter(false), Line::Adapter(true)));
        let Line::Explain(what) = Line::of("/adapter maybe") else { panic!("a command") };
        assert!(what.contains("`/adapter maybe`") && what.contains("/clear"));
    }
}
