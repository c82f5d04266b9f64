//! Checkpoints on a disk that is not always kind.

#![allow(clippy::unwrap_used)]

use std::fs;

use super::*;

type State = (u64, String);

fn checkpoint(step: u64) -> Checkpoint<State> {
    let values = vec![step as f32, -0.0, f32::MIN_POSITIVE / 2.0, f32::from_bits(0x7fc0_1234)];
    Checkpoint {
        identity: Identity::default().with("model", "abc").with("training.steps", 9),
        state: (step, "so far".into()),
        tensors: vec![Tensor { name: "b".into(), values }, Tensor { name: "a".into(), values: vec![1.5] }],
    }
}

fn bits(checkpoint: &Checkpoint<State>) -> Vec<(String, Vec<u32>)> {
    let tensor = |t: &Tensor| (t.name.clone(), t.values.iter().map(|value| value.to_bits()).collect());
    let mut tensors: Vec<_> = checkpoint.tensors.iter().map(tensor).collect();
    tensors.sort();
    tensors
}

fn store(keep: usize) -> (tempfile::TempDir, Store) {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::new(folder.path().join("checkpoints"), keep);
    (folder, store)
}

fn steps(store: &Store) -> Vec<usize> {
    store.list().unwrap().into_iter().map(|(step, _)| step).collect()
}

#[test]
fn every_bit_comes_back() {
    let (_folder, store) = store(2);
    assert!(store.latest::<State>(5).unwrap().is_none());
    store.save(3, &checkpoint(3)).unwrap();
    let mut found = store.latest::<State>(5).unwrap().unwrap();
    assert_eq!((&found.checkpoint.identity, &found.checkpoint.state), (&checkpoint(3).identity, &checkpoint(3).state));
    assert_eq!(bits(&found.checkpoint), bits(&checkpoint(3)));
    assert_eq!(found.checkpoint.take("a"), Some(vec![1.5]));
    assert_eq!(found.checkpoint.take("a"), None);
}

#[test]
fn the_last_few_stay_and_none_of_a_future_that_was_left() {
    let (_folder, store) = store(2);
    for step in [0, 5, 10, 15] {
        store.save(step, &checkpoint(1)).unwrap();
    }
    assert_eq!(steps(&store), [15, 10]);
    store.save(12, &checkpoint(1)).unwrap();
    assert_eq!(steps(&store), [12, 10]);
    store.clear().unwrap();
    assert_eq!(steps(&store), [0; 0]);
}

#[test]
fn a_damaged_one_is_named_and_the_next_older_one_taken() {
    let (_folder, store) = store(9);
    store.save(1, &checkpoint(1)).unwrap();
    let path = store.save(2, &checkpoint(2)).unwrap();
    let good = fs::read(&path).unwrap();
    let spoil = |at: usize| {
        let mut bytes = good.clone();
        bytes[at] ^= 1;
        bytes
    };
    let damaged = (0..good.len()).map(spoil).chain((0..good.len()).map(|end| good[..end].to_vec()));
    for bytes in damaged.chain([[&good[..], &[0]].concat()]) {
        let error = Checkpoint::<State>::from_bytes(&path, &bytes).unwrap_err().to_string();
        assert!(error.contains("step-00000002"), "{error}");
    }
    fs::write(&path, &good[..good.len() / 2]).unwrap();
    assert_eq!(store.latest::<State>(5).unwrap().unwrap().checkpoint.state.0, 1);
    fs::remove_file(store.folder().join("step-00000001.checkpoint")).unwrap();
    let error = store.latest::<State>(5).unwrap_err().to_string();
    assert!(error.contains("step-00000002") && error.contains("not whole"), "{error}");
    fs::write(&path, vec![0; 16]).unwrap();
    let mut other = good.clone();
    other[16] = 1;
    fs::write(&path, &other).unwrap();
    let error = Found::<State>::read(&path, 5).unwrap_err().to_string();
    assert!(error.contains("version 2") && error.contains("version 1"), "{error}");
}

#[test]
fn a_disk_that_refuses_loses_nothing() {
    let (_folder, store) = store(1);
    store.save(1, &checkpoint(1)).unwrap();
    // Something at the place of the next one, where it cannot be renamed to.
    fs::create_dir(store.folder().join("step-00000002.checkpoint")).unwrap();
    let error = store.save(2, &checkpoint(2)).unwrap_err().to_string();
    assert!(error.contains("step-00000002"), "{error}");
    assert_eq!(store.latest::<State>(5).unwrap().unwrap().checkpoint.state.0, 1);
    fs::remove_dir(store.folder().join("step-00000002.checkpoint")).unwrap();
    store.save(2, &checkpoint(2)).unwrap();
    assert_eq!(steps(&store), [2]);
}

#[test]
fn one_is_due_after_so_many_steps_or_minutes_and_0_leaves_it_to_the_other() {
    let due = |save_every, save_minutes, steps, seconds| {
        let config = CheckpointConfig { save_every, save_minutes, keep: 1 };
        config.is_due(steps, Duration::from_secs_f64(seconds))
    };
    assert_eq!([19, 20, 21, 40].map(|steps| due(20, 0, steps, 1e9)), [false, true, false, true]);
    assert_eq!([0.0, 299.999, 300.0, 1e9].map(|seconds| due(0, 5, 20, seconds)), [false, false, true, true]);
    assert_eq!([(20, 0.0), (21, 299.0), (21, 300.0)].map(|(steps, s)| due(20, 5, steps, s)), [true, false, true]);
    assert!(!due(0, 0, 20, 1e9) && !due(0, u64::MAX, 20, 1e9));
}

#[test]
fn what_differs_is_named_with_both_values() {
    #[derive(Serialize)]
    struct Settings {
        rate: f64,
        threads: usize,
        inner: Inner,
    }
    #[derive(Serialize)]
    struct Inner {
        modules: Vec<&'static str>,
        format: Option<u8>,
    }
    let identity = |rate, threads, modules| {
        let settings = Settings { rate, threads, inner: Inner { modules, format: None } };
        let identity = Identity::default().with("model", "abc");
        identity.with_settings("training", &settings, &["training.threads"]).unwrap()
    };
    let saved = identity(2e-4, 1, vec!["q"]);
    assert_eq!(identity(2e-4, 7, vec!["q"]).differences(&saved), []);
    let now = identity(4e-4, 1, vec!["q", "v"]).with("data", "new");
    let said: Vec<String> = now.differences(&saved).iter().map(ToString::to_string).collect();
    assert_eq!(
        said,
        [
            "data is not set in the checkpoint and new now",
            "training.inner.modules is [\"q\"] in the checkpoint and [\"q\",\"v\"] now",
            "training.rate is 0.0002 in the checkpoint and 0.0004 now",
        ]
    );
}
