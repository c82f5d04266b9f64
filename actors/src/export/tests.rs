//! What is written is read again by other means than it was written by.

#![allow(clippy::unwrap_used)]

use candle_core::quantized::gguf_file::Content;
use candle_core::{Device, Tensor};
use protocol::model::synthetic::{StoredAs, SyntheticLlama};
use protocol::model::{Model, Projection};
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use tempfile::TempDir;

use super::*;
use crate::lora::{LoraAdapters, LoraConfig};

/// A tiny model and adapters that change it by this much.
fn model_and_adapters(stored: StoredAs, size: f32, config: LoraConfig) -> (TempDir, Model, LoraAdapters) {
    let folder = tempfile::tempdir().unwrap();
    SyntheticLlama::tiny(3).write_folder(folder.path(), stored).unwrap();
    let model = Model::open(folder.path()).unwrap();
    let adapters = LoraAdapters::new(model.config(), &config, 7).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    for (_, group) in adapters.groups() {
        let b: Vec<f32> = (0..group.b.elem_count()).map(|_| size * rng.random_range(-1.0..1.0f32)).collect();
        group.b.set(&Tensor::from_vec(b, group.b.shape(), &Device::Cpu).unwrap()).unwrap();
    }
    (folder, model, adapters)
}

fn uneven() -> LoraConfig {
    LoraConfig {
        rank: 4,
        alpha: 12.0,
        use_rslora: true,
        rank_pattern: [("down_proj".to_owned(), 6)].into_iter().collect(),
        alpha_pattern: [("k_proj".to_owned(), 5.0)].into_iter().collect(),
        ..LoraConfig::default()
    }
}

/// `W + s·B·A` of a projection, by candle.
fn merged_by_candle(model: &Model, adapters: &LoraAdapters, layer: u16, projection: Projection) -> Vec<f32> {
    let shape = projection.shape(model.config());
    let weight = model.projection(layer.into(), projection).unwrap();
    let weight = Tensor::from_vec(weight, (shape.d_out, shape.d_in), &Device::Cpu).unwrap();
    let mut sum = None;
    adapters
        .for_each(|of, its, a, b| {
            if (of, its) == (layer, projection) {
                let slot = adapters.groups().find_map(|(linear, group)| {
                    let slots = group.slots.iter().find(|slot| slot.projection == its);
                    slots.filter(|_| linear.layer == of).copied()
                });
                let product = (b.matmul(a)? * f64::from(slot.unwrap().scaling))?;
                sum = Some((&weight + product)?.flatten_all()?.to_vec1::<f32>()?);
            }
            Ok::<_, candle_core::Error>(())
        })
        .unwrap();
    sum.unwrap()
}

#[test]
fn a_merged_folder_is_the_model_with_its_adapter() {
    for (stored, tolerance) in [(StoredAs::Bf16, 1.01 / 256.0), (StoredAs::F32, 1e-6)] {
        let (_base, model, adapters) = model_and_adapters(stored, 0.05, uneven());
        let out = tempfile::tempdir().unwrap();
        let merged = write_merged(&model, &adapters, out.path()).unwrap();
        assert_eq!(merged.changed, 7 * model.config().layers);
        let found = Model::open(out.path()).unwrap();
        assert_eq!(found.config(), model.config());
        assert_eq!(found.embeddings().unwrap(), model.embeddings().unwrap());
        assert!(out.path().join("tokenizer.json").is_file());
        for layer in 0..model.config().layers as u16 {
            for projection in Projection::SEPARATE {
                let weight = found.projection(layer.into(), projection).unwrap();
                let expected = merged_by_candle(&model, &adapters, layer, projection);
                // Sums of other order differ by more than a small one is rounded by.
                let near = |(a, b): (&f32, &f32)| (a - b).abs() <= tolerance * b.abs() + 1e-7;
                assert!(weight.iter().zip(&expected).all(near), "layer {layer} {projection:?}");
            }
        }
        let error = write_merged(&model, &adapters, out.path()).unwrap_err().to_string();
        assert!(error.contains("is not empty"), "{error}");
    }
}

#[test]
fn a_merge_that_changes_nothing_is_an_error() {
    for (size, told) in [(0.0, "adds nothing"), (1e-9, "is as it was before")] {
        let (_base, model, adapters) = model_and_adapters(StoredAs::Bf16, size, LoraConfig::default());
        let out = tempfile::tempdir().unwrap();
        let error = write_merged(&model, &adapters, out.path()).unwrap_err().to_string();
        assert!(error.contains(told), "{error}");
    }
}

#[test]
fn trained_norms_are_not_left_out_in_silence() {
    let config = LoraConfig { modules_to_save: vec!["input_layernorm".to_owned()], ..LoraConfig::default() };
    let (_base, model, adapters) = model_and_adapters(StoredAs::Bf16, 0.05, config);
    let out = tempfile::tempdir().unwrap();
    let errors = [
        write_merged(&model, &adapters, &out.path().join("merged")).unwrap_err(),
        write_gguf_adapter(&out.path().join("adapter.gguf"), model.config(), &adapters).unwrap_err(),
    ];
    assert!(errors.iter().all(|error| error.to_string().contains("layers.0.input_layernorm")), "{errors:?}");
    assert_eq!(std::fs::read_dir(out.path()).unwrap().count(), 0);
}

#[test]
fn an_adapter_for_llama_cpp_adds_the_same_in_its_order_of_rows() {
    let (_base, model, adapters) = model_and_adapters(StoredAs::F32, 0.05, uneven());
    let out = tempfile::tempdir().unwrap();
    let path = out.path().join("adapter.gguf");
    assert_eq!(write_gguf_adapter(&path, model.config(), &adapters).unwrap(), 7 * model.config().layers);
    let mut file = std::fs::File::open(&path).unwrap();
    let content = Content::read(&mut file).unwrap();
    let text = |key: &str| content.metadata[key].to_string().unwrap().clone();
    assert_eq!(
        [text("general.type"), text("adapter.type"), text("general.architecture")],
        ["adapter", "lora", "llama"]
    );
    let alpha = content.metadata["adapter.lora.alpha"].to_f32().unwrap();
    let (layer, projection, head_dim) = (1_u16, Projection::K, model.config().head_dim);
    let mut tensor =
        |name: &str| content.tensor(&mut file, name, &Device::Cpu).unwrap().dequantize(&Device::Cpu).unwrap();
    let (a, b) = (tensor("blk.1.attn_k.weight.lora_a"), tensor("blk.1.attn_k.weight.lora_b"));
    let (rank, d_in) = a.dims2().unwrap();
    let product = (b.matmul(&a).unwrap() * f64::from(alpha / rank as f32)).unwrap();
    let product = product.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let expected = merged_by_candle(&model, &adapters, layer, projection);
    let shape = projection.shape(model.config());
    let weight = model.projection(layer.into(), projection).unwrap();
    for row in 0..shape.d_out {
        // llama.cpp turns neighbours against each other where Hugging Face turns the halves of a head.
        let (head, at) = (row / head_dim, row % head_dim);
        let in_file = head * head_dim + at % (head_dim / 2) * 2 + at / (head_dim / 2);
        for column in 0..d_in {
            let added = expected[row * d_in + column] - weight[row * d_in + column];
            let found = product[in_file * d_in + column];
            assert!((found - added).abs() < 1e-5, "({row}, {column}): {found} {added}");
        }
    }
}
