//! The tokenizer of a Hugging Face folder as the metadata of a GGUF file: the way back from what `gguf` reads.
//!
//! llama.cpp has the ways in which text is split into words in its code, by name, and so only those can be written that a
//! name is known of. SentencePiece's scores are not in a `tokenizer.json`; the order of its merges is, which is the order of
//! the scores, and nothing else of them is used.

use std::collections::HashMap;

use serde_json::Value as Json;

use super::gguf::{CONTROL, LLAMA3_WORDS, NORMAL, QWEN2_WORDS, SPECIAL, USER_DEFINED};
use super::{DEFAULT, TextTokenizer};
use crate::model::error::ModelError;
use crate::model::gguf::{Entries, Entry};

/// Further types of tokens (llama.cpp's `llama_token_type`).
const UNKNOWN: i128 = 2;
const UNUSED: i128 = 5;
const BYTE: i128 = 6;

/// What stands for a space in SentencePiece's tokens.
const SPACE: &str = "▁";

/// A step of splitting text into words.
#[derive(Debug, PartialEq)]
enum Split<'a> {
    Words(&'a str),
    Digits,
    /// Bytes written as letters, after splitting into GPT-2's words or not.
    Bytes(bool),
}

/// Tokens with their types, and how text becomes tokens.
struct Parts {
    tokens: Vec<String>,
    types: Vec<i128>,
}

impl TextTokenizer {
    /// Adds it to a file's metadata.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] when llama.cpp has none such.
    pub(crate) fn set_gguf(&self, entries: &mut Entries<'_>) -> Result<(), ModelError> {
        let description = self.inner.to_string(false).map_err(|error| self.error(error))?;
        let description: Json = serde_json::from_str(&description).map_err(|error| self.error(error))?;
        let set = self.set_described(entries, &description);
        set.map_err(|what| {
            self.error(format!(
                "{what}; `node export merged` writes a Hugging Face folder, which llama.cpp's own converter reads"
            ))
        })
    }

    fn set_described(&self, entries: &mut Entries<'_>, description: &Json) -> Result<(), String> {
        let model = &description["model"];
        if model["type"] != "BPE" {
            return Err(format!(
                "a tokenizer of the kind {} has no form in a GGUF file that is known here",
                model["type"]
            ));
        }
        let parts = self.parts(description)?;
        let mut set = |key: &str, value: Entry<'static>| entries.set(format!("tokenizer.ggml.{key}"), value);
        let text = |text: &str| Entry::Text(text.to_owned());
        let merges = merges(model)?;
        match spaces(description) {
            Some(prefix) => {
                set("model", text("llama"));
                set("pre", text("default"));
                set("add_space_prefix", Entry::Bool(prefix));
                set("scores", Entry::F32s(scores(&parts, &merges)));
            }
            None => {
                let steps = splits(&description["pre_tokenizer"])?;
                set("model", text("gpt2"));
                set("pre", text(name(&steps, &description["pre_tokenizer"])?));
                set("merges", Entry::Texts(merges.iter().map(|(left, right)| format!("{left} {right}")).collect()));
            }
        }
        set("tokens", Entry::Texts(parts.tokens));
        set("token_type", Entry::I32s(parts.types.iter().map(|&kind| kind as i32).collect()));
        let id = |name: &str| {
            let token = self.special.get(name).and_then(Json::as_str);
            token.and_then(|token| self.inner.token_to_id(token)).filter(|&id| (id as usize) < self.vocabulary)
        };
        for (key, name) in SPECIAL {
            let id = match name {
                "bos_token" => self.bos,
                "eos_token" => self.eos,
                name => id(name),
            };
            if let Some(id) = id {
                set(key, Entry::U32(id));
            }
        }
        let framed = |place: fn(&[u32]) -> Option<&u32>, token: Option<u32>| {
            let ends = |special| self.encode("a", special).map(|ids| place(&ids).copied()).map_err(|e| e.to_string());
            Ok::<_, String>(token.is_some() && ends(true)? == token && ends(false)? != token)
        };
        set("add_bos_token", Entry::Bool(framed(<[u32]>::first, self.bos)?));
        set("add_eos_token", Entry::Bool(framed(<[u32]>::last, self.eos)?));
        for (name, template) in &self.templates {
            let key = match name.as_str() {
                DEFAULT => "tokenizer.chat_template".to_owned(),
                name => format!("tokenizer.chat_template.{name}"),
            };
            entries.set(key, Entry::Text(template.source().to_owned()));
        }
        let named: Vec<String> =
            self.template_names().into_iter().filter(|name| *name != DEFAULT).map(str::to_owned).collect();
        if !named.is_empty() {
            entries.set("tokenizer.chat_templates", Entry::Texts(named));
        }
        Ok(())
    }

    /// A token for each row of the embeddings.
    fn parts(&self, description: &Json) -> Result<Parts, String> {
        let mut tokens: Vec<String> = (0..self.vocabulary).map(|id| format!("[PAD{id}]")).collect();
        let mut types = vec![UNUSED; self.vocabulary];
        let mut put = |id: usize, token: &str, kind: i128| {
            let place = tokens.get_mut(id).zip(types.get_mut(id));
            let (known, its) = place.ok_or_else(|| {
                format!("its token {id} (`{token}`) is outside the model's vocabulary of {}", self.vocabulary)
            })?;
            (*known, *its) = (token.to_owned(), kind);
            Ok::<_, String>(())
        };
        let unknown = description["model"]["unk_token"].as_str();
        let falls_back = description["model"]["byte_fallback"] == true;
        let vocabulary = description["model"]["vocab"].as_object().ok_or("it has no vocabulary")?;
        for (token, id) in vocabulary {
            let kind = match token.as_str() {
                token if falls_back && is_byte(token) => BYTE,
                token if falls_back && Some(token) == unknown => UNKNOWN,
                _ => NORMAL,
            };
            put(id.as_u64().ok_or("its vocabulary has a token without a number")? as usize, token, kind)?;
        }
        for added in description["added_tokens"].as_array().into_iter().flatten() {
            let (id, token) = (added["id"].as_u64(), added["content"].as_str());
            let (id, token) = id.zip(token).ok_or("an added token has no number or no text")?;
            let kind = match added["special"] == true {
                true if falls_back && Some(token) == unknown => UNKNOWN,
                true => CONTROL,
                false => USER_DEFINED,
            };
            put(id as usize, token, kind)?;
        }
        Ok(Parts { tokens, types })
    }
}

/// Whether a token stands for one byte: `<0x0A>`.
fn is_byte(token: &str) -> bool {
    token.strip_prefix("<0x").and_then(|token| token.strip_suffix('>')).is_some_and(|byte| byte.len() == 2)
}

fn merges(model: &Json) -> Result<Vec<(&str, &str)>, String> {
    let merges = model["merges"].as_array().ok_or("it has no merges")?;
    let merges = merges.iter().map(|merge| match merge {
        Json::String(merge) => merge.split_once(' '),
        merge => merge[0].as_str().zip(merge[1].as_str()),
    });
    merges.collect::<Option<_>>().ok_or_else(|| "a merge is not of two tokens".to_owned())
}

/// Of a tokenizer of SentencePiece's kind, whether a space is put before a text; `None` of others.
fn spaces(description: &Json) -> Option<bool> {
    if description["model"]["byte_fallback"] != true {
        return None;
    }
    let steps = |value: &Json, list: &str| match value[list].as_array() {
        Some(steps) => steps.clone(),
        None => vec![value.clone()],
    };
    let normalisers = steps(&description["normalizer"], "normalizers");
    let splitters = steps(&description["pre_tokenizer"], "pretokenizers");
    let replaces = normalisers.iter().any(|step| step["type"] == "Replace" && step["content"] == SPACE);
    let metaspace = splitters.iter().find(|step| step["type"] == "Metaspace" && step["replacement"] == SPACE);
    if !replaces && metaspace.is_none() {
        return None;
    }
    let prepends = normalisers.iter().any(|step| step["type"] == "Prepend" && step["prepend"] == SPACE);
    Some(prepends || metaspace.is_some_and(|step| step["prepend_scheme"] != "never"))
}

/// A score for each token, the better the earlier its merge comes.
fn scores(parts: &Parts, merges: &[(&str, &str)]) -> Vec<f32> {
    let mut ranks: HashMap<String, usize> = HashMap::new();
    for (rank, (left, right)) in merges.iter().enumerate() {
        ranks.entry(format!("{left}{right}")).or_insert(rank);
    }
    let score = |(token, &kind): (&String, &i128)| match (kind, ranks.get(token)) {
        (NORMAL, Some(&rank)) => -(rank as f32),
        // A character by itself is never what a merge makes.
        (NORMAL, None) => -(merges.len() as f32),
        _ => 0.0,
    };
    parts.tokens.iter().zip(&parts.types).map(score).collect()
}

/// The steps in which text is split.
fn splits(described: &Json) -> Result<Vec<Split<'_>>, String> {
    let steps = match described["pretokenizers"].as_array() {
        Some(steps) => steps.iter().collect(),
        None => vec![described],
    };
    let mut found = Vec::new();
    for step in steps {
        found.push(match step["type"].as_str() {
            Some("Digits") if step["individual_digits"] == true => Split::Digits,
            Some("ByteLevel") if step["add_prefix_space"] != true => Split::Bytes(step["use_regex"] != false),
            Some("Split") if step["behavior"] == "Isolated" && step["invert"] != true => {
                let words = step["pattern"]["Regex"].as_str();
                Split::Words(words.ok_or("text is split at a fixed text, which is not known of llama.cpp")?)
            }
            _ => return Err(format!("text is split by {step}, which has no name in llama.cpp that is known here")),
        });
    }
    Ok(found)
}

/// llama.cpp's name for a way of splitting.
fn name(steps: &[Split<'_>], described: &Json) -> Result<&'static str, String> {
    match steps {
        [Split::Bytes(true)] => Ok("gpt-2"),
        [Split::Digits, Split::Bytes(true)] => Ok("smollm"),
        [Split::Words(words), Split::Bytes(false)] if *words == LLAMA3_WORDS => Ok("llama-bpe"),
        [Split::Words(words), Split::Bytes(false)] if *words == QWEN2_WORDS => Ok("qwen2"),
        _ => Err(format!("text is split by {described}, which has no name in llama.cpp that is known here")),
    }
}
