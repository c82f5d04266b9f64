//! Answers as they are written: what the engine tells of each choice becomes parts of text, for a stream or for the whole.

use actors::generation::{Event, Events, PromptScores, Token};
use futures::StreamExt as _;
use futures::stream::{self, BoxStream, SelectAll};
use tokio::sync::OwnedSemaphorePermit;

use super::answer::{Part, Used};
use super::asked::{Asked, Encoded, prompt_field};
use super::error::ApiError;
use super::request::{Endpoint, Request};
use super::served::{Models, refused};

/// The choices of one request. Dropping it cancels them.
pub(super) struct Choices {
    prompts: Vec<Encoded>,
    /// The prompt of each choice.
    of: Vec<usize>,
    events: SelectAll<BoxStream<'static, (usize, Event)>>,
    /// How many have not ended.
    left: usize,
    pub(super) used: Used,
    echo: bool,
    told: bool,
    /// Whether a token that ends an answer is told like any other.
    ends_told: bool,
    field: &'static str,
    _seats: OwnedSemaphorePermit,
}

/// Some of a choice, and why it ends if it does.
pub(super) struct Piece {
    pub(super) choice: usize,
    pub(super) part: Part,
    pub(super) reason: Option<&'static str>,
}

impl Choices {
    pub(super) fn new(request: &Request, asked: Asked, seats: OwnedSemaphorePermit) -> Self {
        let Asked { prompts, choices } = asked;
        let of: Vec<usize> = choices.iter().map(|&(prompt, _)| prompt).collect();
        let events = choices.into_iter().enumerate().map(|(choice, (_, events))| numbered(choice, events)).collect();
        let field = prompt_field(request.endpoint);
        let (echo, told) = (request.echo, request.logprobs.is_some());
        // Who scores a prompt by /v1/completions counts on one more token than the prompt has, whatever it is.
        let ends_told = request.ignore_ends || request.endpoint == Endpoint::Completions;
        let left = of.len();
        Self { prompts, of, events, left, used: Used::default(), echo, told, ends_told, field, _seats: seats }
    }

    /// Number of choices.
    pub(super) fn len(&self) -> usize {
        self.of.len()
    }

    /// The next piece of any choice; `None` when all have ended.
    ///
    /// # Errors
    /// When one cannot be finished.
    ///
    /// # Cancel safety
    /// Nothing is lost by dropping the future.
    pub(super) async fn next(&mut self, models: &Models) -> Option<Result<Piece, ApiError>> {
        while self.left > 0 {
            let Some((choice, event)) = self.events.next().await else {
                return Some(Err(ApiError::stopping()));
            };
            let (part, reason) = match event {
                Event::Prompt(scores) => (self.prompt(choice, scores), None),
                Event::Token(token) => (self.token(models, token), None),
                Event::Finished(finished) => {
                    self.left -= 1;
                    let usage = finished.usage;
                    // A prompt counts once, however many answers it gets.
                    let first = choice == 0 || self.of[choice - 1] != self.of[choice];
                    let (prompt, reused) = if first { (usage.prompt_tokens, usage.reused_tokens) } else { (0, 0) };
                    self.used.add(Used { prompt, reused, written: usage.tokens });
                    (Part { text: finished.text, ..Part::default() }, Some(finished.reason.name()))
                }
                Event::Failed(error) => return Some(Err(refused(&error, self.field))),
            };
            if reason.is_some() || !part.text.is_empty() || !part.tokens.is_empty() {
                return Some(Ok(Piece { choice, part, reason }));
            }
        }
        None
    }

    /// All of every choice, and why each ended.
    ///
    /// # Errors
    /// When one cannot be finished.
    pub(super) async fn all(&mut self, models: &Models) -> Result<Vec<(Part, &'static str)>, ApiError> {
        let mut all = vec![(Part::default(), "length"); self.len()];
        while let Some(piece) = self.next(models).await {
            let Piece { choice, part, reason } = piece?;
            let (whole, ended) = &mut all[choice];
            whole.text.push_str(&part.text);
            whole.tokens.extend(part.tokens);
            *ended = reason.unwrap_or(ended);
        }
        Ok(all)
    }

    /// The prompt, where it stands before the answer.
    fn prompt(&self, choice: usize, scores: PromptScores) -> Part {
        if !self.echo {
            return Part::default();
        }
        let Encoded { tokens, text } = &self.prompts[self.of[choice]];
        let told = |tokens: &[u32]| {
            // Nothing says how likely the first one is.
            let scored = std::iter::once(None).chain(scores.tokens.into_iter().map(Some));
            tokens.iter().copied().zip(scored).collect()
        };
        Part { text: text.clone(), tokens: if self.told { told(tokens) } else { Vec::new() }, offset: 0 }
    }

    /// A token; that which ends a turn is no part of it.
    fn token(&self, models: &Models, token: Token) -> Part {
        let ends = !self.ends_told && models.engine.ends().contains(&token.id);
        let tokens = if self.told && !ends { vec![(token.id, token.scored)] } else { Vec::new() };
        Part { text: token.text, tokens, offset: 0 }
    }
}

fn numbered(choice: usize, events: Events) -> BoxStream<'static, (usize, Event)> {
    let next = move |mut events: Events| async move {
        let event = events.next().await?;
        Some(((choice, event), events))
    };
    stream::unfold(events, next).boxed()
}
