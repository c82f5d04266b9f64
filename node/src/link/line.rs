//! What a link does to bytes: how late it delivers them, and how fast it takes them.

use std::fmt;
use std::num::NonZeroU64;
use std::str::FromStr;
use std::time::{Duration, Instant};

use serde::{Serialize, Serializer};

/// Longest round trip: twice that by way of a geostationary satellite, with room to spare.
const LONGEST: Duration = Duration::from_secs(2);
/// Bytes that one direction of a connection holds at most while they are on their way.
pub(super) const MOST_ON_THE_WAY: usize = 256 << 20;
/// Bytes that a direction may hold however near and slow it is: what a sender's socket would hold in its place.
const LEAST_ON_THE_WAY: usize = 1 << 20;
/// Names of rates, and bits a second.
const UNITS: [(&str, f64); 3] = [("kbit", 1e3), ("mbit", 1e6), ("gbit", 1e9)];

/// How long and how wide a link is, the same in both directions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Line {
    /// From a byte's departure to the arrival of another that answers it: half of it each way.
    #[serde(rename = "round_trip_ms", serialize_with = "milliseconds")]
    pub round_trip: Duration,
    /// Bytes a second in each direction of each connection; `None` as many as the machine passes on.
    #[serde(rename = "bytes_per_second")]
    pub rate: Option<NonZeroU64>,
}

fn milliseconds<S: Serializer>(time: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(1e3 * time.as_secs_f64())
}

/// A text that is no link.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{text}`: {why}; write a link as DELAY,RATE, like 20ms,100mbit or 100ms,unlimited")]
pub struct LineError {
    text: String,
    why: String,
}

impl Line {
    /// The same without its delay.
    pub fn without_delay(self) -> Self {
        Self { round_trip: Duration::ZERO, ..self }
    }

    /// Bytes that one direction of a connection may hold: twice what is on its way at the full rate, so that the sender is
    /// held up by the rate alone.
    pub(super) fn on_the_way(&self) -> usize {
        let Some(rate) = self.rate else { return MOST_ON_THE_WAY };
        let bytes = rate.get() as f64 * self.round_trip.as_secs_f64();
        (bytes as usize).clamp(LEAST_ON_THE_WAY, MOST_ON_THE_WAY)
    }
}

impl FromStr for Line {
    type Err = LineError;

    /// `DELAY` or `DELAY,RATE`: a round trip in `us`, `ms` or `s`; `kbit`, `mbit` or `gbit` a second, or `unlimited`.
    fn from_str(text: &str) -> Result<Self, LineError> {
        let fail = |why: String| LineError { text: text.to_owned(), why };
        let (delay, rate) = text.split_once(',').unwrap_or((text, "unlimited"));
        let round_trip = round_trip(delay.trim()).map_err(fail)?;
        let line = Self { round_trip, rate: bytes_a_second(rate.trim()).map_err(fail)? };
        let on_the_way = line.rate.map_or(0.0, |rate| rate.get() as f64 * round_trip.as_secs_f64());
        if on_the_way > MOST_ON_THE_WAY as f64 {
            let (bytes, most) = (on_the_way / 1e6, MOST_ON_THE_WAY as f64 / 1e6);
            return Err(fail(format!(
                "{bytes:.0} MB would be on their way at a time, and this machine keeps {most:.0}"
            )));
        }
        Ok(line)
    }
}

/// A number and the unit behind it.
fn amount<'a>(text: &'a str, what: &str) -> Result<(f64, &'a str), String> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let number = number.parse().map_err(|_| format!("`{text}` is no {what}"))?;
    Ok((number, unit))
}

fn round_trip(text: &str) -> Result<Duration, String> {
    let (number, unit) = amount(text, "delay")?;
    let seconds = match unit {
        "us" => number / 1e6,
        "ms" => number / 1e3,
        "s" => number,
        _ => return Err(format!("the delay `{text}` is in none of us, ms, s")),
    };
    if seconds > LONGEST.as_secs_f64() {
        return Err(format!("the delay `{text}` is longer than {} s", LONGEST.as_secs()));
    }
    Ok(Duration::from_secs_f64(seconds))
}

fn bytes_a_second(text: &str) -> Result<Option<NonZeroU64>, String> {
    if text == "unlimited" {
        return Ok(None);
    }
    let (number, unit) = amount(text, "rate")?;
    let bits = UNITS.iter().find(|(name, _)| *name == unit).map(|(_, bits)| number * bits);
    let bits = bits.ok_or_else(|| format!("the rate `{text}` is in none of kbit, mbit, gbit"))?;
    let rate = NonZeroU64::new((bits / 8.0) as u64).ok_or_else(|| format!("the rate `{text}` passes nothing on"))?;
    Ok(Some(rate))
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ms there and back, ", 1e3 * self.round_trip.as_secs_f64())?;
        match self.rate {
            Some(rate) => write!(f, "{} Mbit/s each way", 8.0 * rate.get() as f64 / 1e6),
            None => f.write_str("no limit of rate"),
        }
    }
}

/// When the bytes of one direction arrive.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// When the last byte so far has departed.
    departed: Option<Instant>,
}

impl Pace {
    /// When the last of so many bytes arrives that come at `now`.
    pub(super) fn arrival(&mut self, line: Line, length: usize, now: Instant) -> Instant {
        let begins = self.departed.map_or(now, |departed| departed.max(now));
        let takes = line.rate.map_or(0.0, |rate| length as f64 / rate.get() as f64);
        let departs = begins + Duration::from_secs_f64(takes);
        self.departed = Some(departs);
        departs + line.round_trip / 2
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn line(text: &str) -> Result<Line, String> {
        text.parse::<Line>().map_err(|error| error.to_string())
    }

    #[test]
    fn links_are_read() {
        let rate = |bytes| NonZeroU64::new(bytes);
        let cases = [
            ("20ms,100mbit", Duration::from_millis(20), rate(12_500_000)),
            ("0.5ms, 1gbit", Duration::from_micros(500), rate(125_000_000)),
            ("1s,64kbit", Duration::from_secs(1), rate(8000)),
            ("100us,unlimited", Duration::from_micros(100), None),
            ("0ms", Duration::ZERO, None),
        ];
        for (text, round_trip, rate) in cases {
            assert_eq!(line(text), Ok(Line { round_trip, rate }), "{text}");
        }
        assert_eq!(line("20ms,100mbit").unwrap().to_string(), "20 ms there and back, 100 Mbit/s each way");
        let json = serde_json::to_string(&line("20ms,8mbit").unwrap()).unwrap();
        assert_eq!(json, r#"{"round_trip_ms":20.0,"bytes_per_second":1000000}"#);
    }

    #[test]
    fn what_is_wrong_with_a_link_is_said() {
        let cases = [
            ("", "`` is no delay"),
            ("fast", "`fast` is no delay"),
            ("-3ms", "`-3ms` is no delay"),
            ("1.2.3ms", "`1.2.3ms` is no delay"),
            ("20", "none of us, ms, s"),
            ("20min", "none of us, ms, s"),
            ("3s,1mbit", "longer than 2 s"),
            ("20ms,", "`` is no rate"),
            ("20ms,100", "none of kbit, mbit, gbit"),
            ("20ms,100MB", "none of kbit, mbit, gbit"),
            ("20ms,0gbit", "passes nothing on"),
            ("20ms,1gbit,3", "none of kbit, mbit, gbit"),
            ("1s,100gbit", "12500 MB would be on their way"),
        ];
        for (text, why) in cases {
            let error = line(text).unwrap_err();
            assert!(error.contains(why) && error.contains("20ms,100mbit"), "{text}: {error}");
        }
    }

    #[test]
    fn bytes_depart_at_the_rate_and_arrive_after_the_delay() {
        let (start, mut pace) = (Instant::now(), Pace::default());
        let line = Line { round_trip: Duration::from_millis(100), rate: NonZeroU64::new(1000) };
        let mut arrives = |length, after: u64| {
            let arrival = pace.arrival(line, length, start + Duration::from_millis(after));
            arrival.duration_since(start).as_millis()
        };
        assert_eq!(arrives(100, 0), 150);
        assert_eq!(arrives(100, 20), 250, "behind those before");
        assert_eq!(arrives(100, 1000), 1150, "a pause is not made up for");
        assert_eq!(Pace::default().arrival(Line::default(), 1 << 40, start), start);
    }

    #[test]
    fn more_than_fits_the_link_is_on_its_way_and_no_more() {
        let on_the_way = |text| line(text).unwrap().on_the_way();
        assert_eq!(on_the_way("100ms,1gbit"), 12_500_000);
        assert_eq!(on_the_way("0ms,1mbit"), LEAST_ON_THE_WAY);
        assert_eq!(on_the_way("100ms"), MOST_ON_THE_WAY);
    }
}
