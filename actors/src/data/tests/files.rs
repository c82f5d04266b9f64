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
        load(&path).unwrap().digest()
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
        assert_eq!(load(&path).unwrap().digest(), expected, "{name}");
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
        ("k.parquet", b"PAR1....".to_vec(), "Parquet"),
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
    assert!(matches!(error, Err(DataError::Io { .. } | DataError::Line { .. })), "{error:?}");
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
    assert_eq!((whole.examples().len(), whole.unused.len()), (4, 1));
    let (train, held) = whole.split(HeldOut::Count(1), 0).unwrap();
    assert_eq!((train.examples().len(), held.examples().len()), (3, 1));
    std::fs::write(folder.path().join("valid.jsonl.gz"), gzip(&lines(&records[4..6]))).unwrap();
    let (train, held) = load(folder.path()).unwrap().split(HeldOut::Count(1), 0).unwrap();
    assert_eq!(train.examples(), whole.examples());
    let only = folder.path().join("only.jsonl");
    std::fs::write(&only, lines(&records[4..6])).unwrap();
    assert_eq!(held.examples(), load(&only).unwrap().examples());
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
        prop_assert_eq!(load(list.path()).unwrap().digest(), load(plain.path()).unwrap().digest());
    }
}
