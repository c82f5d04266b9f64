//! Weights: values, layouts, damage.

use std::collections::HashMap;
use std::fs;
use std::ops::ControlFlow;

use candle_core::quantized::GgmlDType;
use proptest::prelude::*;

use super::super::synthetic::KnownModel;
use super::super::{Group, LinearId, Norm, RopeScaling, expected};
use super::*;

/// A fused matrix straight from its definition: transposed projections side by side.
fn fused(synthetic: &SyntheticLlama, id: LinearId) -> Vec<f32> {
    let shape = synthetic.config.shape(id.group);
    let mut columns: Vec<Vec<f32>> = Vec::new();
    for projection in synthetic.config.projections(id.group) {
        let shape = projection.shape(&synthetic.config);
        let name = format!("model.layers.{}.{}.weight", id.layer, projection.name());
        let values = synthetic.tensor(&name, &[shape.d_out, shape.d_in]);
        columns.extend(values.chunks_exact(shape.d_in).map(<[f32]>::to_vec));
    }
    assert_eq!(columns.len(), shape.d_out);
    (0..shape.d_in).flat_map(|i| columns.iter().map(move |column| column[i])).collect()
}

#[test]
fn linear_is_the_transposed_projections_side_by_side() {
    let synthetic = SyntheticLlama::tiny(1);
    let (_folder, model) = folder(&synthetic, StoredAs::F32);
    assert_eq!(model.config(), &synthetic.config);
    for id in synthetic.config.linears() {
        assert_eq!(model.linear(id).unwrap(), fused(&synthetic, id), "{id}");
    }
}

#[test]
fn slices_of_the_head_are_its_rows_transposed_with_zeros_behind_them() {
    for (tied, vocabulary) in [(true, 0), (false, 100)] {
        let mut synthetic = SyntheticLlama::tiny(6);
        synthetic.config.tie_word_embeddings = tied;
        synthetic.config.vocabulary += vocabulary;
        let (_folder, model) = folder(&synthetic, StoredAs::F32);
        let (config, head) = (model.config(), model.head().unwrap());
        let width = config.shape(Group::Head).d_out;
        for slice in 0..config.head_slices() {
            let matrix = model.linear(config.head_linear(slice)).unwrap();
            let entry = |feature: usize, entry: usize| head.get(entry * config.hidden_size + feature).copied();
            for feature in 0..config.hidden_size {
                let expected: Vec<f32> =
                    (0..width).map(|column| entry(feature, slice * width + column).unwrap_or(0.0)).collect();
                assert_eq!(matrix[feature * width..][..width], expected, "feature {feature} of slice {slice}");
            }
        }
        let beyond = config.head_linear(config.head_slices());
        assert!(matches!(model.linear(beyond), Err(ModelError::OutOfRange { .. })));
    }
}

/// Every thread of the trainer and of a worker's loader reads the same model.
const _: () = {
    const fn shared<T: Send + Sync>() {}
    shared::<Model>();
};

#[test]
fn bf16_folder_holds_the_rounded_numbers() {
    let synthetic = SyntheticLlama::tiny(2);
    let (_folder, model) = folder(&synthetic, StoredAs::Bf16);
    let id = LinearId { layer: 1, group: Group::Down };
    let rounded: Vec<f32> = fused(&synthetic, id).iter().map(|&v| half::bf16::from_f32(v).to_f32()).collect();
    assert_eq!(model.linear(id).unwrap(), rounded);
}

#[test]
fn rows_of_the_head_are_read_again_after_their_memory_was_released() {
    let mut synthetic = SyntheticLlama::tiny(5);
    synthetic.config.tie_word_embeddings = false;
    for stored_as in [StoredAs::F32, StoredAs::Bf16] {
        let (_folder, model) = folder(&synthetic, stored_as);
        let (head, hidden) = (model.head().unwrap(), synthetic.config.hidden_size);
        let vocabulary = synthetic.config.vocabulary;
        for _ in 0..2 {
            model.digest().unwrap();
            for (first, rows) in [(0, vocabulary), (3, 2), (vocabulary - 1, 1), (vocabulary, 0)] {
                let mut read = vec![0.0; rows * hidden];
                model.head_rows(first, &mut read).unwrap();
                assert_eq!(read, head[first * hidden..(first + rows) * hidden], "rows {first} to {}", first + rows);
            }
        }
        for (first, rows) in [(vocabulary, 1), (0, vocabulary + 1), (usize::MAX, 1)] {
            let error = model.head_rows(first, &mut vec![0.0; rows * hidden]).unwrap_err();
            assert!(matches!(error, ModelError::OutOfRange { .. }), "{error}");
        }
    }
}

/// The file is written in chunks of several runs of the generator; this model's embeddings need more than one.
#[test]
fn a_large_tensor_is_written_as_it_is_drawn() {
    let mut synthetic = SyntheticLlama::tiny(14);
    synthetic.config.layers = 1;
    synthetic.config.vocabulary = (1 << 16) + 17;
    let (_folder, model) = folder(&synthetic, StoredAs::F32);
    let embeddings = model.embeddings().unwrap();
    let shape = [synthetic.config.vocabulary, synthetic.config.hidden_size];
    assert!(embeddings == synthetic.tensor("model.embed_tokens.weight", &shape));
    assert_eq!(synthetic.weight_bytes(StoredAs::F32), 4 * synthetic.parameters());
}

#[test]
fn known_models_are_possible_and_the_same_seed_gives_the_same_bytes() {
    for known in KnownModel::ALL {
        SyntheticLlama::known(known, 1).config.validate("known".as_ref()).unwrap();
        assert_eq!(known.name().parse(), Ok(known));
    }
    assert!("llama".parse::<KnownModel>().is_err());
    // Of the model's card, the tied head counted once.
    assert_eq!(SyntheticLlama::known(KnownModel::Llama32_1b, 1).parameters(), 1_235_814_400);
    assert_eq!(SyntheticLlama::known(KnownModel::SmolLm2_135m, 1).parameters(), 134_515_008);
    assert_eq!(SyntheticLlama::known(KnownModel::Llama32_3b, 1).parameters(), 3_212_749_824);

    let mut synthetic = SyntheticLlama::known(KnownModel::SmolLm2_135m, 5);
    synthetic.config.layers = 1;
    synthetic.config.vocabulary = 300;
    let (a, b) = (folder(&synthetic, StoredAs::Bf16), folder(&synthetic, StoredAs::Bf16));
    for file in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        assert!(fs::read(a.0.path().join(file)).unwrap() == fs::read(b.0.path().join(file)).unwrap(), "{file}");
    }
    assert_eq!(a.1.config(), &synthetic.config);
}

#[test]
fn a_watched_folder_counts_up_to_its_weights_and_can_be_broken_off() {
    let synthetic = SyntheticLlama::tiny(15);
    let folder = tempfile::tempdir().unwrap();
    let mut seen = Vec::new();
    let mut watch = |bytes| {
        seen.push(bytes);
        ControlFlow::Continue(())
    };
    synthetic.write_folder_watched(folder.path(), StoredAs::Bf16, &mut watch).unwrap();
    assert!(seen.is_sorted());
    assert_eq!(seen.last(), Some(&synthetic.weight_bytes(StoredAs::Bf16)));
    let broken = synthetic.write_folder_watched(folder.path(), StoredAs::Bf16, &mut |_| ControlFlow::Break(()));
    assert!(matches!(broken, Err(ModelError::Io { source, .. }) if source.kind() == std::io::ErrorKind::Interrupted));
}

#[test]
fn gguf_and_folder_hold_the_same_model() {
    let mut synthetic = SyntheticLlama::tiny(3);
    synthetic.config.tie_word_embeddings = false;
    let (from_folder, gguf) = (folder(&synthetic, StoredAs::F32), tempfile::tempdir().unwrap());
    let path = gguf.path().join("model.gguf");
    synthetic.write_gguf(&path, GgmlDType::F32).unwrap();
    let (a, b) = (from_folder.1, Model::open(&path).unwrap());
    assert_eq!(b.config().shape(Group::Qkv), a.config().shape(Group::Qkv));
    assert_eq!((b.config().bos, &b.config().eos), (a.config().bos, &a.config().eos));
    for id in synthetic.config.linears() {
        assert_eq!(a.linear(id).unwrap(), b.linear(id).unwrap(), "{id}");
    }
    for projection in synthetic.config.family.layer_projections() {
        assert_eq!(a.projection(1, projection).unwrap(), b.projection(1, projection).unwrap(), "{projection:?}");
    }
    for norm in [Norm::BeforeAttention(1), Norm::BeforeFeedForward(0), Norm::Final] {
        assert_eq!(a.norm(norm).unwrap(), b.norm(norm).unwrap(), "{norm:?}");
    }
    assert_eq!(a.embeddings().unwrap(), b.embeddings().unwrap());
    assert_eq!(a.head().unwrap(), b.head().unwrap());
    assert_ne!(a.head().unwrap(), a.embeddings().unwrap());
    let hidden = synthetic.config.hidden_size;
    assert_eq!(a.embed(&[7, 0]).unwrap()[..hidden], a.embeddings().unwrap()[7 * hidden..8 * hidden]);
    assert!(a.embed(&[u32::MAX]).is_err());
    assert!(a.linear(LinearId { layer: 2, group: Group::O }).is_err());
}

/// The rotation that llama.cpp applies to neighbouring pairs must, on its row order, equal Hugging Face's rotation of
/// halves on ours: the definition of the permutation, independent of how it is computed.
#[test]
fn interleaved_rows_turn_as_llama_cpp_turns_them() {
    let head_dim = 8;
    let rows = super::super::weights::Rows::Interleaved { head_dim };
    for row in 0..3 * head_dim {
        let (head, within) = (row / head_dim, row % head_dim);
        let in_file = rows.in_file(row);
        assert_eq!(in_file / head_dim, head);
        // Feature i of HF turns by frequency i mod half, as its first or second partner; llama.cpp's feature p turns by
        // frequency p / 2, as first or second partner by its parity.
        assert_eq!((in_file % head_dim) / 2, within % (head_dim / 2));
        assert_eq!((in_file % head_dim) % 2, within / (head_dim / 2));
    }
}

#[test]
fn every_block_format_is_read() {
    let mut synthetic = SyntheticLlama::tiny(4);
    synthetic.config.hidden_size = 256;
    synthetic.config.intermediate_size = 256;
    synthetic.config.head_dim = 64;
    synthetic.config.rope.features = 64;
    synthetic.config.layers = 1;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    use GgmlDType::*;
    for (format, tolerance) in [
        (F16, 1e-3),
        (BF16, 1e-2),
        (Q8_0, 0.02),
        (Q8_1, 0.02),
        (Q8K, 0.02),
        (Q6K, 0.05),
        (Q5_0, 0.1),
        (Q5_1, 0.1),
        (Q5K, 0.1),
        (Q4_0, 0.2),
        (Q4_1, 0.2),
        (Q4K, 0.2),
        (Q3K, 0.4),
        (Q2K, 0.6),
    ] {
        synthetic.write_gguf(&path, format).unwrap();
        let model = Model::open(&path).unwrap();
        for group in Group::ALL {
            let id = LinearId { layer: 0, group };
            let (read, true_values) = (model.linear(id).unwrap(), fused(&synthetic, id));
            let error: f32 = read.iter().zip(&true_values).map(|(a, b)| (a - b).powi(2)).sum();
            let norm: f32 = true_values.iter().map(|value| value.powi(2)).sum();
            assert!((error / norm).sqrt() < tolerance, "{format:?} {group:?}: {}", (error / norm).sqrt());
        }
    }
}

#[test]
fn rope_factors_come_from_the_tensor() {
    let mut synthetic = SyntheticLlama::tiny(5);
    let factors: Vec<f32> = (1..=8).map(|i| i as f32).collect();
    synthetic.config.rope.scaling = Some(RopeScaling::Factors(factors));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    synthetic.write_gguf(&path, GgmlDType::F32).unwrap();
    assert_eq!(Model::open(&path).unwrap().config().rope, synthetic.config.rope);
}

#[test]
fn shards_are_one_model() {
    let synthetic = SyntheticLlama::tiny(6);
    let (whole, single) = folder(&synthetic, StoredAs::F32);
    let sharded = tempfile::tempdir().unwrap();
    for file in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
        fs::copy(whole.path().join(file), sharded.path().join(file)).unwrap();
    }
    let mut map = HashMap::new();
    let mut shards: [Vec<(String, Vec<usize>)>; 2] = Default::default();
    for (i, (name, shape)) in expected(&synthetic.config).into_iter().enumerate() {
        map.insert(name.clone(), format!("part-{}.safetensors", i % 2));
        shards[i % 2].push((name, shape));
    }
    for (i, shard) in shards.iter().enumerate() {
        let values: Vec<Vec<u8>> = shard
            .iter()
            .map(|(name, shape)| synthetic.tensor(name, shape).iter().flat_map(|v| v.to_le_bytes()).collect())
            .collect();
        let views = shard.iter().zip(&values).map(|((name, shape), bytes)| {
            (name, safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes).unwrap())
        });
        let path = sharded.path().join(format!("part-{i}.safetensors"));
        safetensors::serialize_to_file(views, None, &path).unwrap();
    }
    let index = sharded.path().join("model.safetensors.index.json");
    fs::write(&index, serde_json::json!({"metadata": {}, "weight_map": map}).to_string()).unwrap();
    let model = Model::open(sharded.path()).unwrap();
    assert_eq!(model.digest().unwrap(), single.digest().unwrap());

    fs::remove_file(sharded.path().join("part-1.safetensors")).unwrap();
    assert!(refusal(Model::open(sharded.path())).contains("part-1.safetensors"));
    fs::write(&index, r#"{"weight_map": {"model.norm.weight": "../../etc/passwd"}}"#).unwrap();
    assert!(refusal(Model::open(sharded.path())).contains("not the name of a file beside it"));
}

#[test]
fn digest_names_weights_and_configuration() {
    let synthetic = SyntheticLlama::tiny(7);
    let (at, model) = folder(&synthetic, StoredAs::F32);
    let digest = model.digest().unwrap();
    assert_eq!(digest, folder(&synthetic, StoredAs::F32).1.digest().unwrap());
    assert_ne!(digest, folder(&synthetic, StoredAs::Bf16).1.digest().unwrap());
    assert_ne!(digest, folder(&SyntheticLlama::tiny(8), StoredAs::F32).1.digest().unwrap());

    let config = at.path().join("config.json");
    let text = fs::read_to_string(&config).unwrap().replace("10000.0", "20000.0");
    fs::write(&config, text).unwrap();
    assert_ne!(digest, Model::open(at.path()).unwrap().digest().unwrap());
}

#[test]
fn what_is_not_a_model_is_named() {
    let empty = tempfile::tempdir().unwrap();
    assert!(refusal(Model::open(empty.path().join("nowhere"))).contains("nowhere: no such file or folder"));
    assert!(refusal(Model::open(empty.path())).contains("no config.json"));
    let text = empty.path().join("notes.txt");
    fs::write(&text, "hello").unwrap();
    assert!(refusal(Model::open(&text)).contains("neither a folder nor a .gguf file"));
    let gguf = empty.path().join("empty.gguf");
    fs::write(&gguf, "").unwrap();
    assert!(refusal(Model::open(&gguf)).contains("empty.gguf: the file is damaged or cut short"));
    let (folder, _) = folder(&SyntheticLlama::tiny(9), StoredAs::F32);
    fs::remove_file(folder.path().join("model.safetensors")).unwrap();
    assert!(refusal(Model::open(folder.path())).contains("neither model.safetensors nor"));
}

#[test]
fn tensors_must_fit_the_configuration() {
    let (folder, _) = folder(&SyntheticLlama::tiny(10), StoredAs::F32);
    let path = folder.path().join("config.json");
    let json = fs::read_to_string(&path).unwrap();
    fs::write(&path, json.replace("\"intermediate_size\": 96", "\"intermediate_size\": 128")).unwrap();
    let message = refusal(Model::open(folder.path()));
    assert!(
        message.contains("gate_proj") && message.contains("[96, 64]") && message.contains("[128, 64]"),
        "{message}"
    );
    fs::write(&path, json.replace("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3")).unwrap();
    assert!(refusal(Model::open(folder.path())).contains("model.layers.2.input_layernorm.weight` is missing"));
}

/// Writes a GGUF file and changes its bytes before it is opened.
fn gguf_with(change: impl FnOnce(&mut Vec<u8>)) -> Result<Model, ModelError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    SyntheticLlama::tiny(12).write_gguf(&path, GgmlDType::Q8_0).unwrap();
    let mut bytes = fs::read(&path).unwrap();
    change(&mut bytes);
    fs::write(&path, bytes).unwrap();
    Model::open(&path)
}

fn after(bytes: &[u8], text: &str) -> usize {
    bytes.windows(text.len()).position(|window| window == text.as_bytes()).unwrap() + text.len()
}

#[test]
fn a_gguf_that_lies_is_refused() {
    let put = |at: usize, value: &[u8], bytes: &mut Vec<u8>| bytes[at..at + value.len()].copy_from_slice(value);
    // A file of another architecture, of the same length of name.
    let message = refusal(gguf_with(|bytes| {
        let at = bytes.windows(5).position(|window| window == b"llama").unwrap();
        put(at, b"bloom", bytes);
    }));
    assert!(message.contains("`bloom`; those that are known are `llama`"), "{message}");
    // Counts, lengths and offsets beyond the file.
    let huge = u64::MAX.to_le_bytes();
    for (what, message) in [
        ("tensors", refusal(gguf_with(|bytes| put(8, &huge, bytes)))),
        ("metadata", refusal(gguf_with(|bytes| put(16, &huge, bytes)))),
        ("text", refusal(gguf_with(|bytes| put(24, &huge, bytes)))),
        ("array", refusal(gguf_with(|bytes| put(after(bytes, "tokenizer.ggml.tokens") + 8, &huge, bytes)))),
        ("offset", refusal(gguf_with(|bytes| put(after(bytes, "output_norm.weight") + 4 + 8 + 4, &huge, bytes)))),
    ] {
        assert!(message.contains("model.gguf") && message.contains("damaged or cut short"), "{what}: {message}");
    }
    // A side so long that the number of bytes wraps around.
    let message = refusal(gguf_with(|bytes| put(after(bytes, "token_embd.weight") + 4 + 8, &huge, bytes)));
    assert!(message.contains("18446744073709551615"), "{message}");
    // A number format that nobody knows.
    let message = refusal(gguf_with(|bytes| put(after(bytes, "token_embd.weight") + 4 + 16, &[99, 0, 0, 0], bytes)));
    assert!(message.contains("number format 99"), "{message}");
}

/// A small model's file, cut or scribbled over, in a folder of its own.
fn damaged(name: &str, bytes: &[u8]) -> (tempfile::TempDir, Result<Model, ModelError>) {
    let folder = tempfile::tempdir().unwrap();
    SyntheticLlama::tiny(11).write_folder(folder.path(), StoredAs::Bf16).unwrap();
    let path = folder.path().join(name);
    fs::write(&path, bytes).unwrap();
    let opened = if name.ends_with(".gguf") { Model::open(&path) } else { Model::open(folder.path()) };
    (folder, opened)
}

/// Uses a model that opened although its file was changed: no answer is wrong, but none may panic.
fn exercise(model: &Model) {
    let ids: Vec<LinearId> = model.config().linears().take(4).collect();
    ids.into_iter().for_each(|id| drop(model.linear(id)));
    drop(model.embeddings());
    drop(model.digest());
    drop(model.tokenizer());
}

fn whole_files() -> (Vec<u8>, Vec<u8>) {
    let folder = tempfile::tempdir().unwrap();
    let synthetic = SyntheticLlama::tiny(11);
    synthetic.write_folder(folder.path(), StoredAs::Bf16).unwrap();
    let gguf = folder.path().join("model.gguf");
    synthetic.write_gguf(&gguf, GgmlDType::Q4_1).unwrap();
    (fs::read(folder.path().join("model.safetensors")).unwrap(), fs::read(gguf).unwrap())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn cut_files_are_refused_by_name(cut in 0.0f64..1.0) {
        let (safetensors, gguf) = whole_files();
        for (name, bytes) in [("model.safetensors", safetensors), ("model.gguf", gguf)] {
            // The last padding of a GGUF file belongs to nobody.
            let end = ((bytes.len() - 32) as f64 * cut) as usize;
            let (_folder, opened) = damaged(name, &bytes[..end]);
            let message = refusal(opened);
            prop_assert!(message.contains(name) && message.contains("damaged or cut short"), "{}", message);
        }
    }

    #[test]
    fn scribbled_heads_do_no_harm(at in 0.0f64..1.0, bytes in proptest::collection::vec(any::<u8>(), 1..16)) {
        let (safetensors, gguf) = whole_files();
        for (name, mut file) in [("model.safetensors", safetensors), ("model.gguf", gguf)] {
            let start = (at * 8000.0) as usize;
            file[start..start + bytes.len()].copy_from_slice(&bytes);
            let (_folder, opened) = damaged(name, &file);
            if let Ok(model) = opened {
                exercise(&model);
            }
        }
    }
}
