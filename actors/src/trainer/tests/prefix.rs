//! What enters the lowest adapted layer comes from a disk, and nothing that is learnt shows it.

use std::sync::Mutex;

use protocol::ids::{Direction, Group};

use super::resume::{Place, Ran, every, ran, texts, training};
use super::*;
use crate::checkpoint::Checkpoint;
use crate::lora::Layers;
use crate::prefix::{PrefixCache, PrefixIdentity, StateFormat};
use crate::transformer::Prefix;

/// Notes the rows that are sent forward through each layer.
struct Counting(PlainBackend, Mutex<[Vec<usize>; 2]>);

impl LinearBackend for Counting {
    fn apply(&self, product: ProductId, rows: Arc<Buffer>, n: usize) -> Result<Product, BackendError> {
        if product.direction == Direction::Forward && product.linear.group == Group::Qkv {
            self.1.lock().unwrap()[usize::from(product.linear.layer)].push(n);
        }
        self.0.apply(product, rows, n)
    }
}

fn upper(steps: usize) -> TrainingConfig {
    let lora = LoraConfig { layers: Layers::Top(1), ..training(steps).lora };
    TrainingConfig { lora, ..training(steps) }
}

fn open(path: &std::path::Path, format: StateFormat) -> Arc<PrefixCache> {
    let identity = PrefixIdentity { model: "tiny".into(), layer: 1, products: "plain".into(), format };
    Arc::new(PrefixCache::open(path, &identity, 1 << 30).unwrap())
}

/// A run, and the rows that went through each of the two layers.
async fn run(
    place: &Place,
    prefix: Option<Prefix>,
    save_every: usize,
    resume: Option<Checkpoint<TrainState>>,
) -> (Ran, [Vec<usize>; 2]) {
    let backend = Arc::new(Counting(place.plain(), Mutex::default()));
    let mut model = TrainableModel::new(place.tiny.model.clone(), backend.clone(), &upper(7)).unwrap();
    if let Some(prefix) = prefix {
        model = model.with_prefix(prefix);
    }
    let handle = place.launch_model(model, upper(7), every(save_every), resume, Arc::new(String::new)).unwrap();
    let ran = ran(handle).await;
    let rows = std::mem::take(&mut *backend.1.lock().unwrap());
    (ran, rows)
}

#[actix::test]
async fn a_text_goes_through_the_lower_layers_once_and_the_run_is_the_same() {
    let place = Place::new(1);
    let path = place.folder.path().join("states");
    let (without, all) = run(&place, None, 0, None).await;
    assert_eq!(all[0].iter().sum::<usize>(), all[1].iter().sum::<usize>(), "every row goes through both layers");
    let (with, rows) =
        run(&place, Some(Prefix { cache: open(&path, StateFormat::F32), training: true }), 0, None).await;
    assert_eq!((with.losses, with.parameters), (without.losses.clone(), without.parameters.clone()));
    let tokens: usize = texts().lengths().sum();
    assert_eq!(rows[0].iter().sum::<usize>(), tokens, "each text once: {:?}", rows[0]);
    assert_eq!(rows[1].iter().sum::<usize>(), all[1].iter().sum::<usize>());

    // Texts that are not trained on again are computed where they are, and only the evaluation's are kept.
    let (again, rows) =
        run(&place, Some(Prefix { cache: open(&path, StateFormat::F32), training: false }), 0, None).await;
    assert_eq!((again.losses, again.parameters), (without.losses, without.parameters));
    assert!(rows[0].is_empty(), "all are there already: {:?}", rows[0]);
}

#[actix::test]
async fn a_resumed_run_is_the_same_whatever_became_of_the_file() {
    for format in [StateFormat::F32, StateFormat::Bf16] {
        let (whole, place) = (Place::new(100), Place::new(1));
        let path = whole.folder.path().join("states");
        let (uninterrupted, _) =
            run(&whole, Some(Prefix { cache: open(&path, format), training: true }), 1, None).await;
        let good = std::fs::read(&path).unwrap();
        for (step, damage) in [(2, 0), (3, 1), (4, 2), (5, 3)] {
            let mut bytes = good.clone();
            match damage {
                0 => {}
                // A text's states are not what they were.
                1 => bytes[good.len() / 2] ^= 4,
                2 => bytes.truncate(good.len() / 2),
                _ => bytes.clear(),
            }
            std::fs::write(&path, &bytes).unwrap();
            let prefix = Prefix { cache: open(&path, format), training: true };
            let (resumed, rows) = run(&place, Some(prefix), 0, Some(whole.checkpoint(step))).await;
            assert_eq!(resumed.losses, uninterrupted.losses, "{format:?}, damage {damage}");
            assert_eq!(resumed.parameters, uninterrupted.parameters, "{format:?}, damage {damage}");
            assert_eq!(rows[0].is_empty(), damage == 0, "{:?}", rows[0]);
        }
    }
}
