//! Settings of a `config.json` by name and kind. A setting that is `null` is one that is left out, except where somebody
//! asks ([`Settings::is_null`]): a few families tell the two apart.

use std::path::Path;

use serde_json::{Map, Value};

use crate::model::error::ModelError;

/// An object of settings.
#[derive(Clone, Copy)]
pub(super) struct Settings<'a> {
    path: &'a Path,
    /// What stands before the names in messages, such as `rope_scaling.`.
    prefix: &'a str,
    map: &'a Map<String, Value>,
}

impl<'a> Settings<'a> {
    pub(super) fn new(path: &'a Path, map: &'a Map<String, Value>) -> Self {
        Self { path, prefix: "", map }
    }

    /// Those of an object that is a setting itself.
    pub(super) fn table(&self, name: &'a str, prefix: &'a str) -> Result<Option<Self>, ModelError> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Self { path: self.path, prefix, map })),
            Some(other) => Err(self.not(name, other, "a table of settings")),
        }
    }

    pub(super) fn fail(&self, what: impl Into<String>) -> ModelError {
        ModelError::config(self.path, what)
    }

    fn not(&self, name: &str, value: &Value, kind: &str) -> ModelError {
        self.fail(format!("{}{name} is {value}, not {kind}", self.prefix))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    pub(super) fn same_as(&self, other: Self) -> bool {
        self.map == other.map
    }

    pub(super) fn get(&self, name: &str) -> Option<&'a Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    /// Whether it is given as nothing.
    pub(super) fn is_null(&self, name: &str) -> bool {
        self.map.get(name).is_some_and(Value::is_null)
    }

    pub(super) fn count(&self, name: &str) -> Result<Option<usize>, ModelError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let whole =
            value.as_u64().or_else(|| value.as_f64().filter(|v| v.fract() == 0.0 && *v >= 0.0).map(|v| v as u64));
        let count = whole.and_then(|count| usize::try_from(count).ok());
        count.map(Some).ok_or_else(|| self.not(name, value, "a count"))
    }

    pub(super) fn need_count(&self, name: &str) -> Result<usize, ModelError> {
        self.count(name)?.ok_or_else(|| self.fail(format!("the setting {}{name} is missing", self.prefix)))
    }

    pub(super) fn number(&self, name: &str) -> Result<Option<f64>, ModelError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        value.as_f64().map(Some).ok_or_else(|| self.not(name, value, "a number"))
    }

    pub(super) fn need_number(&self, name: &str) -> Result<f64, ModelError> {
        self.number(name)?.ok_or_else(|| self.fail(format!("the setting {}{name} is missing", self.prefix)))
    }

    pub(super) fn flag(&self, name: &str) -> Result<Option<bool>, ModelError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.not(name, value, "true or false"))
    }

    pub(super) fn text(&self, name: &str) -> Result<Option<&'a str>, ModelError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.not(name, value, "text"))
    }

    pub(super) fn list(&self, name: &str) -> Result<Option<&'a [Value]>, ModelError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        value.as_array().map(|list| Some(&list[..])).ok_or_else(|| self.not(name, value, "a list"))
    }

    pub(super) fn need_numbers(&self, name: &str) -> Result<Vec<f64>, ModelError> {
        let missing = || self.fail(format!("the setting {}{name} is missing", self.prefix));
        let numbers = self.list(name)?.ok_or_else(missing)?.iter().map(Value::as_f64).collect::<Option<_>>();
        numbers.ok_or_else(|| self.fail(format!("{}{name} is not a list of numbers", self.prefix)))
    }

    /// Token numbers: one or a list.
    pub(super) fn tokens(&self, name: &str) -> Result<Vec<u32>, ModelError> {
        let Some(value) = self.get(name) else { return Ok(Vec::new()) };
        let one = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let ids = match value {
            Value::Array(ids) => ids.iter().map(one).collect(),
            id => one(id).map(|id| vec![id]),
        };
        ids.ok_or_else(|| self.not(name, value, "a token's number or a list of them"))
    }
}
