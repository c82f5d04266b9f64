//! The tokenizer inside a GGUF file: byte-level BPE (`gpt2`) and SentencePiece BPE (`llama`).
//!
//! The file holds vocabulary, merges or scores, and names how text is split before merging (`tokenizer.ggml.pre`);
//! from these the same pipeline is built that the model's own `tokenizer.json` describes.

use std::collections::HashMap;

use serde_json::{Value as Json, json};
use tokenizers::Tokenizer;

use super::{DEFAULT, Surroundings, TextTokenizer};
use crate::model::config::LlamaConfig;
use crate::model::error::ModelError;
use crate::model::weights::{GgufFile, Value};

/// Llama 3's splitting of text into words, numbers of up to three digits, punctuation and space.
pub(super) const LLAMA3_WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Qwen 2's, which differs in that digits stand alone.
pub(super) const QWEN2_WORDS: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Token types that matter here (llama.cpp's `llama_token_type`).
pub(super) const NORMAL: i128 = 1;
pub(super) const CONTROL: i128 = 3;
pub(super) const USER_DEFINED: i128 = 4;

/// Keys of special tokens, and what templates call them.
pub(super) const SPECIAL: [(&str, &str); 7] = [
    ("bos_token_id", "bos_token"),
    ("eos_token_id", "eos_token"),
    ("unknown_token_id", "unk_token"),
    ("seperator_token_id", "sep_token"),
    ("padding_token_id", "pad_token"),
    ("cls_token_id", "cls_token"),
    ("mask_token_id", "mask_token"),
];

struct Vocabulary<'a> {
    tokens: Vec<&'a str>,
    types: Vec<i128>,
}

/// Builds the tokenizer of a GGUF file.
///
/// # Errors
/// [`ModelError::Tokenizer`] when the metadata is incomplete or names a kind that is not known.
pub(crate) fn from_gguf(file: &GgufFile, config: &LlamaConfig) -> Result<TextTokenizer, ModelError> {
    let metadata = file.metadata()?;
    build(&metadata, config, file.path().to_owned())
}

fn build(
    metadata: &HashMap<&str, Value<'_>>,
    config: &LlamaConfig,
    path: std::path::PathBuf,
) -> Result<TextTokenizer, ModelError> {
    let fail = |what: String| ModelError::tokenizer(&path, what);
    let get = |key: &str| metadata.get(format!("tokenizer.ggml.{key}").as_str());
    let text = |key: &str| get(key).and_then(Value::text);
    let vocabulary = Vocabulary::read(get).map_err(fail)?;
    let (kind, pre) = (text("model").unwrap_or("not given"), text("pre").unwrap_or("not given"));
    let mut description = match kind {
        "gpt2" => byte_level(&vocabulary, get("merges"), pre),
        "llama" => sentence_piece(&vocabulary, get("scores"), get("add_space_prefix").and_then(Value::flag)),
        other => Err(format!("tokenizer.ggml.model is `{other}`; `gpt2` and `llama` are known")),
    }
    .map_err(fail)?;
    let token = |key: &str| get(key).and_then(Value::count).and_then(|id| vocabulary.tokens.get(id).map(|t| (id, *t)));
    let (bos, eos) = (token("bos_token_id"), token("eos_token_id"));
    let adds_bos = get("add_bos_token").and_then(Value::flag).unwrap_or(kind == "llama" || is_llama3(pre));
    let adds_eos = get("add_eos_token").and_then(Value::flag).unwrap_or(false);
    description["added_tokens"] = vocabulary.added();
    description["post_processor"] = frame(bos.filter(|_| adds_bos), eos.filter(|_| adds_eos));
    let inner = serde_json::from_value::<Tokenizer>(description).map_err(|error| fail(error.to_string()))?;
    let special = SPECIAL.into_iter().filter_map(|(key, name)| Some((name.to_owned(), token(key)?.1.to_owned())));
    let around = Surroundings { special: special.collect(), templates: templates(metadata), path };
    TextTokenizer::assemble(inner, config, around)
}

/// `tokenizer.chat_template`, and those with a name behind it.
fn templates(metadata: &HashMap<&str, Value<'_>>) -> Vec<(String, String)> {
    let found = metadata.iter().filter_map(|(key, value)| {
        let name = match key.strip_prefix("tokenizer.chat_template")? {
            "" => DEFAULT,
            name => name.strip_prefix('.')?,
        };
        Some((name.to_owned(), value.text()?.to_owned()))
    });
    let mut found: Vec<(String, String)> = found.collect();
    found.sort();
    found
}

impl<'a> Vocabulary<'a> {
    fn read<'m>(get: impl Fn(&str) -> Option<&'m Value<'a>>) -> Result<Self, String>
    where
        'a: 'm,
    {
        let tokens = texts(get("tokens"), "tokens")?;
        let types = match get("token_type").and_then(Value::array) {
            None => vec![NORMAL; tokens.len()],
            Some(types) => types.iter().map(|v| if let Value::Integer(kind) = v { *kind } else { NORMAL }).collect(),
        };
        if types.len() != tokens.len() {
            return Err(format!("it has {} tokens and {} token types", tokens.len(), types.len()));
        }
        Ok(Self { tokens, types })
    }

    fn ids(&self) -> serde_json::Map<String, Json> {
        self.tokens.iter().enumerate().map(|(id, &token)| (token.to_owned(), json!(id))).collect()
    }

    /// Tokens that are found in a text before anything is merged.
    fn added(&self) -> Json {
        let tokens = self.tokens.iter().zip(&self.types).enumerate();
        let added = tokens.filter(|&(_, (token, &kind))| matches!(kind, CONTROL | USER_DEFINED) && !token.is_empty());
        let describe = |(id, (token, &kind)): (usize, (&&str, &i128))| {
            json!({
                "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": kind == CONTROL,
            })
        };
        added.map(describe).collect()
    }
}

fn texts<'a>(value: Option<&Value<'a>>, name: &str) -> Result<Vec<&'a str>, String> {
    let values = value.and_then(Value::array).ok_or_else(|| format!("tokenizer.ggml.{name} is missing"))?;
    let texts = values.iter().map(Value::text).collect::<Option<Vec<_>>>();
    texts.ok_or_else(|| format!("tokenizer.ggml.{name} holds something other than text"))
}

fn is_llama3(pre: &str) -> bool {
    matches!(pre, "llama-bpe" | "llama3" | "llama-v3" | "smaug-bpe" | "falcon3")
}

/// GPT-2's kind: text is split into words, written as printable stand-ins of its bytes, and merged.
fn byte_level(vocabulary: &Vocabulary<'_>, merges: Option<&Value<'_>>, pre: &str) -> Result<Json, String> {
    let bytes = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
    let words = |pattern: &str| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
    let splits = match pre {
        "gpt-2" | "gpt2" => vec![bytes(true)],
        "smollm" | "starcoder" | "refact" | "command-r" => {
            vec![json!({"type": "Digits", "individual_digits": true}), bytes(true)]
        }
        "qwen2" | "deepseek-r1-qwen" => vec![words(QWEN2_WORDS), bytes(false)],
        pre if is_llama3(pre) => vec![words(LLAMA3_WORDS), bytes(false)],
        other => {
            return Err(format!(
                "tokenizer.ggml.pre is `{other}`; gpt-2, smollm, starcoder, refact, command-r, llama-bpe, smaug-bpe, falcon3, \
                 qwen2 and deepseek-r1-qwen are known; use the model's Hugging Face folder"
            ));
        }
    };
    let merges = texts(merges, "merges")?;
    Ok(json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": splits},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": is_llama3(pre),
            "vocab": vocabulary.ids(), "merges": merges,
        },
    }))
}

/// SentencePiece's kind: spaces become `▁`, pieces are merged in the order of their scores, unknown characters fall
/// back to bytes.
fn sentence_piece(
    vocabulary: &Vocabulary<'_>,
    scores: Option<&Value<'_>>,
    prefix: Option<bool>,
) -> Result<Json, String> {
    let scores = scores.and_then(Value::array).ok_or("tokenizer.ggml.scores is missing")?;
    let scores = scores.iter().map(Value::float).collect::<Option<Vec<_>>>();
    let scores = scores.filter(|scores| scores.len() == vocabulary.tokens.len());
    let scores = scores.ok_or("tokenizer.ggml.scores does not hold a number for each token")?;
    let prefix = prefix.unwrap_or(true);
    let spaces = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    let normalizers = if prefix { vec![json!({"type": "Prepend", "prepend": "▁"}), spaces] } else { vec![spaces] };
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    Ok(json!({
        "version": "1.0", "truncation": null, "padding": null, "pre_tokenizer": null,
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": vocabulary.ids(), "merges": merges_by_score(vocabulary, &scores),
        },
    }))
}

/// SentencePiece merges whichever neighbouring pair makes the piece with the best score; as a list of merges that is
/// every way of cutting a piece in two known ones, best pieces first.
fn merges_by_score(vocabulary: &Vocabulary<'_>, scores: &[f64]) -> Vec<[String; 2]> {
    let ids: HashMap<&str, usize> = vocabulary.tokens.iter().enumerate().map(|(id, &token)| (token, id)).collect();
    let mut merges = Vec::new();
    for (id, &piece) in vocabulary.tokens.iter().enumerate() {
        if vocabulary.types[id] != NORMAL {
            continue;
        }
        for (cut, _) in piece.char_indices().skip(1) {
            let (left, right) = piece.split_at(cut);
            if let (Some(&left), Some(&right)) = (ids.get(left), ids.get(right)) {
                merges.push((scores[id], left, right));
            }
        }
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    let spell = |id: usize| vocabulary.tokens[id].to_owned();
    merges.into_iter().map(|(_, left, right)| [spell(left), spell(right)]).collect()
}

/// What is put around a text: tokens that begin and end it, where the model wants them.
fn frame(bos: Option<(usize, &str)>, eos: Option<(usize, &str)>) -> Json {
    if bos.is_none() && eos.is_none() {
        return Json::Null;
    }
    let special = |token: Option<(usize, &str)>| token.map(|(_, t)| json!({"SpecialToken": {"id": t, "type_id": 0}}));
    let sequence = |id: &str| Some(json!({"Sequence": {"id": id, "type_id": 0}}));
    let single: Vec<Json> = [special(bos), sequence("A"), special(eos)].into_iter().flatten().collect();
    let pair: Vec<Json> = [special(bos), sequence("A"), sequence("B"), special(eos)].into_iter().flatten().collect();
    let tokens: serde_json::Map<String, Json> = [bos, eos]
        .into_iter()
        .flatten()
        .map(|(id, token)| (token.to_owned(), json!({"id": token, "ids": [id], "tokens": [token]})))
        .collect();
    json!({"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens})
}

#[cfg(test)]
mod tests;
