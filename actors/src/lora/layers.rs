//! Which layers get adapters.
//!
//! What lies below the lowest of them has nothing to learn: no gradient is asked for there, and what enters that layer is
//! the same for a text in every pass over the data. So adapting the upper layers alone saves most of a run's work, at some
//! loss of what can be learnt.

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::trainer::InvalidSetting;

/// The setting's path.
const FIELD: &str = "lora.layers";

/// Layers of a model, as a user names them: `"all"`, `"top 8"`, `"top 25%"`, `"20-29"`, `"0, 4, 20-29"` or `[0, 4]`, counted
/// from 0 where the text enters; the last number of a range is among them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Spelt", into = "Spelt")]
pub enum Layers {
    /// Every one.
    #[default]
    All,
    /// So many of those nearest to the head.
    Top(u16),
    /// So many in a hundred of them, rounded up.
    TopPercent(f64),
    /// These.
    These(BTreeSet<u16>),
}

impl Layers {
    /// Whether it is every layer of any model.
    pub(crate) fn is_all(&self) -> bool {
        *self == Self::All
    }

    /// Their numbers in a model of so many layers; at least one.
    ///
    /// # Errors
    /// When the model has no such layers.
    pub fn of(&self, layers: usize) -> Result<BTreeSet<u16>, InvalidSetting> {
        let fail = |why: String| Err(InvalidSetting { field: FIELD, why });
        let end = u16::try_from(layers).unwrap_or(u16::MAX);
        let top = |count: u16| (end - count..end).collect();
        match self {
            Self::All => Ok(top(end)),
            &Self::Top(count) if count > end => {
                fail(format!("asks for the top {count} layers of a model that has {layers}; \"all\" is every one"))
            }
            &Self::Top(count) => Ok(top(count)),
            &Self::TopPercent(percent) => {
                Ok(top(((percent * f64::from(end) / 100.0).ceil() as u16).clamp(1.min(end), end)))
            }
            Self::These(these) => match these.last() {
                Some(&last) if last >= end => {
                    fail(format!("names layer {last}, and the model's {layers} layers are counted from 0 on"))
                }
                _ => Ok(these.clone()),
            },
        }
    }
}

/// How it stands in a file.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Spelt {
    Text(String),
    List(Vec<i64>),
}

impl TryFrom<Spelt> for Layers {
    type Error = InvalidSetting;

    fn try_from(spelt: Spelt) -> Result<Self, InvalidSetting> {
        let fail = |why: String| InvalidSetting { field: FIELD, why };
        let text = match spelt {
            Spelt::Text(text) => text,
            Spelt::List(list) => return these(list.into_iter().map(|number| number..=number)).map_err(fail),
        };
        let unknown = || {
            fail(format!(
                "is `{text}`; write \"all\", \"top 8\", \"top 25%\", a range like \"20-29\", or a list like [0, 4, 20]"
            ))
        };
        if text.trim() == "all" {
            return Ok(Self::All);
        }
        if let Some(count) = text.trim().strip_prefix("top ") {
            return match count.trim().strip_suffix('%') {
                Some(percent) => match percent.trim().parse() {
                    Ok(percent) if percent > 0.0 && percent <= 100.0 => Ok(Self::TopPercent(percent)),
                    _ => Err(fail(format!("is `{text}`, and the part must be more than 0% and at most 100%"))),
                },
                None => match count.trim().parse() {
                    Ok(0) => Err(fail(format!("is `{text}`, so nothing would be trained"))),
                    Ok(count) => Ok(Self::Top(count)),
                    Err(_) => Err(unknown()),
                },
            };
        }
        let range = |part: &str| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            Some(first.trim().parse::<i64>().ok()?..=last.trim().parse::<i64>().ok()?)
        };
        let ranges: Option<Vec<_>> = text.split(',').map(range).collect();
        these(ranges.ok_or_else(unknown)?.into_iter()).map_err(fail)
    }
}

/// The layers of some ranges, or what is wrong with them.
fn these(ranges: impl Iterator<Item = std::ops::RangeInclusive<i64>>) -> Result<Layers, String> {
    let mut these = BTreeSet::new();
    for range in ranges {
        let (first, last) = range.clone().into_inner();
        if first > last {
            return Err(format!("has the range {first}-{last}, which ends before it begins"));
        }
        for number in [first, last] {
            u16::try_from(number).map_err(|_| format!("names layer {number}, which no model has"))?;
        }
        for number in range {
            if !these.insert(number as u16) {
                return Err(format!("names layer {number} twice"));
            }
        }
    }
    if these.is_empty() { Err("is empty, so nothing would be trained".into()) } else { Ok(Layers::These(these)) }
}

impl From<Layers> for Spelt {
    fn from(layers: Layers) -> Self {
        match layers {
            Layers::These(these) => Self::List(these.into_iter().map(i64::from).collect()),
            other => Self::Text(other.to_string()),
        }
    }
}

impl fmt::Display for Layers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => f.write_str("all"),
            Self::Top(count) => write!(f, "top {count}"),
            Self::TopPercent(percent) => write!(f, "top {percent}%"),
            Self::These(these) => write!(f, "{these:?}"),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn read(json: &str) -> Result<Layers, String> {
        serde_json::from_str(json).map_err(|error| error.to_string())
    }

    #[test]
    fn each_spelling_names_its_layers_and_comes_back() {
        for (json, layers, expected) in [
            (r#""all""#, 3, vec![0, 1, 2]),
            (r#""top 2""#, 5, vec![3, 4]),
            (r#""top 25%""#, 30, (22..30).collect()),
            (r#""top 10%""#, 30, vec![27, 28, 29]),
            (r#""top 0.1%""#, 30, vec![29]),
            (r#""top 100%""#, 2, vec![0, 1]),
            (r#""2-4""#, 5, vec![2, 3, 4]),
            (r#""7""#, 8, vec![7]),
            (r#""6, 0,2 - 4""#, 7, vec![0, 2, 3, 4, 6]),
            ("[4, 1]", 5, vec![1, 4]),
        ] {
            let read = read(json).unwrap();
            assert!(read.of(layers).unwrap().into_iter().eq(expected), "{json}");
            let again = serde_json::to_string(&read).unwrap();
            assert_eq!(serde_json::from_str::<Layers>(&again).unwrap(), read, "{json} became {again}");
        }
    }

    #[test]
    fn what_cannot_be_is_named() {
        for (json, said) in [
            (r#""bottom 3""#, "`bottom 3`; write"),
            (r#""""#, "is ``; write"),
            (r#""top 0""#, "nothing would be trained"),
            (r#""top x""#, "`top x`"),
            (r#""top 0%""#, "more than 0%"),
            (r#""top 101%""#, "at most 100%"),
            (r#""top NaN%""#, "at most 100%"),
            (r#""4-2""#, "ends before it begins"),
            (r#""2,1-3""#, "layer 2 twice"),
            (r#""0-99999999999""#, "layer 99999999999, which no model has"),
            ("[]", "nothing would be trained"),
            ("[-1]", "layer -1, which no model has"),
            ("[3, 3]", "layer 3 twice"),
        ] {
            let error = read(json).unwrap_err();
            assert!(error.contains(said), "{json}: {error}");
            assert!(error.contains("lora.layers"), "{json}: {error}");
        }
        let refused = |json: &str| read(json).unwrap().of(30).unwrap_err().to_string();
        assert!(refused(r#""top 31""#).contains("lora.layers asks for the top 31 layers of a model that has 30"));
        assert!(refused("[0, 30]").contains("lora.layers names layer 30, and the model's 30 layers"));
    }
}
