//! The files that records come in.

use std::io::Write as _;
use std::path::Path;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::super::*;
use super::tokenizer;

/// Some records, told apart by what they say.
fn records() -> Vec<Value> {
    (0..7).map(|n| json!({"prompt": format!("the \"{n}\",\nin"), "completion": format!("inn {n} é")})).collect()
}

fn lines(records: &[Value]) -> Vec<u8> {
    records.iter().flat_map(|record| format!("{record}\n\n").into_bytes()).collect()
}

fn csv(records: &[Value], delimiter: char) -> Vec<u8> {
    let cell = |record: &Value, name: &str| format!("\"{}\"", record[name].as_str().unwrap().replace('"', "\"\""));
    let row = |record: &Value| format!("{}{delimiter}{}\r\n", cell(record, "completion"), cell(record, "prompt"));
    let head = format!("completion{delimiter}prompt\r\n");
    (head + &records.iter().map(row).collect::<String>()).into_bytes()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    out.write_all(bytes).unwrap();
    out.finish().unwrap()
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest)
}

fn load(path: &Path) -> Result<Dataset, DataError> {
    Dataset::load(path, &DataOptions::default(), &tokenizer(None))
}

#[test]
fn the_same_records_give_the_same_examples_in_every_kind_of_file() {
    let folder = tempfile::tempdir().unwrap();
    let records = records();
    let list = serde_json::to_vec_pretty(&records).unwrap();
    let expected = {
        let path = folder.path().join("plain.jsonl");
        std::fs::write(&path, lines(&records)).unwrap();
        load(&path).unwrap().digest().unwrap()
    };
    let with_mark = [b"\xef\xbb\xbf", &lines(&records)[..]].concat();
    let kinds = [
        ("a.jsonl", with_mark.clone()),
        ("a.json", list.clone()),
        ("b.json", serde_json::to_vec(&records).unwrap()),
        ("a.csv", csv(&records, ',')),
        ("a.tsv", csv(&records, '\t')),
        ("a.jsonl.gz", gzip(&lines(&records))),
        // Two files in one, as gzip allows.
        ("b.jsonl.gz", [gzip(&lines(&records[..3])), gzip(&lines(&records[3..]))].concat()),
        ("a.csv.gz", gzip(&csv(&records, ','))),
        ("a.json.zst", zstd(&list)),
        ("a.jsonl.zst", zstd(&with_mark)),
        ("b.jsonl.zst", [zstd(&lines(&records[..3])), zstd(&lines(&records[3..]))].concat()),
    ];
    for (name, bytes) in kinds {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        assert_eq!(load(&path).unwrap().digest().unwrap(), expected, "{name}");
    }
}

#[test]
fn places_are_named_as_people_count_them() {
    let folder = tempfile::tempdir().unwrap();
    let refused = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        load(&path).unwrap_err().to_string()
    };
    let fine = r#"{"text": "in"}"#;
    for (name, bytes, said) in [
        (
            "a.json",
            format!("[\n  {fine},\n\n  {{\n    \"text\": 5\n  }}\n]").into_bytes(),
            "line 4: `text` is a number",
        ),
        ("b.json", format!("[{fine},\n{{\n\"text\": x\n}}]").into_bytes(), "(line 3, column 9)"),
        ("c.json", format!("[{fine}").into_bytes(), "the list is not closed"),
        ("d.json", format!("[{fine}]\n[").into_bytes(), "line 2: something follows the list"),
        (
            "e.jsonl",
            format!("{fine}\n{{\"text\": x}}\n").into_bytes(),
            "line 2: it is not a JSON object: expected value (column 10)",
        ),
        ("a.csv", b"text\n\"two\nlines\"\n\"three\",4\n".to_vec(), "line 4: it has 2 cells, where the head has 1"),
        ("d.csv", b"text\n\"in\n".to_vec(), "line 2: a quote is not closed"),
        ("b.csv", b"text,text\na,b\n".to_vec(), "line 1: two columns are called `text`"),
        ("c.csv", b"text\nin\ncaf\xe9\n".to_vec(), "line 3: it is not UTF-8, perhaps Latin-1"),
        ("f.jsonl", b"{\"text\": \"caf\xe9\"}\n".to_vec(), "(byte 0xe9 in column 14)"),
        ("g.jsonl", b"\xff\xfe{\0".to_vec(), "UTF-16"),
        ("k.parquet", b"PAR1....".to_vec(), "cannot be read"),
        ("l.parquet.gz", gzip(b"PAR1...."), "compressed as a whole"),
        ("h.jsonl", b"PK\x03\x04..".to_vec(), "zip archive"),
        ("i.jsonl", b"\xfd7zXZ\0".to_vec(), "xz -d"),
        ("j.jsonl", b"version https://git-lfs.github.com/spec/v1\n".to_vec(), "git lfs pull"),
    ] {
        let error = refused(name, &bytes);
        assert!(error.contains(name) && error.contains(said), "{error}");
    }
    let cut = gzip(&lines(&records()));
    let error = load(&{
        let path = folder.path().join("cut.jsonl.gz");
        std::fs::write(&path, &cut[..cut.len() - 20]).unwrap();
        path
    });
    assert!(matches!(error, Err(DataError::Io { .. } | DataError::Record { .. })), "{error:?}");
    let missing = load(&folder.path().join("nothing.jsonl")).unwrap_err();
    // The cause is told once, by whoever prints the chain.
    let told = format!("{missing}: {}", std::error::Error::source(&missing).unwrap());
    assert_eq!(told.matches("No such file").count(), 1, "{told}");
}

#[test]
fn a_folder_says_what_is_held_out() {
    let folder = tempfile::tempdir().unwrap();
    let records = records();
    let put = |name: &str, records: &[Value]| std::fs::write(folder.path().join(name), lines(records)).unwrap();
    put("test.jsonl", &records[6..]);
    std::fs::write(folder.path().join("README.md"), "words").unwrap();
    let error = load(folder.path()).unwrap_err().to_string();
    assert!(error.contains("no file train.*") && error.contains("test.jsonl"), "{error}");
    put("train-00001-of-00002.jsonl", &records[2..4]);
    put("train-00000-of-00002.jsonl", &records[..2]);
    let whole = load(folder.path()).unwrap();
    assert_eq!((whole.len(), whole.unused.len()), (4, 1));
    let (train, held) = whole.split(HeldOut::Count(1), 0).unwrap();
    assert_eq!((train.len(), held.len()), (3, 1));
    std::fs::write(folder.path().join("valid.jsonl.gz"), gzip(&lines(&records[4..6]))).unwrap();
    let (train, held) = load(folder.path()).unwrap().split(HeldOut::Count(1), 0).unwrap();
    assert_eq!(train.examples().unwrap(), whole.examples().unwrap());
    let only = folder.path().join("only.jsonl");
    std::fs::write(&only, lines(&records[4..6])).unwrap();
    assert_eq!(held.examples().unwrap(), load(&only).unwrap().examples().unwrap());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// However a list is laid out, its members are cut apart as a whole parser would.
    #[test]
    fn lists_are_cut_apart(texts in prop::collection::vec("[ -~\\n\"\\\\\\[\\]{},é]{1,20}x", 1..6), pretty: bool) {
        let records: Vec<Value> = texts.iter().map(|text| json!({"text": text, "more": [{"a": [text]}, {}]})).collect();
        let list = if pretty { serde_json::to_vec_pretty(&records) } else { serde_json::to_vec(&records) }.unwrap();
        let mut list = tempfile::NamedTempFile::new().and_then(|mut file| { file.write_all(&list)?; Ok(file) }).unwrap();
        list.flush().unwrap();
        let plain = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(plain.path(), lines(&records)).unwrap();
        prop_assert_eq!(load(list.path()).unwrap().digest().unwrap(), load(plain.path()).unwrap().digest().unwrap());
    }
}

/// A file beside the sources; `tests/parquet.py` wrote it.
fn stored(name: &str) -> std::path::PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/data")).join(name)
}

#[test]
fn parquet_gives_the_examples_of_the_same_records_in_lines() {
    let expected = load(&stored("records.jsonl")).unwrap();
    assert_eq!(expected.len(), 5);
    for compression in ["snappy", "zstd", "gzip", "none"] {
        let found = load(&stored(&format!("records-{compression}.parquet"))).unwrap();
        assert_eq!(found.digest().unwrap(), expected.digest().unwrap(), "{compression}");
        assert_eq!(found.notes, []);
    }
    let error = load(&stored("bytes.parquet")).unwrap_err().to_string();
    assert!(error.contains("row 1: `completion` holds bytes that are no text"), "{error}");
    let cut = std::fs::read(stored("records-snappy.parquet")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cut.parquet");
    std::fs::write(&path, &cut[..cut.len() / 2]).unwrap();
    let error = load(&path).unwrap_err().to_string();
    assert!(error.contains("is Parquet, but cannot be read"), "{error}");
}

#[test]
fn files_are_taken_as_often_as_their_weights_say_and_a_run_goes_on_within_a_pass() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, said: &str, count: usize| {
        let path = folder.path().join(name);
        let line = |n| format!("{}\n", json!({"prompt": format!("{said} {n}"), "completion": said}));
        std::fs::write(&path, (0..count).map(line).collect::<String>()).unwrap();
        path
    };
    let (a, b) = (write("a.jsonl", "the", 6), write("b.jsonl", "tin", 4));
    let options = DataOptions::default();
    let files = |weight: f64| [DataFile { path: a.clone(), weight }, DataFile::new(&b)];
    let load = |weight| Dataset::load_files(&files(weight), &options, &tokenizer(None));
    let (once, twice) = (load(1.0).unwrap(), load(2.5).unwrap());
    assert_eq!((once.units(), once.pass(), twice.units(), twice.pass()), (10, 10, 10, 19));
    assert_ne!(once.digest().unwrap(), twice.digest().unwrap());

    let mut batches = Batches::new(&twice, 1, 1, 7);
    let dealt: Vec<_> = (0..38).map(|_| batches.deal().unwrap()).collect();
    let of_a = |pass: &[MicroBatch]| pass.iter().filter(|batch| batch.numbers[0] < 6).count();
    assert_eq!((of_a(&dealt[..19]), of_a(&dealt[19..])), (15, 15));
    let mut again = Batches::new(&twice, 1, 1, 7);
    (0..23).for_each(|_| drop(again.deal().unwrap()));
    let mut resumed = Batches::new(&twice, 1, 1, 0);
    resumed.seek(again.position());
    let rest: Vec<_> = (0..15).map(|_| resumed.deal().unwrap()).collect();
    assert_eq!(rest, dealt[23..]);

    // What is held out is of the files without their weights, and what is left keeps them.
    let (train, held_out) = twice.split(HeldOut::Count(3), 1).unwrap();
    assert_eq!((held_out.units(), held_out.pass()), (3, 3));
    let left_of_a = train.examples().unwrap().iter().filter(|e| once.examples().unwrap()[..6].contains(e)).count();
    assert_eq!(train.pass(), 7 - left_of_a + (2.5 * left_of_a as f64).round() as usize);

    for weight in [0.0, -1.0, f64::NAN, 1e9] {
        let error = load(weight).unwrap_err().to_string();
        assert!(error.contains("a.jsonl in data.files"), "{error}");
    }
}
