//! Values as Python writes them: `str`, `repr` and `json.dumps`.

use std::fmt::Write as _;

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, Value};

/// Deeper values than this are no conversation.
const DEPTH: usize = 64;

/// Python's `str(value)`.
pub(super) fn text(value: &Value) -> Result<String, Error> {
    match value.as_str() {
        Some(text) => Ok(text.to_owned()),
        None => repr(value),
    }
}

/// Python's `repr(value)`.
pub(super) fn repr(value: &Value) -> Result<String, Error> {
    let mut out = String::new();
    write_repr(value, &mut out, 0)?;
    Ok(out)
}

fn write_repr(value: &Value, out: &mut String, depth: usize) -> Result<(), Error> {
    check(depth)?;
    match value.kind() {
        ValueKind::String => quote(value.as_str().unwrap_or_default(), out),
        ValueKind::Number if !value.is_integer() => out.push_str(&float(value)?),
        ValueKind::Seq | ValueKind::Iterable => {
            out.push('[');
            for (i, item) in value.try_iter()?.enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                write_repr(&item, out, depth + 1)?;
            }
            out.push(']');
        }
        ValueKind::Map => {
            out.push('{');
            for (i, key) in value.try_iter()?.enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                write_repr(&key, out, depth + 1)?;
                out.push_str(": ");
                write_repr(&value.get_item(&key)?, out, depth + 1)?;
            }
            out.push('}');
        }
        _ => out.push_str(&value.to_string()),
    }
    Ok(())
}

/// A string in Python's quotes: single ones, unless there are single and no double ones in it.
fn quote(text: &str, out: &mut String) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => out.extend(['\\', c]),
            c if c.is_control() => {
                let _ = write!(out, "\\x{:02x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push(quote);
}

/// A float as Python writes it: the shortest digits that give it back, with an exponent from 1e16 on and below 1e-4.
fn float(value: &Value) -> Result<String, Error> {
    let value = f64::try_from(value.clone())?;
    if value.is_nan() {
        return Ok("nan".into());
    }
    if value.is_infinite() {
        return Ok(if value > 0.0 { "inf" } else { "-inf" }.into());
    }
    let size = value.abs();
    if size != 0.0 && !(1e-4..1e16).contains(&size) {
        let short = format!("{value:e}");
        let (digits, exponent) = short.split_once('e').unwrap_or((&short, "0"));
        let (sign, exponent) = match exponent.strip_prefix('-') {
            Some(exponent) => ('-', exponent),
            None => ('+', exponent),
        };
        return Ok(format!("{digits}e{sign}{exponent:0>2}"));
    }
    let short = value.to_string();
    Ok(if short.contains('.') { short } else { format!("{short}.0") })
}

fn check(depth: usize) -> Result<(), Error> {
    if depth > DEPTH {
        return Err(Error::new(ErrorKind::InvalidOperation, format!("a value is nested more than {DEPTH} deep")));
    }
    Ok(())
}

/// How `json.dumps` is asked to write.
struct Json {
    ascii: bool,
    sorted: bool,
    indent: Option<String>,
    between: String,
    after_key: String,
}

/// The filter `tojson` as transformers sets it up: Python's `json.dumps` with `ensure_ascii=False` by default.
pub(super) fn to_json(value: &Value, options: &Kwargs) -> Result<Value, Error> {
    let indent = match options.get::<Option<Value>>("indent")? {
        None => None,
        Some(indent) if indent.is_none() => None,
        Some(indent) => Some(match indent.as_str() {
            Some(text) => text.to_owned(),
            None => " ".repeat(usize::try_from(indent)?.min(64)),
        }),
    };
    let separators: Option<Value> = options.get("separators")?;
    let separators = separators.filter(|separators| !separators.is_none());
    let (between, after_key) = match separators {
        None => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
        Some(two) => {
            let part = |at: usize| two.get_item_by_index(at).and_then(|part| text(&part));
            (part(0)?, part(1)?)
        }
    };
    let json = Json {
        ascii: options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sorted: options.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        indent,
        between,
        after_key,
    };
    options.assert_all_used()?;
    let mut out = String::new();
    json.write(value, &mut out, 0)?;
    Ok(Value::from(out))
}

impl Json {
    fn write(&self, value: &Value, out: &mut String, depth: usize) -> Result<(), Error> {
        check(depth)?;
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number if value.is_integer() => out.push_str(&value.to_string()),
            ValueKind::Number => out.push_str(match float(value)?.as_str() {
                "nan" => "NaN",
                "inf" => "Infinity",
                "-inf" => "-Infinity",
                number => {
                    out.push_str(number);
                    return Ok(());
                }
            }),
            ValueKind::String => self.string(value.as_str().unwrap_or_default(), out),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.group(['[', ']'], &items, out, depth, |item, out| self.write(item, out, depth + 1))?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sorted {
                    keys.sort();
                }
                self.group(['{', '}'], &keys, out, depth, |key, out| {
                    self.string(&text(key)?, out);
                    out.push_str(&self.after_key);
                    self.write(&value.get_item(key)?, out, depth + 1)
                })?;
            }
            other => {
                let what = format!("a value that is {other} cannot be written as JSON");
                return Err(Error::new(ErrorKind::BadSerialization, what));
            }
        }
        Ok(())
    }

    fn group(
        &self,
        [open, close]: [char; 2],
        items: &[Value],
        out: &mut String,
        depth: usize,
        mut write: impl FnMut(&Value, &mut String) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let line = |out: &mut String, depth: usize| {
            if let Some(indent) = &self.indent {
                out.push('\n');
                (0..depth).for_each(|_| out.push_str(indent));
            }
        };
        out.push(open);
        for (i, item) in items.iter().enumerate() {
            out.push_str(if i > 0 { &self.between } else { "" });
            line(out, depth + 1);
            write(item, out)?;
        }
        if !items.is_empty() {
            line(out, depth);
        }
        out.push(close);
        Ok(())
    }

    fn string(&self, text: &str, out: &mut String) {
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                c if u32::from(c) < 0x20 || self.ascii && !(' '..='~').contains(&c) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        let _ = write!(out, "\\u{unit:04x}");
                    }
                }
                c => out.push(c),
            }
        }
        out.push('"');
    }
}

/// Python's `%`: formatting on a text, else the remainder, which has the divisor's sign.
pub(super) fn percent(state: &minijinja::State<'_, '_>, left: &Value, right: &[Value]) -> Result<Value, Error> {
    if left.as_str().is_some() {
        let written = |value: &Value| match value.kind() {
            // A mapping stays one: its members are asked for by name.
            ValueKind::Seq | ValueKind::Iterable => repr(value).map(Value::from),
            _ => Ok(value.clone()),
        };
        let arguments = right.iter().map(written).collect::<Result<Vec<_>, _>>()?;
        return state.apply_filter("format", &[std::slice::from_ref(left), &arguments[..]].concat());
    }
    let [right] = right else {
        return Err(Error::new(ErrorKind::InvalidOperation, "a remainder is of two numbers"));
    };
    let cannot =
        || Error::new(ErrorKind::InvalidOperation, format!("{left} % {right} is neither a remainder nor a format"));
    if left.is_integer() && right.is_integer() {
        let (a, b) = (i128::try_from(left.clone())?, i128::try_from(right.clone())?);
        let rest = a.checked_rem(b).ok_or_else(cannot)?;
        return Ok(Value::from(if rest != 0 && (rest < 0) != (b < 0) { rest + b } else { rest }));
    }
    if left.kind() != ValueKind::Number || right.kind() != ValueKind::Number {
        return Err(cannot());
    }
    let (a, b) = (f64::try_from(left.clone())?, f64::try_from(right.clone())?);
    let rest = a % b;
    Ok(Value::from(if rest != 0.0 && (rest < 0.0) != (b < 0.0) { rest + b } else { rest }))
}
