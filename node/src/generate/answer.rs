//! An answer as a whole, and what is said of it.

use actors::generation::{Event, Events, Finished, Scored};
use anyhow::{anyhow, bail};
use protocol::model::TextTokenizer;
use serde_json::{Map, Value, json};

use super::prompts::Prompt;

/// All that came of one request.
pub(super) struct Answer {
    text: String,
    tokens: Vec<u32>,
    scored: Vec<Scored>,
    finished: Finished,
}

impl Answer {
    /// Waits until it is finished.
    ///
    /// # Errors
    /// When it cannot be.
    pub(super) async fn of(events: &mut Events) -> anyhow::Result<Self> {
        let (mut text, mut tokens, mut scored) = (String::new(), Vec::new(), Vec::new());
        while let Some(event) = events.next().await {
            match event {
                Event::Prompt(_) => {}
                Event::Token(token) => {
                    text.push_str(&token.text);
                    tokens.push(token.id);
                    scored.extend(token.scored);
                }
                Event::Finished(finished) => {
                    text.push_str(&finished.text);
                    return Ok(Self { text, tokens, scored, finished });
                }
                Event::Failed(error) => return Err(error.into()),
            }
        }
        bail!(anyhow!("the engine ended before the answer did"))
    }

    /// One line.
    pub(super) fn to_json(&self, number: usize, prompt: &Prompt, tokenizer: &TextTokenizer) -> anyhow::Result<Value> {
        let Finished { reason, stop, usage, .. } = &self.finished;
        let mut line = Map::new();
        line.insert("index".into(), number.into());
        if let Some(id) = &prompt.id {
            line.insert("id".into(), id.clone());
        }
        line.insert("text".into(), self.text.as_str().into());
        line.insert("finish_reason".into(), reason.name().into());
        line.insert("stop".into(), stop.as_deref().into());
        line.insert("tokens".into(), self.tokens.clone().into());
        if !self.scored.is_empty() {
            let of = |id: u32, logprob: f32| {
                anyhow::Ok(json!({ "token": tokenizer.decode(&[id])?, "id": id, "logprob": logprob }))
            };
            let scored = |scored: &Scored| {
                let mut one = of(scored.id, scored.logprob)?;
                let top =
                    scored.top.iter().map(|&(id, logprob)| of(id, logprob)).collect::<anyhow::Result<Vec<_>>>()?;
                one["top"] = top.into();
                anyhow::Ok(one)
            };
            let all = self.scored.iter().map(scored).collect::<anyhow::Result<Vec<_>>>()?;
            line.insert("logprobs".into(), all.into());
        }
        let usage = json!({
            "prompt_tokens": usage.prompt_tokens,
            "tokens": usage.tokens,
            "passes": usage.passes,
            "drafted": usage.drafted,
            "accepted": usage.accepted,
            "first_seconds": usage.first_seconds,
            "seconds": usage.seconds,
        });
        line.insert("usage".into(), usage);
        Ok(Value::Object(line))
    }
}

/// What an answer took, in a line for people.
pub(super) fn summary(finished: &Finished) -> String {
    let Finished { reason, usage, .. } = finished;
    let mut line = format!(
        "{} tokens after {} of the prompt; the first came after {:.2} s",
        usage.tokens, usage.prompt_tokens, usage.first_seconds
    );
    if usage.tokens > 1 && usage.seconds > 0.0 {
        line.push_str(&format!(", the others at {:.2} tokens/s", (usage.tokens - 1) as f64 / usage.seconds));
    }
    if usage.drafted > 0 {
        line.push_str(&format!(" ({} of {} guesses right)", usage.accepted, usage.drafted));
    }
    if *reason == actors::generation::FinishReason::Length {
        line.push_str("; it was cut off by --max-tokens or the model's context");
    }
    line
}
