//! Texts that are gone on with, against the same texts as wholes: every family, in pieces of any size, side by side.

use super::families::{Case, folders};
use super::*;

/// How far a logit may be off, as a share of the largest one.
const TOLERANCE: f64 = 1e-5;

/// The model of a case over its weights, and its head.
fn ready(case: &Case, head: bool) -> (Llama, Logits) {
    let llama = case.llama(head);
    let logits = Logits::new(&llama).unwrap();
    (llama, logits)
}

/// The tokens of a case's sequences.
fn texts(case: &Case) -> Vec<Vec<u32>> {
    let batch = case.batch();
    batch.sequences().map(|rows| batch.tokens[rows].to_vec()).collect()
}

/// The adapters beside all of so many rows.
fn of_all(adapters: Option<&LoraAdapters>, rows: usize) -> Vec<(std::ops::Range<usize>, &LoraAdapters)> {
    adapters.map(|adapters| (0..rows, adapters)).into_iter().collect()
}

/// Logits of every token of a text that is read in pieces of these sizes, the last one again and again.
fn in_pieces(
    (llama, logits): &(Llama, Logits),
    tokens: &[u32],
    adapters: Option<&LoraAdapters>,
    sizes: &[usize],
) -> Vec<f32> {
    let mut cache = KvCache::new(llama.config());
    cache.turn_for(llama.config(), tokens.len());
    let (mut found, mut sizes, mut left) = (Vec::new(), sizes.iter(), tokens);
    let mut size = 1;
    while !left.is_empty() {
        size = *sizes.next().unwrap_or(&size);
        let (now, later) = left.split_at(size.min(left.len()));
        let text = Continuation { cache: &mut cache, tokens: now, adapters, wanted: now.len() };
        let states = llama.extend(&mut [text], 1).unwrap();
        found.extend_from_slice(&logits.of(llama, states, &of_all(adapters, now.len())).unwrap());
        left = later;
    }
    assert_eq!(cache.len(), tokens.len());
    found
}

fn assert_near(what: &str, found: &[f32], expected: &[f64]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let largest = expected.iter().fold(0.0f64, |largest, x| largest.max(x.abs()));
    let off = found.iter().zip(expected).map(|(&a, b)| (f64::from(a) - b).abs()).fold(0.0, f64::max) / largest;
    assert!(off < TOLERANCE, "{what}: logits off by {off} of the largest");
}

#[test]
fn texts_in_pieces_have_the_logits_of_whole_texts() {
    let folders = folders();
    let of_tokens = folders.iter().filter_map(|folder| Some((Case::of_tokens(folder)?, true)));
    for (case, of_tokens) in folders.iter().map(|folder| (Case::open(folder), false)).chain(of_tokens) {
        let served = of_tokens.then_some(&case.adapters);
        for (head, adapters) in [(false, Some(&case.adapters)), (true, served)] {
            let ready = ready(&case, head);
            let expected = case.logits(&ready.0, adapters);
            let mut rest = &expected[..];
            for tokens in texts(&case) {
                let (of_text, others) = rest.split_at(tokens.len() * case.model.config().vocabulary);
                rest = others;
                for sizes in [&[1][..], &[100], &[5, 1], &[20, 3, 1], &[7, 17, 2]] {
                    let found = in_pieces(&ready, &tokens, adapters, sizes);
                    assert_near(&format!("{} in pieces of {sizes:?}", case.name), &found, of_text);
                }
            }
        }
    }
}

#[test]
fn texts_side_by_side_are_computed_as_each_alone_to_the_last_bit() {
    let folders = folders();
    let of_tokens = folders.iter().filter_map(|folder| Case::of_tokens(folder));
    for case in folders.iter().map(|folder| Case::open(folder)).chain(of_tokens) {
        let (llama, logits) = ready(&case, false);
        let (texts, config) = (texts(&case), case.model.config());
        let beside = [Some(&case.adapters), None, Some(&case.adapters)];
        let tokens = [&texts[0][..], &texts[1], &texts[1]];
        // Each is read alone; then they go on side by side, by different numbers of tokens, with rows of none behind them.
        let read = |text: usize| {
            let mut cache = KvCache::new(config);
            cache.turn_for(config, tokens[text].len());
            let first = &tokens[text][..4 + 3 * text];
            let text = Continuation { cache: &mut cache, tokens: first, adapters: beside[text], wanted: 0 };
            assert!(llama.extend(&mut [text], 1).unwrap().is_empty());
            cache
        };
        let next = |text: usize, steps: usize| &tokens[text][4 + 3 * text..][..steps];
        let steps = [3, 1, 2];
        let mut caches: Vec<KvCache> = (0..3).map(read).collect();
        let mut all: Vec<Continuation<'_>> = caches
            .iter_mut()
            .enumerate()
            .map(|(text, cache)| {
                let (tokens, wanted) = (next(text, steps[text]), steps[text]);
                Continuation { cache, tokens, adapters: beside[text], wanted }
            })
            .collect();
        let places = beside.iter().zip([0..3, 3..4, 4..6]);
        let places: Vec<_> = places.filter_map(|(adapters, rows)| Some((rows, (*adapters)?))).collect();
        let together = logits.of(&llama, llama.extend(&mut all, 8).unwrap(), &places).unwrap();
        let mut alone = Vec::new();
        for text in 0..3 {
            let mut cache = read(text);
            // What was guessed wrongly and forgotten leaves no trace.
            let wrong = Continuation { cache: &mut cache, tokens: &[7; 5], adapters: beside[text], wanted: 0 };
            llama.extend(&mut [wrong], 1).unwrap();
            cache.truncate(4 + 3 * text);
            for token in next(text, steps[text]) {
                let tokens = std::slice::from_ref(token);
                let one = Continuation { cache: &mut cache, tokens, adapters: beside[text], wanted: 1 };
                let states = llama.extend(&mut [one], 1).unwrap();
                alone.extend_from_slice(&logits.of(&llama, states, &of_all(beside[text], 1)).unwrap());
            }
        }
        assert_eq!(together[..], alone[..], "{}", case.name);
    }
}

#[test]
fn a_text_that_outgrows_its_frequencies_is_read_anew() {
    let case = Case::open(&folders().into_iter().find(|folder| folder.ends_with("phi3")).unwrap());
    let config = case.model.config();
    let (llama, tokens) = (case.llama(false), vec![5u32; 20]);
    let mut cache = KvCache::new(config);
    cache.turn_for(config, 20);
    llama.extend(&mut [Continuation { cache: &mut cache, tokens: &tokens, adapters: None, wanted: 0 }], 1).unwrap();
    assert_eq!((KvCache::turns_alike_up_to(config, 12), KvCache::turns_alike_up_to(config, 21)), (20, usize::MAX));
    cache.turn_for(config, 20);
    assert_eq!(cache.len(), 20);
    cache.turn_for(config, 21);
    assert_eq!(cache.len(), 0, "its first tokens turn by the long frequencies from now on");
    let llama = Case::open(&folders().into_iter().find(|folder| folder.ends_with("qwen3")).unwrap());
    assert_eq!(KvCache::turns_alike_up_to(llama.model.config(), 12), usize::MAX);
}

#[test]
fn what_does_not_fit_is_refused_and_nothing_is_kept_of_it() {
    let tiny = TinyModel::new();
    let llama = tiny.llama();
    let mut cache = KvCache::new(tiny.config());
    let error = |cache: &mut KvCache, tokens: &[u32], wanted| {
        let text = Continuation { cache, tokens, adapters: None, wanted };
        llama.extend(&mut [text], 1).unwrap_err().to_string()
    };
    assert!(error(&mut cache, &[], 0).contains("0 tokens"));
    assert!(error(&mut cache, &[1], 2).contains("2 are wanted"));
    assert!(error(&mut cache, &[1, 60_000], 1).contains("token 60000"));
    assert!(llama.extend(&mut [], 1).is_err() && cache.is_empty());
    let norms = LoraConfig { modules_to_save: vec!["norm".into()], ..LoraConfig::default() };
    let with_norms = LoraAdapters::new(tiny.config(), &norms, 1).unwrap();
    assert!(Llama::together(Some(&with_norms), Some(&with_norms)) && !Llama::together(Some(&with_norms), None));
    let mut other = KvCache::new(tiny.config());
    let texts = [(&mut cache, Some(&with_norms)), (&mut other, None)];
    let mut texts = texts.map(|(cache, adapters)| Continuation { cache, tokens: &[1], adapters, wanted: 1 });
    assert!(llama.extend(&mut texts, 1).unwrap_err().to_string().contains("apart"));
    assert_eq!(KvCache::bytes(tiny.config(), 65), 2 * KvCache::bytes(tiny.config(), 1));
}

#[test]
fn nothing_is_asked_of_a_head_for_no_rows() {
    for folder in folders() {
        let case = Case::open(&folder);
        for served in [false, true] {
            let (llama, logits) = ready(&case, served);
            assert!(logits.of(&llama, Buffer::scratch(0), &[]).unwrap().is_empty(), "{}", case.name);
        }
    }
}

/// What `tests/generation.py` had transformers write.
#[derive(serde::Deserialize)]
struct Written {
    prompt: Vec<u32>,
    base: Vec<u32>,
    adapted: Vec<u32>,
}

#[test]
fn every_family_writes_what_transformers_writes() {
    #[derive(serde::Deserialize)]
    struct Fixture {
        models: std::collections::BTreeMap<String, Written>,
    }
    let text = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/generation.json")).unwrap();
    let Fixture { models } = serde_json::from_slice(&text).unwrap();
    let folders = folders();
    assert_eq!(folders.len(), models.len(), "each model has its texts");
    for folder in folders {
        let case = Case::open(&folder);
        let (llama, logits) = ready(&case, false);
        let Written { prompt, base, adapted } = &models[&case.name];
        for (adapters, expected) in [(None, base), (Some(&case.adapters), adapted)] {
            let (mut cache, mut text) = (KvCache::new(llama.config()), prompt.clone());
            for _ in expected {
                cache.turn_for(llama.config(), text.len());
                let tokens = &text[cache.len()..];
                let next = Continuation { cache: &mut cache, tokens, adapters, wanted: 1 };
                let states = llama.extend(&mut [next], 1).unwrap();
                let row = logits.of(&llama, states, &of_all(adapters, 1)).unwrap();
                let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                text.push(row.iter().position(|&logit| logit == largest).unwrap() as u32);
            }
            assert_eq!(text[prompt.len()..], expected[..], "{}, adapted: {}", case.name, adapters.is_some());
        }
    }
}
