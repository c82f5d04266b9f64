//! The day that templates are told.

use std::fmt;
use std::str::FromStr;

use chrono::{Datelike as _, Days, NaiveDate, NaiveDateTime, NaiveTime};
use serde::{Deserialize, Serialize};

/// A day of the Gregorian calendar, written as `2024-07-26`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TemplateDay(NaiveDate);

impl Default for TemplateDay {
    /// The day that Llama 3's own template falls back to.
    fn default() -> Self {
        Self(NaiveDate::from_ymd_opt(2024, 7, 26).unwrap_or_default())
    }
}

/// A text is no day.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no day; write one like 2024-07-26")]
pub struct NoDay(String);

impl FromStr for TemplateDay {
    type Err = NoDay;

    fn from_str(text: &str) -> Result<Self, NoDay> {
        let day = NaiveDate::parse_from_str(text, "%Y-%m-%d").ok();
        day.filter(|day| (1..=9999).contains(&day.year())).map(Self).ok_or_else(|| NoDay(text.to_owned()))
    }
}

impl fmt::Display for TemplateDay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl TryFrom<String> for TemplateDay {
    type Error = NoDay;

    fn try_from(text: String) -> Result<Self, NoDay> {
        text.parse()
    }
}

impl From<TemplateDay> for String {
    fn from(day: TemplateDay) -> Self {
        day.to_string()
    }
}

impl TemplateDay {
    /// One whose day of the month, month, year and weekday are others.
    pub(super) fn other(self) -> Self {
        // More than a year, and no whole number of weeks.
        let days = Days::new(400);
        let other = if self.0.year() > 2 { self.0.checked_sub_days(days) } else { self.0.checked_add_days(days) };
        Self(other.unwrap_or_default())
    }

    /// Python's `strftime` at midnight.
    pub(super) fn strftime(self, format: &str) -> String {
        let midnight = NaiveDateTime::new(self.0, NaiveTime::MIN);
        let written = |directive: &str| midnight.format(directive).to_string();
        let mut out = String::new();
        let mut chars = format.chars();
        while let Some(c) = chars.next() {
            if c != '%' {
                out.push(c);
                continue;
            }
            // glibc's flag for numbers without padding; of words it takes no notice.
            let bare = chars.as_str().starts_with('-');
            let of = chars.nth(usize::from(bare));
            let flag = if bare { "-" } else { "" };
            match of {
                Some('f') => out.push_str("000000"),
                // A time without a zone has neither.
                Some('z' | 'Z') => {}
                Some(of) if NUMBERS.contains(of) => out.push_str(&written(&format!("%{flag}{of}"))),
                Some(of) if WORDS.contains(of) => out.push_str(&written(&format!("%{of}"))),
                // As it stands, as with glibc.
                Some(of) => out.extend(["%", flag].into_iter().flat_map(str::chars).chain([of])),
                None => out.extend(["%", flag]),
            }
        }
        out
    }
}

/// Directives that Python's `strftime` on Linux and chrono's understand alike: those of numbers.
const NUMBERS: &str = "demyYGjuwUWVHMSI";
/// The others.
const WORDS: &str = "bBhaApFDxTXRcnt%";

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn days_are_written_as_python_writes_them() {
        let expected = [
            (
                "2024-07-26",
                "26 26 26 26 07 7 Jul July 24 2024 2024 Fri Friday 208 208 5 5 29 30 30 2024-07-26 07/26/24 Fri Jul 26 00:00:00 2024",
            ),
            (
                "2024-02-29",
                "29 29 29 29 02 2 Feb February 24 2024 2024 Thu Thursday 060 60 4 4 08 09 09 2024-02-29 02/29/24 Thu Feb 29 00:00:00 2024",
            ),
            (
                "2023-01-01",
                "01  1 1 1 01 1 Jan January 23 2023 2022 Sun Sunday 001 1 7 0 01 00 52 2023-01-01 01/01/23 Sun Jan  1 00:00:00 2023",
            ),
            (
                "2021-01-03",
                "03  3 3 3 01 1 Jan January 21 2021 2020 Sun Sunday 003 3 7 0 01 00 53 2021-01-03 01/03/21 Sun Jan  3 00:00:00 2021",
            ),
            (
                "2020-12-31",
                "31 31 31 31 12 12 Dec December 20 2020 2020 Thu Thursday 366 366 4 4 52 52 53 2020-12-31 12/31/20 Thu Dec 31 00:00:00 2020",
            ),
            (
                "2018-12-31",
                "31 31 31 31 12 12 Dec December 18 2018 2019 Mon Monday 365 365 1 1 52 53 01 2018-12-31 12/31/18 Mon Dec 31 00:00:00 2018",
            ),
            (
                "2000-03-01",
                "01  1 1 1 03 3 Mar March 00 2000 2000 Wed Wednesday 061 61 3 3 09 09 09 2000-03-01 03/01/00 Wed Mar  1 00:00:00 2000",
            ),
            (
                "1900-03-01",
                "01  1 1 1 03 3 Mar March 00 1900 1900 Thu Thursday 060 60 4 4 08 09 09 1900-03-01 03/01/00 Thu Mar  1 00:00:00 1900",
            ),
            (
                "2027-01-01",
                "01  1 1 1 01 1 Jan January 27 2027 2026 Fri Friday 001 1 5 5 00 00 53 2027-01-01 01/01/27 Fri Jan  1 00:00:00 2027",
            ),
            (
                "2026-11-08",
                "08  8 8 8 11 11 Nov November 26 2026 2026 Sun Sunday 312 312 7 0 45 44 45 2026-11-08 11/08/26 Sun Nov  8 00:00:00 2026",
            ),
            (
                "2024-12-30",
                "30 30 30 30 12 12 Dec December 24 2024 2025 Mon Monday 365 365 1 1 52 53 01 2024-12-30 12/30/24 Mon Dec 30 00:00:00 2024",
            ),
        ];
        let format = "%d %e %-e %-d %m %-m %b %B %y %Y %G %a %A %j %-j %u %w %U %W %V %F %D %c";
        for (day, expected) in expected {
            let day: TemplateDay = day.parse().unwrap();
            assert_eq!(day.strftime(format), expected);
            assert_ne!(day.other().strftime("%d"), day.strftime("%d"));
            assert_eq!(day.to_string().parse(), Ok(day));
        }
        for none in ["", "2024-13-01", "2023-02-29", "0000-01-01", "26 July 2024", "2024-07-26-1", "today"] {
            assert!(none.parse::<TemplateDay>().is_err(), "{none}");
        }
        let day = TemplateDay::default();
        assert_eq!(day.to_string(), "2024-07-26");
        assert_eq!(
            day.strftime("%-H %I %p %-B %x %X %R %c %f|%z|%Q %-Q %% 日 %n%-"),
            "0 12 AM July 07/26/24 00:00:00 00:00 \
            Fri Jul 26 00:00:00 2024 000000||%Q %-Q % 日 \n%-"
        );
    }
}
