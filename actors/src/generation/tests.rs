//! The engine on tiny models: against passes by hand, alone and beside others.

#![allow(clippy::unwrap_used)]

mod texts;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use protocol::buffer::Buffer;
use protocol::ids::ProductId;

use super::*;
use crate::backend::{BackendError, LinearBackend, PlainBackend, Product};
use crate::data::{IGNORED, MicroBatch};
use crate::lora::{LoraAdapters, LoraConfig};
use crate::testing::{TinyModel, nudge};
use crate::transformer::{Continuation, KvCache, Llama, Logits};

/// What a request came to.
#[derive(Debug, Default)]
struct Answer {
    tokens: Vec<Token>,
    /// What was told, piece by piece.
    pieces: Vec<String>,
    prompt: Vec<Scored>,
    finished: Option<Finished>,
}

impl Answer {
    fn of(mut events: Events) -> Self {
        let mut answer = Self::default();
        while let Some(event) = events.next_blocking() {
            assert!(answer.finished.is_none(), "nothing comes behind the end");
            match event {
                Event::Prompt(PromptScores { tokens }) => {
                    assert!(answer.tokens.is_empty(), "the prompt comes first");
                    answer.prompt = tokens;
                }
                Event::Token(token) => {
                    answer.pieces.push(token.text.clone());
                    answer.tokens.push(token);
                }
                Event::Finished(finished) => {
                    answer.pieces.push(finished.text.clone());
                    answer.finished = Some(finished);
                }
                Event::Failed(error) => panic!("{error}"),
            }
        }
        answer
    }

    fn ids(&self) -> Vec<u32> {
        self.tokens.iter().map(|token| token.id).collect()
    }

    fn text(&self) -> String {
        self.pieces.concat()
    }

    fn finished(&self) -> &Finished {
        self.finished.as_ref().unwrap()
    }
}

fn engine(tiny: &TinyModel, config: EngineConfig) -> Engine {
    Engine::start(Arc::new(tiny.llama()), config).unwrap()
}

fn adapters(tiny: &TinyModel, config: &LoraConfig) -> Arc<LoraAdapters> {
    let adapters = LoraAdapters::new(tiny.config(), config, 3).unwrap();
    for (i, var) in adapters.parameters().iter().enumerate() {
        nudge(var, i as u64, 0.3);
    }
    Arc::new(adapters)
}

/// A prompt without special tokens.
fn prompt(number: u32, length: u32) -> Vec<u32> {
    (0..length).map(|i| 3 + (i * i + 31 * number + 7 * i) % 250).collect()
}

/// A request that nothing but its number of tokens ends.
fn endless(prompt: Vec<u32>, max_tokens: usize) -> Request {
    let stops = Stops { ignore_ends: true, ..Stops::default() };
    Request { stops, ..Request::new(prompt, max_tokens) }
}

#[test]
fn the_likeliest_tokens_are_those_of_passes_by_hand() {
    let tiny = TinyModel::new();
    let (llama, engine) = (tiny.llama(), engine(&tiny, EngineConfig::default()));
    let logits = Logits::new(&llama).unwrap();
    let adapter = adapters(&tiny, &LoraConfig::default());
    for (number, adapter) in [(1, None), (2, Some(adapter))] {
        let (mut cache, mut text) = (KvCache::new(tiny.config()), prompt(number, 9));
        let asked = Request { adapter: adapter.clone(), logprobs: Some(3), ..endless(text.clone(), 12) };
        let answer = Answer::of(engine.submit(asked).unwrap());
        let mut tokens = text.clone();
        for token in &answer.tokens {
            let now = Continuation { cache: &mut cache, tokens: &tokens, adapters: adapter.as_deref(), wanted: 1 };
            let states = llama.extend(&mut [now], 1).unwrap();
            let beside: Vec<_> = adapter.as_deref().map(|adapters| (0..1, adapters)).into_iter().collect();
            let row = logits.of(&llama, states, &beside).unwrap();
            let best = sampling::likeliest(&row);
            let scored = token.scored.as_ref().unwrap();
            assert_eq!((token.id, scored.id, scored.top[0].0), (best, best, best));
            assert!((scored.logprob - scored.top[0].1).abs() < 1e-6 && scored.top.len() == 3);
            tokens = vec![best];
            text.push(best);
        }
        let Finished { reason, usage, .. } = answer.finished();
        assert_eq!((*reason, usage.prompt_tokens, usage.tokens), (FinishReason::Length, 9, 12));
    }
}

#[test]
fn a_seed_gives_the_same_text_whatever_is_beside_it() {
    let tiny = TinyModel::new();
    let adapter = adapters(&tiny, &LoraConfig::default());
    let norms = adapters(&tiny, &LoraConfig { modules_to_save: vec!["norm".into()], ..LoraConfig::default() });
    let request = |number: u32| {
        let sampling = Sampling {
            temperature: f64::from(number % 3) * 0.6,
            top_p: 0.95,
            repetition_penalty: 1.0 + f64::from(number % 2) * 0.2,
            seed: Some(u64::from(number)),
            ..Sampling::default()
        };
        let adapter = match number % 4 {
            1 => Some(Arc::clone(&adapter)),
            2 => Some(Arc::clone(&norms)),
            _ => None,
        };
        Request { sampling, adapter, ..endless(prompt(number, 3 + 5 * number), 20 + number as usize) }
    };
    let alone: Vec<Vec<u32>> = {
        let engine = engine(&tiny, EngineConfig { sequences: 1, drafts: Drafts::UpTo(0), ..EngineConfig::default() });
        (0..10).map(|number| Answer::of(engine.submit(request(number)).unwrap()).ids()).collect()
    };
    // Guesses change nothing either.
    let mut right = 0;
    for guesses in [0, 5] {
        let config = EngineConfig { sequences: 6, drafts: Drafts::UpTo(guesses), ..EngineConfig::default() };
        let engine = engine(&tiny, config);
        let all: Vec<Events> = (0..10).map(|number| engine.submit(request(number)).unwrap()).collect();
        for (number, (events, alone)) in all.into_iter().zip(&alone).enumerate() {
            let answer = Answer::of(events);
            assert_eq!(&answer.ids(), alone, "request {number} with {guesses} guesses");
            let usage = answer.finished().usage;
            assert_eq!(usage.passes + usage.accepted, usage.tokens - 1, "{usage:?}");
            right += usage.accepted;
        }
    }
    assert!(right > 0, "no guess was right: nothing was tested");
    let other = Request { sampling: Sampling { seed: Some(99), ..request(5).sampling }, ..request(5) };
    let engine = engine(&tiny, EngineConfig::default());
    assert_ne!(Answer::of(engine.submit(other).unwrap()).ids(), alone[5]);
}

#[test]
fn a_prompt_is_scored_as_its_loss_says() {
    let tiny = TinyModel::new();
    let (llama, engine) = (tiny.llama(), engine(&tiny, EngineConfig::default()));
    // Longer than what is scored at once.
    for (length, adapter) in [(2, None), (500, Some(adapters(&tiny, &LoraConfig::default())))] {
        let text = prompt(4, length);
        let targets = text[1..].iter().copied().chain([IGNORED]).collect();
        let batch = MicroBatch::new([(&text[..], targets)], 0, 1);
        let loss = llama.evaluate(&batch, adapter.as_deref()).unwrap();
        let asked = Request { prompt_logprobs: Some(2), adapter, ..Request::new(text.clone(), 0) };
        let answer = Answer::of(engine.submit(asked).unwrap());
        assert!(answer.tokens.is_empty() && answer.finished().reason == FinishReason::Length);
        assert!(answer.prompt.iter().map(|scored| scored.id).eq(text[1..].iter().copied()));
        assert!(answer.prompt.iter().all(|scored| scored.top.len() == 2 && scored.top[0].1 >= scored.logprob));
        let sum: f64 = answer.prompt.iter().map(|scored| -f64::from(scored.logprob)).sum();
        assert!((sum / loss - 1.0).abs() < 1e-5, "{sum} for {loss}");
    }
    // Both: the scores, and an answer.
    let asked = Request { prompt_logprobs: Some(0), ..endless(prompt(4, 30), 3) };
    let answer = Answer::of(engine.submit(asked).unwrap());
    assert_eq!((answer.prompt.len(), answer.tokens.len()), (29, 3));
}

#[test]
fn a_stop_is_cut_out_wherever_tokens_end() {
    let tiny = TinyModel::new();
    let engine = engine(&tiny, EngineConfig::default());
    // Random bytes are rarely characters: a prompt whose answer has enough of them.
    let (request, whole) = (0..200)
        .map(|number| endless(prompt(number, 5), 60))
        .map(|request| {
            let answer = Answer::of(engine.submit(request.clone()).unwrap());
            (request, answer)
        })
        .find(|(_, answer)| answer.text().chars().filter(|c| *c != '\u{fffd}').count() > 20)
        .unwrap();
    let text = whole.text();
    let chars: Vec<char> = text.chars().collect();
    for (from, length) in [(3, 1), (4, 3), (7, 5), (9, 2)] {
        let stop: String = chars[from..from + length].iter().collect();
        let stops = Stops { texts: vec!["never said".into(), stop.clone()], ..request.stops.clone() };
        let answer = Answer::of(engine.submit(Request { stops, ..request.clone() }).unwrap());
        assert_eq!(answer.text(), text[..text.find(&stop).unwrap()], "stop {stop:?}");
        assert_eq!((answer.finished().reason, answer.finished().stop.as_ref()), (FinishReason::Stop, Some(&stop)));
    }
    // A token that ends it is told and is no text.
    let end = whole.tokens[4].id;
    let stops = Stops { tokens: vec![end], ..request.stops.clone() };
    let answer = Answer::of(engine.submit(Request { stops, ..request.clone() }).unwrap());
    let place = whole.ids().iter().position(|&id| id == end).unwrap();
    assert_eq!(answer.ids(), whole.ids()[..=place]);
    assert_eq!(answer.finished().reason, FinishReason::Stop);
    assert!(engine.ends().contains(&2), "the end of a turn, by the template");
}

#[test]
fn texts_end_where_the_context_does_and_what_cannot_fit_is_refused() {
    let tiny = TinyModel::new();
    let memory = KvCache::bytes(tiny.config(), 300);
    let engine = engine(&tiny, EngineConfig { context: Some(400), memory, ..EngineConfig::default() });
    assert_eq!(engine.room(100), memory_room(&tiny, memory) - 100);
    let refused = |request: Request| engine.submit(request).unwrap_err().to_string();
    assert!(refused(Request::new(vec![], 1)).contains("no tokens"));
    assert!(refused(Request::new(vec![100_000], 1)).contains("token 100000"));
    assert!(refused(Request::new(prompt(1, 400), 1)).contains("the context of the model takes 400"));
    assert!(refused(Request::new(prompt(1, 390), 1000)).contains("400 tokens needs"));
    let sampling = Sampling { temperature: -1.0, ..Sampling::default() };
    assert!(refused(Request { sampling, ..Request::new(vec![5], 1) }).contains("temperature is -1"));
    assert!(refused(Request { logprobs: Some(1000), ..Request::new(vec![5], 1) }).contains("100 is the most"));
    let small = EngineConfig { context: Some(40), ..EngineConfig::default() };
    let short = Engine::start(Arc::new(tiny.llama()), small).unwrap();
    let answer = Answer::of(short.submit(endless(prompt(1, 30), 1000)).unwrap());
    assert_eq!((answer.tokens.len(), answer.finished().reason), (10, FinishReason::Length));
    for config in [
        EngineConfig { sequences: 17, ..EngineConfig::default() },
        EngineConfig { waiting: 0, ..EngineConfig::default() },
        EngineConfig { context: Some(0), ..EngineConfig::default() },
    ] {
        assert!(matches!(config.validate(), Err(GenerationError::Setting(_))));
    }
}

fn memory_room(tiny: &TinyModel, memory: u64) -> usize {
    (1..).take_while(|&tokens| KvCache::bytes(tiny.config(), tokens) <= memory).last().unwrap().min(400)
}

#[test]
fn more_texts_than_fit_the_memory_wait_for_each_other() {
    let tiny = TinyModel::new();
    let memory = KvCache::bytes(tiny.config(), 130);
    let config = EngineConfig { memory, waiting: 20, ..EngineConfig::default() };
    let engine = engine(&tiny, config);
    let all: Vec<Events> = (0..6).map(|number| engine.submit(endless(prompt(number, 20), 50)).unwrap()).collect();
    for events in all {
        assert_eq!(Answer::of(events).tokens.len(), 50);
    }
    let mut kept = Vec::new();
    let busy = loop {
        match engine.submit(endless(prompt(1, 3), 100)) {
            Ok(events) => kept.push(events),
            Err(error) => break error,
        }
    };
    assert!(matches!(busy, GenerationError::Busy { waiting: 20 }), "{busy}");
}

/// Products that take their time.
struct Slow(PlainBackend);

impl LinearBackend for Slow {
    fn apply(&self, product: ProductId, rows: Arc<Buffer>, tokens: usize) -> Result<Product, BackendError> {
        std::thread::sleep(Duration::from_millis(5));
        self.0.apply(product, rows, tokens)
    }

    fn serves_head(&self) -> bool {
        self.0.serves_head()
    }
}

#[test]
fn who_stops_listening_makes_room_and_the_last_clone_ends_everything() {
    let tiny = TinyModel::new();
    // So slow that no text of hundreds of tokens is whole before the test has done what it does meanwhile.
    let backend = Arc::new(Slow(PlainBackend::new(&tiny.model).unwrap()));
    let llama = Llama::new(tiny.model.clone(), backend).unwrap();
    let config = EngineConfig { sequences: 1, ..EngineConfig::default() };
    let engine = Engine::start(Arc::new(llama), config).unwrap();
    let mut first = engine.submit(endless(prompt(1, 4), 400)).unwrap();
    let second = engine.submit(endless(prompt(2, 4), 2)).unwrap();
    while !matches!(first.next_blocking(), Some(Event::Token(_))) {}
    drop(first);
    assert_eq!(Answer::of(second).tokens.len(), 2);
    let began = Instant::now();
    while engine.activity() != (Activity { running: 0, waiting: 0 }) {
        assert!(began.elapsed() < Duration::from_secs(20), "{:?}", engine.activity());
        std::thread::yield_now();
    }
    let mut under_way = engine.submit(endless(prompt(1, 4), 450)).unwrap();
    let waiting = engine.submit(endless(prompt(1, 4), 450)).unwrap();
    while !matches!(under_way.next_blocking(), Some(Event::Token(_))) {}
    drop(engine);
    assert_eq!(Answer::of(under_way).finished().reason, FinishReason::Cancelled);
    assert_eq!(Answer::of(waiting).finished().reason, FinishReason::Cancelled);
}

#[test]
fn the_next_turn_goes_on_from_what_was_kept() {
    let tiny = TinyModel::new();
    let engine = engine(&tiny, EngineConfig { reuse: true, ..EngineConfig::default() });
    let mut text = prompt(1, 30);
    let first = Answer::of(engine.submit(endless(text.clone(), 10)).unwrap());
    assert_eq!(first.finished().usage.reused_tokens, 0);
    text.extend(first.ids());
    text.extend(prompt(3, 12));
    let other = adapters(&tiny, &LoraConfig::default());
    let adapted = Request { adapter: Some(other), ..endless(text.clone(), 10) };
    assert_eq!(Answer::of(engine.submit(adapted).unwrap()).finished().usage.reused_tokens, 0);
    let second = Answer::of(engine.submit(endless(text.clone(), 10)).unwrap());
    assert!((39..=40).contains(&second.finished().usage.reused_tokens));
    let anew = super::tests::engine(&tiny, EngineConfig::default());
    let fresh = Answer::of(anew.submit(endless(text.clone(), 10)).unwrap());
    assert_eq!(second.ids(), fresh.ids());
    // The whole text again: its last token is left to compute.
    let again = Answer::of(engine.submit(endless(text.clone(), 10)).unwrap());
    assert_eq!((again.finished().usage.reused_tokens, again.ids()), (text.len() - 1, fresh.ids()));
}

/// Products that can be made to fail.
struct Failing {
    inner: PlainBackend,
    fails: AtomicBool,
}

impl LinearBackend for Failing {
    fn apply(&self, product: ProductId, rows: Arc<Buffer>, tokens: usize) -> Result<Product, BackendError> {
        if product.linear.layer == 1 && self.fails.load(Ordering::Relaxed) {
            return Err(BackendError {
                product,
                why: crate::backend::BackendFailure::LostWorkers("nobody left".into()),
            });
        }
        self.inner.apply(product, rows, tokens)
    }

    fn serves_head(&self) -> bool {
        self.inner.serves_head()
    }

    fn asks_workers(&self) -> bool {
        true
    }
}

#[test]
fn a_pass_that_fails_ends_its_texts_alone_and_workers_read_and_write_at_once() {
    let tiny = TinyModel::new();
    let inner = PlainBackend::with_head(&tiny.model).unwrap();
    let backend = Arc::new(Failing { inner, fails: AtomicBool::new(true) });
    let llama = Llama::new(tiny.model.clone(), Arc::clone(&backend) as Arc<dyn LinearBackend>).unwrap();
    let engine = Engine::start(Arc::new(llama), EngineConfig::default()).unwrap();
    let mut events = engine.submit(endless(prompt(1, 4), 5)).unwrap();
    let Some(Event::Failed(error)) = events.next_blocking() else { panic!("no failure") };
    assert!(error.is_lost_workers() && error.to_string().contains("nobody left"), "{error}");
    assert!(events.next_blocking().is_none());
    backend.fails.store(false, Ordering::Relaxed);
    let plain = super::tests::engine(&tiny, EngineConfig::default());
    let requests: Vec<Request> = (0..12).map(|number| endless(prompt(number, 5 + number), 15)).collect();
    let all: Vec<Events> = requests.iter().map(|request| engine.submit(request.clone()).unwrap()).collect();
    for (events, request) in all.into_iter().zip(requests) {
        assert_eq!(Answer::of(events).ids(), Answer::of(plain.submit(request).unwrap()).ids());
    }
}
