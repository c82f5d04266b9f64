//! What is learnt of a turn, however tokenizers and templates write it.

use protocol::model::TextTokenizer;
use serde_json::{Value, json};

use super::super::*;
use super::{changed, load, one, tokenizer};

const TALK: &str = r#"{"messages": [{"role": "user", "content": "Is it in?"}, {"role": "assistant", "content": "In the inn. "},
    {"role": "user", "content": "the"}, {"role": "assistant", "content": "a tin"}]}"#;

/// `role: content` in lines, each turn ended by a mark.
fn template(end: &str) -> String {
    format!(
        "{{% for m in messages %}}<|im_start|>{{{{ m.role }}}}\n{{{{ m.content }}}}{end}\n{{% endfor %}}\
         {{% if add_generation_prompt %}}<|im_start|>assistant\n{{% endif %}}"
    )
}

fn learnt_with(tokenizer: &TextTokenizer, options: &DataOptions) -> String {
    one(&TALK.replace('\n', " "), options, tokenizer).1
}

fn flagged(flags: &[(&str, bool)]) -> TextTokenizer {
    changed(Some(&template("<|im_end|>")), |json| {
        let added = json["added_tokens"].as_array_mut().unwrap();
        let end = added.iter_mut().find(|token| token["content"] == "<|im_end|>").unwrap();
        flags.iter().for_each(|&(flag, set)| end[flag] = set.into());
    })
}

#[test]
fn the_end_is_learnt_whatever_its_flags() {
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
    for flags in [
        &[("special", false)][..],
        &[("special", false), ("normalized", true)],
        &[("rstrip", true)],
        &[("lstrip", true)],
        &[("lstrip", true), ("rstrip", true), ("special", false)],
    ] {
        for trims in [false, true] {
            let tokenizer = changed(Some(&template("<|im_end|>")), |json| {
                let added = json["added_tokens"].as_array_mut().unwrap();
                let end = added.iter_mut().find(|token| token["content"] == "<|im_end|>").unwrap();
                flags.iter().for_each(|&(flag, set)| end[flag] = set.into());
                if trims {
                    json["post_processor"] = bytes.clone();
                }
            });
            let learnt = learnt_with(&tokenizer, &DataOptions::default());
            // White space that the end swallows is part of no other token.
            let strips = flags.contains(&("lstrip", true));
            let first = if strips { "In the inn.<|im_end|>" } else { "In the inn. <|im_end|>" };
            assert_eq!(learnt, format!("{first}|a tin<|im_end|>"), "{flags:?} {trims}");
            let none = DataOptions { train_on_end: TrainOnEnd::None, ..DataOptions::default() };
            let first = if strips { "In the inn." } else { "In the inn. " };
            assert_eq!(learnt_with(&tokenizer, &none), format!("{first}|a tin"), "{flags:?} {trims}");
        }
    }
}

#[test]
fn a_head_that_swallows_white_space_is_not_learnt() {
    let template = "{% for m in messages %}<|im_start|> {{ m.content }}<|im_end|>{% endfor %}";
    let tokenizer = changed(Some(template), |json| {
        let added = json["added_tokens"].as_array_mut().unwrap();
        added.iter_mut().find(|token| token["content"] == "<|im_start|>").unwrap()["rstrip"] = true.into();
    });
    let line = r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " the inn"}]}"#;
    assert_eq!(one(line, &DataOptions::default(), &tokenizer).1, "the inn<|im_end|>");
}

#[test]
fn an_end_may_be_ordinary_text() {
    for (mark, learnt) in [
        ("\n### End", "In the inn. \n### End|a tin\n### End"),
        (" [end]\n", "In the inn.  [end]|a tin [end]"),
        // Nothing but white space is no mark.
        ("", "In the inn. |a tin"),
        ("\n", "In the inn. |a tin"),
    ] {
        let tokenizer = tokenizer(Some(&template(mark)));
        assert_eq!(learnt_with(&tokenizer, &DataOptions::default()), learnt, "{mark:?}");
        let dataset = load(&TALK.replace('\n', " "), &DataOptions::default(), &tokenizer).unwrap();
        assert_eq!(dataset.ended, usize::from(!mark.trim().is_empty()), "{mark:?}");
    }
}

#[test]
fn an_end_that_only_the_last_turn_has_is_learnt_there() {
    let template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}{{ eos_token }}";
    let tokenizer = tokenizer(Some(template));
    assert_eq!(learnt_with(&tokenizer, &DataOptions::default()), "In the inn. |a tin\n<|im_end|>");
}

#[test]
fn ends_are_learnt_of_every_turn_of_the_last_or_of_none() {
    let tokenizer = flagged(&[]);
    for (end, learnt) in [
        (TrainOnEnd::Turn, "In the inn. <|im_end|>|a tin<|im_end|>"),
        (TrainOnEnd::Last, "In the inn. |a tin<|im_end|>"),
        (TrainOnEnd::None, "In the inn. |a tin"),
    ] {
        let options = DataOptions { train_on_end: end, ..DataOptions::default() };
        assert_eq!(learnt_with(&tokenizer, &options), learnt);
        let (text, learnt) = one(r#"{"text": "in the inn"}"#, &options, &tokenizer);
        let ended = if end == TrainOnEnd::None { "" } else { "<|im_end|>" };
        assert_eq!((text, learnt), (format!("in the inn{ended}"), format!(" the inn{ended}")));
    }
}

#[test]
fn an_end_that_the_tokenizer_appends_is_learnt_once() {
    let frame = |single: Value| {
        let token = |id: u32, name: &str| json!({"id": name, "ids": [id], "tokens": [name]});
        json!({"type": "TemplateProcessing", "single": single, "pair": single,
            "special_tokens": {"<|im_start|>": token(1, "<|im_start|>"), "<|im_end|>": token(2, "<|im_end|>")}})
    };
    let (begin, text, end) = (
        json!({"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}),
        json!({"Sequence": {"id": "A", "type_id": 0}}),
        json!({"SpecialToken": {"id": "<|im_end|>", "type_id": 0}}),
    );
    let both = changed(None, |json| json["post_processor"] = frame(json!([begin, text, end])));
    let (written, learnt) = one(r#"{"text": "in the inn"}"#, &DataOptions::default(), &both);
    assert_eq!((written.as_str(), learnt.as_str()), ("<|im_start|>in the inn<|im_end|>", "in the inn<|im_end|>"));
    let plain = DataOptions { format: PromptFormat::Plain, ..DataOptions::default() };
    let line = r#"{"prompt": "a", "completion": "b"}"#;
    assert_eq!(one(line, &plain, &both), ("<|im_start|>ab<|im_end|>".into(), "b<|im_end|>".into()));
    let none = DataOptions { train_on_end: TrainOnEnd::None, ..plain };
    assert_eq!(one(line, &none, &both).1, "b");
    // What it begins a text with may not be in it, too.
    let begins = changed(None, |json| json["post_processor"] = frame(json!([begin, text])));
    let error = load(r#"{"text": "<|im_start|>in"}"#, &DataOptions::default(), &begins).unwrap_err().to_string();
    assert!(error.contains("line 1: it begins with `<|im_start|>`, which the tokenizer writes by itself"), "{error}");
}

#[test]
fn generation_tags_say_what_is_learnt() {
    let template = "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>{% generation %}\
         {{ m.content }}<|im_end|>\n{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}";
    let tokenizer = tokenizer(Some(template));
    let with = |options: &DataOptions| learnt_with(&tokenizer, options);
    // The line feed behind the end is between the tags.
    assert_eq!(with(&DataOptions::default()), "In the inn. <|im_end|>\n|a tin<|im_end|>\n");
    let last = DataOptions { train_on_end: TrainOnEnd::Last, ..DataOptions::default() };
    assert_eq!(with(&last), "In the inn. |a tin<|im_end|>\n");
    let one_turn = DataOptions { turns: Turns::Last, ..DataOptions::default() };
    assert_eq!(with(&one_turn), "a tin<|im_end|>\n");
}

#[test]
fn turns_can_be_learnt_one_by_one() {
    let tokenizer = tokenizer(Some(&template("<|im_end|>")));
    let options = DataOptions { turns: Turns::Each, ..DataOptions::default() };
    let dataset = load(&TALK.replace('\n', " "), &options, &tokenizer).unwrap();
    let learnt: Vec<String> =
        dataset.examples().unwrap().iter().map(|example| super::learnt(example, &tokenizer)).collect();
    assert_eq!(learnt, ["In the inn. <|im_end|>", "a tin<|im_end|>"]);
    assert!(dataset.examples().unwrap()[0].tokens.len() < dataset.examples().unwrap()[1].tokens.len());
}

const THINKS: &str = r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nin"},
    {"role": "user", "content": "the"}, {"role": "assistant", "content": "<think>\nha\n</think>\n\ninn"}]}"#;

/// A template that leaves thoughts out, of all turns or of all but the last.
fn strips(when: &str) -> String {
    format!(
        "{{% for m in messages %}}{{% set c = m.content %}}{{% if m.role == 'assistant' and {when} %}}\
         {{% set c = c.split('</think>')[-1].lstrip('\n') %}}{{% endif %}}[{{{{ m.role }}}}]{{{{ c }}}}<|im_end|>{{% endfor %}}"
    )
}

#[test]
fn thoughts_that_a_template_leaves_out_are_refused_with_a_way_out() {
    let line = THINKS.replace('\n', " ");
    let refused = |template: &str, options: &DataOptions| {
        load(&line, options, &tokenizer(Some(template))).unwrap_err().to_string()
    };
    let error = refused(&strips("true"), &DataOptions::default());
    assert!(error.contains("leaves out what was thought in turn 2") && error.contains("data.chat_template"), "{error}");
    let error = refused(&strips("not loop.last"), &DataOptions::default());
    assert!(error.contains("in turn 2") && error.contains("data.turns = \"each\""), "{error}");
    // Which works.
    let each = DataOptions { turns: Turns::Each, ..DataOptions::default() };
    let tokenizer = tokenizer(Some(&strips("not loop.last")));
    let dataset = load(&line, &each, &tokenizer).unwrap();
    let learnt: Vec<String> =
        dataset.examples().unwrap().iter().map(|example| super::learnt(example, &tokenizer)).collect();
    assert_eq!(learnt, ["<think>\nhm\n</think>\n\nin<|im_end|>", "<think>\nha\n</think>\n\ninn<|im_end|>"]);
    // As does a template of one's own.
    let file = super::file(&template("<|im_end|>"));
    let own = DataOptions { chat_template: Some(file.path().display().to_string()), ..DataOptions::default() };
    assert!(load(&line, &own, &tokenizer).is_ok());
}

/// The head that asks a model to go on may have more than an answer's own: what is learnt begins where both part.
#[test]
fn a_head_that_opens_thoughts_is_learnt_from_where_the_answer_differs() {
    let template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}\
         {% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}";
    let tokenizer = tokenizer(Some(template));
    assert_eq!(learnt_with(&tokenizer, &DataOptions::default()), "In the inn. <|im_end|>|a tin<|im_end|>");
    let line = r#"{"prompt": "a", "completion": "<think>hm</think>in"}"#;
    assert_eq!(one(line, &DataOptions::default(), &tokenizer).1, "hm</think>in<|im_end|>");
}

/// What the template writes before an answer and the head does not ask with, the model must write itself.
#[test]
fn what_comes_between_head_and_answer_is_learnt() {
    let template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}(ok) {% endif %}\
         {{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    let learnt = learnt_with(&tokenizer(Some(template)), &DataOptions::default());
    assert_eq!(learnt, "(ok) In the inn. <|im_end|>|(ok) a tin<|im_end|>");
}

/// A template that takes a tool's answer only after a call shows no turn without it.
#[test]
fn turns_that_the_template_needs_are_found_by_what_comes_before() {
    let template = "{% set ns = namespace(called=false) %}{% for m in messages %}{% if m.role == 'tool' and not ns.called %}\
         {{ raise_exception('no call') }}{% endif %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}{% for c in m.tool_calls %}\
         {% set ns.called = true %}CALL {{ c.function.name }}{% endfor %}<|im_end|>\n{% endfor %}\
         {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    let line = r#"{"messages": [{"role": "user", "content": "a"},
        {"role": "assistant", "content": null, "tool_calls": [{"function": {"name": "find", "arguments": {}}}]},
        {"role": "tool", "content": "inn"}, {"role": "assistant", "content": "in"}]}"#;
    let tokenizer = tokenizer(Some(template));
    assert_eq!(
        one(&line.replace('\n', " "), &DataOptions::default(), &tokenizer).1,
        "CALL find<|im_end|>|in<|im_end|>"
    );
}

#[test]
fn an_example_is_shown_with_what_is_learnt_of_it() {
    let tokenizer = tokenizer(Some(&template("<|im_end|>")));
    let dataset = load(r#"{"prompt": "the é", "completion": "in é"}"#, &DataOptions::default(), &tokenizer).unwrap();
    assert_eq!(
        marked(&dataset.examples().unwrap()[0], &tokenizer).unwrap(),
        "<|im_start|>user\nthe é<|im_end|>\n<|im_start|>assistant\n⟦in é<|im_end|>⟧\n"
    );
}
