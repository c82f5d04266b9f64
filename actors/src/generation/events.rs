//! What a caller hears of its request.

use tokio::sync::mpsc;

use super::error::GenerationError;

/// What happened to a request. [`Event::Finished`] or [`Event::Failed`] is the last one.
#[derive(Debug)]
pub enum Event {
    /// The prompt was read. Comes once, before the first token.
    Prompt(PromptScores),
    /// A token was written.
    Token(Token),
    /// The text is finished.
    Finished(Finished),
    /// The text cannot be finished.
    Failed(GenerationError),
}

/// How likely the tokens of a prompt are.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PromptScores {
    /// Of each token but the first, in order; empty if they were not asked for.
    pub tokens: Vec<Scored>,
}

/// A token that was written.
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    /// Its number.
    pub id: u32,
    /// The text that is certain now and was not before: empty while a character is incomplete or a stop may have begun.
    pub text: String,
    /// How likely it was, if that was asked for.
    pub scored: Option<Scored>,
}

/// How likely a token is after those before it.
///
/// Probabilities are the model's own, at temperature 1 and before anything is filtered or penalised.
#[derive(Clone, Debug, PartialEq)]
pub struct Scored {
    /// The token.
    pub id: u32,
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// The likeliest tokens with theirs, the likeliest first, as many as were asked for.
    pub top: Vec<(u32, f32)>,
}

/// How a text ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Finished {
    /// Why.
    pub reason: FinishReason,
    /// The end of the text, which was held back until now.
    pub text: String,
    /// The stop text or the spelled-out token that ended it.
    pub stop: Option<String>,
    /// What it took.
    pub usage: Usage,
}

/// Why a text ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop text, or a token that ends a text.
    Stop,
    /// The most tokens that were asked for, or the context's end.
    Length,
    /// The caller no longer listens, or the engine ends. Only its log tells.
    Cancelled,
}

impl FinishReason {
    /// Its name: `stop`, `length` or `cancelled`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Cancelled => "cancelled",
        }
    }
}

/// What a text took.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens of the prompt whose keys and values were still there from an earlier request.
    pub reused_tokens: usize,
    /// Tokens that were written, with the one that ended the text.
    pub tokens: usize,
    /// Passes through the model that wrote them, beside those that read the prompt.
    pub passes: usize,
    /// Tokens that were guessed ahead of a pass.
    pub drafted: usize,
    /// Those of them that were right.
    pub accepted: usize,
    /// Seconds from the request to the first token, with those that it waited.
    pub first_seconds: f64,
    /// Seconds from the first token to the last one.
    pub seconds: f64,
}

/// Events of one request, in order. Dropping it cancels the request.
#[derive(Debug)]
pub struct Events {
    pub(super) received: mpsc::UnboundedReceiver<Event>,
}

impl Events {
    /// The next event; `None` behind the last one.
    ///
    /// # Cancel safety
    /// No event is lost by dropping the future.
    pub async fn next(&mut self) -> Option<Event> {
        self.received.recv().await
    }

    /// The same for threads that may block, outside of asynchronous code.
    pub fn next_blocking(&mut self) -> Option<Event> {
        self.received.blocking_recv()
    }
}
