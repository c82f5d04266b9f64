//! The engine: requests of several callers, taken in at any time.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use protocol::model::TextTokenizer;
use tokio::sync::mpsc;

use super::config::EngineConfig;
use super::ends;
use super::error::GenerationError;
use super::events::Events;
use super::request::Request;
use super::sequence::{Common, Sequence};
use super::writer::Writer;
use crate::data::fresh_seed;
use crate::transformer::{KvCache, Llama, Logits};

const MIB: u64 = 1 << 20;

/// Writes texts, in a thread of its own. Clones are the same engine; the thread ends after the last of them is dropped, and
/// what is under way then is cancelled.
#[derive(Clone)]
pub struct Engine {
    desk: Arc<Desk>,
    /// Dropped with the last clone.
    _open: Arc<Open>,
}

/// Where requests wait for the thread that writes.
pub(super) struct Desk {
    pub(super) llama: Arc<Llama>,
    pub(super) common: Common,
    pub(super) config: EngineConfig,
    /// Guesses at a time.
    guesses: usize,
    state: Mutex<State>,
    changed: Condvar,
}

/// What changes at a desk.
#[derive(Default)]
pub(super) struct State {
    pub(super) waiting: VecDeque<Sequence>,
    pub(super) running: usize,
    pub(super) ended: bool,
}

/// What an engine is busy with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Activity {
    /// Texts that are being written.
    pub running: usize,
    /// Requests that wait.
    pub waiting: usize,
}

impl Engine {
    /// Begins, with a model whose adapters come with each request. Reads the head if it is the owner's own, which blocks for a
    /// moment.
    ///
    /// # Errors
    /// When a setting cannot be, the model's files cannot be read, or the system has no thread.
    pub fn start(llama: Arc<Llama>, config: EngineConfig) -> Result<Self, GenerationError> {
        config.validate()?;
        let tokenizer = llama.model().tokenizer()?;
        let ends = ends::of(llama.model(), &tokenizer)?;
        let positions = llama.config().max_positions;
        let context = config.context.map_or(positions, |context| context.min(positions));
        llama.expect_few_rows();
        let logits = Logits::new(&llama)?;
        let guesses = config.drafts.most(llama.asks_workers());
        let (state, changed) = (Mutex::default(), Condvar::new());
        let common = Common { tokenizer, ends, context };
        let desk = Arc::new(Desk { llama, common, config, guesses, state, changed });
        let writer = Writer::new(Arc::clone(&desk), logits);
        thread::Builder::new().name("generation".to_owned()).spawn(move || writer.run())?;
        Ok(Self { _open: Arc::new(Open(Arc::clone(&desk))), desk })
    }

    /// Takes a request in.
    ///
    /// # Errors
    /// When it can never be done, too many wait already, or the engine has ended.
    pub fn submit(&self, request: Request) -> Result<Events, GenerationError> {
        self.check(&request)?;
        let seed = match request.sampling.seed {
            Some(seed) => seed,
            None => fresh_seed()?,
        };
        let (sender, received) = mpsc::unbounded_channel();
        let cache = KvCache::new(self.desk.llama.config());
        let sequence = Sequence::new(request, seed, self.desk.guesses, cache, sender);
        let mut state = self.desk.lock();
        if state.ended {
            return Err(GenerationError::Ended);
        }
        let waiting = state.waiting.len();
        if waiting >= self.desk.config.waiting {
            return Err(GenerationError::Busy { waiting });
        }
        state.waiting.push_back(sequence);
        self.desk.changed.notify_one();
        Ok(Events { received })
    }

    /// The most tokens that may be asked for behind a prompt of so many.
    pub fn room(&self, prompt: usize) -> usize {
        let per_token = KvCache::bytes(self.desk.llama.config(), KvCache::PAGE) / KvCache::PAGE as u64;
        let in_memory = self.desk.config.memory / per_token.max(1);
        // Memory is taken in pages.
        let in_memory = usize::try_from(in_memory).unwrap_or(usize::MAX) / KvCache::PAGE * KvCache::PAGE;
        self.desk.common.context.min(in_memory).saturating_sub(prompt)
    }

    /// The model's tokenizer.
    pub fn tokenizer(&self) -> &TextTokenizer {
        &self.desk.common.tokenizer
    }

    /// The longest text, prompt and answer together.
    pub fn context(&self) -> usize {
        self.desk.common.context
    }

    /// Tokens that end a text or a turn.
    pub fn ends(&self) -> &[u32] {
        &self.desk.common.ends
    }

    /// What it is busy with.
    pub fn activity(&self) -> Activity {
        let state = self.desk.lock();
        Activity { running: state.running, waiting: state.waiting.len() }
    }

    fn check(&self, request: &Request) -> Result<(), GenerationError> {
        let (config, context) = (self.desk.llama.config(), self.desk.common.context);
        let vocabulary = config.vocabulary;
        let tokens = request.prompt.len();
        if tokens == 0 {
            return Err(GenerationError::Empty);
        }
        let mut all = request.prompt.iter().chain(&request.stops.tokens);
        if let Some(&token) = all.find(|&&token| token as usize >= vocabulary) {
            return Err(GenerationError::Vocabulary { token, vocabulary });
        }
        if tokens > context || (tokens == context && request.max_tokens > 0) {
            return Err(GenerationError::Context { tokens, context });
        }
        let asked = [request.logprobs, request.prompt_logprobs].into_iter().flatten().max().unwrap_or(0);
        if asked > Request::MOST_LOGPROBS {
            let most = Request::MOST_LOGPROBS;
            let what = format!("log-probabilities of {asked} tokens are asked for; {most} is the most");
            return Err(GenerationError::Setting(what));
        }
        if request.stops.texts.iter().any(String::is_empty) {
            return Err(GenerationError::Setting("an empty text cannot be a stop".to_owned()));
        }
        request.sampling.validate()?;
        let tokens = tokens.saturating_add(request.max_tokens).min(context);
        let (needed, limit) = (KvCache::bytes(config, tokens), self.desk.config.memory);
        if needed > limit {
            return Err(GenerationError::Memory { tokens, needed: needed.div_ceil(MIB), limit: limit / MIB });
        }
        Ok(())
    }
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine").field("config", &self.desk.config).finish_non_exhaustive()
    }
}

impl Desk {
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until something changes.
    pub(super) fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes no more requests, and cancels those that wait.
    pub(super) fn close(&self) {
        let mut state = self.lock();
        state.ended = true;
        state.waiting.drain(..).for_each(Sequence::cancel);
        self.changed.notify_all();
    }
}

/// While it lives, requests may come.
struct Open(Arc<Desk>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.close();
    }
}
