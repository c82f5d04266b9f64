//! Tokenizers and chat templates, from both formats.

use std::fs;

use candle_core::quantized::GgmlDType;
use proptest::prelude::*;

use super::super::{ChatMessage, TextTokenizer};
use super::*;

fn both() -> (TextTokenizer, TextTokenizer) {
    let synthetic = SyntheticLlama::tiny(1);
    let (folder, model) = folder(&synthetic, StoredAs::F32);
    let path = folder.path().join("model.gguf");
    synthetic.write_gguf(&path, GgmlDType::F32).unwrap();
    (model.tokenizer().unwrap(), Model::open(&path).unwrap().tokenizer().unwrap())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn texts_survive_and_formats_agree(text in "(<\\|im_end\\|>|the| in |\\PC|\\n){0,40}") {
        let (a, b) = both();
        let tokens = a.encode(&text, true).unwrap();
        prop_assert_eq!(&tokens, &b.encode(&text, true).unwrap());
        prop_assert_eq!(a.decode(&tokens).unwrap(), text.clone());
        prop_assert_eq!(b.decode(&tokens).unwrap(), text);
    }
}

#[test]
fn spans_name_the_bytes_of_each_token() {
    let (a, _) = both();
    let text = "In the inn<|im_end|>x";
    let spans = a.encode_spans(text, false).unwrap();
    let pieces: Vec<&str> = spans.iter().map(|token| &text[token.span.clone()]).collect();
    assert_eq!(pieces, ["I", "n", " the", " ", "in", "n", "<|im_end|>", "x"]);
    assert_eq!(spans[6].id, 2);
}

#[test]
fn special_tokens_are_known() {
    for tokenizer in <[_; 2]>::from(both()) {
        assert_eq!((tokenizer.bos(), tokenizer.eos()), (Some(1), Some(2)));
        let mut special = tokenizer.special_tokens();
        special.sort();
        assert_eq!(special, ["<|endoftext|>", "<|im_end|>", "<|im_start|>"]);
    }
}

#[test]
fn chats_are_rendered_by_the_template() {
    let messages = [ChatMessage::new("user", "Hi"), ChatMessage::new("assistant", "Hello")];
    for tokenizer in <[_; 2]>::from(both()) {
        let template = tokenizer.chat_template().unwrap();
        let whole = template.render(&messages, false).unwrap();
        assert_eq!(whole, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n");
        let open = template.render(&messages[..1], true).unwrap();
        assert_eq!(open, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
    }
}

fn with_template(template: &str) -> TextTokenizer {
    let (folder, model) = folder(&SyntheticLlama::tiny(1), StoredAs::F32);
    fs::write(folder.path().join("chat_template.jinja"), template).unwrap();
    model.tokenizer().unwrap()
}

/// The features of Jinja, Python and transformers that published templates lean on.
#[test]
fn templates_may_use_what_transformers_offers() {
    let messages = [ChatMessage::new("user", "  \"a\" & <b>  ")];
    for (template, expected) in [
        ("{{ messages[0].content.strip() }}", "\"a\" & <b>"),
        ("{{ messages[0]['content'] | trim }}|{{ bos_token }}|{{ eos_token }}", "\"a\" & <b>|<|im_start|>|<|im_end|>"),
        ("{{ messages | tojson }}", "[{\"role\": \"user\", \"content\": \"  \\\"a\\\" & <b>  \"}]"),
        ("{{ strftime_now('%d %b %Y') }}", "26 Jul 2024"),
        (
            "{% if tools is defined and tools is none %}x{% endif %}{% set ns = namespace(n=1) %}{% set ns.n = 2 %}{{ ns.n }}",
            "x2",
        ),
        ("    {% for m in messages %}\n    {{ m.role.upper() }}\n    {% endfor %}\n", "    USER\n"),
        (
            "{%- for m in messages -%}{% if not loop.last %}{% continue %}{% endif %}{{ loop.index0 }}{%- endfor -%}",
            "0",
        ),
        ("{{ messages[0].role.startswith('us') }}", "True"),
    ] {
        let found = with_template(template).chat_template().unwrap().render(&messages, false).unwrap();
        assert_eq!(found, expected, "{template}");
    }
}

#[test]
fn templates_that_refuse_or_break_say_so() {
    let messages = [ChatMessage::new("user", "Hi")];
    for (template, said) in
        [("{{ raise_exception('roles must alternate') }}", "roles must alternate"), ("{% if %}", "chat_template")]
    {
        let message =
            with_template(template).chat_template().unwrap().render(&messages, false).unwrap_err().to_string();
        assert!(message.contains(said), "{message}");
    }
}

#[test]
fn tokenizer_files_that_cannot_be_read_are_named() {
    let (folder, model) = folder(&SyntheticLlama::tiny(1), StoredAs::F32);
    for (file, said) in [("tokenizer_config.json", "tokenizer_config.json"), ("tokenizer.json", "tokenizer.json")] {
        fs::write(folder.path().join(file), "{").unwrap();
        let Err(error) = model.tokenizer() else { panic!("{file} was read") };
        assert!(error.to_string().contains(said), "{error}");
    }
    fs::remove_file(folder.path().join("tokenizer.json")).unwrap();
    let Err(error) = model.tokenizer() else { panic!("no tokenizer was read") };
    assert!(error.to_string().contains("tokenizer.json: no such file"), "{error}");
}
