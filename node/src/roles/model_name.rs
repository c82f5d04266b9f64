//! What a model is called, for people and for the adapter's configuration: never where it lies on its owner's disk.

use std::fs;
use std::path::Path;

use serde::Deserialize;

/// Longest name that is taken from a model's own configuration.
const LONGEST: usize = 96;

/// The part of a Hugging Face configuration that names the model.
#[derive(Deserialize)]
struct Named {
    #[serde(default, rename = "_name_or_path")]
    name: Option<String>,
}

/// The name that a model was published under, where its configuration has one, else that of its folder or file.
pub(super) fn of(model: &Path) -> String {
    let json = fs::read(model.join("config.json")).ok();
    let named = json.and_then(|json| serde_json::from_slice::<Named>(&json).ok()).and_then(|named| named.name);
    named.filter(|name| is_published(name)).unwrap_or_else(|| {
        let absolute = fs::canonicalize(model).unwrap_or_else(|_| model.to_owned());
        let gguf = absolute.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"));
        let name = if gguf { absolute.file_stem() } else { absolute.file_name() };
        name.map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned())
    })
}

/// Whether it is a name on the Hub, `owner/model`, and no path on the computer of whoever saved the model.
fn is_published(name: &str) -> bool {
    let part = |part: &str| {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        !part.is_empty() && !part.starts_with('.') && part.chars().all(plain)
    };
    name.len() <= LONGEST && name.split_once('/').is_some_and(|(owner, model)| part(owner) && part(model))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_name_is_no_path() {
        let folder = tempfile::tempdir().unwrap();
        let model = folder.path().join("llama-3.2-1b");
        fs::create_dir(&model).unwrap();
        assert_eq!(of(&model), "llama-3.2-1b");
        for (named, name) in [
            ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B"),
            ("/home/somebody/models/x", "llama-3.2-1b"),
            ("./out", "llama-3.2-1b"),
            ("../secret/out", "llama-3.2-1b"),
            ("", "llama-3.2-1b"),
        ] {
            fs::write(model.join("config.json"), serde_json::json!({ "_name_or_path": named }).to_string()).unwrap();
            assert_eq!(of(&model), name, "{named}");
        }
        assert_eq!(of(Path::new("/some/where/SmolLM2.Q4_1.gguf")), "SmolLM2.Q4_1");
    }
}
