//! Methods of Python's texts and dictionaries that templates call, besides those that minijinja's own collection has.

use minijinja::value::{ValueKind, from_args};
use minijinja::{Error, ErrorKind, State, Value};

/// A method of a value.
pub(super) fn call(state: &State<'_, '_>, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    let known = match (value.as_str(), value.kind()) {
        (Some(text), _) => of_text(text, method, args)?,
        (None, ValueKind::Map) if method == "copy" => {
            let () = from_args(args)?;
            Some(value.clone())
        }
        (None, ValueKind::Seq | ValueKind::Iterable) if method == "index" => {
            let (wanted,): (Value,) = from_args(args)?;
            let place = value.try_iter()?.position(|item| item == wanted);
            Some(Value::from(place.ok_or_else(|| not_found(&wanted))?))
        }
        _ => None,
    };
    match known {
        Some(result) => Ok(result),
        None => minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args),
    }
}

fn not_found(wanted: &Value) -> Error {
    Error::new(ErrorKind::InvalidOperation, format!("`{wanted}` is not in it"))
}

fn of_text(text: &str, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    let found = match method {
        "removeprefix" => {
            let (part,): (&str,) = from_args(args)?;
            Value::from(text.strip_prefix(part).unwrap_or(text))
        }
        "removesuffix" => {
            let (part,): (&str,) = from_args(args)?;
            Value::from(text.strip_suffix(part).unwrap_or(text))
        }
        "partition" => {
            let (at,): (&str,) = from_args(args)?;
            let (before, after) = text.split_once(refuse_empty(at)?).unwrap_or((text, ""));
            let found = before.len() < text.len();
            Value::from([before, if found { at } else { "" }, after].map(str::to_owned).to_vec())
        }
        "rpartition" => {
            let (at,): (&str,) = from_args(args)?;
            match text.rsplit_once(refuse_empty(at)?) {
                Some((before, after)) => Value::from([before, at, after].map(str::to_owned).to_vec()),
                None => Value::from(["", "", text].map(str::to_owned).to_vec()),
            }
        }
        "rsplit" => {
            let (at, most): (Option<&str>, Option<i64>) = from_args(args)?;
            Value::from(rsplit(text, at, most)?)
        }
        "index" | "rindex" => {
            let (part,): (&str,) = from_args(args)?;
            let place = if method == "index" { text.find(part) } else { text.rfind(part) };
            let place = place.ok_or_else(|| not_found(&Value::from(part)))?;
            Value::from(text[..place].chars().count())
        }
        "ljust" | "rjust" | "center" => {
            let (width, fill): (usize, Option<char>) = from_args(args)?;
            Value::from(filled(text, method, width, fill.unwrap_or(' '))?)
        }
        "zfill" => {
            let (width,): (usize,) = from_args(args)?;
            let sign = text.len() - text.trim_start_matches(['+', '-']).len();
            let (sign, digits) = text.split_at(sign.min(1));
            Value::from(format!("{sign}{}", filled(digits, "rjust", width.saturating_sub(sign.len()), '0')?))
        }
        "swapcase" => {
            let () = from_args(args)?;
            let swap = |c: char| -> String {
                if c.is_uppercase() { c.to_lowercase().collect() } else { c.to_uppercase().collect() }
            };
            Value::from(text.chars().map(swap).collect::<String>())
        }
        "casefold" => {
            let () = from_args(args)?;
            Value::from(text.to_lowercase().replace('ß', "ss"))
        }
        "isdecimal" => {
            let () = from_args(args)?;
            Value::from(!text.is_empty() && text.chars().all(char::is_numeric))
        }
        "isidentifier" => {
            let () = from_args(args)?;
            let first = text.chars().next().is_some_and(|c| c.is_alphabetic() || c == '_');
            Value::from(first && text.chars().all(|c| c.is_alphanumeric() || c == '_'))
        }
        _ => return Ok(None),
    };
    Ok(Some(found))
}

fn refuse_empty(separator: &str) -> Result<&str, Error> {
    match separator {
        "" => Err(Error::new(ErrorKind::InvalidOperation, "empty separator")),
        separator => Ok(separator),
    }
}

/// Python's `rsplit`: at most so many cuts, counted from the end.
fn rsplit(text: &str, at: Option<&str>, most: Option<i64>) -> Result<Vec<String>, Error> {
    let most = most.and_then(|most| usize::try_from(most).ok());
    let mut parts: Vec<String> = Vec::new();
    let mut rest = text;
    match at {
        Some(at) => {
            refuse_empty(at)?;
            while let Some((before, after)) =
                rest.rsplit_once(at).filter(|_| most.is_none_or(|most| parts.len() < most))
            {
                parts.push(after.to_owned());
                rest = before;
            }
            parts.push(rest.to_owned());
        }
        None => {
            rest = rest.trim_end();
            while !rest.is_empty() {
                let cut = rest.rfind(char::is_whitespace).filter(|_| most.is_none_or(|most| parts.len() < most));
                let Some(cut) = cut else {
                    parts.push(rest.to_owned());
                    break;
                };
                parts.push(rest[cut..].trim_start().to_owned());
                rest = rest[..cut].trim_end();
            }
        }
    }
    parts.reverse();
    Ok(parts)
}

/// The text made up to a width.
fn filled(text: &str, method: &str, width: usize, fill: char) -> Result<String, Error> {
    /// A wider text is no part of a conversation.
    const WIDEST: usize = 1 << 16;
    if width > WIDEST {
        return Err(Error::new(ErrorKind::InvalidOperation, format!("a text cannot be made {width} wide")));
    }
    let missing = width.saturating_sub(text.chars().count());
    // Python's own rounding.
    let left = match method {
        "ljust" => 0,
        "rjust" => missing,
        _ => missing / 2 + (missing & width & 1),
    };
    let run = |count: usize| std::iter::repeat_n(fill, count).collect::<String>();
    Ok(format!("{}{text}{}", run(left), run(missing - left)))
}
