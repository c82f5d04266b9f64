//! Templates against transformers' own output, which `tests/chat_templates.py` wrote.

#![allow(clippy::unwrap_used)]

use serde::Deserialize;
use serde_json::{Map, Value};

use super::{Chat, ChatMessage, ChatTemplate};

#[derive(Deserialize)]
struct Corpus {
    special: Map<String, Value>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    template: String,
    messages: Vec<ChatMessage>,
    tools: Option<Value>,
    values: Option<Map<String, Value>>,
    #[serde(default)]
    open: bool,
    /// What transformers writes, or
    text: Option<String>,
    /// why it does not.
    refused: Option<String>,
    #[serde(default)]
    generated: Vec<String>,
}

#[test]
fn templates_write_what_transformers_writes() {
    let corpus: Corpus = serde_json::from_str(include_str!("corpus.json")).unwrap();
    assert!(corpus.cases.len() >= 40);
    let mut wrong = Vec::new();
    for case in corpus.cases {
        let template = ChatTemplate::new(case.template, corpus.special.clone());
        let chat = Chat { tools: case.tools.as_ref(), values: case.values.as_ref(), ..Chat::new(&case.messages) };
        match (template.write(&chat, case.open), &case.text) {
            (Ok(found), Some(expected)) => {
                let generated: Vec<&str> = found.generated.iter().map(|span| &found.text[span.clone()]).collect();
                if found.text != *expected || generated != case.generated {
                    wrong.push(format!(
                        "{}:\n  found    {:?}\n  expected {expected:?}\n  {generated:?}",
                        case.name, found.text
                    ));
                }
            }
            (Ok(found), None) => wrong.push(format!("{}: {:?}, but {:?}", case.name, found.text, case.refused)),
            (Err(error), Some(expected)) => wrong.push(format!("{}: {error}, where {expected:?} is right", case.name)),
            (Err(error), None) => {
                let why = case.refused.unwrap_or_default();
                // Words of the template's own are handed on.
                assert!(!case.name.starts_with("alternation") || error.to_string().contains(&why), "{error}: {why}");
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn parts_are_taken_by_templates_that_look_into_them() {
    let takes = |source: &str| ChatTemplate::new(source.to_owned(), Map::new()).takes_parts();
    assert!(takes("{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"));
    assert!(!takes("{% for m in messages %}{{ m.content }}{% endfor %}"));
    assert!(!takes("{% for m in messages %}{{ m.content | tojson }}{% endfor %}"));
    assert!(!takes("{% for m in messages %}{{ m.role + m.content }}{% endfor %}"));
}

#[test]
fn marks_of_what_is_generated_are_none_that_were_said() {
    let template = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}";
    let template = ChatTemplate::new(template.to_owned(), Map::new());
    let said = "\u{f0000}a\u{f0001}";
    let written = template.write(&Chat::new(&[ChatMessage::new("user", said)]), false).unwrap();
    assert_eq!((written.text.as_str(), &written.generated[0], written.generated.len()), (said, &(0..said.len()), 1));
}
