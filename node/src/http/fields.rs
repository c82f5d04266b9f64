//! The fields of a request's body, each taken once by whoever knows it. What is left over is refused by name, so that nothing
//! that was asked for is ignored in silence.

use std::fmt;
use std::ops::RangeInclusive;

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use super::error::ApiError;

/// A body's fields that nobody took yet. A field that is null is the same as one that is not there.
pub(super) struct Fields {
    left: Map<String, Value>,
}

impl Fields {
    /// The fields of a JSON object.
    ///
    /// # Errors
    /// When it is none, or has a field twice.
    pub(super) fn of(body: &[u8]) -> Result<Self, ApiError> {
        let Distinct(mut left) =
            serde_json::from_slice(body).map_err(|error| ApiError::body(format_args!("is no JSON object: {error}")))?;
        left.retain(|_, value| !value.is_null());
        Ok(Self { left })
    }

    /// Those of an object within a body.
    pub(super) fn within(mut object: Map<String, Value>) -> Self {
        object.retain(|_, value| !value.is_null());
        Self { left: object }
    }

    /// Takes a field.
    pub(super) fn take(&mut self, name: &str) -> Option<Value> {
        self.left.shift_remove(name)
    }

    /// Takes a text.
    ///
    /// # Errors
    /// When it is none.
    pub(super) fn text(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        self.take(name).map(|value| text(name, value)).transpose()
    }

    /// Takes a number within a range.
    ///
    /// # Errors
    /// When it is none, or lies outside.
    pub(super) fn number(&mut self, name: &str, range: RangeInclusive<f64>) -> Result<Option<f64>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        match value.as_f64() {
            Some(number) if range.contains(&number) => Ok(Some(number)),
            Some(number) => {
                let (least, most) = range.into_inner();
                Err(ApiError::field(name, format_args!("is {number}, and must be from {least} to {most}")))
            }
            None => Err(ApiError::field(name, format_args!("is {}, where a number is expected", kind(&value)))),
        }
    }

    /// Takes a whole number within a range.
    ///
    /// # Errors
    /// When it is none, or lies outside.
    pub(super) fn whole(&mut self, name: &str, range: RangeInclusive<usize>) -> Result<Option<usize>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        match value.as_u64().and_then(|number| usize::try_from(number).ok()) {
            Some(number) if range.contains(&number) => Ok(Some(number)),
            _ if value.is_number() => {
                let (least, most) = range.into_inner();
                let why = format_args!("is {value}, and must be a whole number from {least} to {most}").to_string();
                Err(ApiError::field(name, why))
            }
            _ => Err(ApiError::field(name, format_args!("is {}, where a whole number is expected", kind(&value)))),
        }
    }

    /// Takes true or false.
    ///
    /// # Errors
    /// When it is neither.
    pub(super) fn flag(&mut self, name: &str) -> Result<Option<bool>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(flag)),
            Some(other) => {
                Err(ApiError::field(name, format_args!("is {}, where true or false is expected", kind(&other))))
            }
        }
    }

    /// Takes an object.
    ///
    /// # Errors
    /// When it is none.
    pub(super) fn object(&mut self, name: &str) -> Result<Option<Map<String, Value>>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Object(fields)) => Ok(Some(fields)),
            Some(other) => Err(ApiError::field(name, format_args!("is {}, where an object is expected", kind(&other)))),
        }
    }

    /// Refuses a field that this server does not follow, unless its value asks for what is done anyway.
    ///
    /// # Errors
    /// When it asks for something else.
    pub(super) fn refuse(&mut self, name: &str, neutral: &[Value], why: &str) -> Result<(), ApiError> {
        match self.take(name) {
            Some(value) if !neutral.contains(&value) => Err(ApiError::unsupported(name, why)),
            _ => Ok(()),
        }
    }

    /// Refuses what is left, within the field `of` where one is named.
    ///
    /// # Errors
    /// Names the first one.
    pub(super) fn end(self, of: &str) -> Result<(), ApiError> {
        match self.left.into_iter().next() {
            None => Ok(()),
            Some((name, _)) if of.is_empty() => Err(ApiError::unknown_field(&name)),
            Some((name, _)) => Err(ApiError::unknown_field(&format!("{of}.{name}"))),
        }
    }
}

/// A text.
///
/// # Errors
/// When the value is none.
pub(super) fn text(name: &str, value: Value) -> Result<String, ApiError> {
    match value {
        Value::String(text) => Ok(text),
        other => Err(ApiError::field(name, format_args!("is {}, where a text is expected", kind(&other)))),
    }
}

/// What a value is, in words.
pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// An object none of whose fields occurs twice, nor of those within it: of two values that contradict each other one would be
/// ignored.
struct Distinct(Map<String, Value>);

impl<'de> Deserialize<'de> for Distinct {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match DistinctValue::deserialize(deserializer)?.0 {
            Value::Object(fields) => Ok(Self(fields)),
            other => Err(D::Error::custom(format_args!("it is {}, where an object is expected", kind(&other)))),
        }
    }
}

/// Any value, of whose objects the same holds.
struct DistinctValue(Value);

impl<'de> Deserialize<'de> for DistinctValue {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Reader;
        impl<'de> Visitor<'de> for Reader {
            type Value = Value;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON value")
            }

            fn visit_unit<E>(self) -> Result<Value, E> {
                Ok(Value::Null)
            }

            fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
                Ok(value.into())
            }

            fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
                Ok(value.into())
            }

            fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
                Ok(value.into())
            }

            fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
                Ok(value.into())
            }

            fn visit_str<E>(self, value: &str) -> Result<Value, E> {
                Ok(value.into())
            }

            fn visit_string<E>(self, value: String) -> Result<Value, E> {
                Ok(value.into())
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
                let mut all = Vec::new();
                while let Some(DistinctValue(value)) = access.next_element()? {
                    all.push(value);
                }
                Ok(Value::Array(all))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
                let mut fields = Map::new();
                while let Some((name, DistinctValue(value))) = access.next_entry::<String, _>()? {
                    if fields.contains_key(&name) {
                        return Err(A::Error::custom(format_args!("the field `{name}` occurs twice")));
                    }
                    fields.insert(name, value);
                }
                Ok(Value::Object(fields))
            }
        }
        deserializer.deserialize_any(Reader).map(Self)
    }
}
