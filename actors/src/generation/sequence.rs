//! One text on its way: what of it is computed, what is chosen, and what its caller is told.

use std::sync::Arc;
use std::time::Instant;

use protocol::model::TextTokenizer;
use tokio::sync::mpsc::UnboundedSender;

use super::drafts::Lookup;
use super::error::GenerationError;
use super::events::{Event, FinishReason, Finished, PromptScores, Scored, Token, Usage};
use super::request::Request;
use super::sampling::{Sampler, scored};
use super::text::TextStream;
use crate::lora::LoraAdapters;
use crate::transformer::KvCache;

/// What a model's texts have in common.
pub(super) struct Common {
    pub(super) tokenizer: TextTokenizer,
    /// Tokens that end a text.
    pub(super) ends: Vec<u32>,
    /// Longest text.
    pub(super) context: usize,
}

/// See the module's documentation.
pub(super) struct Sequence {
    request: Request,
    events: UnboundedSender<Event>,
    /// The prompt and what was written.
    pub(super) tokens: Vec<u32>,
    /// Of the first of them.
    pub(super) cache: KvCache,
    sampler: Sampler,
    text: TextStream,
    lookup: Lookup,
    scores: Vec<Scored>,
    read: bool,
    usage: Usage,
    asked: Instant,
    first: Option<Instant>,
}

/// Tokens of a text that go through the layers now.
pub(super) struct Rows {
    /// Those of the text, and behind them guesses.
    pub(super) tokens: Vec<u32>,
    /// How many of them are guesses.
    guesses: usize,
    /// How many, the last ones, go through the head.
    pub(super) wanted: usize,
}

impl Sequence {
    /// A text to go on with, by random numbers from this seed, with at most so many guesses at a time.
    pub(super) fn new(
        request: Request,
        seed: u64,
        guesses: usize,
        cache: KvCache,
        events: UnboundedSender<Event>,
    ) -> Self {
        let prompt = &request.prompt;
        Self {
            sampler: Sampler::new(request.sampling, seed, prompt),
            text: TextStream::new(prompt, request.stops.texts.clone(), request.special),
            lookup: Lookup::new(guesses),
            tokens: prompt.clone(),
            usage: Usage { prompt_tokens: prompt.len(), ..Usage::default() },
            cache,
            events,
            scores: Vec::new(),
            read: false,
            asked: Instant::now(),
            first: None,
            request,
        }
    }

    /// The adapters beside the base model.
    pub(super) fn adapter(&self) -> Option<&Arc<LoraAdapters>> {
        self.request.adapter.as_ref()
    }

    /// Tokens that it may have in the end.
    pub(super) fn longest(&self, context: usize) -> usize {
        self.request.prompt.len().saturating_add(self.request.max_tokens).min(context)
    }

    /// Whether nobody listens any more.
    pub(super) fn is_cancelled(&self) -> bool {
        self.events.is_closed()
    }

    /// Whether more than the last token has to go through the layers first.
    pub(super) fn is_behind(&self) -> bool {
        self.tokens.len() - self.cache.len() > 1 || !self.read
    }

    /// Goes on from what an earlier text with the same beginning has kept.
    pub(super) fn go_on_from(&mut self, cache: KvCache) {
        self.usage.reused_tokens = cache.len();
        self.cache = cache;
    }

    /// Whether the keys and values of another text may stand for the first tokens of this one's prompt.
    pub(super) fn may_reuse(&self) -> bool {
        self.request.prompt_logprobs.is_none()
    }

    /// The next tokens that are known already, at most so many.
    pub(super) fn next_piece(&self, most: usize) -> Rows {
        let start = self.cache.len();
        let end = self.tokens.len().min(start + most.max(1));
        let scored = match self.request.prompt_logprobs {
            // Those that are followed by a token of the prompt whose score is not there yet.
            Some(_) if !self.read => end.saturating_sub(start.max(self.scores.len())),
            _ => 0,
        };
        let last = usize::from(end == self.tokens.len());
        let wanted = scored.max(last);
        Rows { tokens: self.tokens[start..end].to_vec(), guesses: 0, wanted }
    }

    /// The last token, which alone is not computed yet, and guesses at those that follow, at most so many.
    pub(super) fn next_tokens(&self, common: &Common, alike: usize, most: usize) -> Rows {
        let written = self.tokens.len() - self.request.prompt.len();
        // The last one of an answer is never computed itself.
        let room = (self.request.max_tokens - written).saturating_sub(1);
        let room = room.min(common.context.min(alike).saturating_sub(self.tokens.len())).min(most);
        let guesses = self.lookup.guess(&self.tokens, room);
        let tokens: Vec<u32> = self.tokens.last().into_iter().chain(guesses).copied().collect();
        Rows { guesses: guesses.len(), wanted: tokens.len(), tokens }
    }

    /// Takes in what came of some rows: logits of the vocabulary for each that was wanted. Gives how the text ends, if it does.
    ///
    /// # Errors
    /// When the tokenizer cannot read its own tokens.
    pub(super) fn take(
        &mut self,
        common: &Common,
        rows: &Rows,
        logits: &[f32],
    ) -> Result<Option<Finished>, GenerationError> {
        let vocabulary = logits.len() / rows.wanted.max(1);
        // What the cache holds now, guesses included, without those rows that nobody asked for.
        let first = self.cache.len() - rows.wanted;
        let guesses = &rows.tokens[rows.tokens.len() - rows.guesses..];
        let before = self.tokens.len();
        let mut ended = None;
        for (position, logits) in (first..).zip(logits.chunks_exact(vocabulary.max(1))) {
            if position + 1 < self.tokens.len() {
                self.score(position, logits);
                continue;
            }
            self.tell_prompt();
            ended = self.next(common, logits)?;
            if ended.is_some() || guesses.get(self.tokens.len() - before - 1) != self.tokens.last() {
                break;
            }
        }
        let written = self.tokens.len() - before;
        if rows.guesses > 0 {
            let right = written.saturating_sub(1).min(rows.guesses);
            self.lookup.learn(rows.guesses, right);
            self.usage.drafted += rows.guesses;
            self.usage.accepted += right;
        }
        self.usage.passes += usize::from(written > 0 && before > self.request.prompt.len());
        self.cache.truncate(self.tokens.len() - usize::from(written > 0));
        let usage = self.usage;
        Ok(ended.map(|finished| Finished { usage, ..finished }))
    }

    /// Notes how likely the token behind a position of the prompt is.
    fn score(&mut self, position: usize, logits: &[f32]) {
        if let Some(top) = self.request.prompt_logprobs
            && !self.read
            && self.scores.len() == position
        {
            self.scores.push(scored(logits, self.tokens[position + 1], top));
        }
    }

    /// Tells that the prompt was read, once.
    fn tell_prompt(&mut self) {
        if !self.read {
            self.read = true;
            let tokens = std::mem::take(&mut self.scores);
            self.tell(Event::Prompt(PromptScores { tokens }));
        }
    }

    /// Chooses the next token, unless none is wanted.
    fn next(&mut self, common: &Common, logits: &[f32]) -> Result<Option<Finished>, GenerationError> {
        let place = self.tokens.len() - self.request.prompt.len();
        if place == self.request.max_tokens {
            return Ok(Some(self.finished(common, FinishReason::Length, None)?));
        }
        let id = self.sampler.choose(place, logits);
        self.sampler.note(id);
        self.tokens.push(id);
        self.usage.tokens += 1;
        let first = *self.first.get_or_insert_with(Instant::now);
        self.usage.first_seconds = (first - self.asked).as_secs_f64();
        self.usage.seconds = first.elapsed().as_secs_f64();
        let scored = self.request.logprobs.map(|top| scored(logits, id, top));
        let stops = &self.request.stops;
        if stops.tokens.contains(&id) || (!stops.ignore_ends && common.ends.contains(&id)) {
            self.tell(Event::Token(Token { id, text: String::new(), scored }));
            let stop = common.tokenizer.decode(&[id])?;
            return Ok(Some(self.finished(common, FinishReason::Stop, Some(stop))?));
        }
        let told = self.text.push(&common.tokenizer, id)?;
        self.tell(Event::Token(Token { id, text: told.text, scored }));
        if told.stop.is_some() {
            let usage = self.usage;
            return Ok(Some(Finished { reason: FinishReason::Stop, text: String::new(), stop: told.stop, usage }));
        }
        if place + 1 == self.request.max_tokens || self.tokens.len() >= common.context {
            return Ok(Some(self.finished(common, FinishReason::Length, None)?));
        }
        Ok(None)
    }

    /// The end of the text, with what was held back of it.
    fn finished(
        &mut self,
        common: &Common,
        reason: FinishReason,
        stop: Option<String>,
    ) -> Result<Finished, GenerationError> {
        let told = self.text.finish(&common.tokenizer)?;
        let (reason, stop) = match told.stop {
            Some(of_text) => (FinishReason::Stop, Some(of_text)),
            None => (reason, stop),
        };
        Ok(Finished { reason, text: told.text, stop, usage: self.usage })
    }

    /// Ends it before its time.
    pub(super) fn cancel(self) {
        let (reason, usage) = (FinishReason::Cancelled, self.usage);
        self.tell(Event::Finished(Finished { reason, text: String::new(), stop: None, usage }));
    }

    /// What it leaves to texts that begin in the same way.
    pub(super) fn into_kept(self) -> (Vec<u32>, Option<Arc<LoraAdapters>>, KvCache) {
        (self.tokens, self.request.adapter, self.cache)
    }

    /// Tells an event, if anybody listens.
    pub(super) fn tell(&self, event: Event) {
        // Who has stopped listening is found by that when the next step begins.
        drop(self.events.send(event));
    }
}
