//! Prints the tokens that an owner evaluates on, for `tests/peft_check.py` and `tests/dpo_check.py`:
//!
//!     cargo run --release -p tests --example held_out_tokens -- owner.toml > tokens.json
//!
//! `owner.toml` is the configuration of the run, with its model, data and seed in it.

use std::path::PathBuf;

use actors::data::{Dataset, IGNORED};
use anyhow::Context as _;
use node::config::Config;
use protocol::model::Model;

fn main() -> anyhow::Result<()> {
    let path = std::env::args_os().nth(1).map(PathBuf::from).context("which configuration?")?;
    let config = Config::read(&path)?;
    let tokenizer = Model::open(config.model()?)?.tokenizer()?;
    let examples = match config.training.objective.of_pairs() {
        true => Dataset::load_pairs(&config.data_files()?, &config.data, &tokenizer)?,
        false => Dataset::load_files(&config.data_files()?, &config.data, &tokenizer)?,
    };
    let (_, held_out) = examples.split(config.data.held_out, config.training.seed)?;
    let batches = match config.training.eval_batches {
        0 => usize::MAX,
        most => most,
    };
    let sequences: Vec<_> =
        held_out.in_order(config.training.micro_batch, 1).take(batches).collect::<Result<_, _>>()?;
    let mut lines = Vec::new();
    for batch in &sequences {
        for (tokens, targets) in batch.sequences().map(|rows| (&batch.tokens[rows.clone()], &batch.targets[rows])) {
            // What follows the last target changes no loss.
            let used = targets.iter().rposition(|&target| target != IGNORED).map_or(0, |last| last + 1);
            let targets: Vec<i64> = targets[..used]
                .iter()
                .map(|&target| if target == IGNORED { -100 } else { i64::from(target) })
                .collect();
            lines.push(serde_json::json!({ "tokens": tokens[..used], "targets": targets }));
        }
    }
    println!("{}", serde_json::Value::from(lines));
    Ok(())
}
