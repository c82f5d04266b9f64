//! `node eval`: what a model makes of a file of examples, with and without an adapter.
//!
//! 1. The loss of what is learnt of each example, and the perplexity that it is;
//! 2. if asked for, answers to the examples' prompts, `generate`d side by side, and `measures` of how near they are to the
//!    examples' own: exact match, `chrf`, `bleu`;
//! 3. a `table`, or JSON with every answer.

mod bleu;
mod chrf;
mod generate;
mod measures;
mod table;

use std::path::PathBuf;
use std::sync::Arc;

use actors::data::{DataOptions, Dataset, MicroBatch, Question};
use actors::lora::LoraAdapters;
use actors::transformer::{Llama, LlamaError};
use anyhow::{Context as _, anyhow, ensure};
use serde::Serialize;

use self::generate::{Answered, answers};
use self::measures::{AnswerExpression, Measures};
use crate::data::tell;
use crate::roles::progress::Progress;
use crate::roles::ready::{Ready, Used};
use crate::roles::stop::StopSignals;
use crate::{output, protect};

/// What is evaluated, and how.
pub(crate) struct EvalOptions {
    pub(crate) used: Used,
    /// Whether a file of settings says how long examples may be; if not, they are as long as the model takes.
    pub(crate) bounded: bool,
    pub(crate) data: PathBuf,
    pub(crate) adapter: Option<PathBuf>,
    /// The first so many examples only.
    pub(crate) limit: Option<usize>,
    pub(crate) generation: Option<Generation>,
    /// JSON in place of a table.
    pub(crate) json: bool,
}

/// How prompts are answered.
pub(crate) struct Generation {
    /// Tokens of an answer at most.
    pub(crate) max_tokens: usize,
    /// What counts of an answer.
    pub(crate) answer_regex: Option<String>,
}

/// What one model came to.
#[derive(Clone, Debug, Serialize)]
struct Scores {
    /// Mean cross entropy of what is learnt, in nats a token.
    loss: f64,
    /// Its exponential.
    perplexity: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    generation: Option<Measures>,
}

/// What an evaluation found.
#[derive(Clone, Debug, Serialize)]
struct Evaluation {
    model: String,
    data: String,
    examples: usize,
    /// Tokens that carry loss.
    loss_tokens: usize,
    base: Scores,
    #[serde(skip_serializing_if = "Option::is_none")]
    adapter: Option<Scores>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    answers: Vec<Answered>,
}

/// Evaluates, and prints what was found.
///
/// # Errors
/// Whatever is wrong with model, data or adapter, and what fails on the way.
pub(crate) async fn run(options: EvalOptions) -> anyhow::Result<()> {
    protect::shut_memory();
    let mut stop = StopSignals::listen()?;
    let progress = Progress::new();
    let expression = options.generation.as_ref().and_then(|generation| generation.answer_regex.as_deref());
    let expression = expression.map(AnswerExpression::new).transpose()?;
    let evaluated = tokio::select! {
        evaluated = evaluate(&options, expression, &progress) => evaluated,
        () = stop.next() => Err(anyhow!("stopped before the evaluation was complete")),
    };
    progress.finish();
    let evaluation = evaluated?;
    if options.json {
        output::print(serde_json::to_string_pretty(&evaluation)?);
    } else {
        table::lines(&evaluation).into_iter().for_each(output::print);
    }
    Ok(())
}

async fn evaluate(
    options: &EvalOptions,
    expression: Option<AnswerExpression>,
    progress: &Progress,
) -> anyhow::Result<Evaluation> {
    let EvalOptions { used, data, limit, generation, .. } = options;
    let config = &used.config;
    let ready = Ready::prepare(used, options.adapter.iter().cloned().collect(), progress).await?;
    let result = async {
        let tokenizer = Arc::new(ready.model.tokenizer()?);
        let mut reading = config.data.clone();
        if !options.bounded {
            reading.max_tokens = ready.model.config().max_positions;
        }
        let dataset = read(data, &reading, &tokenizer, *limit)?;
        let batches: Arc<Vec<MicroBatch>> =
            Arc::new(dataset.in_order(config.training.micro_batch, reading.pad_to).collect::<Result<_, _>>()?);
        let mut models = vec![("the base model", None)];
        models.extend(ready.adapters.first().map(|adapter| ("the adapter", Some(Arc::clone(adapter)))));
        let mut scores = Vec::new();
        for (name, adapter) in &models {
            progress.status(format!("evaluating {name}"));
            scores.push(loss(&ready.llama, &batches, adapter.clone()).await?);
        }
        let mut answered = Vec::new();
        if let Some(generation) = generation {
            let questions = Question::of_all(&dataset.examples()?, &tokenizer)?;
            ensure!(
                !questions.is_empty(),
                "--generate: {} has no prompts to answer, only texts; give {{\"prompt\", \"completion\"}} or {{\"messages\"}}",
                data.display()
            );
            let adapters: Vec<Option<Arc<LoraAdapters>>> = models.into_iter().map(|(_, adapter)| adapter).collect();
            let asking = generate::Asking {
                llama: &ready.llama,
                adapters: &adapters,
                questions: &questions,
                max_tokens: generation.max_tokens,
                expression,
            };
            let (measures, all) = answers(asking, progress).await?;
            answered = all;
            scores.iter_mut().zip(measures).for_each(|(scores, measures)| scores.generation = Some(measures));
        }
        let mut scores = scores.into_iter();
        Ok(Evaluation {
            model: Ready::name(config)?,
            data: data.display().to_string(),
            examples: dataset.len(),
            loss_tokens: batches.iter().map(MicroBatch::loss_tokens).sum(),
            base: scores.next().context("the base model is always evaluated")?,
            adapter: scores.next(),
            answers: answered,
        })
    };
    let result = result.await;
    ready.stop().await;
    result
}

/// The examples, or the first of them; all files of a folder together.
fn read(
    data: &std::path::Path,
    options: &DataOptions,
    tokenizer: &protocol::model::TextTokenizer,
    limit: Option<usize>,
) -> anyhow::Result<Dataset> {
    let dataset = Dataset::load(data, options, tokenizer)?;
    tell(&dataset, &data.display().to_string(), options, tokenizer);
    let first = dataset.iter().take(limit.unwrap_or(usize::MAX)).collect::<Result<_, _>>()?;
    Ok(Dataset::from_examples(first, dataset.padding()))
}

/// The mean loss over micro-batches, of which one after the other goes through the model.
async fn loss(
    llama: &Arc<Llama>,
    batches: &Arc<Vec<MicroBatch>>,
    adapter: Option<Arc<LoraAdapters>>,
) -> anyhow::Result<Scores> {
    let (mut sum, mut tokens) = (0.0, 0);
    for number in 0..batches.len() {
        let (llama, batches, adapter) = (Arc::clone(llama), Arc::clone(batches), adapter.clone());
        // One at a time: whoever stops waits for no more than this one.
        let computed = tokio::task::spawn_blocking(move || {
            let batch = &batches[number];
            Ok::<_, LlamaError>((llama.evaluate(batch, adapter.as_deref())?, batch.loss_tokens()))
        });
        let (cost, learnt) = computed.await.context("evaluating")??;
        (sum, tokens) = (sum + cost, tokens + learnt);
    }
    let loss = sum / tokens as f64;
    Ok(Scores { loss, perplexity: loss.exp(), generation: None })
}
