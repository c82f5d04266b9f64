//! Tests of the model on disk: both formats against the numbers they were made of, and against damage.

#![allow(clippy::unwrap_used)]

mod config;
mod families;
mod files;
mod folders;
mod tokenizer;

use tempfile::TempDir;

use super::synthetic::{StoredAs, SyntheticLlama};
use super::{Model, ModelError};

/// A synthetic model in a Hugging Face folder.
fn folder(synthetic: &SyntheticLlama, stored_as: StoredAs) -> (TempDir, Model) {
    let folder = tempfile::tempdir().unwrap();
    synthetic.write_folder(folder.path(), stored_as).unwrap();
    let model = Model::open(folder.path()).unwrap();
    (folder, model)
}

/// What opening a damaged model says; it may be found later than at opening, but never accepted.
fn refusal(result: Result<Model, ModelError>) -> String {
    match result {
        Ok(_) => panic!("the model was opened"),
        Err(error) => error.to_string(),
    }
}
