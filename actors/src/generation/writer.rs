//! The thread that writes: step by step, each text that is under way by a token or a few.

use std::sync::Arc;

use protocol::buffer::wipe_idle;

use super::engine::Desk;
use super::error::GenerationError;
use super::events::Event;
use super::kept::Kept;
use super::sequence::{Rows, Sequence};
use crate::transformer::{Continuation, KvCache, Llama, LlamaError, Logits};

/// Rows of a pass in which nothing is read, at most: where workers compute, few rows have a way of their own.
pub(super) const ROWS: usize = 16;
/// Tokens of prompts that are read in one pass: what fills a block of the encryption, or, where nobody is asked, what does not
/// keep other texts waiting for long.
const PIECE: (usize, usize) = (1024, 256);
/// Tokens whose logits of the whole vocabulary are held at once.
const SCORED: usize = 256;
/// Where workers compute, passes of more rows than [`ROWS`] have a multiple of this, so that a prompt's length is not seen exactly.
const MULTIPLE: usize = 64;

/// See the module's documentation.
pub(super) struct Writer {
    desk: Arc<Desk>,
    logits: Logits,
    /// Whether products come from workers: then whatever waits goes through the layers together.
    workers: bool,
    active: Vec<Sequence>,
    /// Texts that are finished.
    kept: Kept,
}

impl Writer {
    pub(super) fn new(desk: Arc<Desk>, logits: Logits) -> Self {
        let workers = desk.llama.asks_workers();
        Self { desk, logits, workers, active: Vec::new(), kept: Kept::default() }
    }

    /// Writes until nobody can ask for more.
    pub(super) fn run(mut self) {
        // Also where this thread panics: nobody may wait for it then.
        let _closed = Closed(Arc::clone(&self.desk));
        while self.admit() {
            self.step();
        }
        self.active.drain(..).for_each(Sequence::cancel);
    }

    /// Takes in requests for which there is room, and waits for some if nothing is under way. Says whether to go on.
    fn admit(&mut self) -> bool {
        let desk = Arc::clone(&self.desk);
        self.active.retain(|sequence| !sequence.is_cancelled());
        let mut state = desk.lock();
        loop {
            state.waiting.retain(|sequence| !sequence.is_cancelled());
            if state.ended {
                return false;
            }
            while self.active.len() < desk.config.sequences
                && let Some(next) = state.waiting.pop_front()
            {
                if !self.has_room_for(&next) {
                    state.waiting.push_front(next);
                    break;
                }
                let next = self.begin(next);
                self.active.push(next);
            }
            state.running = self.active.len();
            if !self.active.is_empty() {
                return true;
            }
            // Nobody who asks for something waits until all is wiped.
            drop(state);
            wipe_idle();
            state = desk.lock();
            if !state.ended && state.waiting.is_empty() {
                state = desk.wait(state);
            }
        }
    }

    /// Whether the keys and values of another text fit the memory, which those of finished ones are cleared out of.
    fn has_room_for(&mut self, next: &Sequence) -> bool {
        let (config, context) = (self.desk.llama.config(), self.desk.common.context);
        let of = |sequence: &Sequence| KvCache::bytes(config, sequence.longest(context));
        let under_way: u64 = self.active.iter().map(of).sum();
        let left = self.desk.config.memory.saturating_sub(under_way).checked_sub(of(next));
        left.is_some_and(|left| {
            self.kept.shrink(left);
            true
        })
    }

    /// A request's first step: what an earlier text with the same beginning has kept is gone on from.
    fn begin(&mut self, mut next: Sequence) -> Sequence {
        if next.may_reuse()
            && let Some(cache) = self.kept.take(&next.tokens, next.adapter())
        {
            next.go_on_from(cache);
        }
        next
    }

    /// Every text goes on by something.
    fn step(&mut self) {
        self.turn();
        if let Some(rows) = self.reading() {
            let ended = self.pass(&rows);
            self.end(ended);
            self.turn();
        }
        let passes = self.writing();
        let ended = passes.iter().flat_map(|rows| self.pass(rows)).collect();
        self.end(ended);
    }

    /// Has each text turn as a text of its length does.
    fn turn(&mut self) {
        let config = self.desk.llama.config();
        for sequence in &mut self.active {
            sequence.cache.turn_for(config, sequence.tokens.len());
        }
    }

    /// The pass that reads what is known already, if something is to be read: the numbers of its texts and their rows. Where
    /// workers compute, it is one for all, with the next tokens of the others; else one for the first text that is behind.
    fn reading(&self) -> Option<Vec<(usize, Rows)>> {
        let most = if self.workers { PIECE.0 } else { PIECE.1 };
        let first = self.active.iter().position(Sequence::is_behind)?;
        let mut pass: Vec<(usize, Rows)> = Vec::new();
        let (mut left, mut scored) = (most, SCORED);
        for (number, sequence) in self.active.iter().enumerate() {
            let room = if sequence.may_reuse() { left } else { left.min(scored) };
            let mine = number == first || (self.workers && room > 0 && self.fit(first, number));
            if !mine {
                continue;
            }
            let rows = sequence.next_piece(room);
            left -= rows.tokens.len();
            scored -= if sequence.may_reuse() { 0 } else { rows.tokens.len() };
            pass.push((number, rows));
        }
        Some(pass)
    }

    /// Passes that write the next tokens of texts that are not behind.
    fn writing(&self) -> Vec<Vec<(usize, Rows)>> {
        let mut ready: Vec<usize> = (0..self.active.len()).filter(|&number| !self.active[number].is_behind()).collect();
        let mut passes = Vec::new();
        while let Some(&first) = ready.first() {
            let (now, later) = ready.into_iter().partition(|&number| self.fit(first, number));
            ready = later;
            let now: Vec<usize> = now;
            let mut spare = ROWS.saturating_sub(now.len());
            let next = |&number: &usize| {
                let sequence = &self.active[number];
                let alike = KvCache::turns_alike_up_to(self.desk.llama.config(), sequence.tokens.len());
                let rows = sequence.next_tokens(&self.desk.common, alike, spare);
                spare -= rows.tokens.len() - 1;
                (number, rows)
            };
            passes.push(now.iter().map(next).collect());
        }
        passes
    }

    /// Whether two texts can go through the layers together.
    fn fit(&self, one: usize, other: usize) -> bool {
        let adapter = |number: usize| self.active[number].adapter().map(AsRef::as_ref);
        Llama::together(adapter(one), adapter(other))
    }

    /// One pass. Gives the numbers of the texts that end with it, and how.
    fn pass(&mut self, texts: &[(usize, Rows)]) -> Vec<(usize, Event)> {
        let mut ended = Vec::new();
        match self.compute(texts) {
            Ok(logits) => {
                let vocabulary = self.desk.llama.config().vocabulary;
                let mut rest = &logits[..];
                for (number, rows) in texts {
                    let (mine, others) = rest.split_at(rows.wanted * vocabulary);
                    rest = others;
                    match self.active[*number].take(&self.desk.common, rows, mine) {
                        Ok(None) => {}
                        Ok(Some(finished)) => ended.push((*number, Event::Finished(finished))),
                        Err(error) => ended.push((*number, Event::Failed(error))),
                    }
                }
            }
            Err(error) => {
                let error = Arc::new(error);
                let failed =
                    |(number, _): &(usize, Rows)| (*number, Event::Failed(GenerationError::Pass(Arc::clone(&error))));
                ended.extend(texts.iter().map(failed));
            }
        }
        ended
    }

    /// Tells how texts end, and lets go of them.
    fn end(&mut self, mut ended: Vec<(usize, Event)>) {
        // From the last one on, so that the numbers of the others stay.
        ended.sort_unstable_by_key(|(number, _)| std::cmp::Reverse(*number));
        for (number, event) in ended {
            let sequence = self.active.remove(number);
            let keep = self.desk.config.reuse && matches!(event, Event::Finished(_));
            sequence.tell(event);
            if keep {
                self.kept.put(sequence);
            }
        }
    }

    /// Logits of the rows that are wanted, text after text.
    fn compute(&mut self, texts: &[(usize, Rows)]) -> Result<protocol::buffer::Buffer, LlamaError> {
        let rows: usize = texts.iter().map(|(_, rows)| rows.tokens.len()).sum();
        let multiple = if self.workers && rows > ROWS { MULTIPLE } else { 1 };
        let mut next = texts.iter().peekable();
        let mut together = Vec::with_capacity(texts.len());
        for (number, sequence) in self.active.iter_mut().enumerate() {
            let Some((_, rows)) = next.next_if(|(mine, _)| *mine == number) else { continue };
            let adapter = sequence.adapter().map(Arc::clone);
            together.push((&mut sequence.cache, rows, adapter));
        }
        let mut together: Vec<Continuation<'_>> = together
            .iter_mut()
            .map(|(cache, rows, adapter)| Continuation {
                cache,
                tokens: &rows.tokens,
                adapters: adapter.as_deref(),
                wanted: rows.wanted,
            })
            .collect();
        let (mut beside, mut end) = (Vec::new(), 0);
        for text in &together {
            let first = end;
            end += text.wanted;
            beside.extend(text.adapters.map(|adapters| (first..end, adapters)));
        }
        let states = self.desk.llama.extend(&mut together, multiple)?;
        self.logits.of(&self.desk.llama, states, &beside)
    }
}

/// Closes the desk when the thread ends, in whatever way.
struct Closed(Arc<Desk>);

impl Drop for Closed {
    fn drop(&mut self) {
        self.0.close();
    }
}
