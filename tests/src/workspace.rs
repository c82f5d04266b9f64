//! A folder of one test: models, data, results.

use std::fs;
use std::path::{Path, PathBuf};

use protocol::model::synthetic::{StoredAs, SyntheticLlama};
use tempfile::TempDir;

/// A temporary folder with what a test needs in it; removed with the value.
pub struct Workspace {
    folder: TempDir,
}

impl Default for Workspace {
    fn default() -> Self {
        Self::new()
    }
}

impl Workspace {
    /// An empty folder.
    ///
    /// # Panics
    /// When the system has no temporary folder.
    pub fn new() -> Self {
        Self { folder: tempfile::tempdir().expect("a temporary folder") }
    }

    /// A path in the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes a file.
    ///
    /// # Panics
    /// When it cannot.
    pub fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, text).expect("the test's folder can be written");
        path
    }

    /// A small random Llama of so many layers, as a Hugging Face folder.
    ///
    /// # Panics
    /// When the folder cannot be written.
    pub fn model(&self, name: &str, seed: u64, layers: usize) -> PathBuf {
        let mut llama = SyntheticLlama::tiny(seed);
        llama.config.layers = layers;
        let path = self.path(name);
        llama.write_folder(&path, StoredAs::F32).expect("the test's folder can be written");
        path
    }

    /// The same, for texts of so many tokens.
    ///
    /// # Panics
    /// When the folder cannot be written.
    pub fn model_for(&self, name: &str, layers: usize, positions: usize) -> PathBuf {
        let mut llama = SyntheticLlama::tiny(1);
        (llama.config.layers, llama.config.max_positions) = (layers, positions);
        let path = self.path(name);
        llama.write_folder(&path, StoredAs::F32).expect("the test's folder can be written");
        path
    }

    /// A GGUF file without tensors that says it is of some architecture.
    ///
    /// # Panics
    /// When it cannot be written.
    pub fn foreign_gguf(&self, name: &str, architecture: &str) -> PathBuf {
        use candle_core::quantized::gguf_file;
        let path = self.path(name);
        let mut file = fs::File::create(&path).expect("the test's folder can be written");
        let value = gguf_file::Value::String(architecture.to_owned());
        gguf_file::write(&mut file, &[("general.architecture", &value)], &[]).expect("a GGUF can be written");
        path
    }

    /// Questions and answers in JSONL.
    pub fn questions(&self, name: &str, count: usize) -> PathBuf {
        let line = |number: usize| {
            let (question, answer) = (format!("What is {number} and one?"), format!("It is {}.", number + 1));
            serde_json::json!({ "prompt": question, "completion": answer }).to_string() + "\n"
        };
        self.write(name, &(0..count).map(line).collect::<String>())
    }

    /// Names of all that lies in a folder of the workspace, sorted; none if there is no such folder.
    pub fn names_in(&self, name: &str) -> Vec<String> {
        names_in(&self.path(name))
    }
}

fn names_in(folder: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let mut names: Vec<_> =
        entries.filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned())).collect();
    names.sort();
    names
}
