//! The day that templates are told.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Days before each month of a year that is no leap year.
const BEFORE: [u32; 12] = [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334];
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// A day of the Gregorian calendar, written as `2024-07-26`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TemplateDay {
    year: u32,
    month: u32,
    day: u32,
}

impl Default for TemplateDay {
    /// The day that Llama 3's own template falls back to.
    fn default() -> Self {
        Self { year: 2024, month: 7, day: 26 }
    }
}

/// A text is no day.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no day; write one like 2024-07-26")]
pub struct NoDay(String);

impl FromStr for TemplateDay {
    type Err = NoDay;

    fn from_str(text: &str) -> Result<Self, NoDay> {
        let none = || NoDay(text.to_owned());
        let digits = text.len() == 10 && text.bytes().all(|byte| byte == b'-' || byte.is_ascii_digit());
        let mut parts = text.split('-').map(|part| part.parse().map_err(|_| none()));
        let mut part = || parts.next().unwrap_or_else(|| Err(none()));
        let day = Self { year: part()?, month: part()?, day: part()? };
        let possible =
            digits && parts.next().is_none() && (1..=9999).contains(&day.year) && (1..=12).contains(&day.month);
        if !possible || day.day == 0 || day.day > day.days_of_month() {
            return Err(none());
        }
        Ok(day)
    }
}

impl fmt::Display for TemplateDay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04}-{:02}-{:02}", self.year, self.month, self.day)
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

fn is_leap(year: u32) -> bool {
    year.is_multiple_of(4) && !year.is_multiple_of(100) || year.is_multiple_of(400)
}

impl TemplateDay {
    /// One whose every part is another.
    pub(super) fn other(self) -> Self {
        Self { year: if self.year == 1999 { 2001 } else { 1999 }, month: self.month % 12 + 1, day: self.day % 28 + 1 }
    }

    fn days_of_month(self) -> u32 {
        match self.month {
            2 => 28 + u32::from(is_leap(self.year)),
            4 | 6 | 9 | 11 => 30,
            _ => 31,
        }
    }

    /// Counted from 0.
    fn of_year(self) -> u32 {
        let leap = is_leap(self.year) && self.month > 2;
        BEFORE[self.month as usize - 1] + u32::from(leap) + self.day - 1
    }

    /// Counted from Sunday.
    fn weekday(self) -> u32 {
        let years = self.year - 1;
        // The first day of the first year was a Monday.
        (1 + 365 * years + years / 4 - years / 100 + years / 400 + self.of_year()) % 7
    }

    /// Year and week of ISO 8601: weeks begin on Mondays, and the first has the year's first Thursday.
    fn iso_week(self) -> (u32, u32) {
        let thursday = self.of_year() + 4 - (self.weekday() + 6) % 7;
        let days = |year| 365 + u32::from(is_leap(year));
        if self.of_year() + 3 < (self.weekday() + 6) % 7 {
            let last = Self { year: self.year - 1, month: 12, day: 31 };
            return if self.year > 1 { last.iso_week() } else { (0, 52) };
        }
        if thursday > days(self.year) { (self.year + 1, 1) } else { (self.year, (thursday - 1) / 7 + 1) }
    }

    /// Python's `strftime` at midnight.
    pub(super) fn strftime(self, format: &str) -> String {
        let mut out = String::new();
        let mut chars = format.chars().peekable();
        let (month, weekday) = (MONTHS[self.month as usize - 1], WEEKDAYS[self.weekday() as usize]);
        while let Some(c) = chars.next() {
            if c != '%' {
                out.push(c);
                continue;
            }
            // glibc's flag for numbers without padding.
            let bare = chars.next_if_eq(&'-').is_some();
            let number = |value: u32, digits: usize| match bare {
                true => value.to_string(),
                false => format!("{value:0digits$}"),
            };
            let written = match chars.next() {
                Some('d') => number(self.day, 2),
                Some('e') if bare => self.day.to_string(),
                Some('e') => format!("{:2}", self.day),
                Some('m') => number(self.month, 2),
                Some('b' | 'h') => month[..3].to_owned(),
                Some('B') => month.to_owned(),
                Some('y') => number(self.year % 100, 2),
                Some('Y') => self.year.to_string(),
                Some('G') => self.iso_week().0.to_string(),
                Some('a') => weekday[..3].to_owned(),
                Some('A') => weekday.to_owned(),
                Some('j') => number(self.of_year() + 1, 3),
                Some('u') => (if self.weekday() == 0 { 7 } else { self.weekday() }).to_string(),
                Some('w') => self.weekday().to_string(),
                Some('U') => number((self.of_year() + 7 - self.weekday()) / 7, 2),
                Some('W') => number((self.of_year() + 7 - (self.weekday() + 6) % 7) / 7, 2),
                Some('V') => number(self.iso_week().1, 2),
                Some('H' | 'M' | 'S') => number(0, 2),
                Some('I') => number(12, 2),
                Some('f') => "000000".to_owned(),
                Some('p') => "AM".to_owned(),
                Some('F') => self.strftime("%Y-%m-%d"),
                Some('D' | 'x') => self.strftime("%m/%d/%y"),
                Some('T' | 'X') => "00:00:00".to_owned(),
                Some('R') => "00:00".to_owned(),
                Some('c') => self.strftime("%a %b %e 00:00:00 %Y"),
                // A time without a zone has neither.
                Some('z' | 'Z') => String::new(),
                Some('n') => "\n".to_owned(),
                Some('t') => "\t".to_owned(),
                Some('%') => "%".to_owned(),
                Some(other) => format!("%{}{other}", if bare { "-" } else { "" }),
                None => format!("%{}", if bare { "-" } else { "" }),
            };
            out.push_str(&written);
        }
        out
    }
}

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
        for none in ["", "2024-7-26", "2024-13-01", "2023-02-29", "0000-01-01", "26 July 2024", "2024-07-26-1", "today"]
        {
            assert!(none.parse::<TemplateDay>().is_err(), "{none}");
        }
        assert_eq!(TemplateDay::default().to_string(), "2024-07-26");
    }
}
