//! Answers as OpenAI's clients read them, whole or in pieces.

use actors::generation::Scored;
use serde_json::{Map, Value, json};

use super::pieces::Pieces;
use super::request::Endpoint;

/// What stands in every object of one answer.
pub(super) struct Shape<'a> {
    pub(super) endpoint: Endpoint,
    /// Names the answer.
    pub(super) id: String,
    /// Seconds since 1970.
    pub(super) created: u64,
    /// As the request names it.
    pub(super) model: String,
    /// Whether each token's probability is told.
    pub(super) logprobs: bool,
    /// Whether a stream ends with what was used.
    pub(super) include_usage: bool,
    pub(super) pieces: Pieces<'a>,
}

/// Some of a choice: of a stream, or all of it.
#[derive(Clone, Debug, Default)]
pub(super) struct Part {
    pub(super) text: String,
    /// The tokens that it is of, with their probabilities; a first one of a prompt has none.
    pub(super) tokens: Vec<(u32, Option<Scored>)>,
    /// Characters of the choice that came before it.
    pub(super) offset: usize,
}

/// Tokens of all prompts and answers of a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Used {
    pub(super) prompt: usize,
    /// Of these, tokens whose keys and values were still there.
    pub(super) reused: usize,
    pub(super) written: usize,
}

impl Shape<'_> {
    /// The first piece of a choice, where there is one that says nothing yet.
    pub(super) fn opening(&self, index: usize) -> Option<Value> {
        let delta = json!({"role": "assistant", "content": ""});
        (self.endpoint == Endpoint::Chat).then(|| self.chunk(index, delta, &Part::default(), None))
    }

    /// A piece of a choice, and why it ends if it does.
    pub(super) fn piece(&self, index: usize, part: &Part, reason: Option<&str>) -> Value {
        let delta = if part.text.is_empty() && reason.is_some() { json!({}) } else { json!({"content": part.text}) };
        self.chunk(index, delta, part, reason)
    }

    fn chunk(&self, index: usize, delta: Value, part: &Part, reason: Option<&str>) -> Value {
        let logprobs = if part.tokens.is_empty() { Value::Null } else { self.logprobs(part) };
        let choice = match self.endpoint {
            Endpoint::Chat => {
                json!({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason})
            }
            Endpoint::Completions => {
                json!({"index": index, "text": part.text, "logprobs": logprobs, "finish_reason": reason})
            }
        };
        let mut chunk = self.object(match self.endpoint {
            Endpoint::Chat => "chat.completion.chunk",
            Endpoint::Completions => "text_completion",
        });
        chunk.insert("choices".to_owned(), json!([choice]));
        if self.include_usage {
            chunk.insert("usage".to_owned(), Value::Null);
        }
        Value::Object(chunk)
    }

    /// What ends a stream that was asked to say what was used.
    pub(super) fn usage(&self, used: Used) -> Value {
        let mut chunk = self.object(match self.endpoint {
            Endpoint::Chat => "chat.completion.chunk",
            Endpoint::Completions => "text_completion",
        });
        chunk.insert("choices".to_owned(), json!([]));
        chunk.insert("usage".to_owned(), used.json());
        Value::Object(chunk)
    }

    /// All choices with why they ended.
    pub(super) fn whole(&self, choices: &[(Part, &'static str)], used: Used) -> Value {
        let choice = |(index, (part, reason)): (usize, &(Part, &str))| {
            let logprobs = if self.logprobs { self.logprobs(part) } else { Value::Null };
            match self.endpoint {
                Endpoint::Chat => {
                    let message = json!({"role": "assistant", "content": part.text, "refusal": null});
                    json!({"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason})
                }
                Endpoint::Completions => {
                    json!({"index": index, "text": part.text, "logprobs": logprobs, "finish_reason": reason})
                }
            }
        };
        let mut whole = self.object(match self.endpoint {
            Endpoint::Chat => "chat.completion",
            Endpoint::Completions => "text_completion",
        });
        whole.insert("choices".to_owned(), choices.iter().enumerate().map(choice).collect());
        whole.insert("usage".to_owned(), used.json());
        Value::Object(whole)
    }

    /// Characters of a part's tokens, where they are told.
    pub(super) fn width(&self, part: &Part) -> usize {
        part.tokens.iter().map(|&(token, _)| self.pieces.of(token).chars().count()).sum()
    }

    fn object(&self, kind: &str) -> Map<String, Value> {
        let fields = [
            ("id", json!(self.id)),
            ("object", json!(kind)),
            ("created", json!(self.created)),
            ("model", json!(self.model)),
        ];
        fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }

    fn logprobs(&self, part: &Part) -> Value {
        if !self.logprobs {
            return Value::Null;
        }
        match self.endpoint {
            Endpoint::Chat => self.chat_logprobs(part),
            Endpoint::Completions => self.completions_logprobs(part),
        }
    }

    fn chat_logprobs(&self, part: &Part) -> Value {
        let entry = |(token, logprob): (u32, f32)| {
            let text = self.pieces.of(token);
            let bytes = Pieces::bytes(&text);
            json!({"token": text, "logprob": logprob, "bytes": bytes})
        };
        let content = part.tokens.iter().filter_map(|(token, scored)| {
            let scored = scored.as_ref()?;
            let mut told = entry((*token, scored.logprob));
            told["top_logprobs"] = scored.top.iter().copied().map(entry).collect();
            Some(told)
        });
        json!({"content": content.collect::<Vec<_>>(), "refusal": null})
    }

    fn completions_logprobs(&self, part: &Part) -> Value {
        let mut offset = part.offset;
        let (mut texts, mut offsets, mut logprobs, mut tops) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (token, scored) in &part.tokens {
            let text = self.pieces.of(*token);
            offsets.push(offset);
            offset += text.chars().count();
            logprobs.push(scored.as_ref().map(|scored| scored.logprob));
            tops.push(scored.as_ref().map(|scored| self.by_text(scored)));
            texts.push(text);
        }
        json!({"tokens": texts, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets})
    }

    /// The likeliest tokens and the one that stands there, by their texts. Of tokens with the same text, such as parts of
    /// characters, the likeliest is told.
    fn by_text(&self, scored: &Scored) -> Value {
        let mut told = Map::new();
        for &(token, logprob) in scored.top.iter().chain([&(scored.id, scored.logprob)]) {
            let text = self.pieces.of(token);
            let likelier = told.get(&text).and_then(Value::as_f64).is_none_or(|known| f64::from(logprob) > known);
            if likelier {
                told.insert(text, json!(logprob));
            }
        }
        Value::Object(told)
    }
}

impl Used {
    /// Together with those of another choice of the same prompt or of another one.
    pub(super) fn add(&mut self, other: Self) {
        self.prompt += other.prompt;
        self.reused += other.reused;
        self.written += other.written;
    }

    fn json(self) -> Value {
        let Self { prompt, reused, written } = self;
        json!({
            "prompt_tokens": prompt,
            "completion_tokens": written,
            "total_tokens": prompt + written,
            "prompt_tokens_details": {"cached_tokens": reused},
        })
    }
}
