//! Text of tokens as they come.

use protocol::model::TextTokenizer;

use super::super::text::{TextStream, Told};
use super::*;

/// What each token of a text makes certain, and what is left at the end.
fn told(tokenizer: &TextTokenizer, prompt: &[u32], tokens: &[u32], stops: &[&str]) -> (Vec<String>, Option<String>) {
    let stops = stops.iter().map(|&stop| stop.to_owned()).collect();
    let mut stream = TextStream::new(prompt, stops, false);
    let mut pieces = Vec::new();
    for &token in tokens {
        let Told { text, stop } = stream.push(tokenizer, token).unwrap();
        pieces.push(text);
        if stop.is_some() {
            return (pieces, stop);
        }
    }
    let Told { text, stop } = stream.finish(tokenizer).unwrap();
    pieces.push(text);
    (pieces, stop)
}

#[test]
fn characters_come_whole_and_texts_are_what_their_tokens_say() {
    let tokenizer = TinyModel::new().model.tokenizer().unwrap();
    let prompt = tokenizer.encode("Say: ", false).unwrap();
    for text in ["plain the the in", "süß, 深い 🦀🦀 e\u{301}", "", " \n a", "ends with ü"] {
        let tokens = tokenizer.encode(text, false).unwrap();
        let (pieces, stop) = told(&tokenizer, &prompt, &tokens, &[]);
        assert_eq!((pieces.concat().as_str(), stop), (text, None));
        assert!(pieces.iter().all(|piece| !piece.contains('\u{fffd}')), "{pieces:?}");
        // Every token but those within a character says something.
        let within = text.len() - text.chars().count();
        assert!(pieces[..tokens.len()].iter().filter(|piece| piece.is_empty()).count() <= within);
    }
    // Half a character at the end is no text; half a character in the prompt is made whole.
    let tokens = tokenizer.encode("a🦀", false).unwrap();
    assert_eq!(told(&tokenizer, &prompt, &tokens[..3], &[]).0.concat(), "a");
    assert_eq!(told(&tokenizer, &tokens[..3], &tokens[3..], &[]).0.concat(), "🦀");
    assert_eq!(told(&tokenizer, &[], &tokens, &[]).0.concat(), "a🦀");
    // Special tokens are no text, unless they are asked for.
    let special = tokenizer.encode("a<|im_start|>b", false).unwrap();
    assert_eq!(told(&tokenizer, &prompt, &special, &[]).0.concat(), "ab");
    let mut spelled = TextStream::new(&prompt, Vec::new(), true);
    let pieces: Vec<String> = special.iter().map(|&token| spelled.push(&tokenizer, token).unwrap().text).collect();
    assert_eq!(pieces.concat(), "a<|im_start|>b");
}

#[test]
fn what_may_begin_a_stop_is_held_back_until_it_is_certain() {
    let tokenizer = TinyModel::new().model.tokenizer().unwrap();
    let run = |text: &str, stops: &[&str]| told(&tokenizer, &[], &tokenizer.encode(text, false).unwrap(), stops);
    let (pieces, stop) = run("ab###cd", &["###"]);
    assert_eq!(
        (pieces, stop.as_deref()),
        (vec!["a".into(), "b".into(), String::new(), String::new(), String::new()], Some("###"))
    );
    let (pieces, stop) = run("ab##cd", &["###"]);
    assert_eq!(pieces, ["a", "b", "", "", "##c", "d", ""]);
    assert_eq!(stop, None);
    assert_eq!(run("ab##", &["###"]).0.concat(), "ab##", "what has not become a stop is text");
    assert_eq!(run("xaab", &["aab"]).0.concat(), "x", "a stop that begins within its own beginning");
    assert_eq!(run("one\n\ntwo", &["two", "\n\n"]), (run("one\n\n", &["\n\n"]).0, Some("\n\n".into())));
    assert_eq!(run("über🦀weg", &["🦀"]).0.concat(), "über");
    assert_eq!(run("abc", &["b", "bc"]).1.as_deref(), Some("b"), "the first that is complete");
}
