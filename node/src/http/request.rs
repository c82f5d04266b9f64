//! What clients ask for: `/v1/chat/completions` and `/v1/completions` as OpenAI has them, read strictly.
//!
//! A field is followed, or the request is refused with its name. Beyond OpenAI's own, `top_k`, `min_p`,
//! `repetition_penalty`, `ignore_eos` and `chat_template_kwargs` are known, by the names that other servers have for them.

use protocol::model::ChatMessage;
use serde_json::{Map, Value, json};

use super::error::ApiError;
use super::fields::{Fields, kind, text};

/// Answers that one request may ask for, over all of its prompts.
const MOST_CHOICES: usize = 128;
/// Texts that may end an answer.
const MOST_STOPS: usize = 16;
/// Alternatives that are told of each token.
pub(super) const MOST_TOP: usize = 20;
/// Tokens of an answer to `/v1/completions` that is told no number, as OpenAI has it.
const DEFAULT_TOKENS: usize = 16;
/// More tokens than any model has positions for.
const MOST_TOKENS: usize = 1 << 24;
/// Roles of a message that say something. The others of OpenAI belong to tools, or go by another name.
const ROLES: [&str; 3] = ["system", "user", "assistant"];

/// Which of the two a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Endpoint {
    /// `/v1/chat/completions`
    Chat,
    /// `/v1/completions`
    Completions,
}

/// What is to be gone on from.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Prompt {
    /// A text.
    Text(String),
    /// Tokens as they are.
    Tokens(Vec<u32>),
    /// A conversation, and further variables of the chat template.
    Chat(Vec<ChatMessage>, Map<String, Value>),
}

/// How tokens are drawn; what is not given is left to the engine.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Drawing {
    /// 0 takes the most likely token.
    pub(super) temperature: f64,
    /// Tokens that together are this likely.
    pub(super) top_p: f64,
    /// So many of the most likely tokens; 0 takes all.
    pub(super) top_k: usize,
    /// Tokens that are this likely beside the most likely one.
    pub(super) min_p: f64,
    /// Divides what tokens that occurred already have.
    pub(super) repetition_penalty: f64,
    /// Taken from tokens that were said already.
    pub(super) presence_penalty: f64,
    /// The same, for each time.
    pub(super) frequency_penalty: f64,
    /// Makes an answer repeatable.
    pub(super) seed: Option<u64>,
}

/// A request.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Request {
    pub(super) endpoint: Endpoint,
    /// The base model, or an adapter.
    pub(super) model: String,
    pub(super) prompts: Vec<Prompt>,
    /// Answers to each prompt.
    pub(super) choices: usize,
    /// Tokens of an answer at most; `None` is what there is room for.
    pub(super) max_tokens: Option<usize>,
    pub(super) drawing: Drawing,
    /// Texts that end an answer and are no part of it.
    pub(super) stop: Vec<String>,
    /// The model's own ends do not end an answer.
    pub(super) ignore_ends: bool,
    /// How many alternatives are told of each token, if its probability is.
    pub(super) logprobs: Option<usize>,
    /// Whether the prompt stands before the answer.
    pub(super) echo: bool,
    /// Whether the answer comes as it is made.
    pub(super) stream: bool,
    /// Whether a stream ends with what was used.
    pub(super) include_usage: bool,
}

impl Request {
    /// Reads a request's body.
    ///
    /// # Errors
    /// Names the field that is wrong, unknown or not followed.
    pub(super) fn read(endpoint: Endpoint, body: &[u8]) -> Result<Self, ApiError> {
        let mut fields = Fields::of(body)?;
        let model = fields.text("model")?.ok_or_else(|| ApiError::field("model", "is missing"))?;
        let prompts = match endpoint {
            Endpoint::Chat => vec![chat(&mut fields)?],
            Endpoint::Completions => prompts(fields.take("prompt"))?,
        };
        let choices = fields.whole("n", 1..=MOST_CHOICES)?.unwrap_or(1);
        if choices * prompts.len() > MOST_CHOICES {
            let why = format_args!("asks for more than {MOST_CHOICES} answers over all prompts").to_string();
            return Err(ApiError::field("n", why));
        }
        let stream = fields.flag("stream")?.unwrap_or(false);
        let include_usage = usage_in_stream(&mut fields, stream)?;
        let (logprobs, echo) = match endpoint {
            Endpoint::Chat => (chat_logprobs(&mut fields)?, false),
            Endpoint::Completions => (fields.whole("logprobs", 0..=MOST_TOP)?, fields.flag("echo")?.unwrap_or(false)),
        };
        let request = Self {
            endpoint,
            model,
            prompts,
            choices,
            max_tokens: max_tokens(&mut fields, endpoint, echo)?,
            drawing: drawing(&mut fields)?,
            stop: stops(fields.take("stop"))?,
            ignore_ends: fields.flag("ignore_eos")?.unwrap_or(false),
            logprobs,
            echo,
            stream,
            include_usage,
        };
        refuse(&mut fields, endpoint)?;
        fields.end("")?;
        Ok(request)
    }
}

/// What both or one of the endpoints have at OpenAI, and nobody follows here.
fn refuse(fields: &mut Fields, endpoint: Endpoint) -> Result<(), ApiError> {
    let empty = || json!([]);
    fields.refuse("logit_bias", &[json!({})], "is not supported")?;
    fields.refuse("user", &[], "is not supported: nobody is told apart")?;
    if endpoint == Endpoint::Completions {
        fields.refuse("suffix", &[json!("")], "is not supported: an answer goes on from the prompt alone")?;
        return fields.refuse("best_of", &[json!(1)], "is not supported: ask for `n` answers, and choose");
    }
    let tools = "is not supported: no tools are called";
    for name in ["tools", "functions"] {
        fields.refuse(name, &[empty()], tools)?;
    }
    for name in ["tool_choice", "function_call"] {
        fields.refuse(name, &[json!("none")], tools)?;
    }
    fields.refuse("parallel_tool_calls", &[json!(false)], tools)?;
    fields.refuse("response_format", &[json!({"type": "text"})], "is not supported but as {\"type\": \"text\"}")?;
    fields.refuse("modalities", &[json!(["text"])], "is not supported but as [\"text\"]")?;
    fields.refuse("audio", &[], "is not supported")?;
    fields.refuse("prediction", &[], "is not supported")?;
    fields.refuse("reasoning_effort", &[], "is not supported; chat_template_kwargs reach the chat template")?;
    fields.refuse("web_search_options", &[], "is not supported")?;
    fields.refuse("store", &[json!(false)], "is not supported: nothing is kept")?;
    fields.refuse("metadata", &[json!({})], "is not supported: nothing is kept")?;
    fields.refuse("service_tier", &[json!("auto"), json!("default")], "is not supported")
}

/// The conversation of a request to `/v1/chat/completions`.
fn chat(fields: &mut Fields) -> Result<Prompt, ApiError> {
    let list = match fields.take("messages") {
        Some(Value::Array(list)) => list,
        Some(other) => {
            return Err(ApiError::field("messages", format_args!("is {}, where a list is expected", kind(&other))));
        }
        None => return Err(ApiError::field("messages", "is missing")),
    };
    if list.is_empty() {
        return Err(ApiError::field("messages", "is empty"));
    }
    let messages = list.into_iter().enumerate().map(|(number, value)| message(number, value));
    let messages = messages.collect::<Result<Vec<_>, _>>()?;
    let values = fields.object("chat_template_kwargs")?.unwrap_or_default();
    // A template is given these by whoever writes the conversation.
    for name in ["messages", "tools", "documents", "add_generation_prompt"] {
        if values.contains_key(name) {
            return Err(ApiError::unsupported(&format!("chat_template_kwargs.{name}"), "is not supported"));
        }
    }
    Ok(Prompt::Chat(messages, values))
}

fn message(number: usize, value: Value) -> Result<ChatMessage, ApiError> {
    let of = format!("messages[{number}]");
    let Value::Object(object) = value else {
        return Err(ApiError::field(&of, format_args!("is {}, where an object is expected", kind(&value))));
    };
    let mut fields = Fields::within(object);
    let named = |name: &str| format!("{of}.{name}");
    let role = fields.take("role").ok_or_else(|| ApiError::field(&named("role"), "is missing"))?;
    let role = text(&named("role"), role)?;
    match role.as_str() {
        known if ROLES.contains(&known) => {}
        "developer" => return Err(ApiError::unsupported(&named("role"), "is `developer`: write `system`")),
        "tool" | "function" => {
            return Err(ApiError::unsupported(&named("role"), format_args!("is `{role}`: no tools are called")));
        }
        other => {
            let known = ROLES.join("`, `");
            return Err(ApiError::field(&named("role"), format_args!("is `{other}`; there are `{known}`")));
        }
    }
    for name in ["tool_calls", "function_call", "tool_call_id", "audio"] {
        fields.refuse(name, &[json!([])], "is not supported").map_err(|_| {
            ApiError::unsupported(&named(name), "is not supported: messages are texts, and no tools are called")
        })?;
    }
    fields
        .refuse("name", &[], "")
        .map_err(|_| ApiError::unsupported(&named("name"), "is not supported: a role says who speaks"))?;
    fields
        .refuse("refusal", &[], "")
        .map_err(|_| ApiError::unsupported(&named("refusal"), "is not supported: write it as `content`"))?;
    let said = fields.take("content").ok_or_else(|| ApiError::field(&named("content"), "is missing"))?;
    let said = content(&named("content"), said)?;
    fields.end(&of)?;
    Ok(ChatMessage::new(role, said))
}

/// A text, or parts that are texts.
fn content(name: &str, value: Value) -> Result<String, ApiError> {
    let parts = match value {
        Value::Array(parts) => parts,
        value => return text(name, value),
    };
    let part = |(number, part): (usize, Value)| {
        let of = format!("{name}[{number}]");
        let Value::Object(object) = part else {
            return Err(ApiError::field(&of, format_args!("is {}, where an object is expected", kind(&part))));
        };
        let mut fields = Fields::within(object);
        match fields.take("type") {
            Some(Value::String(of_type)) if of_type == "text" => {}
            other => {
                let shown = other.unwrap_or_default();
                let why = format_args!("is {shown}; only \"text\" is supported").to_string();
                return Err(ApiError::unsupported(&format!("{of}.type"), why));
            }
        }
        let name = format!("{of}.text");
        let said = fields.take("text").ok_or_else(|| ApiError::field(&name, "is missing"))?;
        let said = text(&name, said)?;
        fields.end(&of)?;
        Ok(said)
    };
    parts.into_iter().enumerate().map(part).collect()
}

/// The prompts of a request to `/v1/completions`: a text, texts, tokens, or lists of tokens.
fn prompts(value: Option<Value>) -> Result<Vec<Prompt>, ApiError> {
    const EXPECTED: &str = "must be a text, a list of texts, a list of tokens, or a list of lists of tokens";
    let wrong = || ApiError::field("prompt", EXPECTED);
    let list = match value {
        None => return Err(ApiError::field("prompt", "is missing")),
        Some(Value::String(text)) => return Ok(vec![Prompt::Text(text)]),
        Some(Value::Array(list)) => list,
        Some(_) => return Err(wrong()),
    };
    let tokens = |list: &[Value]| -> Result<Prompt, ApiError> {
        let token = |value: &Value| value.as_u64().and_then(|token| u32::try_from(token).ok()).ok_or_else(wrong);
        Ok(Prompt::Tokens(list.iter().map(token).collect::<Result<_, _>>()?))
    };
    match list.first() {
        None => Err(ApiError::field("prompt", "is an empty list")),
        Some(Value::Number(_)) => Ok(vec![tokens(&list)?]),
        Some(_) if list.len() > MOST_CHOICES => {
            Err(ApiError::field("prompt", format_args!("has more than the {MOST_CHOICES} prompts that are taken")))
        }
        Some(Value::String(_)) => {
            let text = |value: Value| match value {
                Value::String(text) => Ok(Prompt::Text(text)),
                _ => Err(wrong()),
            };
            list.into_iter().map(text).collect()
        }
        Some(Value::Array(_)) => {
            list.iter().map(|value| value.as_array().ok_or_else(wrong).and_then(|list| tokens(list))).collect()
        }
        Some(_) => Err(wrong()),
    }
}

fn usage_in_stream(fields: &mut Fields, stream: bool) -> Result<bool, ApiError> {
    let Some(options) = fields.object("stream_options")? else { return Ok(false) };
    if !stream {
        return Err(ApiError::field("stream_options", "is set, and `stream` is not"));
    }
    let mut options = Fields::within(options);
    let include = options.flag("include_usage")?.unwrap_or(false);
    options.refuse("include_obfuscation", &[json!(false)], "is not supported")?;
    options.end("stream_options")?;
    Ok(include)
}

fn chat_logprobs(fields: &mut Fields) -> Result<Option<usize>, ApiError> {
    let (told, top) = (fields.flag("logprobs")?.unwrap_or(false), fields.whole("top_logprobs", 0..=MOST_TOP)?);
    if !told && top.is_some_and(|top| top > 0) {
        return Err(ApiError::field("top_logprobs", "is set, and `logprobs` is not true"));
    }
    Ok(told.then_some(top.unwrap_or(0)))
}

fn max_tokens(fields: &mut Fields, endpoint: Endpoint, echo: bool) -> Result<Option<usize>, ApiError> {
    // With an echo, none asks what the prompt itself is worth.
    let least = usize::from(!echo);
    let most = fields.whole("max_tokens", least..=MOST_TOKENS)?;
    if endpoint == Endpoint::Completions {
        return Ok(Some(most.unwrap_or(DEFAULT_TOKENS)));
    }
    match (most, fields.whole("max_completion_tokens", 1..=MOST_TOKENS)?) {
        (Some(one), Some(other)) if one != other => {
            Err(ApiError::field("max_tokens", format_args!("is {one}, and `max_completion_tokens` is {other}")))
        }
        (one, other) => Ok(one.or(other)),
    }
}

fn drawing(fields: &mut Fields) -> Result<Drawing, ApiError> {
    let seed = match fields.take("seed") {
        None => None,
        // Whoever counts below zero means a seed all the same.
        Some(value) => match value.as_u64().or_else(|| value.as_i64().map(i64::cast_unsigned)) {
            Some(seed) => Some(seed),
            None => return Err(ApiError::field("seed", format_args!("is {value}, where a whole number is expected"))),
        },
    };
    Ok(Drawing {
        temperature: fields.number("temperature", 0.0..=2.0)?.unwrap_or(1.0),
        top_p: fields.number("top_p", 0.0..=1.0)?.unwrap_or(1.0),
        top_k: fields.whole("top_k", 0..=MOST_TOKENS)?.unwrap_or(0),
        min_p: fields.number("min_p", 0.0..=1.0)?.unwrap_or(0.0),
        repetition_penalty: fields.number("repetition_penalty", 0.01..=10.0)?.unwrap_or(1.0),
        presence_penalty: fields.number("presence_penalty", -2.0..=2.0)?.unwrap_or(0.0),
        frequency_penalty: fields.number("frequency_penalty", -2.0..=2.0)?.unwrap_or(0.0),
        seed,
    })
}

/// A text, or a list of texts, none of which is empty.
fn stops(value: Option<Value>) -> Result<Vec<String>, ApiError> {
    let list = match value {
        None => Vec::new(),
        Some(Value::String(one)) => vec![one],
        Some(Value::Array(list)) => list.into_iter().map(|stop| text("stop", stop)).collect::<Result<_, _>>()?,
        Some(other) => {
            return Err(ApiError::field("stop", format_args!("is {}, where texts are expected", kind(&other))));
        }
    };
    if list.len() > MOST_STOPS {
        return Err(ApiError::field("stop", format_args!("has more than the {MOST_STOPS} texts that are taken")));
    }
    if list.iter().any(String::is_empty) {
        return Err(ApiError::field("stop", "has an empty text, with which every answer would end"));
    }
    Ok(list)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use actix_web::ResponseError as _;

    use super::*;

    fn completion(more: Value) -> Result<Request, ApiError> {
        read(Endpoint::Completions, json!({"model": "m", "prompt": "Once"}), more)
    }

    fn chatted(more: Value) -> Result<Request, ApiError> {
        read(Endpoint::Chat, json!({"model": "m", "messages": [{"role": "user", "content": "Hello"}]}), more)
    }

    fn read(endpoint: Endpoint, mut body: Value, more: Value) -> Result<Request, ApiError> {
        let more = more.as_object().unwrap().clone();
        body.as_object_mut().unwrap().extend(more);
        Request::read(endpoint, body.to_string().as_bytes())
    }

    /// The field that an error names, and what it says of it.
    fn named(error: &ApiError) -> (String, String) {
        let json = error.json();
        let said = |name: &str| json["error"][name].as_str().unwrap_or_default().to_owned();
        assert_eq!(error.status_code(), 400);
        assert_eq!(said("type"), "invalid_request_error");
        (said("param"), said("message"))
    }

    #[test]
    fn what_is_not_said_is_as_openai_has_it() {
        let request = completion(json!({})).unwrap();
        assert_eq!((request.max_tokens, request.choices, request.logprobs), (Some(16), 1, None));
        assert_eq!((request.drawing.temperature, request.drawing.top_p, request.drawing.seed), (1.0, 1.0, None));
        assert_eq!(request.prompts, [Prompt::Text("Once".into())]);
        let request = chatted(json!({"stop": null, "tools": [], "tool_choice": "none", "n": 1})).unwrap();
        assert_eq!((request.max_tokens, request.stream, request.stop.len()), (None, false, 0));
    }

    #[test]
    fn prompts_come_in_four_shapes() {
        let prompts = |prompt: Value| completion(json!({"prompt": prompt})).map(|request| request.prompts);
        let text = |text: &str| Prompt::Text(text.into());
        assert_eq!(prompts(json!(["a", "b"])).unwrap(), [text("a"), text("b")]);
        assert_eq!(prompts(json!([1, 2])).unwrap(), [Prompt::Tokens(vec![1, 2])]);
        assert_eq!(prompts(json!([[1], [2, 3]])).unwrap(), [Prompt::Tokens(vec![1]), Prompt::Tokens(vec![2, 3])]);
        for wrong in
            [json!([]), json!(["a", 1]), json!([1, "a"]), json!([[1], 2]), json!([-1]), json!([1.5]), json!({})]
        {
            assert_eq!(named(&prompts(wrong.clone()).unwrap_err()).0, "prompt", "{wrong}");
        }
        assert_eq!(named(&completion(json!({"prompt": null})).unwrap_err()).1, "`prompt` is missing");
    }

    #[test]
    fn every_field_that_is_not_followed_is_named() {
        for (field, value) in [
            ("suffix", json!("end")),
            ("best_of", json!(2)),
            ("logit_bias", json!({"1": 3})),
            ("user", json!("me")),
            ("colour", json!("blue")),
            ("messages", json!([])),
            ("max_completion_tokens", json!(5)),
        ] {
            let (param, message) = named(&completion(json!({field: value})).unwrap_err());
            assert!(param == field && message.contains(field), "{message}");
        }
        for (field, value) in [
            ("tools", json!([{"type": "function"}])),
            ("tool_choice", json!("auto")),
            ("response_format", json!({"type": "json_object"})),
            ("parallel_tool_calls", json!(true)),
            ("store", json!(true)),
            ("echo", json!(true)),
            ("prompt", json!("Once")),
            ("best_of", json!(1)),
        ] {
            let (param, message) = named(&chatted(json!({field: value})).unwrap_err());
            assert!(param == field && message.contains(field), "{message}");
        }
    }

    #[test]
    fn values_that_cannot_be_are_named_with_what_can() {
        for (field, value, said) in [
            ("temperature", json!(2.5), "from 0 to 2"),
            ("temperature", json!("hot"), "a text"),
            ("top_p", json!(-0.1), "from 0 to 1"),
            ("top_k", json!(1.5), "a whole number"),
            ("max_tokens", json!(0), "from 1 to"),
            ("max_tokens", json!(-3), "from 1 to"),
            ("n", json!(0), "from 1 to 128"),
            ("n", json!(129), "from 1 to 128"),
            ("logprobs", json!(true), "whole number"),
            ("stream", json!("yes"), "true or false"),
            ("stop", json!([""]), "an empty text"),
            ("stop", json!([1]), "a number"),
            ("seed", json!(0.5), "whole number"),
            ("stream_options", json!({"include_usage": true}), "`stream` is not"),
        ] {
            let (param, message) = named(&completion(json!({field: value})).unwrap_err());
            assert!(param == field && message.contains(said), "{message}");
        }
        let (param, _) = named(&completion(json!({"n": 64, "prompt": ["a", "b", "c"]})).unwrap_err());
        assert_eq!(param, "n");
        let (param, _) = named(&chatted(json!({"top_logprobs": 3})).unwrap_err());
        assert_eq!(param, "top_logprobs");
        let (param, _) = named(&chatted(json!({"max_tokens": 3, "max_completion_tokens": 4})).unwrap_err());
        assert_eq!(param, "max_tokens");
        assert_eq!(completion(json!({"max_tokens": 0, "echo": true})).unwrap().max_tokens, Some(0));
        assert_eq!(completion(json!({"seed": -1})).unwrap().drawing.seed, Some(u64::MAX));
        let usage = json!({"stream": true, "stream_options": {"include_usage": true}});
        assert!(completion(usage).unwrap().include_usage);
    }

    #[test]
    fn messages_are_texts_and_nothing_else() {
        let parts = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
        let request =
            chatted(json!({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": parts}]}));
        let Prompt::Chat(messages, _) = &request.unwrap().prompts[0] else { panic!("a conversation") };
        assert_eq!((messages[0].role(), messages[1].content()), ("system", Some("ab")));
        for (message, param) in [
            (json!("Hello"), "messages[0]"),
            (json!({"content": "a"}), "messages[0].role"),
            (json!({"role": "user"}), "messages[0].content"),
            (json!({"role": "user", "content": 1}), "messages[0].content"),
            (json!({"role": "tool", "content": "a", "tool_call_id": "1"}), "messages[0].role"),
            (json!({"role": "robot", "content": "a"}), "messages[0].role"),
            (json!({"role": "assistant", "tool_calls": [{}]}), "messages[0].tool_calls"),
            (json!({"role": "user", "content": "a", "name": "me"}), "messages[0].name"),
            (json!({"role": "user", "content": "a", "mood": 1}), "messages[0].mood"),
            (json!({"role": "user", "content": [{"type": "image_url"}]}), "messages[0].content[0].type"),
            (json!({"role": "user", "content": [{"type": "text", "text": "a", "x": 1}]}), "messages[0].content[0].x"),
        ] {
            assert_eq!(named(&chatted(json!({"messages": [message]})).unwrap_err()).0, param);
        }
    }

    #[test]
    fn bodies_that_are_no_object_are_refused() {
        for body in ["", "[]", "{", "{\"model\": \"m\", \"model\": \"n\"}", "\u{1}", "{\"a\": 1} x"] {
            let error = Request::read(Endpoint::Completions, body.as_bytes()).unwrap_err();
            assert!(named(&error).1.contains("JSON"), "{error}");
        }
        let deep = "[".repeat(100_000);
        assert!(Request::read(Endpoint::Chat, format!("{{\"model\": {deep}").as_bytes()).is_err());
    }
}
