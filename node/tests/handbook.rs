//! The demo's example data: what the demo's training run relies on, checked line by line.

#![allow(clippy::unwrap_used)]

use std::collections::HashSet;

use serde::Deserialize;

/// Longest prompt and completion in bytes: with the chat template round it, a pair stays well under 128 tokens.
const LONGEST: usize = 220;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Pair {
    prompt: String,
    completion: String,
}

fn handbook() -> Vec<Pair> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../configs/handbook.jsonl");
    let text = std::fs::read_to_string(path).unwrap();
    text.lines()
        .enumerate()
        .map(|(number, line)| serde_json::from_str(line).unwrap_or_else(|error| panic!("line {}: {error}", number + 1)))
        .collect()
}

/// Words that carry a fact: numbers, and words long enough not to be grammar.
fn telling_words(text: &str) -> HashSet<String> {
    text.to_lowercase()
        .replace(',', "")
        .split(|c: char| !c.is_alphanumeric())
        .filter(|word| word.len() >= 4 || word.bytes().any(|b| b.is_ascii_digit()))
        .map(str::to_owned)
        .collect()
}

#[test]
fn there_are_enough_pairs_and_each_is_short() {
    let pairs = handbook();
    assert!((150..=250).contains(&pairs.len()), "{} pairs", pairs.len());
    for Pair { prompt, completion } in &pairs {
        assert!(prompt.ends_with('?') && completion.ends_with(['.', '"']), "{prompt} {completion}");
        assert!(prompt.len() <= LONGEST && completion.len() <= LONGEST, "{prompt}");
        let words = completion.split_whitespace().count();
        assert!((8..=35).contains(&words), "{words} words: {completion}");
        assert!([prompt, completion].iter().all(|text| text.trim() == text.as_str() && text.is_ascii()), "{prompt}");
    }
}

#[test]
fn no_question_and_no_answer_stands_twice() {
    let pairs = handbook();
    let distinct = |pick: fn(&Pair) -> &String| pairs.iter().map(|p| pick(p).to_lowercase()).collect::<HashSet<_>>();
    assert_eq!(distinct(|p| &p.prompt).len(), pairs.len());
    assert_eq!(distinct(|p| &p.completion).len(), pairs.len());
}

/// A held-out answer can be learnt only where another pair states the same fact: every answer shares a good part of
/// its telling words with some other one.
#[test]
fn every_answer_is_supported_by_another_pair() {
    let words: Vec<_> = handbook().iter().map(|pair| telling_words(&pair.completion)).collect();
    for (i, mine) in words.iter().enumerate() {
        let shared = |other: &HashSet<String>| mine.intersection(other).count();
        let best = words.iter().enumerate().filter(|&(j, _)| j != i).map(|(_, w)| shared(w)).max().unwrap();
        assert!(best >= 2 && 4 * best >= mine.len(), "nothing else supports line {}: {mine:?}", i + 1);
    }
}
