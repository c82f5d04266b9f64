//! The messages of a conversation: OpenAI's `role` and `content`, ShareGPT's `from` and `value`.

use protocol::model::ChatMessage;
use serde_json::{Map, Value, json};

use super::{Turn, kind, structured};
use crate::data::FieldNames;

/// What data sets call those who speak, by the names that templates know.
const ROLES: [(&str, &str); 13] = [
    ("human", "user"),
    ("prompter", "user"),
    ("customer", "user"),
    ("gpt", "assistant"),
    ("chatgpt", "assistant"),
    ("bing", "assistant"),
    ("bard", "assistant"),
    ("bot", "assistant"),
    ("chatbot", "assistant"),
    ("model", "assistant"),
    ("observation", "tool"),
    ("function_response", "tool"),
    ("tool_response", "tool"),
];

/// The turns of the list `value`, which the record calls `name`.
///
/// # Errors
/// What is wrong with it, in words.
pub(super) fn turns(name: &str, value: Value, names: &FieldNames) -> Result<Vec<Turn>, String> {
    let expected = || format!("a list of {{\"{}\", \"{}\"}}", names.role, names.content);
    let list = match structured(name, value) {
        Ok(Value::Array(list)) => list,
        Ok(other) => return Err(format!("`{name}` is {}, where {} is expected", kind(&other), expected())),
        Err(_) => return Err(format!("`{name}` is a text, where {} is expected", expected())),
    };
    if list.is_empty() {
        return Err(format!(
            "`{name}` is empty, where {} with at least one turn of the assistant is expected",
            expected()
        ));
    }
    let turn = |(number, value): (usize, Value)| match value {
        Value::Object(fields) => turn(fields, names).map_err(|what| format!("turn {number} of `{name}`: {what}")),
        other => Err(format!("turn {number} of `{name}` is {}, where an object is expected", kind(&other))),
    };
    (1..).zip(list).map(turn).collect()
}

fn turn(fields: Map<String, Value>, names: &FieldNames) -> Result<Turn, String> {
    let has = |name: &str| fields.get(name).is_some_and(|value| !value.is_null());
    let role_name = if has(&names.role) || !has(&names.from) { &names.role } else { &names.from };
    let content_name = if has(&names.content) || !has(&names.value) { &names.content } else { &names.value };
    let (mut message, mut weight, mut train) = (Map::new(), None, None);
    for (name, value) in fields.into_iter().filter(|(_, value)| !value.is_null()) {
        if name == *role_name {
            message.insert("role".to_owned(), role(&name, &value)?.into());
        } else if name == *content_name {
            message.insert("content".to_owned(), content(&name, value)?);
        } else if name == names.weight {
            weight = Some(weighed(&name, &value)?);
        } else if name == names.train {
            train = Some(
                value
                    .as_bool()
                    .ok_or_else(|| format!("`{name}` is {}, where true or false is expected", kind(&value)))?,
            );
        } else if name == "tool_calls" {
            message.insert(name.clone(), structured(&name, value)?);
        } else {
            message.insert(name, value);
        }
    }
    let message = ChatMessage::from(message);
    if message.role().is_empty() {
        return Err(format!("`{role_name}` is missing"));
    }
    let answers = message.role() == "assistant";
    let says = ["content", "tool_calls"].iter().any(|name| message.fields().contains_key(*name));
    if !says && message.reasoning().is_none() {
        return Err(format!("`{content_name}` is missing"));
    }
    let learnt = match (weight, train) {
        (Some(weight), Some(train)) if weight != train => {
            return Err(format!("`{}` and `{}` contradict each other", names.weight, names.train));
        }
        (_, Some(train)) => train,
        (Some(true), None) if !answers => {
            return Err(format!(
                "it has a `{}`, and is not the assistant's; \"{}\": true has another's turn learnt",
                names.weight, names.train
            ));
        }
        (Some(weight), None) => weight,
        (None, None) => answers,
    };
    Ok(Turn { message, learnt })
}

fn role(name: &str, value: &Value) -> Result<String, String> {
    let role = value.as_str().ok_or_else(|| format!("`{name}` is {}, where a text is expected", kind(value)))?;
    if role == "function_call" {
        return Err(
            "a turn `function_call` is not taken; write it as a turn of the assistant with `tool_calls`".to_owned()
        );
    }
    let known = ROLES.iter().find(|(theirs, _)| *theirs == role);
    Ok(known.map_or(role, |(_, ours)| ours).to_owned())
}

/// A text, or a list of parts that are texts.
fn content(name: &str, value: Value) -> Result<Value, String> {
    match value {
        Value::String(_) => Ok(value),
        Value::Array(parts) => parts.into_iter().map(part).collect::<Result<Vec<_>, _>>().map(Value::Array),
        other => Err(format!("`{name}` is {}, where a text is expected", kind(&other))),
    }
}

fn part(part: Value) -> Result<Value, String> {
    match &part {
        Value::String(text) => Ok(json!({"type": "text", "text": text})),
        Value::Object(fields) => match (fields.get("type").and_then(Value::as_str), fields.get("text")) {
            (Some("text") | None, Some(Value::String(_))) => Ok(part),
            (Some(other), _) if other != "text" => {
                Err(format!("its content has a part of type `{other}`; only texts are taken"))
            }
            _ => Err("its content has a part without a text".to_owned()),
        },
        other => Err(format!("its content has a part that is {}, where a text is expected", kind(other))),
    }
}

/// Whether a message of this weight is learnt.
fn weighed(name: &str, value: &Value) -> Result<bool, String> {
    match value.as_f64() {
        Some(0.0) => Ok(false),
        Some(1.0) => Ok(true),
        Some(other) => Err(format!("`{name}` is {other}; a turn is learnt (1) or not (0)")),
        None => Err(format!("`{name}` is {}, where 0 or 1 is expected", kind(value))),
    }
}
