//! Heads are read again by the reader that files of other tools are read by.

#![allow(clippy::unwrap_used)]

use tempfile::TempDir;

use super::*;
use crate::model::synthetic::{StoredAs, SyntheticLlama};
use crate::model::{Family, Rope, RopeScaling};

fn folder(synthetic: &SyntheticLlama) -> (TempDir, Model) {
    let folder = tempfile::tempdir().unwrap();
    synthetic.write_folder(folder.path(), StoredAs::F32).unwrap();
    let model = Model::open(folder.path()).unwrap();
    (folder, model)
}

/// The whole file of a plan, written plainly in 32-bit floats.
fn written(model: &Model) -> (TempDir, Model) {
    let plan = model.gguf_plan(GgufNumbers::F32).unwrap();
    let mut bytes = plan.head.clone();
    for tensor in &plan.tensors {
        let (rows, columns) = tensor.dimensions();
        let mut row = vec![0.0; columns];
        for number in 0..rows {
            match tensor.of_model() {
                Some(name) => model.rows(name).unwrap().row(tensor.model_row(number), &mut row).unwrap(),
                None => row.copy_from_slice(tensor.values().unwrap()),
            }
            tensor.order(&mut row);
            row.iter().for_each(|value| bytes.extend(value.to_le_bytes()));
        }
        bytes.resize(bytes.len() + tensor.bytes().1 as usize, 0);
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    std::fs::write(&path, bytes).unwrap();
    let model = Model::open(&path).unwrap();
    (folder, model)
}

#[test]
fn every_family_is_the_same_model_in_a_gguf_file() {
    for &family in Family::ALL {
        let mut synthetic = SyntheticLlama::tiny(4);
        synthetic.config.family = family;
        synthetic.config.tie_word_embeddings = false;
        let traits = &mut synthetic.config.traits;
        traits.activation = family.defaults.activation;
        traits.biases.qkv = family.model_type == "qwen2" || family.model_type == "llama";
        traits.biases.o = family.model_type == "llama";
        traits.embedding_scale = family.scaled_embeddings.then_some(8.0);
        traits.query_scalar = family.defaults.query_scalar.map(|_| 16.0);
        if let Some(each) = family.defaults.unrotated_each {
            synthetic.config.layers = each;
            traits.unrotated = crate::model::LayerSet::of(each, |layer| layer + 1 == each);
        }
        let (_folder, model) = folder(&synthetic);
        let (_file, again) = written(&model);
        assert_eq!(settings::differs(model.config(), again.config()), None, "{}", family.model_type);
        for (name, shape) in expected(model.config()) {
            let (ours, theirs) = (model.rows(&name).unwrap(), again.rows(&name).unwrap());
            let (rows, columns) = ours.dimensions();
            assert_eq!((rows, columns), theirs.dimensions(), "{name}");
            let (mut a, mut b) = (vec![0.0; columns], vec![0.0; columns]);
            for row in 0..rows {
                ours.row(row, &mut a).unwrap();
                theirs.row(row, &mut b).unwrap();
                assert_eq!(a, b, "{}: row {row} of {name} {shape:?}", family.model_type);
            }
        }
        let text = "In 1999, the cat's 12 hats\n\n  were there: <|im_end|> Größe 東京!";
        let tokens = |model: &Model| model.tokenizer().unwrap().encode(text, true).unwrap();
        assert_eq!(tokens(&model), tokens(&again));
        let template = |model: &Model| model.tokenizer().unwrap().chat_template().unwrap().source().to_owned();
        assert_eq!(template(&model), template(&again));
    }
}

#[test]
fn rotary_positions_of_llama_3_are_written_as_divisors() {
    let mut synthetic = SyntheticLlama::tiny(4);
    synthetic.config.rope.scaling = Some(RopeScaling::Llama3(crate::model::family::Llama3RopeScaling {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 128,
    }));
    let (_folder, model) = folder(&synthetic);
    let (_file, again) = written(&model);
    let (ours, theirs) = (model.config().rope.frequencies(9), again.config().rope.frequencies(9));
    assert!(ours.iter().zip(&theirs).all(|(a, b)| (a - b).abs() <= 1e-6 * a), "{ours:?} {theirs:?}");
    assert_ne!(ours, Rope::plain(10_000.0, 16).frequencies(9));
}

#[test]
fn what_llama_cpp_cannot_compute_is_refused() {
    let refused = |change: &dyn Fn(&mut SyntheticLlama)| {
        let mut synthetic = SyntheticLlama::tiny(4);
        change(&mut synthetic);
        let (_folder, model) = folder(&synthetic);
        model.gguf_plan(GgufNumbers::F16).map(|_| ()).unwrap_err().to_string()
    };
    let dynamic = refused(&|synthetic| {
        synthetic.config.rope.scaling = Some(RopeScaling::Dynamic { factor: 2.0, context: 512 });
    });
    assert!(dynamic.contains("dynamic") && dynamic.contains("export merged"), "{dynamic}");
    let unrotated = refused(&|synthetic| {
        synthetic.config.family = Family::of_model_type("smollm3").unwrap();
        synthetic.config.traits.unrotated = crate::model::LayerSet::of(2, |layer| layer == 0);
    });
    assert!(unrotated.contains("unrotated"), "{unrotated}");
}

#[test]
fn a_file_is_copied_with_its_metadata_and_the_type_of_its_numbers() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("base.gguf");
    SyntheticLlama::tiny(8).write_gguf(&path, candle_core::quantized::GgmlDType::Q8_0).unwrap();
    let model = Model::open(&path).unwrap();
    let plan = model.gguf_plan(GgufNumbers::Bf16).unwrap();
    let head = read_gguf_header(&plan.head).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let before = read_gguf_header(&bytes).unwrap();
    for (key, value) in &before.metadata {
        assert_eq!(head.metadata.get(key), Some(value), "{key}");
    }
    assert_eq!(head.metadata["general.file_type"].count(), Some(32));
    assert_eq!(head.tensors.len(), before.tensors.len());
    assert!(head.tensors.values().all(|tensor| tensor.dtype == if tensor.shape.len() == 1 { 0 } else { 30 }));
}
