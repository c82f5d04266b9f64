//! Answers to an evaluation's prompts, of each model.

use std::sync::Arc;

use actors::data::Question;
use actors::generation::{Engine, EngineConfig, Event, FinishReason, Request};
use actors::lora::LoraAdapters;
use actors::transformer::Llama;
use anyhow::{Context as _, bail};
use futures::stream::{self, StreamExt as _};
use serde::Serialize;

use super::measures::{AnswerExpression, Judge, Measures};
use crate::roles::progress::Progress;

/// Prompts that wait beside those that are answered.
const AHEAD: usize = 32;

/// What is asked of whom.
pub(super) struct Asking<'a> {
    pub(super) llama: &'a Arc<Llama>,
    /// The models: without an adapter, and with one.
    pub(super) adapters: &'a [Option<Arc<LoraAdapters>>],
    /// With the numbers of their examples.
    pub(super) questions: &'a [(usize, Question)],
    pub(super) max_tokens: usize,
    pub(super) expression: Option<AnswerExpression>,
}

/// A prompt with what was answered.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Answered {
    /// The number of its example, from 0.
    example: usize,
    prompt: String,
    reference: String,
    base: Answer,
    #[serde(skip_serializing_if = "Option::is_none")]
    adapter: Option<Answer>,
}

/// What one model answered.
#[derive(Clone, Debug, Serialize)]
struct Answer {
    text: String,
    right: bool,
    /// Why it ended.
    finish_reason: &'static str,
}

/// All answers, and what each model's came to.
///
/// # Errors
/// When the engine cannot be started, or a prompt cannot be answered.
pub(super) async fn answers(asking: Asking<'_>, progress: &Progress) -> anyhow::Result<(Vec<Measures>, Vec<Answered>)> {
    let Asking { llama, adapters, questions, max_tokens, expression } = asking;
    progress.status("preparing to answer");
    let starting = Arc::clone(llama);
    let engine = tokio::task::spawn_blocking(move || Engine::start(starting, EngineConfig::default()));
    let engine = engine.await.context("preparing to answer")??;
    let (mut measures, mut columns) = (Vec::new(), Vec::new());
    for adapter in adapters {
        let all = stream::iter(questions).map(|(number, question)| {
            let (engine, adapter) = (&engine, adapter.clone());
            async move {
                let room = engine.room(question.prompt.len()).min(max_tokens);
                let request = Request { adapter, ..Request::new(question.prompt.clone(), room) };
                let answer = answered(engine, request).await;
                answer.with_context(|| format!("the prompt of example {} cannot be answered", number + 1))
            }
        });
        let mut all = all.buffered(AHEAD);
        let mut judge = Judge::new(expression.clone());
        let mut column = Vec::with_capacity(questions.len());
        while let Some(answer) = all.next().await {
            let (text, reason) = answer?;
            let right = judge.add(&text, &questions[column.len()].1.answer);
            column.push(Answer { text, right, finish_reason: reason.name() });
            let model = if adapter.is_some() { "the adapter" } else { "the base model" };
            progress.status(format!("{model} answered {} of {}", column.len(), questions.len()));
        }
        measures.push(judge.measures());
        columns.push(column.into_iter());
    }
    let mut columns = columns.into_iter();
    let (base, mut tuned) = (columns.next().into_iter().flatten(), columns.next());
    let row = |((number, question), base): (&(usize, Question), Answer)| {
        Ok(Answered {
            example: *number,
            prompt: engine.tokenizer().decode(&question.prompt)?,
            reference: question.answer.clone(),
            base,
            adapter: tuned.as_mut().and_then(Iterator::next),
        })
    };
    let rows = questions.iter().zip(base).map(row).collect::<anyhow::Result<_>>()?;
    Ok((measures, rows))
}

/// The text that answers a request, and why it ended.
async fn answered(engine: &Engine, request: Request) -> anyhow::Result<(String, FinishReason)> {
    let mut events = engine.submit(request)?;
    let mut text = String::new();
    while let Some(event) = events.next().await {
        match event {
            Event::Prompt(_) => {}
            Event::Token(token) => text.push_str(&token.text),
            Event::Finished(finished) => {
                text.push_str(&finished.text);
                return Ok((text, finished.reason));
            }
            Event::Failed(error) => return Err(error.into()),
        }
    }
    bail!("the engine ended in the middle of an answer")
}
