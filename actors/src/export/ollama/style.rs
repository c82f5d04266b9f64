//! The forms in which chat templates write conversations, and which one a template has.

use protocol::model::{ChatMessage, ChatTemplate, TextTokenizer};

/// A form: each turn is `before`, the role, `between`, what is said, `after`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Style {
    pub(super) name: &'static str,
    before: &'static str,
    between: &'static str,
    after: &'static str,
    /// What the assistant is called.
    assistant: &'static str,
    /// Whether there are turns of the system.
    system: bool,
}

const STYLES: [Style; 5] = [
    Style {
        name: "ChatML",
        before: "<|im_start|>",
        between: "\n",
        after: "<|im_end|>\n",
        assistant: "assistant",
        system: true,
    },
    Style {
        name: "Llama 3",
        before: "<|start_header_id|>",
        between: "<|end_header_id|>\n\n",
        after: "<|eot_id|>",
        assistant: "assistant",
        system: true,
    },
    Style { name: "Phi 3", before: "<|", between: "|>\n", after: "<|end|>\n", assistant: "assistant", system: true },
    Style { name: "Zephyr", before: "<|", between: "|>\n", after: "</s>\n", assistant: "assistant", system: true },
    Style {
        name: "Gemma",
        before: "<start_of_turn>",
        between: "\n",
        after: "<end_of_turn>\n",
        assistant: "model",
        system: false,
    },
];

/// The names of all forms, for messages.
pub(super) fn names() -> String {
    STYLES.iter().map(|style| style.name).collect::<Vec<_>>().join(", ")
}

/// Conversations that a template is tried on, each ending with a question: who speaks, and what.
const TRIALS: [&[(&str, &str)]; 3] = [
    &[("user", "What is it?")],
    &[("user", "Who?"), ("assistant", "Nobody, or \"no one\"."), ("user", "Two\n\nlines {{ .Role }}")],
    &[("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4"), ("user", "5")],
];
/// What the system says in them.
const SYSTEM: &str = "Answer in one word.";

/// The form of a template.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) style: &'static Style,
    /// What the template has the system say where nothing is given.
    pub(super) system: Option<String>,
    /// What it writes before all that the system says.
    preamble: String,
    /// Texts that end an answer.
    pub(super) stops: Vec<String>,
}

impl Style {
    fn turn(&self, role: &str, said: &str) -> String {
        let role = if role == "assistant" { self.assistant } else { role };
        [self.before, role, self.between, said, self.after].concat()
    }

    /// A conversation, and the beginning of the next answer.
    fn write(&self, system: Option<&str>, turns: &[(&str, &str)]) -> String {
        let mut text = system.map(|system| self.turn("system", system)).unwrap_or_default();
        turns.iter().for_each(|(role, said)| text += &self.turn(role, said));
        text + self.before + self.assistant + self.between
    }

    /// Whether a template writes this form; what it has the system say by itself, and before all that it says.
    fn fits(
        &self,
        render: &impl Fn(Option<&str>, &[(&str, &str)]) -> Option<String>,
    ) -> Option<(Option<String>, String)> {
        let plain = render(None, TRIALS[0])?;
        let bare = self.write(None, TRIALS[0]);
        // What stands in a turn of the system that nobody asked for.
        let own = match plain.strip_suffix(&bare) {
            Some("") => None,
            Some(turn) if self.system => {
                let said = turn.strip_prefix(&[self.before, "system", self.between].concat())?;
                Some(said.strip_suffix(self.after)?.to_owned())
            }
            _ => return None,
        };
        let mut preamble = String::new();
        if self.system {
            let given = render(Some(SYSTEM), TRIALS[0])?;
            let turn = given.strip_suffix(&bare)?.strip_prefix(&[self.before, "system", self.between].concat())?;
            preamble = turn.strip_suffix(self.after)?.strip_suffix(SYSTEM)?.to_owned();
        }
        let own = own.map(|own| own.strip_prefix(&preamble).map(str::to_owned).unwrap_or(own));
        let said = |given: Option<&str>| {
            let said = given.or(own.as_deref()).map(|said| format!("{preamble}{said}"));
            said.or((!preamble.is_empty()).then(|| preamble.clone()))
        };
        for turns in TRIALS {
            let systems: &[Option<&str>] = if self.system { &[None, Some(SYSTEM)] } else { &[None] };
            for &given in systems {
                if render(given, turns)? != self.write(said(given).as_deref(), turns) {
                    return None;
                }
            }
        }
        Some((own.filter(|own| !own.is_empty()), preamble))
    }
}

/// The form of a template, if it is one of those that are known.
pub(super) fn of(tokenizer: &TextTokenizer, template: &ChatTemplate) -> Option<Found> {
    let bos = tokenizer.bos().and_then(|bos| tokenizer.decode(&[bos]).ok()).unwrap_or_default();
    let framed = tokenizer.encode("a", true).ok()?.first().copied() == tokenizer.bos();
    let render = |system: Option<&str>, turns: &[(&str, &str)]| {
        let turns = system.map(|system| ("system", system)).into_iter().chain(turns.iter().copied());
        let messages: Vec<ChatMessage> = turns.map(|(role, said)| ChatMessage::new(role, said)).collect();
        let text = template.render(&messages, true).ok()?;
        // Ollama puts the token that begins a text there by itself.
        Some(match framed {
            true => text.strip_prefix(&bos).map(str::to_owned).unwrap_or(text),
            false => text,
        })
    };
    let fitting = |style: &'static Style| style.fits(&render).map(|(system, preamble)| (style, system, preamble));
    let (style, system, preamble) = STYLES.iter().find_map(fitting)?;
    let breaks = |text: &String| text.contains("\"\"\"") || text.contains("{{");
    if system.as_ref().is_some_and(breaks) || breaks(&preamble) {
        return None;
    }
    let mut stops = vec![style.after.trim_end().to_owned()];
    let eos = tokenizer.eos().and_then(|eos| tokenizer.decode(&[eos]).ok());
    stops.extend(eos.filter(|eos| !eos.trim().is_empty() && !stops.contains(eos)));
    Some(Found { style, system, preamble, stops })
}

impl Found {
    /// The form as a template of Go, in Ollama's names.
    pub(super) fn template(&self) -> String {
        let Style { before, between, after, assistant, .. } = self.style;
        let role = match *assistant {
            "assistant" => "{{ .Role }}".to_owned(),
            // Such a form has no turns of the system: what it says is said by the user.
            assistant => format!("{{{{ if eq .Role \"assistant\" }}}}{assistant}{{{{ else }}}}user{{{{ end }}}}"),
        };
        let said = match self.preamble.as_str() {
            "" => "{{ .Content }}".to_owned(),
            preamble => format!("{{{{ if eq .Role \"system\" }}}}{preamble}{{{{ end }}}}{{{{ .Content }}}}"),
        };
        let turn = format!("{before}{role}{between}{said}{after}");
        // Where nothing is said by the system, what comes before it is said all the same.
        let alone = match self.preamble.as_str() {
            "" => String::new(),
            preamble => format!("{{{{ if not .System }}}}{before}system{between}{preamble}{after}{{{{ end }}}}"),
        };
        format!("{alone}{{{{ range .Messages }}}}{turn}{{{{ end }}}}{before}{assistant}{between}")
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use protocol::model::Model;
    use protocol::model::synthetic::{StoredAs, SyntheticLlama};

    use super::*;

    fn found(source: &str) -> Option<Found> {
        let folder = tempfile::tempdir().unwrap();
        SyntheticLlama::tiny(1).write_folder(folder.path(), StoredAs::F32).unwrap();
        let tokenizer = Model::open(folder.path()).unwrap().tokenizer().unwrap();
        of(&tokenizer, &tokenizer.template(source.to_owned()))
    }

    const DEFAULT_SYSTEM: &str = "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\n\
        You are kind.<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
        {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

    const LLAMA_3: &str = "{% if messages[0].role == 'system' %}{% set said = messages[0].content %}\
        {% set messages = messages[1:] %}{% else %}{% set said = '' %}{% endif %}\
        <|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n\n{{ said }}<|eot_id|>\
        {% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>\
        {% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}";

    const GEMMA: &str = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}\
        <start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n\
        {% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}";

    #[test]
    fn a_form_is_told_by_what_a_template_writes() {
        let chat = found(DEFAULT_SYSTEM).unwrap();
        assert_eq!((chat.style.name, chat.system.as_deref()), ("ChatML", Some("You are kind.")));
        let llama = found(LLAMA_3).unwrap();
        assert_eq!((llama.style.name, llama.system.as_deref()), ("Llama 3", None));
        assert_eq!(llama.preamble, "Cutting Knowledge Date: December 2023\n\n");
        assert_eq!(llama.stops[0], "<|eot_id|>");
        let template = llama.template();
        assert!(template.starts_with("{{ if not .System }}<|start_header_id|>system<|end_header_id|>\n\nCutting"));
        let gemma = found(GEMMA).unwrap();
        assert_eq!((gemma.style.name, gemma.stops[0].as_str()), ("Gemma", "<end_of_turn>"));
        assert!(gemma.template().contains("model{{ else }}user{{ end }}"), "{}", gemma.template());
    }

    #[test]
    fn a_template_that_writes_more_than_a_form_is_none() {
        // It counts the turns, drops the first answer, or writes the form but for one end.
        for change in [
            ("{{ m.content }}", "{{ loop.index }} {{ m.content }}"),
            ("{{ m.content }}", "{% if m.role != 'assistant' %}{{ m.content }}{% endif %}"),
            ("<|im_end|>\n{% endfor", "<|im_end|>{% endfor"),
        ] {
            assert_eq!(found(&DEFAULT_SYSTEM.replace(change.0, change.1)), None, "{change:?}");
        }
    }
}
