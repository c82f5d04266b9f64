//! `node export`: a trained adapter in the formats of other tools.

use std::path::PathBuf;

use actors::adapter;
use actors::export::{write_gguf_adapter, write_merged};
use protocol::model::Model;

use crate::output;

/// What is exported.
#[derive(Clone, Debug)]
pub struct ExportOptions {
    /// The model that the adapter was trained on.
    pub model: PathBuf,
    /// The adapter's folder.
    pub adapter: PathBuf,
    /// What is written.
    pub out: PathBuf,
}

/// Writes a Hugging Face folder with the adapter merged into the weights.
///
/// # Errors
/// Whatever is wrong with model or adapter, and a merge that is not what it should be.
pub fn merged(options: &ExportOptions) -> anyhow::Result<()> {
    let model = Model::open(&options.model)?;
    let adapters = adapter::load(&options.adapter, model.config())?;
    let merged = write_merged(&model, &adapters, &options.out)?;
    let (name, lost) = &merged.worst;
    output::print(format_args!(
        "{}: {} tensors merged, read again and found right; rounding takes most of what was added from {name}: {:.2} %",
        options.out.display(),
        merged.changed,
        100.0 * lost
    ));
    Ok(())
}

/// Writes an adapter as llama.cpp reads it.
///
/// # Errors
/// Whatever is wrong with model or adapter, and a file that does not say what it should.
pub fn gguf_adapter(options: &ExportOptions) -> anyhow::Result<()> {
    let model = Model::open(&options.model)?;
    let adapters = adapter::load(&options.adapter, model.config())?;
    let tensors = write_gguf_adapter(&options.out, model.config(), &adapters)?;
    output::print(format_args!(
        "{}: changes {tensors} tensors of {}, read again and found right",
        options.out.display(),
        model.config().family.gguf_architecture()
    ));
    Ok(())
}
