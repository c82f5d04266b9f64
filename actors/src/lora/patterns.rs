//! Values for some modules: a table of patterns, as PEFT matches them against the modules' names.
//!
//! A pattern is a regular expression for the end of a name, from the beginning of one of its parts on: `q_proj`,
//! `layers.0.self_attn.q_proj` and `layers\.[01]\..*proj` all name modules. PEFT takes the first of several that match,
//! which is none of them where the table is written in TOML: two that disagree are refused.

use std::fmt;
use std::marker::PhantomData;

use regex::Regex;
use serde::de::{MapAccess, Visitor};
use serde::ser::SerializeMap as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Patterns and their values, in the order in which they were written.
#[derive(Clone, Debug, PartialEq)]
pub struct Patterns<T>(Vec<(String, T)>);

/// Patterns that can be matched.
pub(super) struct Matcher<'a, T> {
    patterns: Vec<(&'a str, Regex, T)>,
    matched: Vec<bool>,
}

impl<T> Default for Patterns<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T> FromIterator<(String, T)> for Patterns<T> {
    fn from_iter<I: IntoIterator<Item = (String, T)>>(patterns: I) -> Self {
        Self(patterns.into_iter().collect())
    }
}

impl<T: Copy> Patterns<T> {
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The values.
    pub fn values(&self) -> impl Iterator<Item = T> + '_ {
        self.0.iter().map(|&(_, value)| value)
    }

    /// # Errors
    /// Names what is no regular expression, and why.
    pub(super) fn matcher(&self) -> Result<Matcher<'_, T>, String> {
        let compiled = self.0.iter().map(|(pattern, value)| {
            // Looking around is what Python's expressions can do and these cannot: it is named by the error.
            let regex = Regex::new(&format!(r"^(?:.*\.)?(?:{pattern})$"));
            Ok((
                pattern.as_str(),
                regex.map_err(|error| format!("has `{pattern}`, which cannot be used: {error}"))?,
                *value,
            ))
        });
        let patterns: Vec<_> = compiled.collect::<Result<_, String>>()?;
        let matched = vec![false; patterns.len()];
        Ok(Matcher { patterns, matched })
    }
}

impl<T: Copy + PartialEq + fmt::Display> Matcher<'_, T> {
    /// The value for a module, if a pattern names it.
    ///
    /// # Errors
    /// When two patterns that name it disagree.
    pub(super) fn find(&mut self, module: &str) -> Result<Option<T>, String> {
        let mut found: Option<(&str, T)> = None;
        for ((pattern, regex, value), matched) in self.patterns.iter().zip(&mut self.matched) {
            if !regex.is_match(module) {
                continue;
            }
            *matched = true;
            match found {
                Some((other, first)) if first != *value => {
                    return Err(format!(
                        "has {first} for {module} by `{other}` and {value} by `{pattern}`: only one may name it"
                    ));
                }
                _ => found = Some((pattern, *value)),
            }
        }
        Ok(found.map(|(_, value)| value))
    }

    /// A pattern that has named none of the modules.
    pub(super) fn idle(&self) -> Option<&str> {
        self.patterns.iter().zip(&self.matched).find(|(_, matched)| !**matched).map(|((pattern, ..), _)| *pattern)
    }
}

impl<T: Serialize> Serialize for Patterns<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (pattern, value) in &self.0 {
            map.serialize_entry(pattern, value)?;
        }
        map.end()
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Patterns<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Table<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Table<T> {
            type Value = Patterns<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a table of patterns and numbers, such as { \"q_proj\" = 16 }")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut patterns = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    patterns.push(entry);
                }
                Ok(Patterns(patterns))
            }
        }
        deserializer.deserialize_map(Table(PhantomData))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn found(json: &str, module: &str) -> Result<Option<usize>, String> {
        let patterns: Patterns<usize> = serde_json::from_str(json).unwrap();
        let again: Patterns<usize> = serde_json::from_str(&serde_json::to_string(&patterns).unwrap()).unwrap();
        assert_eq!(again, patterns);
        patterns.matcher()?.find(module)
    }

    #[test]
    fn the_end_of_a_name_is_matched_from_the_beginning_of_a_part() {
        let module = "model.layers.10.self_attn.q_proj";
        for (pattern, matches) in [
            ("q_proj", true),
            ("self_attn.q_proj", true),
            ("layers.10.self_attn.q_proj", true),
            (r"model\\.layers\\.1\\d\\..*", true),
            ("k_proj|q_proj", true),
            ("proj", false),
            ("layers.0.self_attn.q_proj", false),
            ("self_attn", false),
        ] {
            let value = found(&format!(r#"{{"{pattern}": 3}}"#), module).unwrap();
            assert_eq!(value, matches.then_some(3), "{pattern}");
        }
    }

    #[test]
    fn patterns_that_disagree_or_cannot_be_are_named() {
        let module = "model.layers.1.mlp.up_proj";
        assert_eq!(found(r#"{"up_proj": 3, "mlp.up_proj": 3}"#, module), Ok(Some(3)));
        let error = found(r#"{"up_proj": 3, "mlp.up_proj": 4}"#, module).unwrap_err();
        assert!(error.contains("3") && error.contains("`mlp.up_proj`") && error.contains(module), "{error}");
        assert!(found(r#"{"up_(proj": 3}"#, module).unwrap_err().contains("up_(proj"));
        assert!(found(r#"{"(?!up)x": 3}"#, module).unwrap_err().contains("look-around"));
        let patterns: Patterns<usize> = serde_json::from_str(r#"{"up_proj": 3, "w1": 2}"#).unwrap();
        let mut matcher = patterns.matcher().unwrap();
        matcher.find(module).unwrap();
        assert_eq!(matcher.idle(), Some("w1"));
    }
}
