//! What is written is read again by other means than it was written by.

#![allow(clippy::unwrap_used)]

use candle_core::quantized::gguf_file::Content;
use candle_core::{Device, Tensor};
use protocol::model::synthetic::{StoredAs, SyntheticLlama};
use protocol::model::{GgufNumbers, Model, Norm, Projection};
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use tempfile::TempDir;

use super::*;
use crate::lora::{LoraAdapters, LoraConfig, NamedToken};

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

/// Whether a model is this one with its adapter, each number as near as `tolerance` times the largest of its row.
fn assert_merged(found: &Model, model: &Model, adapters: &LoraAdapters, tolerance: f32) {
    for layer in 0..model.config().layers as u16 {
        for projection in Projection::SEPARATE {
            let weight = found.projection(layer.into(), projection).unwrap();
            let expected = merged_by_candle(model, adapters, layer, projection);
            let columns = projection.shape(model.config()).d_in;
            for (found, expected) in weight.chunks(columns).zip(expected.chunks(columns)) {
                let largest = expected.iter().fold(0.0_f32, |largest, x| largest.max(x.abs()));
                // Sums of other order differ by more than a small one is rounded by.
                let near = |(a, b): (&f32, &f32)| (a - b).abs() <= tolerance * largest + 1e-7;
                assert!(found.iter().zip(expected).all(near), "layer {layer} {projection:?}");
            }
        }
    }
}

#[test]
fn a_merged_folder_is_the_model_with_its_adapter() {
    for (stored, tolerance) in [(StoredAs::Bf16, 1.01 / 256.0), (StoredAs::F32, 1e-6)] {
        let (_base, model, adapters) = model_and_adapters(stored, 0.05, uneven());
        let out = tempfile::tempdir().unwrap();
        let merged = write_merged(&model, &adapters, out.path(), Existing::Keep).unwrap();
        assert_eq!(merged.changed, 7 * model.config().layers);
        let found = Model::open(out.path()).unwrap();
        assert_eq!(found.config(), model.config());
        assert_eq!(found.embeddings().unwrap(), model.embeddings().unwrap());
        assert!(out.path().join("tokenizer.json").is_file());
        assert_merged(&found, &model, &adapters, tolerance);
        let error = write_merged(&model, &adapters, out.path(), Existing::Keep).unwrap_err().to_string();
        assert!(error.contains("is not empty"), "{error}");
        write_merged(&model, &adapters, out.path(), Existing::Replace).unwrap();
        let beside: Vec<_> = std::fs::read_dir(out.path().parent().unwrap()).unwrap().flatten().collect();
        assert!(beside.iter().all(|entry| !entry.path().join("replaced").exists()));
    }
}

#[test]
fn a_folder_that_is_no_export_is_not_replaced() {
    let (_base, model, adapters) = model_and_adapters(StoredAs::F32, 0.05, LoraConfig::default());
    let out = tempfile::tempdir().unwrap();
    std::fs::write(out.path().join("letter.txt"), "mine").unwrap();
    let error = write_merged(&model, &adapters, out.path(), Existing::Replace).unwrap_err().to_string();
    assert!(error.contains("has no config.json"), "{error}");
    assert_eq!(std::fs::read_to_string(out.path().join("letter.txt")).unwrap(), "mine");
}

#[test]
fn the_model_itself_is_not_replaced() {
    let (_base, model, adapters) = model_and_adapters(StoredAs::F32, 0.05, LoraConfig::default());
    let base = model.path().to_owned();
    for out in [base.as_path(), base.parent().unwrap()] {
        let error = write_merged(&model, &adapters, out, Existing::Replace).unwrap_err().to_string();
        assert!(error.contains("what is exported"), "{error}");
    }
    let error = write_ollama(&model, Some(&adapters), &base, Existing::Replace).unwrap_err().to_string();
    assert!(error.contains("what is exported"), "{error}");
    assert!(base.join("config.json").is_file());
}

#[test]
fn a_merge_that_changes_nothing_is_an_error_and_leaves_nothing() {
    for (size, told) in [(0.0, "adds nothing"), (1e-9, "is as it was before")] {
        let (_base, model, adapters) = model_and_adapters(StoredAs::Bf16, size, LoraConfig::default());
        let out = tempfile::tempdir().unwrap();
        let errors = [
            write_merged(&model, &adapters, &out.path().join("merged"), Existing::Keep).unwrap_err(),
            write_gguf(&model, &adapters, GgufNumbers::Q8_0, &out.path().join("m.gguf"), Existing::Keep).unwrap_err(),
        ];
        assert!(errors.iter().all(|error| error.to_string().contains(told)), "{errors:?}");
        assert_eq!(std::fs::read_dir(out.path()).unwrap().count(), 0);
    }
    let (_base, model, adapters) = model_and_adapters(StoredAs::Bf16, 0.0, LoraConfig::default());
    let out = tempfile::tempdir().unwrap();
    let path = out.path().join("adapter.gguf");
    let error = write_gguf_adapter(&model, &adapters, &path, Existing::Keep).unwrap_err().to_string();
    assert!(error.contains("adds nothing") && !path.exists(), "{error}");
}

#[test]
fn a_gguf_file_of_either_base_is_the_model_with_its_adapter() {
    let (base, model, adapters) = model_and_adapters(StoredAs::F32, 0.05, uneven());
    let as_gguf = base.path().join("base.gguf");
    SyntheticLlama::tiny(3).write_gguf(&as_gguf, candle_core::quantized::GgmlDType::F32).unwrap();
    let out = tempfile::tempdir().unwrap();
    for model in [model, Model::open(&as_gguf).unwrap()] {
        for (numbers, tolerance) in [
            (GgufNumbers::F32, 1e-6),
            (GgufNumbers::F16, 1.01 / 2048.0),
            (GgufNumbers::Bf16, 1.01 / 256.0),
            (GgufNumbers::Q8_0, 1.01 * (0.5 / 127.0 + 1.0 / 2048.0)),
        ] {
            let path = out.path().join(format!("{numbers}.gguf"));
            let merged = write_gguf(&model, &adapters, numbers, &path, Existing::Replace).unwrap();
            assert_eq!(merged.changed, 7 * model.config().layers);
            let found = Model::open(&path).unwrap();
            assert_merged(&found, &model, &adapters, tolerance);
            let (ours, theirs) = (model.tokenizer().unwrap(), found.tokenizer().unwrap());
            let text = "The cat's 12 hats.\n\n  And <|im_end|> more";
            assert_eq!(ours.encode(text, true).unwrap(), theirs.encode(text, true).unwrap());
            let error = write_gguf(&model, &adapters, numbers, &path, Existing::Keep).unwrap_err().to_string();
            assert!(error.contains("--force"), "{error}");
        }
    }
}

#[test]
fn a_file_that_is_damaged_on_its_way_is_refused_by_the_tensor() {
    let (_base, model, adapters) = model_and_adapters(StoredAs::F32, 0.05, LoraConfig::default());
    let out = tempfile::tempdir().unwrap();
    let path = out.path().join("model.gguf");
    write_gguf(&model, &adapters, GgufNumbers::F16, &path, Existing::Keep).unwrap();
    let (plan, changes) =
        (model.gguf_plan(GgufNumbers::F16).unwrap(), changes::Changes::of(&adapters, model.config()).unwrap());
    assert!(gguf::check(&model, &plan, &path, &changes).is_ok());
    let mut bytes = std::fs::read(&path).unwrap();
    let mut at = plan.head.len() as u64;
    for tensor in &plan.tensors {
        let length = tensor.bytes();
        if tensor.name() == "blk.1.ffn_down.weight" || tensor.name() == "token_embd.weight" {
            // The sign of one number, in the second tensor where the first is left as it is.
            bytes[at as usize + 101] ^= 0x80;
            std::fs::write(&path, &bytes).unwrap();
            let error = gguf::check(&model, &plan, &path, &changes).unwrap_err().to_string();
            let name = tensor.of_model().unwrap();
            assert!(error.contains(name) && error.contains("rounding explains"), "{error}");
            bytes[at as usize + 101] ^= 0x80;
        }
        at += length.0 + length.1;
    }
    let folder = out.path().join("merged");
    write_merged(&model, &adapters, &folder, Existing::Keep).unwrap();
    let weights = folder.join("model.safetensors");
    let shards = model.shards().unwrap().unwrap();
    assert!(merged::check(&shards, &folder, &changes).is_ok());
    let bytes = std::fs::read(&weights).unwrap();
    for (name, told) in
        [("model.layers.1.self_attn.k_proj.weight", "rounding explains"), ("model.norm.weight", "was to be copied")]
    {
        let view = shards[0].find(name).unwrap();
        let length = view.data().len();
        let parsed = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let at = parsed.tensor(name).unwrap().data().as_ptr().addr() - bytes.as_ptr().addr();
        let mut damaged = bytes.clone();
        damaged[at + length - 1] ^= 0x80;
        std::fs::write(&weights, &damaged).unwrap();
        let error = merged::check(&shards, &folder, &changes).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains(told), "{error}");
    }
}

#[test]
fn trained_norms_are_merged_and_refused_where_they_have_no_place() {
    let config = LoraConfig { modules_to_save: vec!["input_layernorm".to_owned()], ..LoraConfig::default() };
    let (_base, model, adapters) = model_and_adapters(StoredAs::F32, 0.05, config);
    let scales: Vec<f32> = (0..model.config().hidden_size).map(|i| 0.5 + i as f32 / 100.0).collect();
    adapters.set_norms(|_, _| Ok::<_, candle_core::Error>(scales.clone())).unwrap();
    let out = tempfile::tempdir().unwrap();
    let (folder, file) = (out.path().join("merged"), out.path().join("merged.gguf"));
    write_merged(&model, &adapters, &folder, Existing::Keep).unwrap();
    write_gguf(&model, &adapters, GgufNumbers::F16, &file, Existing::Keep).unwrap();
    for path in [folder, file] {
        let found = Model::open(&path).unwrap();
        assert_eq!(found.norm(Norm::BeforeAttention(1)).unwrap().unwrap(), scales);
        assert_eq!(found.norm(Norm::Final).unwrap(), model.norm(Norm::Final).unwrap());
    }
    let path = out.path().join("adapter.gguf");
    let error = write_gguf_adapter(&model, &adapters, &path, Existing::Keep).unwrap_err().to_string();
    assert!(error.contains("layers.0.input_layernorm") && error.contains("export gguf"), "{error}");
    assert!(!path.exists());
}

#[test]
fn trained_embeddings_are_merged_and_refused_where_they_have_no_place() {
    let tokens = vec![NamedToken::Number(20), NamedToken::Number(3)];
    let config = LoraConfig { trainable_token_indices: tokens, ..LoraConfig::default() };
    let (_base, model, adapters) = model_and_adapters(StoredAs::F32, 0.05, config);
    let features = model.config().hidden_size;
    let rows: Vec<f32> = (0..2 * features).map(|i| i as f32 / 100.0).collect();
    adapters.set_tokens(|_| Ok::<_, candle_core::Error>(rows.clone())).unwrap();
    let out = tempfile::tempdir().unwrap();
    let (folder, file) = (out.path().join("merged"), out.path().join("merged.gguf"));
    write_merged(&model, &adapters, &folder, Existing::Keep).unwrap();
    write_gguf(&model, &adapters, GgufNumbers::F32, &file, Existing::Keep).unwrap();
    for path in [folder, file] {
        let found = Model::open(&path).unwrap();
        assert_eq!(found.embed(&[20, 3]).unwrap(), rows);
        assert_eq!(found.embed(&[19, 4]).unwrap(), model.embed(&[19, 4]).unwrap());
        let mut rows_of_head = [vec![0.0; features], vec![0.0; features]];
        found.head_rows(3, &mut rows_of_head[0]).unwrap();
        model.head_rows(3, &mut rows_of_head[1]).unwrap();
        assert_eq!(rows_of_head[0] == rows_of_head[1], !model.config().tie_word_embeddings);
    }
    let path = out.path().join("adapter.gguf");
    let error = write_gguf_adapter(&model, &adapters, &path, Existing::Keep).unwrap_err().to_string();
    assert!(error.contains("trainable_token_indices") && error.contains("export gguf"), "{error}");
    assert!(!path.exists());
}

#[test]
fn a_modelfile_says_how_the_template_writes_conversations() {
    let (_base, model, adapters) = model_and_adapters(StoredAs::F32, 0.05, LoraConfig::default());
    let out = tempfile::tempdir().unwrap();
    let folder = out.path().join("ollama");
    let written = write_ollama(&model, Some(&adapters), &folder, Existing::Keep).unwrap();
    assert_eq!((written.style, written.changes), ("ChatML", Some(14)));
    let text = std::fs::read_to_string(folder.join("Modelfile")).unwrap();
    let base = std::fs::canonicalize(model.path()).unwrap();
    let expected = format!(
        "FROM \"{}\"\nADAPTER ./adapter.gguf\nTEMPLATE \"\"\"{{{{ range .Messages }}}}<|im_start|>{{{{ .Role }}}}\n{{{{ .Content \
         }}}}<|im_end|>\n{{{{ end }}}}<|im_start|>assistant\n\"\"\"\nPARAMETER stop \"<|im_end|>\"\n",
        base.display()
    );
    assert_eq!(text, expected);
    assert!(Content::read(&mut std::fs::File::open(folder.join("adapter.gguf")).unwrap()).is_ok());

    // A template of no known form is refused.
    let path = model.path().join("tokenizer_config.json");
    let settings = std::fs::read_to_string(&path).unwrap().replace("<|im_start|>' + message", "## ' + message");
    std::fs::write(&path, settings).unwrap();
    let model = Model::open(model.path()).unwrap();
    let error = write_ollama(&model, None, &out.path().join("other"), Existing::Keep).unwrap_err().to_string();
    assert!(error.contains("none of the forms") && error.contains("Llama 3"), "{error}");
}

#[test]
fn an_adapter_for_llama_cpp_adds_the_same_in_its_order_of_rows() {
    let (_base, model, adapters) = model_and_adapters(StoredAs::F32, 0.05, uneven());
    let out = tempfile::tempdir().unwrap();
    let path = out.path().join("adapter.gguf");
    let tensors = write_gguf_adapter(&model, &adapters, &path, Existing::Keep).unwrap();
    assert_eq!(tensors, 7 * model.config().layers);
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
