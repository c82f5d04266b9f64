//! The rows that a training step asks products of.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};

use actors::backend::{BackendError, LinearBackend, PlainBackend, Product};
use actors::data::{Batches, DataOptions, Dataset};
use actors::trainer::{TrainableModel, Trainer, TrainerConfig, TrainingConfig, TrainingData};
use protocol::buffer::Buffer;
use protocol::ids::ProductId;
use protocol::model::Model;

/// Sequences of the step.
const SEQUENCES: usize = 8;
/// Their longest.
const LENGTH: usize = 128;

/// The rows of each product of one step, `tokens × inner`, and how many.
pub(crate) type Rows = BTreeMap<ProductId, (Arc<Buffer>, usize)>;

struct Recorder {
    plain: PlainBackend,
    rows: Mutex<Rows>,
}

impl LinearBackend for Recorder {
    fn apply(&self, product: ProductId, rows: Arc<Buffer>, tokens: usize) -> Result<Product, BackendError> {
        self.rows.lock().expect("nobody panicked").insert(product, (Arc::clone(&rows), tokens));
        self.plain.apply(product, rows, tokens)
    }
}

/// Trains for one step and keeps what it asked for.
pub(crate) fn rows_of_a_step(model: &Arc<Model>, data: &Path) -> anyhow::Result<Rows> {
    let options = DataOptions { max_tokens: LENGTH, ..DataOptions::default() };
    let examples = Dataset::load(data, &options, &model.tokenizer()?)?;
    let training =
        TrainingConfig { steps: Some(1), micro_batch: SEQUENCES, accumulation: 1, ..TrainingConfig::default() };
    let data = TrainingData { train: Box::new(Batches::new(&examples, SEQUENCES, 1, 0)), evaluation: Vec::new() };
    let recorder = Arc::new(Recorder { plain: PlainBackend::new(model)?, rows: Mutex::default() });
    let config = TrainerConfig::new(training.clone());
    actix::System::new().block_on(async {
        let trainable = TrainableModel::new(Arc::clone(model), Arc::clone(&recorder) as _, &training)?;
        Trainer::launch(config, trainable, data)?.join().await?;
        anyhow::Ok(())
    })?;
    let rows = std::mem::take(&mut *recorder.rows.lock().expect("nobody panicked"));
    let tokens = rows.values().next().map_or(0, |(_, tokens)| *tokens);
    println!("{} products of {tokens} rows", rows.len());
    Ok(rows)
}
