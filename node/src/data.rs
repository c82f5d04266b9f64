//! `node data show`: how a data set's records become examples, and what is learnt of them; and what is told of that before
//! a run.

use std::path::PathBuf;

use actors::data::{DataFile, DataOptions, Dataset, Example, Note, TrainOnEnd, marked};
use anyhow::Context as _;
use protocol::model::{Model, TextTokenizer};

use crate::config::Config;
use crate::output;

/// What is to be shown.
#[derive(Clone, Debug)]
pub struct ShowOptions {
    /// A Hugging Face folder or a .gguf file; the configuration's if it is not given.
    pub model: Option<PathBuf>,
    /// The data; the configuration's if they are not given.
    pub data: Option<PathBuf>,
    /// Where the settings come from.
    pub config: Option<PathBuf>,
    /// Examples to show.
    pub count: usize,
    /// Show each token by itself.
    pub tokens: bool,
    /// The data are pairs to choose from.
    pub preferences: bool,
}

/// Shows examples on standard output.
///
/// # Errors
/// Whatever is wrong with model, data or settings.
pub fn show(options: &ShowOptions) -> anyhow::Result<()> {
    let config = options.config.as_deref().map(Config::read).transpose()?.unwrap_or_default();
    let model = options.model.as_ref().or(config.model.as_ref()).context("no model: give --model")?;
    let data = match &options.data {
        Some(path) => vec![DataFile::new(path)],
        None => config.data_files()?,
    };
    let tokenizer = Model::open(model)?.tokenizer()?;
    let shown = |what: &str, example: &Example| -> anyhow::Result<()> {
        let (all, learnt) = (example.tokens.len(), example.loss_tokens());
        output::print(format_args!("{what}: {all} tokens, {learnt} of them learnt (between ⟦ and ⟧)"));
        output::print(marked(example, &tokenizer)?);
        if options.tokens {
            for (&token, &learnt) in example.tokens.iter().zip(&example.learnt) {
                let text = tokenizer.decode(&[token])?;
                output::print(format_args!("  {token:>8} {} {text:?}", if learnt { "learnt" } else { "      " }));
            }
        }
        output::print("");
        Ok(())
    };
    if options.preferences {
        let pairs = Dataset::load_pairs(&data, &config.data, &tokenizer)?;
        tell_notes(&pairs.notes, &pairs.unused);
        let (all, answers) = (pairs.units(), ["chosen", "rejected"].into_iter().cycle());
        for ((number, answer), example) in (0..).zip(answers).zip(pairs.iter()).take(2 * options.count) {
            shown(&format!("pair {} of {all}, {answer}", number / 2 + 1), &example?)?;
        }
        return Ok(());
    }
    let examples = Dataset::load_files(&data, &config.data, &tokenizer)?;
    tell(&examples, &named(&data), &config.data, &tokenizer);
    let all = examples.len();
    for (number, example) in (1..).zip(examples.iter()).take(options.count) {
        shown(&format!("example {number} of {all}"), &example?)?;
    }
    Ok(())
}

/// The files of a data set, for messages.
pub(crate) fn named(data: &[DataFile]) -> String {
    data.iter().map(|file| file.path.display().to_string()).collect::<Vec<_>>().join(", ")
}

/// Says what of the data is not used as it is, and shows an example to whoever debugs.
pub(crate) fn tell(examples: &Dataset, data: &str, options: &DataOptions, tokenizer: &TextTokenizer) {
    tell_notes(&examples.notes, &examples.unused);
    let most = options.max_tokens;
    if examples.truncated > 0 {
        tracing::warn!("{} examples of {data} were cut to {most} tokens (data.max_tokens)", examples.truncated);
    }
    if let Some(first) = examples.left_out.first() {
        tracing::warn!(
            "{} examples of {data} are left out, since {most} tokens leave nothing of them to learn; the first is {first}",
            examples.left_out.len(),
        );
    }
    if examples.ended == 0 && options.train_on_end != TrainOnEnd::None {
        tracing::warn!(
            "no example of {data} has a token to learn that ends a turn or a text, so that the model will not learn to stop: \
             its chat template writes none, or data.max_tokens ({most}) cuts it off; node data show tells"
        );
    }
    if let Some(Ok(first)) = examples.iter().next() {
        // Whoever debugs sees the data.
        match marked(&first, tokenizer) {
            Ok(text) => tracing::debug!("the first example of {data}, what is learnt of it between ⟦ and ⟧:\n{text}"),
            Err(error) => tracing::debug!("the first example of {data} cannot be shown: {error}"),
        }
    }
}

fn tell_notes(notes: &[Note], unused: &[PathBuf]) {
    for Note { what, count, first } in notes {
        tracing::warn!("{what} is of no effect, in {count} records; the first is {first}");
    }
    if !unused.is_empty() {
        let files: Vec<String> = unused.iter().map(|file| file.display().to_string()).collect();
        tracing::warn!("neither trained on nor held out: {}", files.join(", "));
    }
}
