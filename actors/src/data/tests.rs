//! Tests of the way from a line to a micro-batch.

#![allow(clippy::unwrap_used)]

use std::io::Write;

use proptest::prelude::*;
use protocol::model::synthetic::{StoredAs, SyntheticLlama};
use protocol::model::{Model, TextTokenizer};
use tempfile::{NamedTempFile, TempDir};

use super::*;

mod files;
mod pairs;
mod shapes;
mod turns;

/// A tokenizer with the given chat template, or with the synthetic model's own.
fn tokenizer(template: Option<&str>) -> TextTokenizer {
    changed(template, |_| {})
}

/// The same with another `tokenizer.json`.
fn changed(template: Option<&str>, change: impl FnOnce(&mut serde_json::Value)) -> TextTokenizer {
    let folder: TempDir = tempfile::tempdir().unwrap();
    SyntheticLlama::tiny(1).write_folder(folder.path(), StoredAs::Bf16).unwrap();
    if let Some(template) = template {
        std::fs::write(folder.path().join("chat_template.jinja"), template).unwrap();
    }
    let path = folder.path().join("tokenizer.json");
    let mut json = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    change(&mut json);
    std::fs::write(path, json.to_string()).unwrap();
    Model::open(folder.path()).unwrap().tokenizer().unwrap()
}

fn file(lines: &str) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(lines.as_bytes()).unwrap();
    file
}

fn load(lines: &str, options: &DataOptions, tokenizer: &TextTokenizer) -> Result<Dataset, DataError> {
    Dataset::load(file(lines).path(), options, tokenizer)
}

/// What is learnt of an example, as text, gaps marked by `|`.
fn learnt(example: &Example, tokenizer: &TextTokenizer) -> String {
    let mut runs: Vec<Vec<u32>> = vec![Vec::new()];
    for (&token, &learnt) in example.tokens.iter().zip(&example.learnt) {
        match (learnt, runs.last_mut().unwrap()) {
            (true, run) => run.push(token),
            (false, run) if run.is_empty() => {}
            (false, _) => runs.push(Vec::new()),
        }
    }
    let runs = runs.iter().filter(|run| !run.is_empty());
    runs.map(|run| tokenizer.decode(run).unwrap()).collect::<Vec<_>>().join("|")
}

fn one(line: &str, options: &DataOptions, tokenizer: &TextTokenizer) -> (String, String) {
    let dataset = load(line, options, tokenizer).unwrap();
    let [example] = &dataset.examples().unwrap()[..] else { panic!("one line is one example") };
    (tokenizer.decode(&example.tokens).unwrap(), learnt(example, tokenizer))
}

#[test]
fn text_is_learnt_whole_but_for_its_first_token() {
    let tokenizer = tokenizer(None);
    let (text, learnt) = one(r#"{"text": "in the inn"}"#, &DataOptions::default(), &tokenizer);
    assert_eq!((text.as_str(), learnt.as_str()), ("in the inn<|im_end|>", " the inn<|im_end|>"));
}

#[test]
fn only_the_completion_is_learnt() {
    let tokenizer = tokenizer(None);
    let line = r#"{"prompt": "Where is the key?", "completion": "In the inn."}"#;
    let chat = one(line, &DataOptions::default(), &tokenizer);
    assert!(chat.0.starts_with("<|im_start|>user\nWhere is the key?<|im_end|>\n<|im_start|>assistant\nIn"), "{chat:?}");
    assert_eq!(chat.1, "In the inn.<|im_end|>");
    let plain = DataOptions { format: PromptFormat::Plain, ..DataOptions::default() };
    let plain = one(line, &plain, &tokenizer);
    assert_eq!(plain, ("Where is the key?In the inn.<|im_end|>".into(), "In the inn.<|im_end|>".into()));
}

#[test]
fn field_names_can_be_set() {
    let fields = FieldNames { prompt: "question".into(), completion: "answer".into(), ..FieldNames::default() };
    let options = DataOptions { fields, ..DataOptions::default() };
    let (_, learnt) = one(r#"{"id": 3, "question": "2 + 2", "answer": "4"}"#, &options, &tokenizer(None));
    assert_eq!(learnt, "4<|im_end|>");
}

const CONVERSATION: &str = r#"{"messages": [
    {"role": "system", "content": "Be brief."}, {"role": "user", "content": "the"},
    {"role": "assistant", "content": "the"}, {"role": "user", "content": "a"},
    {"role": "assistant", "content": " in a tie "}]}"#;

#[test]
fn every_turn_of_the_assistant_is_learnt() {
    let line = CONVERSATION.replace('\n', " ");
    let (_, learnt) = one(&line, &DataOptions::default(), &tokenizer(None));
    assert_eq!(learnt, "the<|im_end|>| in a tie <|im_end|>");
}

/// Templates that trim turns, mark the last one, refuse half a conversation, or leave the system's turn out; and turns
/// whose words occur before, in other turns and in the template.
#[test]
fn turns_are_found_by_their_place() {
    let line = CONVERSATION.replace('\n', " ");
    for template in [
        "{{ messages | length }}{% for m in messages %}\n<|im_start|>{{ m.role }}: {{ m.content | trim }} <|im_end|>{% endfor %}",
        "{% if messages | length < 5 %}{{ raise_exception('whole conversations only') }}{% endif %}\
         {% for m in messages if m.role != 'system' %}the<|im_start|>{{ loop.last }}: {{ m.content.strip() }} <|im_end|>{% endfor %}",
    ] {
        let (text, learnt) = one(&line, &DataOptions::default(), &tokenizer(Some(template)));
        assert_eq!(learnt, " the <|im_end|>|in a tie <|im_end|>", "{text}");
    }
}

#[test]
fn a_template_that_hides_turns_is_refused() {
    let template = "{% for m in messages %}{{ m.content | length }}{% endfor %}";
    let line = CONVERSATION.replace('\n', " ");
    let error = load(&line, &DataOptions::default(), &tokenizer(Some(template))).unwrap_err().to_string();
    assert!(error.contains("line 1") && error.contains("does not show turn 3"), "{error}");
}

#[test]
fn messages_need_a_template() {
    let folder = tempfile::tempdir().unwrap();
    SyntheticLlama::tiny(1).write_folder(folder.path(), StoredAs::Bf16).unwrap();
    std::fs::write(folder.path().join("tokenizer_config.json"), "{}").unwrap();
    let tokenizer = Model::open(folder.path()).unwrap().tokenizer().unwrap();
    let conversation = CONVERSATION.replace('\n', " ");
    let pair = r#"{"prompt": "a", "completion": "b"}"#;
    for line in [conversation.as_str(), pair] {
        let error = load(line, &DataOptions::default(), &tokenizer).unwrap_err().to_string();
        assert!(error.contains("no chat template") && error.contains("data.format = \"plain\""), "{error}");
    }
    let plain = DataOptions { format: PromptFormat::Plain, ..DataOptions::default() };
    assert_eq!(one(pair, &plain, &tokenizer), ("ab<|im_end|>".into(), "b<|im_end|>".into()));
    let (text, learnt) = one(&conversation, &plain, &tokenizer);
    assert_eq!(text, "Be brief.thethe<|im_end|>a in a tie <|im_end|>");
    assert_eq!(learnt, "the<|im_end|>| in a tie <|im_end|>");
}

#[test]
fn bad_lines_are_named_by_number() {
    let tokenizer = tokenizer(None);
    for (bad, said) in [
        ("{", "not a JSON object"),
        ("[1]", "not a JSON object"),
        (r#"{"txt": "x"}"#, r#"[txt]; expected {"text"}, {"prompt", "completion"}, {"messages"}"#),
        (r#"{"prompt": "x"}"#, "`completion` is missing"),
        (r#"{"text": 5}"#, "`text` is a number"),
        (r#"{"text": " "}"#, "the text is empty"),
        (r#"{"prompt": "x", "completion": ""}"#, "the completion is empty"),
        (r#"{"messages": []}"#, "at least one turn of the assistant"),
        (r#"{"messages": [{"role": "user", "content": "x"}]}"#, "no turn of the assistant"),
        (r#"{"messages": [{"role": "assistant"}]}"#, "turn 1 of `messages`: `content` is missing"),
        (r#"{"messages": [{"role": "assistant", "content": null}]}"#, "`content` is missing"),
    ] {
        let lines = format!("{{\"text\": \"fine\"}}\n\n{bad}\n{{\"text\": \"fine\"}}\n");
        let file = file(&lines);
        let message = Dataset::load(file.path(), &DataOptions::default(), &tokenizer).unwrap_err().to_string();
        let place = format!("{} line 3: ", file.path().display());
        assert!(message.starts_with(&place) && message.contains(said), "{bad}: {message}");
    }
    let mut bytes = b"{\"text\": \"fine\"}\n{\"text\": \"".to_vec();
    bytes.extend([0xff, b'"', b'}']);
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(&bytes).unwrap();
    let message = Dataset::load(file.path(), &DataOptions::default(), &tokenizer).unwrap_err().to_string();
    assert!(message.contains("line 2: it is not UTF-8"), "{message}");
}

#[test]
fn long_examples_are_cut_and_counted() {
    let tokenizer = tokenizer(None);
    let options = DataOptions { max_tokens: 20, format: PromptFormat::Plain, ..DataOptions::default() };
    let long = "x".repeat(50);
    let lines = format!(
        "{{\"text\": \"{long}\"}}\r\n{{\"prompt\": \"{long}\", \"completion\": \"y\"}}\r\n{{\"text\": \"short\"}}\r\n"
    );
    let dataset = load(&lines, &options, &tokenizer).unwrap();
    let lengths: Vec<usize> = dataset.examples().unwrap().iter().map(|example| example.tokens.len()).collect();
    assert_eq!((lengths, dataset.truncated, dataset.left_out.len()), (vec![20, 6], 2, 1));
    assert!(dataset.left_out[0].ends_with(" line 2"), "{:?}", dataset.left_out);
    let only = format!("{{\"prompt\": \"{long}\", \"completion\": \"y\"}}");
    assert!(load(&only, &options, &tokenizer).unwrap_err().to_string().contains("raise max_tokens"));
    assert!(load("\n \n", &options, &tokenizer).unwrap_err().to_string().contains("no examples"));
}

#[test]
fn options_are_plain_configuration() {
    let options: DataOptions = serde_json::from_str(
        r#"{"format": "plain", "held_out": 20, "max_tokens": 512, "fields": {"prompt": "question"}}"#,
    )
    .unwrap();
    assert_eq!((options.format, options.held_out), (PromptFormat::Plain, HeldOut::Count(20)));
    assert_eq!((options.fields.prompt.as_str(), options.fields.completion.as_str()), ("question", "completion"));
    assert!(serde_json::from_str::<DataOptions>(r#"{"feilds": {}}"#).is_err());
    assert_eq!(serde_json::from_str::<HeldOut>("0.25").unwrap(), HeldOut::Fraction(0.25));
}

/// Examples that are told apart by their tokens.
fn numbered(count: usize) -> Dataset {
    let example = |i: usize| {
        let tokens = vec![i as u32 + 1; 2 + i % 5];
        let learnt = (0..tokens.len()).map(|t| t > i % 2).collect();
        Example { tokens, learnt }
    };
    Dataset::from_examples((0..count).map(example).collect(), 0)
}

#[test]
fn impossible_splits_are_refused() {
    for held_out in [HeldOut::Count(5), HeldOut::Fraction(1.0), HeldOut::Fraction(-0.1), HeldOut::Fraction(f64::NAN)] {
        assert!(matches!(numbered(5).split(held_out, 0), Err(DataError::Options(_))), "{held_out:?}");
    }
}

proptest! {
    #[test]
    fn a_split_parts_the_examples(count in 2usize..60, part in 0.0f64..0.9, seed: u64) {
        let dataset = numbered(count);
        let Ok((train, held)) = dataset.split(HeldOut::Fraction(part), seed) else { return Ok(()) };
        let again = dataset.split(HeldOut::Fraction(part), seed).unwrap();
        prop_assert_eq!(held.examples().unwrap(), again.1.examples().unwrap());
        prop_assert_eq!(held.examples().unwrap().is_empty(), part == 0.0);
        let mut first: Vec<u32> = train.examples().unwrap().iter().chain(&held.examples().unwrap()).map(|e| e.tokens[0]).collect();
        first.sort_unstable();
        prop_assert_eq!(first, (1..=count as u32).collect::<Vec<_>>());
    }

    #[test]
    fn every_pass_takes_every_example_once(count in 1usize..30, batch in 1usize..7, seed: u64) {
        let dataset = numbered(count);
        let mut batches = Batches::new(&dataset, batch, 1, seed);
        let taken: Vec<u32> = (0..(3 * count).div_ceil(batch))
            .map(|_| batches.deal().unwrap())
            .flat_map(|b| b.sequences().map(|rows| b.tokens[rows.start]).collect::<Vec<_>>())
            .collect();
        for pass in taken.chunks_exact(count).take(3) {
            let mut pass = pass.to_vec();
            pass.sort_unstable();
            prop_assert_eq!(pass, (1..=count as u32).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_resumed_run_goes_on_where_it_was(count in 1usize..30, batch in 1usize..7, steps in 0usize..20, seed: u64) {
        let dataset = numbered(count);
        let mut whole = Batches::new(&dataset, batch, 1, seed);
        for _ in 0..steps {
            whole.deal().unwrap();
        }
        let saved = serde_json::to_string(&whole.position()).unwrap();
        let mut resumed = Batches::new(&dataset, batch, 1, !seed);
        resumed.seek(serde_json::from_str(&saved).unwrap());
        for _ in 0..5 {
            prop_assert_eq!(whole.deal().unwrap(), resumed.deal().unwrap());
        }
    }

    #[test]
    fn a_micro_batch_predicts_what_comes_next(count in 1usize..20, pad_to in 1usize..12) {
        let dataset = numbered(count);
        let batch = Batches::new(&dataset, count, pad_to, 7).deal().unwrap();
        let (used, rows) = (dataset.examples().unwrap().iter().map(|e| e.tokens.len()).sum::<usize>(), batch.tokens.len());
        prop_assert_eq!((batch.used(), batch.targets.len(), batch.runs().iter().sum()), (used, rows, rows));
        prop_assert!(rows >= used && rows < used + pad_to && rows.is_multiple_of(pad_to));
        prop_assert!(batch.tokens[used..].iter().all(|&token| token == 0));
        prop_assert!(batch.targets[used..].iter().all(|&target| target == IGNORED));
        let expected: usize = dataset.examples().unwrap().iter().map(Example::loss_tokens).sum();
        prop_assert_eq!(batch.loss_tokens(), expected);
        for rows in batch.sequences() {
            let (tokens, targets) = (&batch.tokens[rows.clone()], &batch.targets[rows]);
            let example = dataset.iter().map(Result::unwrap).find(|e| e.tokens[0] == tokens[0]).unwrap();
            for (t, (&token, &target)) in tokens.iter().zip(targets).enumerate() {
                prop_assert_eq!(token, example.tokens[t]);
                let learnt = example.learnt.get(t + 1) == Some(&true);
                prop_assert_eq!(target, if learnt { example.tokens[t + 1] } else { IGNORED });
            }
        }
        // Parts of it have its sequences in their order, about as many rows each.
        for parts in [1, 2, 3, count + 1] {
            let cut = batch.cut(parts);
            prop_assert!(cut.len() <= parts && (count < parts || cut.len() == parts.min(count)));
            prop_assert!(cut.iter().all(|part| part.tokens.len().is_multiple_of(pad_to)));
            let of_parts = cut.iter().flat_map(|part| part.sequences().map(move |rows| (part, rows)));
            for ((part, of_part), of_whole) in of_parts.zip(batch.sequences()) {
                prop_assert_eq!(&part.tokens[of_part.clone()], &batch.tokens[of_whole.clone()]);
                prop_assert_eq!(&part.targets[of_part], &batch.targets[of_whole]);
            }
            prop_assert_eq!(cut.iter().map(|part| part.lengths.len()).sum::<usize>(), count);
            let longest = batch.lengths.iter().copied().max().unwrap_or(0);
            let used = cut.iter().map(MicroBatch::used).max().unwrap_or(0);
            prop_assert!(used <= batch.used().div_ceil(parts) + longest);
            if batch.numbers.len() == count {
                let numbers: Vec<usize> = cut.iter().flat_map(|part| part.numbers.clone()).collect();
                prop_assert_eq!(&numbers, &batch.numbers);
            }
        }
        // Some of its sequences are a micro-batch of their own.
        let some: Vec<usize> = (0..count).step_by(2).collect();
        let part = batch.only(&some);
        prop_assert!(part.tokens.len() < part.used() + pad_to && part.tokens.len().is_multiple_of(pad_to));
        let rows: Vec<_> = batch.sequences().collect();
        for (of_part, of_whole) in part.sequences().zip(some.iter().map(|&number| rows[number].clone())) {
            prop_assert_eq!(&part.tokens[of_part.clone()], &batch.tokens[of_whole.clone()]);
            prop_assert_eq!(&part.targets[of_part], &batch.targets[of_whole]);
        }
    }
}

#[test]
fn epochs_and_seeds_differ() {
    let dataset = numbered(40);
    let order = |seed, epoch| {
        let mut batches = Batches::new(&dataset, 40, 1, seed);
        batches.seek(Position { seed, epoch, index: 0 });
        batches.deal().unwrap().tokens
    };
    assert_ne!(order(1, 0), order(1, 1));
    assert_ne!(order(1, 0), order(2, 0));
}

#[test]
fn in_order_takes_everything_once() {
    let dataset = numbered(7);
    let sizes: Vec<usize> = dataset.in_order(3, 1).map(|batch| batch.unwrap().lengths.len()).collect();
    assert_eq!(sizes, [3, 3, 1]);
    let first: Vec<u32> = dataset
        .in_order(3, 1)
        .map(Result::unwrap)
        .flat_map(|b| b.sequences().map(|r| b.tokens[r.start]).collect::<Vec<_>>())
        .collect();
    assert_eq!(first, [1, 2, 3, 4, 5, 6, 7]);
}
