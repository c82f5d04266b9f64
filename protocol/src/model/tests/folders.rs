//! Folders and files that contradict themselves, lack a part or hold what nobody asked for.

use std::fs;
use std::path::Path;

use candle_core::quantized::GgmlDType;
use safetensors::tensor::{Dtype, TensorView};

use super::super::expected;
use super::super::family::Family;
use super::*;

type Tensor = (String, Dtype, Vec<usize>, Vec<u8>);

fn tiny() -> SyntheticLlama {
    SyntheticLlama::tiny(21)
}

/// The tensors of a synthetic model in f32.
fn tensors(synthetic: &SyntheticLlama) -> Vec<Tensor> {
    let tensor = |(name, shape): (String, Vec<usize>)| {
        let bytes = synthetic.tensor(&name, &shape).iter().flat_map(|value| value.to_le_bytes()).collect();
        (name, Dtype::F32, shape, bytes)
    };
    expected(&synthetic.config).into_iter().map(tensor).collect()
}

fn write(path: &Path, tensors: &[Tensor]) {
    let views = tensors
        .iter()
        .map(|(name, dtype, shape, bytes)| (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    safetensors::serialize_to_file(views, None, path).unwrap();
}

/// A folder whose single file of weights is another.
fn folder_of(synthetic: &SyntheticLlama, tensors: &[Tensor]) -> (TempDir, Result<Model, ModelError>) {
    let (folder, _) = super::folder(synthetic, StoredAs::F32);
    write(&folder.path().join("model.safetensors"), tensors);
    let opened = Model::open(folder.path());
    (folder, opened)
}

fn change<'a>(tensors: &'a mut [Tensor], name: &str) -> &'a mut Tensor {
    tensors.iter_mut().find(|tensor| tensor.0.ends_with(name)).unwrap()
}

fn one(shape: &[usize], value: f32) -> Vec<u8> {
    vec![value; shape.iter().product()].iter().flat_map(|value| value.to_le_bytes()).collect()
}

#[test]
fn a_single_file_is_read_in_place_of_a_stale_index() {
    let (folder, _) = super::folder(&tiny(), StoredAs::F32);
    let index = r#"{"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}"#;
    fs::write(folder.path().join("model.safetensors.index.json"), index).unwrap();
    let model = Model::open(folder.path()).unwrap();
    assert_eq!(model.notes().len(), 1);
    assert!(model.notes()[0].contains("the single file is read"), "{:?}", model.notes());

    fs::remove_file(folder.path().join("model.safetensors")).unwrap();
    let message = refusal(Model::open(folder.path()));
    assert!(message.contains("`model.norm.weight` and others are in model-00001-of-00002.safetensors"), "{message}");
    assert!(message.contains("fetch that file too"), "{message}");
    let shard = folder.path().join("model-00001-of-00002.safetensors");
    let (index_path, with_another) =
        (folder.path().join("model.safetensors.index.json"), index.replace("norm", "other"));
    fs::write(&index_path, with_another).unwrap();
    write(&shard, &tensors(&tiny()));
    let notes = Model::open(folder.path()).unwrap().notes().to_vec();
    assert!(notes.len() == 1 && notes[0].contains("it says that `model.other.weight` is in"), "{notes:?}");
    write(&shard, &tensors(&tiny())[2..]);
    let message = refusal(Model::open(folder.path()));
    assert!(message.contains("the tensor `model.embed_tokens.weight` is missing"), "{message}");
    fs::remove_file(folder.path().join("model.safetensors.index.json")).unwrap();
    fs::write(folder.path().join("pytorch_model.bin"), "PK").unwrap();
    let message = refusal(Model::open(folder.path()));
    assert!(message.contains("only pytorch_model.bin (convert it"), "{message}");
}

#[test]
fn a_head_that_differs_from_tied_embeddings_is_the_head() {
    let synthetic = tiny();
    let mut tensors = tensors(&synthetic);
    let (_, dtype, shape, bytes) = change(&mut tensors, "embed_tokens.weight").clone();
    tensors.push(("lm_head.weight".to_owned(), dtype, shape.clone(), bytes));
    let (_folder, same) = folder_of(&synthetic, &tensors);
    assert_eq!(same.unwrap().notes(), [""; 0]);
    tensors.last_mut().unwrap().3 = one(&shape, 0.25);
    let (_folder, other) = folder_of(&synthetic, &tensors);
    let other = other.unwrap();
    assert!(other.notes()[0].contains("it is the head"), "{:?}", other.notes());
    assert!(!other.config().tie_word_embeddings && other.head().unwrap().iter().all(|&value| value == 0.25));

    // Nothing but a head.
    tensors.retain(|tensor| !tensor.0.ends_with("embed_tokens.weight"));
    let (_folder, only) = folder_of(&synthetic, &tensors);
    let only = only.unwrap();
    assert!(only.notes().len() == 1 && only.notes()[0].contains("`lm_head.weight` is both"), "{:?}", only.notes());
    assert!(only.config().tie_word_embeddings && only.embeddings().unwrap() == only.head().unwrap());

    let mut untied = synthetic;
    untied.config.tie_word_embeddings = false;
    let (_folder, opened) = folder_of(&untied, &self::tensors(&tiny()));
    let message = refusal(opened);
    assert!(message.contains("`lm_head.weight` is missing") && message.contains("set tie_word_embeddings to true"));
}

#[test]
fn what_nobody_asked_for_is_named_and_biases_are_not_dropped() {
    let synthetic = tiny();
    let mut tensors = tensors(&synthetic);
    tensors.push(("model.layers.0.self_attn.rotary_emb.inv_freq".to_owned(), Dtype::F32, vec![8], one(&[8], 1.0)));
    let (_folder, opened) = folder_of(&synthetic, &tensors);
    assert_eq!(opened.unwrap().notes(), [""; 0]);
    for name in ["model.layers.2.mlp.up_proj.weight", "model.visual.patch.weight"] {
        tensors.push((name.to_owned(), Dtype::F32, vec![4], one(&[4], 1.0)));
    }
    let (_folder, opened) = folder_of(&synthetic, &tensors);
    let notes = opened.unwrap().notes().to_vec();
    assert!(
        notes[0].contains("`model.layers.2.mlp.up_proj.weight` and 1 other tensors belong to nothing"),
        "{notes:?}"
    );

    let bias = "model.layers.1.self_attn.q_proj.bias";
    tensors.push((bias.to_owned(), Dtype::F32, vec![64], one(&[64], 0.0)));
    assert!(folder_of(&synthetic, &tensors).1.is_ok());
    tensors.last_mut().unwrap().3 = one(&[64], 0.5);
    let message = refusal(folder_of(&synthetic, &tensors).1);
    assert!(message.contains(bias) && message.contains("set \"attention_bias\": true"), "{message}");
    // With the flag all four are asked for.
    let mut flagged = synthetic;
    (flagged.config.traits.biases.qkv, flagged.config.traits.biases.o) = (true, true);
    let message = refusal(folder_of(&flagged, &tensors).1);
    assert!(message.contains("0.self_attn.q_proj.bias` is missing") && message.contains("attention_bias"), "{message}");
    let (_folder, model) = folder_of(&flagged, &self::tensors(&flagged));
    let added = model.unwrap().bias(1, crate::ids::Group::Qkv).unwrap().unwrap();
    assert_eq!(added[..64], flagged.tensor(bias, &[64]));
}

#[test]
fn numbers_that_are_none_are_named_with_their_tensor() {
    let synthetic = tiny();
    for (name, value, found_by_digest) in
        [("embed_tokens.weight", f32::NAN, true), ("1.mlp.down_proj.weight", f32::INFINITY, true)]
    {
        let mut tensors = tensors(&synthetic);
        let (full, _, shape, bytes) = change(&mut tensors, name);
        let (full, at) = (full.clone(), 4 * (5 * shape[1] + 1));
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        let model = folder_of(&synthetic, &tensors);
        let model_of = model.1.unwrap();
        let message = model_of.digest().unwrap_err().to_string();
        assert!(
            found_by_digest && message.contains(&full) && message.contains("NaN or infinity in row 5"),
            "{message}"
        );
        assert!(message.contains("model.safetensors"), "{message}");
        if name.contains("down") {
            let message = model_of.projection(1, super::super::Projection::Down).unwrap_err().to_string();
            assert!(message.contains("row 5"), "{message}");
        }
    }
}

#[test]
fn every_format_of_floats_is_read() {
    let synthetic = tiny();
    let id = crate::ids::LinearId { layer: 0, group: crate::ids::Group::Down };
    let (_folder, plain) = super::folder(&synthetic, StoredAs::F32);
    let plain = plain.linear(id).unwrap();
    let name = "0.mlp.down_proj.weight";

    let mut wide = tensors(&synthetic);
    let (_, dtype, _, bytes) = change(&mut wide, name);
    *dtype = Dtype::F64;
    *bytes = bytes.as_chunks().0.iter().flat_map(|b| f64::from(f32::from_le_bytes(*b)).to_le_bytes()).collect();
    let (_folder, model) = folder_of(&synthetic, &wide);
    assert_eq!(model.unwrap().linear(id).unwrap(), plain);

    // Every byte is a number but two, and those are none.
    let numbers: Vec<u8> = (0..=255).filter(|byte| byte & 0x7f != 0x7f).collect();
    let e4m3 = |byte: u8| {
        let (sign, exponent, mantissa) = (byte >> 7, i32::from(byte >> 3 & 15), f64::from(byte & 7));
        let size = if exponent == 0 {
            mantissa / 8.0 * 2f64.powi(-6)
        } else {
            (1.0 + mantissa / 8.0) * 2f64.powi(exponent - 7)
        };
        if sign == 1 { -size } else { size }
    };
    assert_eq!(e4m3(0x7e), 448.0);
    for (scale_name, scale_shape, block) in [
        ("_scale_inv", vec![4, 6], (16, 16)),
        ("_scale", vec![], (64, 96)),
        ("_scale", vec![64, 1], (1, 96)),
        ("_scale_inv", vec![1, 1], (64, 96)),
    ] {
        let mut narrow = tensors(&synthetic);
        let (full, dtype, shape, bytes) = change(&mut narrow, name);
        let (rows, columns, full) = (shape[0], shape[1], full.clone());
        *dtype = Dtype::F8_E4M3;
        *bytes = (0..rows * columns).map(|i| numbers[i % numbers.len()]).collect();
        let scales: Vec<f32> = (0..scale_shape.iter().product::<usize>().max(1)).map(|i| 0.5 + i as f32).collect();
        let scale_bytes = scales.iter().flat_map(|scale| scale.to_le_bytes()).collect();
        narrow.push((format!("{full}{scale_name}"), Dtype::F32, scale_shape.clone(), scale_bytes));
        narrow.push((
            format!("{}input_scale", full.strip_suffix("weight").unwrap()),
            Dtype::F32,
            vec![],
            one(&[], 1.0),
        ));
        let (_folder, model) = folder_of(&synthetic, &narrow);
        let model = model.unwrap();
        assert_eq!(model.notes(), [""; 0]);
        let read = model.projection(0, super::super::Projection::Down).unwrap();
        let across = columns / block.1;
        for (i, found) in read.iter().enumerate() {
            let scale = scales[i / columns / block.0 * across + i % columns / block.1];
            let expected = e4m3(numbers[i % numbers.len()]) * f64::from(scale);
            assert_eq!(f64::from(*found), expected, "{scale_shape:?} at {i}");
        }
        assert_ne!(model.digest().unwrap(), super::folder(&synthetic, StoredAs::F32).1.digest().unwrap());
        narrow.iter_mut().find(|tensor| tensor.0.ends_with(scale_name)).unwrap().2 = vec![scales.len(), 1, 1];
        let opened = folder_of(&synthetic, &narrow).1;
        let message = refusal(opened);
        assert!(message.contains("does not divide [64, 96] into blocks"), "{message}");
    }

    let mut packed = tensors(&synthetic);
    let (_, dtype, _, bytes) = change(&mut packed, name);
    *dtype = Dtype::U8;
    bytes.truncate(64 * 96);
    let message = refusal(folder_of(&synthetic, &packed).1);
    assert!(message.contains("down_proj") && message.contains("stored as U8"), "{message}");
}

#[test]
fn a_pointer_of_git_lfs_is_no_file() {
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n";
    let (folder, _) = super::folder(&tiny(), StoredAs::F32);
    for file in ["model.safetensors", "config.json"] {
        fs::write(folder.path().join(file), pointer).unwrap();
        let message = refusal(Model::open(folder.path()));
        assert!(message.contains(file) && message.contains("git lfs pull"), "{message}");
    }
    let gguf = folder.path().join("model.gguf");
    fs::write(&gguf, pointer).unwrap();
    assert!(refusal(Model::open(&gguf)).contains("git lfs pull"));
}

#[test]
fn a_folder_with_another_tokenizer_says_so() {
    let (folder, model) = super::folder(&tiny(), StoredAs::F32);
    assert!(model.tokenizer().is_ok());
    fs::write(folder.path().join("tokenizer.json"), "version https://git-lfs.github.com/spec/v1\n").unwrap();
    assert!(model.tokenizer().err().unwrap().to_string().contains("git lfs pull"));
    fs::rename(folder.path().join("tokenizer.json"), folder.path().join("tokenizer.model")).unwrap();
    let message = model.tokenizer().err().unwrap().to_string();
    assert!(message.contains("tokenizer.model") && message.contains("fetch the model's tokenizer.json"), "{message}");
}

#[test]
fn names_without_their_first_part_are_those_of_a_model_without_a_head() {
    let mut bare = tensors(&tiny());
    bare.iter_mut().for_each(|tensor| tensor.0 = tensor.0.strip_prefix("model.").unwrap().to_owned());
    let (_folder, model) = folder_of(&tiny(), &bare);
    let model = model.unwrap();
    assert_eq!(model.notes(), [""; 0]);
    assert_eq!(model.digest().unwrap(), super::folder(&tiny(), StoredAs::F32).1.digest().unwrap());
}

#[test]
fn a_model_in_several_gguf_files_is_one_model() {
    let synthetic = tiny();
    let folder = tempfile::tempdir().unwrap();
    let whole = folder.path().join("whole.gguf");
    synthetic.write_gguf(&whole, GgmlDType::F32).unwrap();
    let whole = Model::open(&whole).unwrap();
    synthetic.write_split_gguf(folder.path(), "parts", 3, GgmlDType::F32).unwrap();
    let part = |number: usize| folder.path().join(format!("parts-{number:05}-of-00003.gguf"));
    for number in [1, 3] {
        let model = Model::open(part(number)).unwrap();
        assert_eq!(model.config(), whole.config());
        assert_eq!(model.digest().unwrap(), whole.digest().unwrap());
        assert!(model.tokenizer().is_ok());
    }
    fs::rename(part(1), folder.path().join("model.gguf")).unwrap();
    let message = refusal(Model::open(part(2)));
    assert!(
        message.contains("one of 3 files") && message.contains("parts-00001-of-00003.gguf is not beside it"),
        "{message}"
    );
    let message = refusal(Model::open(folder.path().join("model.gguf")));
    assert!(message.contains("its name should end in -00001-of-00003.gguf"), "{message}");
}

/// Every family with a synthetic model of each known name is in the list of them.
#[test]
fn known_models_name_known_families() {
    use super::super::synthetic::KnownModel;
    let of = |known: KnownModel| known.config().family;
    assert_eq!(of(KnownModel::Qwen3_8b).model_type, "qwen3");
    assert_eq!(of(KnownModel::Mistral7b).model_type, "mistral");
    assert_eq!(of(KnownModel::SmolLm3_3b).model_type, "smollm3");
    assert_eq!(of(KnownModel::Gemma3_1b).model_type, "gemma3_text");
    assert_eq!(of(KnownModel::Llama33_70b), Family::LLAMA);
    // Of the models' cards, the tied head counted once.
    for (known, parameters) in [
        (KnownModel::Qwen3_0_6b, 596_049_920),
        (KnownModel::Gemma3_1b, 999_885_952),
        (KnownModel::Qwen3_8b, 8_190_735_360),
        (KnownModel::SmolLm3_3b, 3_075_098_624),
        (KnownModel::Mistral7b, 7_241_732_096),
    ] {
        assert_eq!(SyntheticLlama::known(known, 1).parameters(), parameters, "{known}");
    }
}
