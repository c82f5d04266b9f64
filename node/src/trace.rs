//! `--trace`: the spans of a step as a file in Chrome's trace format, to be looked at in ui.perfetto.dev or
//! chrome://tracing.
//!
//! Time stamps are the wall clock's and processes carry their own numbers, so that the files of an owner and of workers
//! on one machine can be laid into one picture. Work becomes slices of its thread; what is in flight (see
//! [`actors::trace`]) becomes asynchronous slices, which may overlap. A span is written when it ends; a file that was
//! never finished lacks its last bracket, which the viewers do not mind.

use std::cell::Cell;
use std::fmt::{Debug, Write as _};
use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use actors::trace::{FLIGHT, WORK};
use anyhow::Context as _;
use serde_json::{Map, Value, json};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::Context;
use tracing_subscriber::registry::LookupSpan;

thread_local! {
    /// The thread's number in the file; 0 until it has one.
    static THREAD: Cell<u64> = const { Cell::new(0) };
}

/// A trace file under way. Dropping it writes the end of the file.
pub struct TraceFile(Arc<Writer>);

impl Drop for TraceFile {
    fn drop(&mut self) {
        self.0.finish();
    }
}

/// Creates a trace file, and the layer of a subscriber that fills it.
///
/// # Errors
/// When the file cannot be created.
pub fn create<S>(path: &Path, process: &str) -> anyhow::Result<(TraceFile, impl Layer<S> + Send + Sync + use<S>)>
where
    S: Subscriber + for<'span> LookupSpan<'span>,
{
    let file = File::create(path).with_context(|| format!("the trace {} cannot be written", path.display()))?;
    let epoch = SystemTime::now().duration_since(UNIX_EPOCH).context("the clock is before 1970")?;
    let writer = Arc::new(Writer {
        out: Mutex::new(Some(BufWriter::new(file))),
        process: std::process::id(),
        began: Instant::now(),
        epoch_us: epoch.as_secs_f64() * 1e6,
        threads: AtomicU64::new(0),
    });
    writer.begin(process);
    let targets = Targets::new().with_target(WORK, Level::TRACE).with_target(FLIGHT, Level::TRACE);
    Ok((TraceFile(Arc::clone(&writer)), Spans(writer).with_filter(targets)))
}

/// The trace file of one of several processes: `trace.json` becomes `trace-worker-1.json`.
pub fn of_process(path: &Path, process: &str) -> PathBuf {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let extension = path.extension().map_or_else(String::new, |extension| format!(".{}", extension.to_string_lossy()));
    path.with_file_name(format!("{stem}-{process}{extension}"))
}

/// Writes events.
struct Writer {
    /// Nothing once the file is finished, or after an error, when the rest of the trace is given up.
    out: Mutex<Option<BufWriter<File>>>,
    process: u32,
    began: Instant,
    epoch_us: f64,
    threads: AtomicU64,
}

impl Writer {
    fn begin(&self, process: &str) {
        let name = json!({"ph": "M", "name": "process_name", "pid": self.process, "args": {"name": process}});
        self.write(&format!("[\n{name}"));
    }

    fn event(&self, event: &Value) {
        self.write(&format!(",\n{event}"));
    }

    fn write(&self, text: &str) {
        let mut out = self.out.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Err(error)) = out.as_mut().map(|out| out.write_all(text.as_bytes())) {
            tracing::warn!(%error, "the trace cannot be written any further");
            *out = None;
        }
    }

    fn finish(&self) {
        let out = self.out.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(Err(error)) = out.map(|mut out| out.write_all(b"\n]\n").and_then(|()| out.flush())) {
            tracing::warn!(%error, "the end of the trace cannot be written");
        }
    }

    /// Microseconds since 1970.
    fn now(&self) -> f64 {
        self.epoch_us + self.began.elapsed().as_secs_f64() * 1e6
    }

    /// This thread's number; its name is written when it gets one.
    fn thread(&self) -> u64 {
        THREAD.with(|number| {
            if number.get() == 0 {
                number.set(self.threads.fetch_add(1, Ordering::Relaxed) + 1);
                let thread = std::thread::current();
                let name = thread.name().map_or_else(|| format!("thread {}", number.get()), str::to_owned);
                self.event(&json!({
                    "ph": "M", "name": "thread_name", "pid": self.process, "tid": number.get(), "args": {"name": name},
                }));
            }
            number.get()
        })
    }
}

/// What is known of a span before it ends.
struct Open {
    arguments: Map<String, Value>,
    created: f64,
    /// Thread and time of the first entry, time of the last exit.
    entered: Option<(u64, f64)>,
    left: f64,
}

/// The layer.
struct Spans(Arc<Writer>);

impl<S> Layer<S> for Spans
where
    S: Subscriber + for<'span> LookupSpan<'span>,
{
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        let mut arguments = Arguments(Map::new());
        attributes.record(&mut arguments);
        let created = self.0.now();
        span.extensions_mut().insert(Open { arguments: arguments.0, created, entered: None, left: created });
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        if let Some(open) = span.extensions_mut().get_mut::<Open>() {
            let mut arguments = Arguments(std::mem::take(&mut open.arguments));
            values.record(&mut arguments);
            open.arguments = arguments.0;
        }
    }

    fn on_enter(&self, id: &Id, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        if let Some(open) = span.extensions_mut().get_mut::<Open>() {
            open.entered.get_or_insert_with(|| (self.0.thread(), self.0.now()));
        }
    }

    fn on_exit(&self, id: &Id, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        if let Some(open) = span.extensions_mut().get_mut::<Open>() {
            open.left = self.0.now();
        }
    }

    fn on_close(&self, id: Id, context: Context<'_, S>) {
        let Some(span) = context.span(&id) else { return };
        let Some(open) = span.extensions_mut().remove::<Open>() else { return };
        let (name, process) = (span.name(), self.0.process);
        if span.metadata().target() == FLIGHT {
            let thread = open.entered.map_or(0, |(thread, _)| thread);
            let number = format!("{process}.{}", id.into_u64());
            for (phase, time) in [("b", open.created), ("e", self.0.now())] {
                self.0.event(&json!({
                    "ph": phase, "cat": name, "name": name, "id": number, "pid": process, "tid": thread, "ts": time,
                    "args": open.arguments,
                }));
            }
        } else if let Some((thread, begin)) = open.entered {
            self.0.event(&json!({
                "ph": "X", "cat": "work", "name": name, "pid": process, "tid": thread, "ts": begin,
                "dur": open.left - begin, "args": open.arguments,
            }));
        }
    }
}

/// A span's fields.
struct Arguments(Map<String, Value>);

impl Visit for Arguments {
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.0.insert(field.name().to_owned(), value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.0.insert(field.name().to_owned(), value.into());
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.insert(field.name().to_owned(), value.into());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        let mut text = String::new();
        // Writing to a string fails only where the value's own formatting does; then what it wrote is shown.
        let _ = write!(text, "{value:?}");
        self.0.insert(field.name().to_owned(), text.into());
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use tracing_subscriber::layer::SubscriberExt as _;

    use super::*;

    fn traced(work: impl FnOnce()) -> Vec<Value> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.json");
        let (file, layer) = create(&path, "test").unwrap();
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), work);
        drop(file);
        serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap()
    }

    fn named<'a>(events: &'a [Value], name: &str) -> Vec<&'a Value> {
        events.iter().filter(|event| event["name"] == name).collect()
    }

    #[test]
    fn work_is_a_slice_of_its_thread_and_flights_may_overlap() {
        let events = traced(|| {
            let flight = tracing::debug_span!(target: FLIGHT, "exchange", call = 7_u64);
            let outer = tracing::debug_span!(target: WORK, "outer", layer = 3_u64, group = ?Some(1)).entered();
            tracing::debug_span!(target: WORK, "inner").in_scope(|| {
                std::thread::sleep(std::time::Duration::from_millis(3));
            });
            drop(outer);
            tracing::info_span!("not for the trace").in_scope(|| tracing::info!(target: WORK, "nor this"));
            drop(flight);
        });
        let (outer, inner) = (named(&events, "outer")[0], named(&events, "inner")[0]);
        assert_eq!(
            (&outer["ph"], &outer["args"]["layer"], &outer["args"]["group"]),
            (&json!("X"), &json!(3), &json!("Some(1)"))
        );
        assert_eq!(outer["tid"], inner["tid"]);
        assert_eq!(outer["pid"], std::process::id());
        let time = |event: &Value, key: &str| event[key].as_f64().unwrap();
        assert!(time(inner, "dur") >= 3000.0);
        assert!(time(outer, "ts") <= time(inner, "ts") && time(outer, "dur") >= time(inner, "dur"));
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64() * 1e6;
        assert!((time(outer, "ts") - now).abs() < 60e6);

        let flight = named(&events, "exchange");
        assert_eq!(flight.iter().map(|event| event["ph"].as_str().unwrap()).collect::<Vec<_>>(), ["b", "e"]);
        assert_eq!((&flight[0]["id"], &flight[0]["args"]["call"]), (&flight[1]["id"], &json!(7)));
        assert!(time(flight[0], "ts") <= time(outer, "ts") && time(flight[1], "ts") >= time(outer, "ts"));
        assert!(named(&events, "not for the trace").is_empty());
        assert_eq!(named(&events, "process_name")[0]["args"]["name"], "test");
        assert_eq!(named(&events, "thread_name").len(), 1);
    }

    #[test]
    fn processes_have_files_of_their_own() {
        let name = |path: &str| of_process(Path::new(path), "owner").display().to_string();
        assert_eq!(name("out/trace.json"), "out/trace-owner.json");
        assert_eq!(name("trace"), "trace-owner");
    }

    #[test]
    fn a_file_that_cannot_be_written_is_named() {
        let made = create::<tracing_subscriber::Registry>(Path::new("/no/such/folder/trace.json"), "test");
        assert!(made.err().unwrap().to_string().contains("/no/such/folder/trace.json"));
    }
}
