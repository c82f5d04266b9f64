//! The owner's own part of a training step, with base products that cost next to nothing.
//!
//! `cargo bench -p benches --bench owner_step [-- SHAPE [IN_FLIGHT]]`, where SHAPE is `smollm2` (the default),
//! `llama1b`, Llama-3.2-1B with four of its layers, or a model's path. Weights of the shapes are random: arithmetic takes as long on them as on real ones. A
//! step is four sequences of 256 tokens, one a micro-batch, LoRA of rank 8 on all seven projections. Printed are the
//! best and the median of the steps, their processor time, the time between one product and the next (where only one micro-batch is in
//! flight), and the memory: its peak, and how much of that is the model's files.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use actors::backend::{BackendError, LinearBackend, Product};
use actors::data::{BatchSource, DataError, MicroBatch, Position};
use actors::trainer::{
    EvaluationReport, TrainEvent, TrainableModel, Trainer, TrainerConfig, TrainingConfig, TrainingData,
};
use protocol::buffer::Buffer;
use protocol::ids::{Direction, Group, LinearShape, ProductId};
use protocol::model::synthetic::{StoredAs, SyntheticLlama};
use protocol::model::{LlamaConfig, Model, Rope};

const STEPS: usize = 5;
const SEQUENCES: usize = 4;
const LENGTH: usize = 256;

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with("--")).collect();
    let shape = arguments.first().map_or("smollm2", String::as_str);
    let in_flight = arguments.get(1).map_or(Ok(1), |argument| argument.parse())?;
    let config = match shape {
        "smollm2" => LlamaConfig {
            hidden_size: 576,
            intermediate_size: 1536,
            layers: 30,
            heads: 9,
            kv_heads: 3,
            vocabulary: 49_152,
            rope: Rope::plain(100_000.0, 64),
            ..SyntheticLlama::tiny(1).config
        },
        "llama1b" => LlamaConfig {
            hidden_size: 2048,
            intermediate_size: 8192,
            layers: 4,
            heads: 32,
            kv_heads: 8,
            vocabulary: 128_256,
            rope: Rope::plain(500_000.0, 64),
            ..SyntheticLlama::tiny(1).config
        },
        path => return measure(&Arc::new(Model::open(path)?), in_flight),
    };
    let config = LlamaConfig { head_dim: 64, max_positions: 2048, ..config };
    let folder = tempfile::tempdir()?;
    SyntheticLlama { config, seed: 1 }.write_folder(folder.path(), StoredAs::Bf16)?;
    let model = Arc::new(Model::open(folder.path())?);
    println!("{shape}, {SEQUENCES} × {LENGTH} tokens a step, {in_flight} in flight");
    measure(&model, in_flight)
}

fn measure(model: &Arc<Model>, in_flight: usize) -> anyhow::Result<()> {
    // Writing the model took more memory than anything that follows: the peak begins anew, where Linux lets it.
    let _ = std::fs::write("/proc/self/clear_refs", "5");
    println!("resident before the model is read: {}", memory());
    let training = TrainingConfig {
        steps: Some(STEPS),
        micro_batch: 1,
        accumulation: SEQUENCES,
        in_flight,
        eval_batches: 1,
        ..TrainingConfig::default()
    };
    let vocabulary = model.config().vocabulary as u32;
    let sequence = move |n: u32| MicroBatch {
        lengths: vec![LENGTH],
        multiple: 1,
        tokens: (0..LENGTH as u32).map(|i| (i * 7919 + n * 104_729) % vocabulary).collect(),
        numbers: Vec::new(),
        targets: (1..=LENGTH as u32).map(|i| (i * 7919 + n * 104_729) % vocabulary).collect(),
    };
    let data = TrainingData { train: Box::new(Endless { next: 0, sequence }), evaluation: vec![sequence(1 << 20)] };
    let config = model.config().clone();
    let most = LENGTH * 2 * config.intermediate_size;
    let numbers = (0..most).map(|i| (i % 61) as f32 * 0.03 - 0.9).collect();
    let backend = Arc::new(Costless { config, numbers, between: Mutex::default() });
    let seconds = actix::System::new().block_on(async {
        let trainable = TrainableModel::new(model.clone(), backend.clone() as _, &training)?;
        let mut run = Trainer::launch(TrainerConfig::new(training), trainable, data)?;
        let (mut seconds, mut processor) = (Vec::new(), 0.0);
        while let Some(event) = run.events.recv().await {
            match event {
                TrainEvent::Step(step) => {
                    seconds.push(step.seconds);
                    println!("step {}: {:.0} ms", step.step, 1e3 * step.seconds);
                    if step.step == 1 {
                        processor = processor_seconds();
                    } else if step.step == STEPS {
                        processor = (processor_seconds() - processor) / (STEPS - 1) as f64;
                    }
                }
                TrainEvent::Evaluation(EvaluationReport { seconds, .. }) => {
                    println!("evaluation of one sequence: {:.0} ms", 1e3 * seconds)
                }
                _ => {}
            }
        }
        run.join().await?;
        println!("processor time: {:.0} ms a step", 1e3 * processor);
        anyhow::Ok(seconds)
    })?;
    let mut sorted = seconds;
    sorted.sort_by(f64::total_cmp);
    println!("step: best {:.0} ms, median {:.0} ms", 1e3 * sorted[0], 1e3 * sorted[sorted.len() / 2]);
    if in_flight == 1 {
        for ((from, to), time) in backend.between.lock().expect("nobody panicked").spent.iter() {
            println!("  {from:>20} → {to:<20} {:>8.1} ms a step", 1e3 * time.as_secs_f64() / STEPS as f64);
        }
    }
    println!("resident at the end: {}", memory());
    Ok(())
}

/// Sequences without end.
struct Endless<F> {
    next: u32,
    sequence: F,
}

impl<F: Fn(u32) -> MicroBatch + Send> BatchSource for Endless<F> {
    fn next_batch(&mut self) -> Result<Option<MicroBatch>, DataError> {
        self.next += 1;
        Ok(Some((self.sequence)(self.next - 1)))
    }

    fn position(&self) -> Position {
        Position { index: self.next as usize, ..Position::default() }
    }

    fn seek(&mut self, position: Position) {
        self.next = position.index as u32;
    }
}

/// Where the owner is between two products.
#[derive(Default)]
struct Between {
    /// When the last product was returned, and which.
    last: Option<(String, Instant)>,
    spent: BTreeMap<(String, String), Duration>,
}

/// Small constants instead of products.
struct Costless {
    config: LlamaConfig,
    /// What every product begins with.
    numbers: Vec<f32>,
    between: Mutex<Between>,
}

impl LinearBackend for Costless {
    fn apply(&self, product: ProductId, _rows: Arc<Buffer>, tokens: usize) -> Result<Product, BackendError> {
        let called = Instant::now();
        let ProductId { linear, direction } = product;
        let LinearShape { d_in, d_out } = self.config.shape(linear.group);
        let outer = if direction == Direction::Forward { d_out } else { d_in };
        let mut out = Buffer::scratch(tokens * outer);
        out.copy_from_slice(&self.numbers[..tokens * outer]);
        let place = match (direction, linear.group) {
            (Direction::Forward, Group::Qkv) if linear.layer == 0 => "first product".to_owned(),
            (Direction::Backward, Group::Down) if linear.layer as usize + 1 == self.config.layers => {
                "last layer".to_owned()
            }
            (direction, group) => format!("{direction:?} {group:?}"),
        };
        let mut between = self.between.lock().expect("nobody panicked");
        if let Some((last, returned)) = between.last.take() {
            *between.spent.entry((last, place.clone())).or_default() += called - returned;
        }
        between.last = Some((place, Instant::now()));
        Ok(Product::of_owner(out))
    }
}

/// Processor time of this process so far, over all its threads.
fn processor_seconds() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a live timespec, which is all that the call writes.
    let status = unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    assert_eq!(status, 0, "the process has a clock");
    time.tv_sec as f64 + 1e-9 * time.tv_nsec as f64
}

/// Peak and present resident memory of this process, and what of the latter is mapped files.
fn memory() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mebibytes = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).map_or(0, |kib| kib / 1024)
    };
    let (peak, anonymous, files) = (mebibytes("VmHWM:"), mebibytes("RssAnon:"), mebibytes("RssFile:"));
    format!("peak {peak} MiB, now {anonymous} MiB of its own and {files} MiB of files")
}
