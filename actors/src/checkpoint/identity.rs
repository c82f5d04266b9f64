//! What must be the same for a checkpoint to be of this run.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Named values, such as `training.learning_rate` and `0.0002`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity(BTreeMap<String, String>);

/// A value that two runs do not share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Its name.
    pub field: String,
    /// What the checkpoint says.
    pub saved: Option<String>,
    /// What this run says.
    pub now: Option<String>,
}

impl Identity {
    /// The same with one more value.
    #[must_use]
    pub fn with(mut self, field: impl Into<String>, value: impl fmt::Display) -> Self {
        self.0.insert(field.into(), value.to_string());
        self
    }

    /// The same with every value of some settings, named by their path behind `section`, but for those whose path is in
    /// `except`.
    ///
    /// # Errors
    /// When the settings are none that JSON can hold.
    pub fn with_settings(
        mut self,
        section: &str,
        settings: &impl Serialize,
        except: &[&str],
    ) -> Result<Self, serde_json::Error> {
        self.flatten(section, &serde_json::to_value(settings)?, except);
        Ok(self)
    }

    fn flatten(&mut self, path: &str, value: &Value, except: &[&str]) {
        match value {
            Value::Object(fields) => {
                fields.iter().for_each(|(name, value)| self.flatten(&format!("{path}.{name}"), value, except));
            }
            _ if except.contains(&path) => {}
            value => drop(self.0.insert(path.to_owned(), value.to_string())),
        }
    }

    /// Where a checkpoint's identity is not this one.
    pub fn differences(&self, saved: &Self) -> Vec<Difference> {
        let fields: BTreeSet<&String> = self.0.keys().chain(saved.0.keys()).collect();
        let differs = fields.into_iter().filter(|&field| self.0.get(field) != saved.0.get(field));
        differs
            .map(|field| Difference {
                field: field.clone(),
                saved: saved.0.get(field).cloned(),
                now: self.0.get(field).cloned(),
            })
            .collect()
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = |value: &Option<String>| value.clone().unwrap_or_else(|| "not set".into());
        write!(f, "{} is {} in the checkpoint and {} now", self.field, value(&self.saved), value(&self.now))
    }
}
