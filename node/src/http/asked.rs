//! From a client's request to the engine's: names are looked up, conversations written, texts encoded.

use std::sync::Arc;

use actors::generation::{self, Events, Sampling, Stops};
use actors::lora::LoraAdapters;

use super::error::ApiError;
use super::request::{Drawing, Endpoint, Prompt, Request};
use super::served::{Models, refused};

/// A prompt as the model reads it.
pub(super) struct Encoded {
    pub(super) tokens: Vec<u32>,
    /// Its text, where it is to stand before the answer.
    pub(super) text: String,
}

/// Answers under way: for each choice the prompt that it belongs to, and what comes of it.
pub(super) struct Asked {
    pub(super) prompts: Vec<Encoded>,
    pub(super) choices: Vec<(usize, Events)>,
}

/// Writes and encodes a request's prompts. Takes a while if they are long.
///
/// # Errors
/// When the template refuses the conversation, the model has none, or a text cannot be encoded.
pub(super) fn encode(models: &Models, request: &Request) -> Result<Vec<Encoded>, ApiError> {
    let tokenizer = models.engine.tokenizer();
    let field = prompt_field(request.endpoint);
    let wrong = |error: protocol::model::ModelError| ApiError::field(field, format_args!("cannot be read: {error}"));
    let encoded = |prompt: &Prompt| -> Result<Encoded, ApiError> {
        let (tokens, text) = match prompt {
            Prompt::Text(text) => (tokenizer.encode(text, true).map_err(wrong)?, text.clone()),
            Prompt::Tokens(tokens) => {
                // The engine names a token that there is not.
                let known = tokens.iter().all(|&token| (token as usize) < tokenizer.vocabulary());
                let text = if request.echo && known { tokenizer.decode(tokens).map_err(wrong)? } else { String::new() };
                (tokens.clone(), text)
            }
            Prompt::Chat(messages, values) => {
                let template = models.template().ok_or_else(|| {
                    ApiError::field(field, "cannot be written: the model has no chat template; ask /v1/completions")
                })?;
                let mut all = models.style.values.clone();
                all.extend(values.clone());
                let text = models.style.write(template, messages, &all).map_err(wrong)?;
                (tokenizer.encode(&text, false).map_err(wrong)?, text)
            }
        };
        Ok(Encoded { tokens, text })
    };
    request.prompts.iter().map(encoded).collect()
}

/// Hands a request's prompts to the engine, each as often as answers are asked for.
///
/// # Errors
/// When the engine refuses one; those before it are cancelled.
pub(super) fn submit(
    models: &Models,
    request: &Request,
    adapter: Option<&Arc<LoraAdapters>>,
    prompts: Vec<Encoded>,
) -> Result<Asked, ApiError> {
    let mut choices = Vec::with_capacity(prompts.len() * request.choices);
    for (number, prompt) in prompts.iter().enumerate() {
        let room = models.engine.room(prompt.tokens.len());
        for choice in 0..request.choices {
            let asked = generation::Request {
                prompt: prompt.tokens.clone(),
                max_tokens: request.max_tokens.unwrap_or(room),
                sampling: sampling(&request.drawing, choice)?,
                stops: Stops { texts: request.stop.clone(), tokens: Vec::new(), ignore_ends: request.ignore_ends },
                adapter: adapter.cloned(),
                logprobs: request.logprobs,
                prompt_logprobs: request.logprobs.filter(|_| request.echo),
                special: false,
            };
            let events =
                models.engine.submit(asked).map_err(|error| refused(&error, prompt_field(request.endpoint)))?;
            choices.push((number, events));
        }
    }
    Ok(Asked { prompts, choices })
}

/// The field of a request that has its prompt.
pub(super) fn prompt_field(endpoint: Endpoint) -> &'static str {
    match endpoint {
        Endpoint::Chat => "messages",
        Endpoint::Completions => "prompt",
    }
}

/// How a choice's tokens are drawn: each draws its own, which a seed makes repeatable.
fn sampling(drawing: &Drawing, choice: usize) -> Result<Sampling, ApiError> {
    let Drawing { temperature, top_p, top_k, min_p, repetition_penalty, seed, .. } = *drawing;
    for (name, penalty) in
        [("presence_penalty", drawing.presence_penalty), ("frequency_penalty", drawing.frequency_penalty)]
    {
        if penalty != 0.0 {
            return Err(ApiError::unsupported(name, "is not supported; repetition_penalty is"));
        }
    }
    // OpenAI lets nothing but the likeliest token through at 0.
    let (top_p, top_k) = if top_p == 0.0 { (1.0, 1) } else { (top_p, top_k) };
    let seed = seed.map(|seed| seed.wrapping_add(choice as u64));
    Ok(Sampling { temperature, top_p, top_k, min_p, repetition_penalty, seed })
}
