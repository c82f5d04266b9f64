//! The SentencePiece kind against the algorithm in its own words, and the kinds that are told apart by name.

#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;
use crate::model::synthetic::SyntheticLlama;

const PIECES: [(&str, f64); 12] = [
    ("▁", -20.0),
    ("a", -21.0),
    ("b", -22.0),
    ("c", -23.0),
    ("é", -24.0),
    ("ab", -1.0),
    ("bc", -2.0),
    ("▁a", -3.0),
    ("abc", -4.0),
    ("ca", -5.0),
    ("▁ab", -0.5),
    ("caab", -7.0),
];

/// Three special tokens, the bytes, the pieces.
fn tokens() -> Vec<String> {
    let special = ["<unk>", "<s>", "</s>"].map(str::to_owned).into_iter();
    let bytes = (0..=255).map(|byte: u8| format!("<0x{byte:02X}>"));
    special.chain(bytes).chain(PIECES.iter().map(|(piece, _)| (*piece).to_owned())).collect()
}

fn llama(tokens: &[String]) -> HashMap<&str, Value<'_>> {
    let scores = tokens.iter().map(|token| {
        let piece = PIECES.iter().find(|(piece, _)| piece == token);
        Value::Float(piece.map_or(0.0, |(_, score)| *score))
    });
    let types = (0..tokens.len()).map(|id| {
        Value::Integer(if id < 3 {
            3
        } else if id < 259 {
            6
        } else {
            1
        })
    });
    HashMap::from([
        ("tokenizer.ggml.model", Value::Text("llama")),
        ("tokenizer.ggml.tokens", Value::Array(tokens.iter().map(|token| Value::Text(token)).collect())),
        ("tokenizer.ggml.scores", Value::Array(scores.collect())),
        ("tokenizer.ggml.token_type", Value::Array(types.collect())),
        ("tokenizer.ggml.bos_token_id", Value::Integer(1)),
        ("tokenizer.ggml.eos_token_id", Value::Integer(2)),
    ])
}

fn tokenizer(metadata: &HashMap<&str, Value<'_>>) -> Result<TextTokenizer, ModelError> {
    let mut config = SyntheticLlama::tiny(1).config;
    config.vocabulary = tokens().len();
    build(metadata, &config, "model.gguf".into())
}

/// SentencePiece: as long as two neighbours make a known piece, join those that make the best one.
fn reference(text: &str, tokens: &[String]) -> Vec<u32> {
    let score = |piece: &str| PIECES.iter().find(|(known, _)| *known == piece).map(|(_, score)| *score);
    let mut pieces: Vec<String> = format!(" {text}").replace(' ', "▁").chars().map(String::from).collect();
    loop {
        let joined = (0..pieces.len().saturating_sub(1)).map(|i| (score(&pieces[i..i + 2].concat()), i));
        let best =
            joined.filter_map(|(score, i)| Some((score?, i))).max_by(|a, b| a.0.total_cmp(&b.0).then(b.1.cmp(&a.1)));
        let Some((_, i)) = best else { break };
        let joined = pieces[i..i + 2].concat();
        pieces.splice(i..i + 2, [joined]);
    }
    let id = |piece: &str| tokens.iter().position(|token| token == piece).map(|id| id as u32);
    pieces
        .iter()
        .flat_map(|piece| match id(piece) {
            Some(id) => vec![id],
            None => piece.bytes().map(|byte| u32::from(byte) + 3).collect(),
        })
        .collect()
}

proptest! {
    #[test]
    fn pieces_are_joined_as_sentence_piece_does(text in "[abc é日]{1,24}") {
        let tokens = tokens();
        let tokenizer = tokenizer(&llama(&tokens)).unwrap();
        let found = tokenizer.encode(&text, false).unwrap();
        prop_assert_eq!(&found, &reference(&text, &tokens));
        prop_assert_eq!(tokenizer.decode(&found).unwrap(), text.clone());
        let framed = tokenizer.encode(&text, true).unwrap();
        prop_assert_eq!((framed[0], &framed[1..]), (1, &found[..]));
    }
}

#[test]
fn unknown_kinds_are_refused_by_name() {
    let tokens = tokens();
    let mut metadata = llama(&tokens);
    metadata.insert("tokenizer.ggml.model", Value::Text("rwkv"));
    let Err(error) = tokenizer(&metadata) else { panic!("rwkv was built") };
    assert!(error.to_string().contains("`rwkv`"), "{error}");
    metadata.insert("tokenizer.ggml.model", Value::Text("gpt2"));
    metadata.insert("tokenizer.ggml.pre", Value::Text("mystery"));
    let Err(error) = tokenizer(&metadata) else { panic!("mystery was built") };
    assert!(error.to_string().contains("`mystery`") && error.to_string().contains("Hugging Face folder"), "{error}");
    metadata.remove("tokenizer.ggml.tokens");
    let Err(error) = tokenizer(&metadata) else { panic!("nothing was built") };
    assert!(error.to_string().contains("tokenizer.ggml.tokens is missing"), "{error}");
}

/// How text is cut before merging decides every token: three letters of each kind, next to one another.
#[test]
fn byte_level_kinds_cut_text_as_they_are_named() {
    let printable: Vec<String> = (33..=126u8).map(|byte| char::from(byte).to_string()).collect();
    let extra = ["Ġ", "12", "123", "1234", "Ġ1"].map(str::to_owned);
    let tokens: Vec<String> = printable.into_iter().chain(extra).collect();
    let merges = ["1 2", "12 3", "123 4", "Ġ 1"].map(Value::Text).to_vec();
    for (pre, pieces) in [
        ("gpt-2", vec!["1234", "Ġ1"]),
        ("smollm", vec!["1", "2", "3", "4", "Ġ", "1"]),
        ("llama-bpe", vec!["123", "4", "Ġ", "1"]),
        ("qwen2", vec!["1", "2", "3", "4", "Ġ", "1"]),
    ] {
        let metadata = HashMap::from([
            ("tokenizer.ggml.model", Value::Text("gpt2")),
            ("tokenizer.ggml.pre", Value::Text(pre)),
            ("tokenizer.ggml.tokens", Value::Array(tokens.iter().map(|token| Value::Text(token)).collect())),
            ("tokenizer.ggml.merges", Value::Array(merges.clone())),
        ]);
        let tokenizer = tokenizer(&metadata).unwrap();
        let found = tokenizer.encode("1234 1", false).unwrap();
        let found: Vec<&str> = found.iter().map(|&id| tokens[id as usize].as_str()).collect();
        assert_eq!(found, pieces, "{pre}");
    }
}
