//! Event files as TensorBoard reads them, in `tensorboard/`.
//!
//! A file is a row of records, each a protocol buffer `Event` between its length and its checksum. Only what scalars need is
//! written: a file's version, the start of a session, and summaries of single values. Every process writes a file of its
//! own; that of a run which goes on says from which step on earlier files do not count.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context as _;

use super::metrics::Entry;
use super::{Report, Rewards, StepReport};

/// Name of the folder in the output folder.
pub const EVENTS_FOLDER: &str = "tensorboard";
/// What the name of an event file begins with: TensorBoard looks for it.
const PREFIX: &str = "events.out.tfevents.";
/// The version of the format.
const VERSION: &str = "brain.Event:2";

/// The event file of a process.
pub(super) struct Events {
    folder: PathBuf,
    /// `None` before the first event.
    file: Option<File>,
    /// Steps and evaluations of the report that some file holds.
    written: (usize, usize),
}

impl Events {
    /// In a folder; what the report holds already is in the files of earlier processes, if there are any.
    pub(super) fn new(out: &Path, report: &Report) -> Self {
        let folder = out.join(EVENTS_FOLDER);
        let earlier = fs::read_dir(&folder).is_ok_and(|mut entries| entries.next().is_some());
        let written = if earlier { (report.steps.len(), report.evaluations.len()) } else { (0, 0) };
        Self { folder, file: None, written }
    }

    /// Writes what the report has beyond what is written.
    ///
    /// # Errors
    /// When the file cannot be written; the next call tries again, in another file.
    pub(super) fn follow(&mut self, report: &Report) -> anyhow::Result<()> {
        let entries = report.entries(self.written);
        if entries.is_empty() {
            return Ok(());
        }
        let cannot = || format!("{} cannot be written", self.folder.display());
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut bytes = Vec::new();
        let mut file = match self.file.take() {
            Some(file) => file,
            None => {
                record(&mut bytes, &event(now.as_secs_f64(), 0, 3, VERSION.as_bytes()));
                let next = report.steps.get(self.written.0).map_or(report.steps.len() + 1, |step| step.step as usize);
                let started = number(1, 1);
                record(&mut bytes, &event(now.as_secs_f64(), next as u64, 7, &started));
                self.create(now.as_secs()).with_context(cannot)?
            }
        };
        for entry in entries {
            let (step, values) = scalars(entry);
            let summary: Vec<u8> = values.into_iter().flat_map(|(tag, value)| scalar(tag, value)).collect();
            record(&mut bytes, &event(now.as_secs_f64(), step.into(), 5, &summary));
        }
        file.write_all(&bytes).with_context(cannot)?;
        self.file = Some(file);
        self.written = (report.steps.len(), report.evaluations.len());
        Ok(())
    }

    fn create(&self, seconds: u64) -> io::Result<File> {
        fs::create_dir_all(&self.folder)?;
        let pid = std::process::id();
        let mut number = 0;
        loop {
            let path = self.folder.join(format!("{PREFIX}{seconds}.velum.{pid}.{number}"));
            match OpenOptions::new().append(true).create_new(true).open(path) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => number += 1,
                opened => return opened,
            }
        }
    }
}

/// Removes the event files of a run that is replaced.
///
/// # Errors
/// When one cannot be removed.
pub fn remove_events(out: &Path) -> io::Result<()> {
    let folder = out.join(EVENTS_FOLDER);
    for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(PREFIX) {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// A step or an evaluation as tags and values.
fn scalars(entry: Entry<'_>) -> (u32, Vec<(&'static str, f64)>) {
    match entry {
        Entry::Step(step) => {
            let StepReport { loss, learning_rate, gradient_norm, tokens, seconds, .. } = *step;
            let speed = (seconds > 0.0).then_some(tokens as f64 / seconds);
            let values = [
                ("train/loss", Some(loss)),
                ("train/learning_rate", learning_rate),
                ("train/gradient_norm", gradient_norm),
                ("train/tokens_per_second", speed),
            ];
            let mut values: Vec<_> = values.into_iter().filter_map(|(tag, value)| Some((tag, value?))).collect();
            values.extend(TRAIN_REWARDS.into_iter().zip(rewards(step.rewards)));
            (step.step, values)
        }
        Entry::Evaluation(evaluation) => {
            let mut values = vec![("eval/loss", evaluation.loss)];
            values.extend(EVAL_REWARDS.into_iter().zip(rewards(evaluation.rewards)));
            (evaluation.step, values)
        }
    }
}

/// Tags of what pairs came to, in the order of [`rewards`].
const TRAIN_REWARDS: [&str; 4] =
    ["train/rewards/chosen", "train/rewards/rejected", "train/rewards/margin", "train/rewards/accuracy"];
const EVAL_REWARDS: [&str; 4] =
    ["eval/rewards/chosen", "eval/rewards/rejected", "eval/rewards/margin", "eval/rewards/accuracy"];

fn rewards(rewards: Option<Rewards>) -> Vec<f64> {
    let Some(Rewards { rewards_chosen, rewards_rejected, rewards_margin, rewards_accuracy }) = rewards else {
        return Vec::new();
    };
    vec![rewards_chosen, rewards_rejected, rewards_margin, rewards_accuracy]
}

/// A `Summary.Value` of a tag, as it stands in a `Summary`.
fn scalar(tag: &str, value: f64) -> Vec<u8> {
    let mut single = bytes_field(1, tag.as_bytes());
    single.push(2 << 3 | 5);
    single.extend((value as f32).to_le_bytes());
    bytes_field(1, &single)
}

/// An `Event` of a time in seconds and a step, with one more field of bytes.
fn event(time: f64, step: u64, field: u8, content: &[u8]) -> Vec<u8> {
    let mut event = vec![1 << 3 | 1];
    event.extend(time.to_le_bytes());
    event.extend(number(2, step));
    event.extend(bytes_field(field, content));
    event
}

/// A field that holds a number.
fn number(field: u8, value: u64) -> Vec<u8> {
    let mut bytes = vec![field << 3];
    variable(&mut bytes, value);
    bytes
}

/// A field that holds bytes: a text or another message.
fn bytes_field(field: u8, content: &[u8]) -> Vec<u8> {
    let mut bytes = vec![field << 3 | 2];
    variable(&mut bytes, content.len() as u64);
    bytes.extend(content);
    bytes
}

/// Seven bits a byte, the lowest first.
fn variable(bytes: &mut Vec<u8>, mut value: u64) {
    while value > 0x7f {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
}

/// Length, its checksum, content, its checksum.
fn record(bytes: &mut Vec<u8>, content: &[u8]) {
    let length = (content.len() as u64).to_le_bytes();
    bytes.extend(length);
    bytes.extend(masked(crc32c(&length)).to_le_bytes());
    bytes.extend(content);
    bytes.extend(masked(crc32c(content)).to_le_bytes());
}

/// So that the checksum of something that holds checksums is none of those in it.
fn masked(crc: u32) -> u32 {
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

/// The checksum of Castagnoli's polynomial, bit by bit: records are short.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc: u32, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| crc >> 1 ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_those_of_the_standard() {
        // RFC 3720, B.4, and the check value of CRC-32C.
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(crc32c(&(0..32).collect::<Vec<u8>>()), 0x46dd_794e);
    }

    #[test]
    fn a_record_is_what_tensorboard_writes() {
        // EventFileWriter of tensorboard 2.21 wrote this for Event(wall_time=1.5, step=300, summary of {"train/loss": 2.25}).
        let mut bytes = Vec::new();
        record(&mut bytes, &event(1.5, 300, 5, &scalar("train/loss", 2.25)));
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(
            hex,
            "2100000000000000017becf609000000000000f83f10ac022a130a110a0a747261696e2f6c6f73731500001040184a3460"
        );
    }
}
