//! Answers to some held-out prompts at each evaluation: what a loss does not show.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use actors::backend::LinearBackend;
use actors::data::{Dataset, Question};
use actors::generation::{Engine, EngineConfig, Event, Events, GenerationError, Request};
use actors::lora::LoraAdapters;
use actors::transformer::{Llama, LlamaError};
use anyhow::ensure;
use protocol::model::Model;

use crate::config::EvalConfig;
use crate::report::{AnswerReport, AnswersReport};

/// Asks the model that is being trained, over the backend that trains it.
pub(super) struct Asking {
    model: Arc<Model>,
    engine: Engine,
    /// The prompts, as texts too.
    questions: Vec<(String, Question)>,
    max_tokens: usize,
    /// What was answered since this process began.
    answered: Mutex<Vec<AnswersReport>>,
}

impl Asking {
    /// Prepares to ask the first of the held-out prompts; `None` if nothing is to be asked. Blocks.
    ///
    /// # Errors
    /// When there is nothing to ask, or the engine cannot be started.
    pub(super) fn begin(
        config: &EvalConfig,
        held_out: &Dataset,
        model: &Arc<Model>,
        backend: Arc<dyn LinearBackend>,
    ) -> anyhow::Result<Option<Self>> {
        if config.generate == 0 {
            return Ok(None);
        }
        let llama = Llama::new(Arc::clone(model), backend)?;
        let engine = Engine::start(Arc::new(llama), EngineConfig::default())?;
        // Of a pair, the answer that is preferred.
        let mut questions = Vec::new();
        for example in held_out.iter().step_by(held_out.unit()) {
            questions.extend(Question::of_all(&[example?], engine.tokenizer())?);
            if questions.len() >= config.generate {
                break;
            }
        }
        let questions = questions.into_iter().map(|(_, question)| {
            let text = engine.tokenizer().decode(&question.prompt)?;
            Ok((text, question))
        });
        let questions: Vec<(String, Question)> = questions.collect::<anyhow::Result<_>>()?;
        ensure!(
            !questions.is_empty(),
            "eval.generate is {}, and no prompt is held out that could be answered: hold some out (data.held_out), or set it \
             to 0",
            config.generate
        );
        let (model, max_tokens) = (Arc::clone(model), config.max_tokens);
        Ok(Some(Self { model, engine, questions, max_tokens, answered: Mutex::default() }))
    }

    /// Has the prompts answered with the adapters as they are after `step` steps.
    ///
    /// # Errors
    /// When a prompt cannot be answered.
    pub(super) fn ask(&self, step: usize, adapters: &LoraAdapters) -> Result<(), GenerationError> {
        let copy = LoraAdapters::new(self.model.config(), adapters.config(), 0).map_err(LlamaError::from)?;
        copy.set(adapters).map_err(LlamaError::from)?;
        let adapter = Some(Arc::new(copy));
        let asked = self.questions.iter().map(|(_, question)| {
            let room = self.engine.room(question.prompt.len()).min(self.max_tokens);
            self.engine.submit(Request { adapter: adapter.clone(), ..Request::new(question.prompt.clone(), room) })
        });
        // All of them before the first is waited for: they are answered side by side.
        let asked: Vec<Events> = asked.collect::<Result<_, _>>()?;
        let answers = self.questions.iter().zip(asked).map(|((prompt, question), events)| {
            let (prompt, expected) = (prompt.clone(), question.answer.clone());
            Ok(AnswerReport { prompt, expected, answer: text(events)? })
        });
        let answers = answers.collect::<Result<_, GenerationError>>()?;
        self.lock().push(AnswersReport { step: u32::try_from(step).unwrap_or(u32::MAX), answers });
        Ok(())
    }

    /// All that was answered since this process began.
    pub(super) fn answered(&self) -> Vec<AnswersReport> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<AnswersReport>> {
        self.answered.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The whole of an answer. Blocks.
fn text(mut events: Events) -> Result<String, GenerationError> {
    let mut text = String::new();
    while let Some(event) = events.next_blocking() {
        match event {
            Event::Prompt(_) => {}
            Event::Token(token) => text.push_str(&token.text),
            Event::Finished(finished) => {
                text.push_str(&finished.text);
                return Ok(text);
            }
            Event::Failed(error) => return Err(error),
        }
    }
    Err(GenerationError::Ended)
}

/// What was answered after some steps, a line for each prompt.
pub(super) fn lines(report: &AnswersReport) -> Vec<String> {
    let line = |answer: &AnswerReport| {
        let one = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        format!("  expected: {}\n  answered: {}", one(&answer.expected), one(&answer.answer))
    };
    let first = format!("answers to held-out prompts after {} steps", report.step);
    std::iter::once(first).chain(report.answers.iter().map(line)).collect()
}
