//! The shapes that records have, and what is refused of them.

use protocol::model::TextTokenizer;

use super::super::*;
use super::{learnt, load, one, tokenizer};

/// Shows all that templates may be given.
const FULL: &str = "{% if tools %}TOOLS {{ tools | tojson }}\n{% endif %}{% for m in messages %}\
     <|im_start|>{{ m.role }}{{ ' ' + m.name if m.name }}\n{% if m.reasoning_content %}[{{ m.reasoning_content }}]{% endif %}\
     {{ m.content or '' }}{% for c in m.tool_calls %}CALL {{ c.function.name }}{% endfor %}<|im_end|>\n{% endfor %}\
     {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

fn load_pairs(line: &str, options: &DataOptions, tokenizer: &TextTokenizer) -> Result<Dataset, DataError> {
    Dataset::load_pairs(&[DataFile::new(super::file(line).path())], options, tokenizer)
}

fn with(line: &str, template: Option<&str>) -> (String, String) {
    one(&line.replace('\n', " "), &DataOptions::default(), &tokenizer(template))
}

#[test]
fn shapes_are_told_by_their_fields() {
    let asked =
        |system: &str, said: &str| format!("{system}<|im_start|>user\n{said}<|im_end|>\n<|im_start|>assistant\n");
    let be_brief = "<|im_start|>system\nBe brief.<|im_end|>\n";
    for (line, head) in [
        (
            r#"{"messages": [{"role": "user", "content": "the"}, {"role": "assistant", "content": "inn"}]}"#,
            asked("", "the"),
        ),
        (
            r#"{"messages": [{"role": "user", "content": [{"type": "text", "text": "th"}, {"type": "text", "text": "e"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "inn"}]}]}"#,
            asked("", "the"),
        ),
        (
            r#"{"conversations": [{"from": "human", "value": "the"}, {"from": "gpt", "value": "inn"}]}"#,
            asked("", "the"),
        ),
        (
            r#"{"system": "Be brief.", "conversations": [{"from": "human", "value": "the"}, {"from": "gpt", "value": "inn"}]}"#,
            asked(be_brief, "the"),
        ),
        (
            r#"{"messages": "[{\"role\": \"human\", \"content\": \"the\"}, {\"role\": \"model\", \"content\": \"inn\"}]"}"#,
            asked("", "the"),
        ),
        (r#"{"prompt": "the", "completion": "inn"}"#, asked("", "the")),
        (
            r#"{"prompt": [{"role": "user", "content": "the"}], "completion": [{"role": "assistant", "content": "inn"}]}"#,
            asked("", "the"),
        ),
        (r#"{"instruction": "the", "input": "", "output": "inn"}"#, asked("", "the")),
        (r#"{"instruction": "the", "input": "tin", "output": "inn"}"#, asked("", "the\n\ntin")),
        (r#"{"instruction": "the", "output": "inn", "system": "Be brief.", "history": []}"#, asked(be_brief, "the")),
    ] {
        let (text, learnt) = with(line, None);
        assert_eq!((text, learnt.as_str()), (format!("{head}inn<|im_end|>\n"), "inn<|im_end|>"), "{line}");
    }
    let history = r#"{"instruction": "the", "output": "inn", "history": [["a", "tie"], ["in", "it"]]}"#;
    assert_eq!(with(history, None).1, "tie<|im_end|>|it<|im_end|>|inn<|im_end|>");
}

#[test]
fn any_field_can_be_renamed() {
    let fields = |toml: &str| DataOptions { fields: serde_json::from_str(toml).unwrap(), ..DataOptions::default() };
    for (names, line) in [
        (
            r#"{"messages": "conversations"}"#,
            r#"{"conversations": [{"from": "human", "value": "the"}, {"from": "gpt", "value": "inn"}]}"#,
        ),
        (
            r#"{"messages": "chat", "role": "who", "content": "said"}"#,
            r#"{"chat": [{"who": "user", "said": "the"}, {"who": "assistant", "said": "inn"}]}"#,
        ),
        (
            r#"{"prompt": "instruction", "completion": "output"}"#,
            r#"{"instruction": "the", "input": "", "output": "inn"}"#,
        ),
        (
            r#"{"instruction": "q", "input": "context", "output": "response"}"#,
            r#"{"q": "", "context": "the", "response": "inn"}"#,
        ),
    ] {
        let (text, learnt) = one(line, &fields(names), &tokenizer(None));
        assert!(text.contains("user\nthe<|im_end|>"), "{text}");
        assert_eq!(learnt, "inn<|im_end|>", "{line}");
    }
    // What goes with a renamed field is used as well.
    let renamed = fields(r#"{"prompt": "instruction", "completion": "output"}"#);
    let (text, _) = one(r#"{"instruction": "the", "input": "tin", "output": "inn"}"#, &renamed, &tokenizer(None));
    assert!(text.contains("the\n\ntin<|im_end|>"), "{text}");
}

#[test]
fn weights_and_train_are_obeyed() {
    let line = |first: &str, second: &str| {
        format!(
            r#"{{"messages": [{{"role": "user", "content": "the"}}, {{"role": "assistant", "content": "in"{first}}},
            {{"role": "user", "content": "the"{second}}}, {{"role": "assistant", "content": "inn"}}]}}"#
        )
    };
    for (first, second, expected) in [
        (r#", "weight": 0"#, "", "inn<|im_end|>"),
        (r#", "weight": 1.0"#, r#", "weight": 0"#, "in<|im_end|>|inn<|im_end|>"),
        (r#", "train": false"#, "", "inn<|im_end|>"),
        (r#", "train": false, "weight": 0"#, r#", "train": true"#, "the<|im_end|>|inn<|im_end|>"),
    ] {
        assert_eq!(with(&line(first, second), None).1, expected, "{first} {second}");
    }
    for (first, second, said) in [
        (r#", "weight": 0.5"#, "", "turn 2 of `messages`: `weight` is 0.5"),
        (r#", "weight": "1""#, "", "`weight` is a text"),
        (r#", "train": 1"#, "", "`train` is a number"),
        (r#", "train": true, "weight": 0"#, "", "contradict"),
        ("", r#", "weight": 1"#, "turn 3 of `messages`: it has a `weight`"),
    ] {
        let line = line(first, second).replace('\n', " ");
        let error = load(&line, &DataOptions::default(), &tokenizer(None)).unwrap_err().to_string();
        assert!(error.contains(said), "{error}");
    }
    let none =
        r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]}"#;
    let error = load(none, &DataOptions::default(), &tokenizer(None)).unwrap_err().to_string();
    assert!(error.contains("no turn of `messages` is to be learnt"), "{error}");
}

#[test]
fn what_a_template_shows_is_learnt_with_the_turn() {
    let calls = r#"{"messages": [{"role": "user", "content": "the"}, {"role": "assistant", "content": "a tie",
        "tool_calls": [{"type": "function", "function": {"name": "find", "arguments": {}}}]}]}"#;
    assert_eq!(with(calls, Some(FULL)).1, "a tieCALL find<|im_end|>");
    for name in ["reasoning_content", "thinking", "reasoning"] {
        let thinks = r#"{"messages": [{"role": "user", "content": "the"}, {"role": "assistant", "content": "inn", "NAME": "hm"}]}"#;
        assert_eq!(with(&thinks.replace("NAME", name), Some(FULL)).1, "[hm]inn<|im_end|>", "{name}");
    }
    let tools = r#"{"tools": "[{\"name\": \"find\"}]", "messages": [{"role": "user", "name": "Ada", "content": "the"}, {"role": "assistant", "content": "inn"}]}"#;
    let (text, _) = with(tools, Some(FULL));
    assert!(text.starts_with("TOOLS [{\"name\": \"find\"}]\n<|im_start|>user Ada\n"), "{text}");
}

#[test]
fn what_a_template_does_not_show_is_refused_or_named() {
    let refused =
        |line: &str| load(&line.replace('\n', " "), &DataOptions::default(), &tokenizer(None)).unwrap_err().to_string();
    let error = refused(
        r#"{"messages": [{"role": "user", "content": "the"}, {"role": "assistant", "content": null, "tool_calls": [{"id": "1"}]},
        {"role": "tool", "tool_call_id": "1", "content": "inn"}, {"role": "assistant", "content": "in"}]}"#,
    );
    // Those that call nothing do no harm.
    let (_, learnt) = with(
        r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "in", "tool_calls": []}]}"#,
        None,
    );
    assert_eq!(learnt, "in<|im_end|>");
    assert!(error.contains("does not show `tool_calls` of turn 2") && error.contains("data.chat_template"), "{error}");
    let error = refused(r#"{"messages": [{"role": "assistant", "content": "in", "reasoning_content": "hm"}]}"#);
    assert!(error.contains("does not show `reasoning_content` of turn 1"), "{error}");
    let error = refused(
        r#"{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, {"role": "assistant", "content": "in"}]}"#,
    );
    assert!(error.contains("a part of type `image_url`"), "{error}");

    let named = |line: &str| load(line, &DataOptions::default(), &tokenizer(None)).unwrap().notes;
    let line = r#"{"id": 7, "tools": [{"name": "find"}], "messages": [{"role": "user", "name": "Ada", "content": "the"}, {"role": "assistant", "content": "inn"}]}"#;
    let notes = named(&format!("{line}\n{{\"text\": \"in\"}}\n{line}"));
    assert!(notes.iter().all(|note| note.first.ends_with(" line 1")), "{notes:?}");
    let told: Vec<(&str, usize)> = notes.iter().map(|note| (note.what.as_str(), note.count)).collect();
    assert_eq!(
        told,
        [
            ("`name` of a turn, which the chat template does not show", 2),
            ("`tools`, which the chat template does not show", 2),
            ("the field `id`", 2),
        ]
    );

    // Values of the template: those that it sets itself, or only speaks of, are not read.
    let template = "{%- set said = 'style' %}{{- strftime_now('%d %b %Y') ~ '|' }}{% if loud is defined %}{{ style }}{% endif %}\
                    {% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}";
    let day = "2025-02-03".parse().unwrap();
    let values = serde_json::from_str(r#"{"loud": true, "said": 1, "enable_thinking": false}"#).unwrap();
    let options = DataOptions { template_values: values, template_date: day, ..DataOptions::default() };
    let line = r#"{"prompt": "the", "completion": "inn"}"#;
    let found = load(line, &options, &tokenizer(Some(template))).unwrap();
    let told: Vec<&str> = found.notes.iter().map(|note| note.what.as_str()).collect();
    let unread = |name: &str| format!("`{name}`, which the chat template never reads (it reads loud, style),");
    assert_eq!(told[..2], [unread("enable_thinking"), unread("said")]);
    assert!(told.len() == 3 && told[2].contains("is told 2025-02-03 instead (data.template_date)"), "{told:?}");
    let text = tokenizer(None).decode(&found.iter().next().unwrap().unwrap().tokens).unwrap();
    assert!(text.starts_with("03 Feb 2025|user: the<|im_end|>"), "{text}");
    let quiet = "{%- if not date is defined %}{% set date = strftime_now('%Y') %}{% endif %}{{ date }}{% for m in messages %}\
                 {{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}";
    let values = serde_json::from_str(r#"{"date": "May"}"#).unwrap();
    let options = DataOptions { template_values: values, ..DataOptions::default() };
    assert_eq!(load(line, &options, &tokenizer(Some(quiet))).unwrap().notes, []);
}

#[test]
fn templates_are_chosen_by_name() {
    let folder = tempfile::tempdir().unwrap();
    use protocol::model::synthetic::{StoredAs, SyntheticLlama};
    SyntheticLlama::tiny(1).write_folder(folder.path(), StoredAs::Bf16).unwrap();
    let template = |mark: &str| format!("{{% for m in messages %}}{mark} {{{{ m.content }}}}<|im_end|>{{% endfor %}}");
    let settings = serde_json::json!({"eos_token": "<|im_end|>", "chat_template": [
        {"name": "short", "template": template("S")}, {"name": "tool_use", "template": template("T")},
    ]});
    std::fs::write(folder.path().join("tokenizer_config.json"), settings.to_string()).unwrap();
    let tokenizer = protocol::model::Model::open(folder.path()).unwrap().tokenizer().unwrap();
    let line = r#"{"prompt": "the", "completion": "inn"}"#;
    let error = load(line, &DataOptions::default(), &tokenizer).unwrap_err().to_string();
    assert!(error.contains("no default chat template, but short, tool_use") && error.contains("\"short\""), "{error}");
    let named = |name: &str| DataOptions { chat_template: Some(name.to_owned()), ..DataOptions::default() };
    assert_eq!(one(line, &named("short"), &tokenizer).0, "S the<|im_end|>S inn<|im_end|>");
    let error = load(line, &named("long"), &tokenizer).unwrap_err().to_string();
    assert!(error.contains("`long`") && error.contains("it has short, tool_use"), "{error}");
    let tools = r#"{"tools": [{"name": "f"}], "messages": [{"role": "user", "content": "the"}, {"role": "assistant", "content": "in"}]}"#;
    assert_eq!(one(tools, &DataOptions::default(), &tokenizer).0, "T the<|im_end|>T in<|im_end|>");
}

#[test]
fn pairs_to_choose_from_are_read_in_all_their_shapes() {
    let tokenizer = tokenizer(None);
    for line in [
        r#"{"prompt": "the", "chosen": "inn", "rejected": "tin"}"#,
        r#"{"instruction": "the", "chosen": "inn", "rejected": "tin"}"#,
        r#"{"prompt": [{"role": "user", "content": "the"}], "chosen": [{"role": "assistant", "content": "inn"}], "rejected": [{"role": "assistant", "content": "tin"}]}"#,
        r#"{"prompt": "the", "chosen": [{"role": "user", "content": "the"}, {"role": "assistant", "content": "inn"}], "rejected": [{"role": "user", "content": "the"}, {"role": "assistant", "content": "tin"}]}"#,
        r#"{"chosen": [{"role": "user", "content": "the"}, {"role": "assistant", "content": "inn"}], "rejected": [{"role": "user", "content": "the"}, {"role": "assistant", "content": "tin"}]}"#,
        r#"{"conversations": [{"from": "human", "value": "the"}], "chosen": {"from": "gpt", "value": "inn"}, "rejected": {"from": "gpt", "value": "tin"}}"#,
    ] {
        let pairs = load_pairs(line, &DataOptions::default(), &tokenizer).unwrap().examples().unwrap();
        let [chosen, rejected] = &pairs[..] else { panic!("one line is one pair") };
        for (example, said) in [(chosen, "inn"), (rejected, "tin")] {
            assert_eq!(learnt(example, &tokenizer), format!("{said}<|im_end|>"), "{line}");
            let text = tokenizer.decode(&example.tokens).unwrap();
            let head = "<|im_start|>user\nthe<|im_end|>\n<|im_start|>assistant\n";
            assert_eq!(text, format!("{head}{said}<|im_end|>\n"), "{line}");
        }
    }
    let plain = DataOptions { format: PromptFormat::Plain, ..DataOptions::default() };
    let line = r#"{"prompt": "the ", "chosen": "inn", "rejected": "tin"}"#;
    let pairs = load_pairs(line, &plain, &tokenizer).unwrap().examples().unwrap();
    assert_eq!(tokenizer.decode(&pairs[1].tokens).unwrap(), "the tin<|im_end|>");
}

#[test]
fn pairs_and_examples_are_not_taken_for_each_other() {
    let tokenizer = tokenizer(None);
    let pair = r#"{"prompt": "the", "chosen": "inn", "rejected": "tin"}"#;
    let error = load(pair, &DataOptions::default(), &tokenizer).unwrap_err().to_string();
    assert!(error.contains("`chosen`, `rejected`") && error.contains("dpo"), "{error}");
    for (line, said) in [
        (r#"{"prompt": "the", "completion": "inn"}"#, "no pair of a chosen and a rejected"),
        (r#"{"prompt": "the", "chosen": "inn"}"#, "`rejected` is missing"),
        (r#"{"chosen": "inn", "rejected": "tin"}"#, "`prompt` is missing"),
        (r#"{"prompt": "the", "chosen": "inn", "rejected": ""}"#, "of `rejected`: the completion is empty"),
    ] {
        let error = load_pairs(line, &DataOptions::default(), &tokenizer).unwrap_err().to_string();
        assert!(error.contains("line 1: ") && error.contains(said), "{error}");
    }
}
