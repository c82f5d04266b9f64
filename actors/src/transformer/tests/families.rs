//! Every family against Hugging Face: tiny models, adapters and expected numbers that `tests/families.py` made.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use protocol::model::Family;

use super::*;
use crate::adapter;

/// How far a number may be off: absolutely, of logits and of the loss of a token, and relative to the length of a gradient.
const TOLERANCE: f64 = 1e-4;

/// One of the models.
pub(super) struct Case {
    pub(super) name: String,
    pub(super) model: Arc<Model>,
    pub(super) adapters: LoraAdapters,
    expected: HashMap<String, Tensor>,
}

impl Case {
    pub(super) fn open(folder: &Path) -> Self {
        Self::with(folder, &folder.join("adapter"), folder)
    }

    /// With adapters that train embeddings of tokens, too; `None` of a model that has none.
    pub(super) fn of_tokens(folder: &Path) -> Option<Self> {
        let tokens = folder.join("tokens");
        tokens.is_dir().then(|| Self::with(folder, &tokens, &tokens))
    }

    fn with(folder: &Path, adapters: &Path, expected: &Path) -> Self {
        let model = Arc::new(Model::open(folder).unwrap());
        match model.config().traits.of_larger {
            false => assert_eq!(model.notes(), [""; 0], "{}", folder.display()),
            true => {
                assert!(matches!(model.notes(), [note] if note.contains("takes more than text")), "{:?}", model.notes())
            }
        }
        let adapters = adapter::load(adapters, model.config()).unwrap();
        let expected = candle_core::safetensors::load(expected.join("expected.safetensors"), &Device::Cpu).unwrap();
        Self { name: folder.file_name().unwrap().to_string_lossy().into_owned(), model, adapters, expected }
    }

    fn numbers(&self, name: &str) -> Vec<f64> {
        let tensor = self.expected[name].to_dtype(candle_core::DType::F64).unwrap();
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    /// Its sequences, of which every next token is a target.
    pub(super) fn batch(&self) -> MicroBatch {
        let whole = |name| self.numbers(name).into_iter().map(|number| number as u32).collect::<Vec<_>>();
        let (tokens, lengths) = (whole("tokens"), whole("lengths"));
        let lengths: Vec<usize> = lengths.into_iter().map(|length| length as usize).collect();
        let mut targets: Vec<u32> = tokens[1..].iter().copied().chain([IGNORED]).collect();
        let mut end = 0;
        for length in &lengths {
            end += length;
            targets[end - 1] = IGNORED;
        }
        let numbers = (0..lengths.len()).collect();
        MicroBatch { lengths, multiple: 1, tokens, targets, numbers }
    }

    pub(super) fn llama(&self, head: bool) -> Llama {
        let backend = if head { PlainBackend::with_head(&self.model) } else { PlainBackend::new(&self.model) };
        Llama::new(self.model.clone(), Arc::new(backend.unwrap())).unwrap()
    }

    /// Logits of every position, by the model's own forward pass and a product with the whole head.
    pub(super) fn logits(&self, llama: &Llama, adapters: Option<&LoraAdapters>) -> Vec<f64> {
        let (batch, config) = (self.batch(), self.model.config());
        let pass = Pass::new(llama, &batch, adapters, None).unwrap();
        let normed = llama.forward(&pass, None, &batch, None, usize::MAX, &mut Vec::new()).unwrap().normed;
        let mut head = self.model.head().unwrap();
        if let Some(trained) = adapters.and_then(LoraAdapters::token_rows).filter(|_| config.tie_word_embeddings) {
            for (&token, row) in trained.tokens.iter().zip(trained.rows.to_vec2::<f32>().unwrap()) {
                head[token as usize * row.len()..][..row.len()].copy_from_slice(&row);
            }
        }
        let logit = |state: &[f32], row: &[f32]| {
            let product: f64 = state.iter().zip(row).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
            config.traits.logit_cap.map_or(product, |cap| cap * (product / cap).tanh())
        };
        let states = normed.chunks_exact(config.hidden_size);
        let rows = || head.chunks_exact(config.hidden_size);
        states.flat_map(|state| rows().map(move |row| logit(state, row))).collect()
    }

    /// The gradient of each of the adapter's matrices, by PEFT's name.
    fn gradients(&self, gradients: Vec<Vec<f32>>) -> Vec<(String, Vec<f32>)> {
        let mut named = Vec::new();
        for ((linear, group), pair) in self.adapters.groups().zip(gradients.chunks_exact(2)) {
            let d_in = self.model.config().shape(linear.group).d_in;
            for slot in group.slots.iter() {
                let rank = slot.rank;
                let inside = if self.model.config().traits.of_larger { "language_model." } else { "" };
                let key = |side: &str| {
                    let name = slot.projection.name();
                    format!("base_model.model.model.{inside}layers.{}.{name}.lora_{side}.weight", linear.layer)
                };
                named.push((key("A"), pair[0][slot.row * d_in..][..rank * d_in].to_vec()));
                named.push((key("B"), pair[1][slot.up..][..slot.d_out * rank].to_vec()));
            }
        }
        if self.adapters.token_rows().is_some() {
            let name = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta";
            named.push((name.to_owned(), gradients.last().unwrap().clone()));
        }
        named
    }
}

pub(super) fn folders() -> Vec<PathBuf> {
    let all = fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/families")).unwrap();
    let mut folders: Vec<PathBuf> = all.map(|entry| entry.unwrap().path()).filter(|path| path.is_dir()).collect();
    folders.sort();
    folders
}

#[test]
fn every_family_computes_what_hugging_face_computes() {
    let mut families = std::collections::BTreeSet::new();
    let folders = folders();
    let of_tokens: Vec<Case> = folders.iter().filter_map(|folder| Case::of_tokens(folder)).collect();
    assert_eq!(of_tokens.len(), 3, "tied heads, a bounded one, and one of its own");
    for case in folders.iter().map(|folder| Case::open(folder)).chain(of_tokens) {
        families.insert(case.model.config().family.model_type);
        let (llama, batch) = (case.llama(false), case.batch());
        let targets = batch.targets.iter().filter(|&&target| target != IGNORED).count() as f64;

        let off = |found: &[f64], expected: &[f64]| {
            assert_eq!(found.len(), expected.len());
            found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
        };
        let of_logits = off(&case.logits(&llama, Some(&case.adapters)), &case.numbers("logits"));
        assert!(of_logits < TOLERANCE, "{}: logits off by {of_logits}", case.name);

        let draw = Draw { seed: 0, step: 0, micro_batch: 0 };
        let (loss, gradients) = llama.gradient(&batch, &case.adapters, draw).unwrap();
        let of_loss = (loss - case.numbers("loss")[0]).abs() / targets;
        assert!(of_loss < TOLERANCE, "{}: loss of a token off by {of_loss}", case.name);

        let (mut worst, gradients) = (0.0f64, case.gradients(gradients));
        assert_eq!(gradients.len(), case.expected.len() - 4, "{}", case.name);
        for (key, gradient) in &gradients {
            let expected = case.numbers(key);
            assert_eq!(gradient.len(), expected.len(), "{}: {key}", case.name);
            let differences = gradient.iter().zip(&expected).map(|(&a, b)| (f64::from(a) - b).powi(2));
            let length = expected.iter().map(|b| b * b).sum::<f64>().sqrt();
            let off = differences.sum::<f64>().sqrt() / length;
            assert!(off < TOLERANCE && length > 1e-3, "{}: gradient of {key} off by {off} of {length}", case.name);
            worst = worst.max(off);
        }
        println!("{:14} logits {of_logits:.1e}, loss {of_loss:.1e}, gradients {worst:.1e}", case.name);

        // The head as workers serve it.
        let (served, of_served) = case.llama(true).gradient(&batch, &case.adapters, draw).unwrap();
        assert!((served / loss - 1.0).abs() < 1e-5, "{}: {served} by a served head for {loss}", case.name);
        for ((key, gradient), (_, of_served)) in gradients.iter().zip(case.gradients(of_served)) {
            let square = |values: &mut dyn Iterator<Item = f32>| values.map(|x| f64::from(x).powi(2)).sum::<f64>();
            let off = square(&mut gradient.iter().zip(&of_served).map(|(a, b)| a - b));
            let length = square(&mut gradient.iter().copied());
            assert!(off < (1e-4f64).powi(2) * length, "{}: gradient of {key} by a served head", case.name);
        }
    }
    let known = Family::ALL.iter().map(|family| family.model_type).collect();
    assert_eq!(families, known, "each family has a model to hold it against");
}

#[test]
fn projections_are_named_as_their_family_has_them() {
    let fused = folders().into_iter().find(|folder| folder.ends_with("phi3")).unwrap();
    let model = Model::open(fused).unwrap();
    let modules = |target_modules: Vec<Projection>| {
        let config = LoraConfig { target_modules, ..LoraConfig::default() };
        config.modules_of(model.config()).map_err(|error| error.to_string())
    };
    let of_phi = vec![Projection::Qkv, Projection::O, Projection::GateUp, Projection::Down];
    assert_eq!(modules(LoraConfig::default().target_modules), Ok(of_phi.clone()), "the default is all of them");
    assert_eq!(modules(vec![Projection::GateUp, Projection::Qkv]), Ok(vec![Projection::Qkv, Projection::GateUp]));
    let error = modules(vec![Projection::O, Projection::Q]).unwrap_err();
    assert!(error.contains("names q_proj, but layers of the family `phi3` have qkv_proj, o_proj"), "{error}");
    let adapters = LoraAdapters::new(model.config(), &LoraConfig::default(), 1).unwrap();
    assert_eq!(adapters.values(), LoraConfig::default().values(model.config()).unwrap());

    let folder = tempfile::tempdir().unwrap();
    adapter::save(folder.path(), &adapters, "base").unwrap();
    let read = adapter::load(folder.path(), model.config()).unwrap();
    assert_eq!(read.config().target_modules, [Projection::O, Projection::Down, Projection::Qkv, Projection::GateUp]);
    let error = adapter::load(folder.path(), TinyModel::new().config()).err().unwrap().to_string();
    assert!(error.contains("names qkv_proj"), "{error}");
}
