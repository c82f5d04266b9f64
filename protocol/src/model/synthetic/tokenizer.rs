//! The tokenizer of synthetic models: every byte is a token, a few pairs are merged, three tokens are special.

use serde_json::{Value as Json, json};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

/// Ends a text.
pub(super) const TEXT_END: u32 = 0;
/// Begins a turn of a chat.
pub(super) const TURN: u32 = 1;
/// Ends a turn of a chat.
pub(super) const END: u32 = 2;
const SPECIAL: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];

/// Merged pairs, each one's result being a token; `Ġ` stands for a space.
const MERGES: [(&str, &str); 5] = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("i", "n"), ("Ġ", "a")];

/// Tokens of a synthetic model's tokenizer: the special ones, the bytes, the merged pairs.
pub const VOCABULARY: usize = SPECIAL.len() + 256 + MERGES.len();

/// The chat template of synthetic models, in the manner of ChatML.
pub const CHAT_TEMPLATE: &str = "{% for message in messages %}\
    {{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}\
    {% endfor %}\
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

/// Every token, in the order of its number.
pub(super) fn tokens() -> Vec<String> {
    let mut bytes: Vec<char> = ByteLevel::alphabet().into_iter().collect();
    bytes.sort_unstable();
    let special = SPECIAL.map(str::to_owned).into_iter();
    let merged = MERGES.iter().map(|(left, right)| format!("{left}{right}"));
    special.chain(bytes.into_iter().map(String::from)).chain(merged).collect()
}

/// The merges as both file formats spell them.
pub(super) fn merges() -> Vec<String> {
    MERGES.iter().map(|(left, right)| format!("{left} {right}")).collect()
}

/// Whether a token is one of the special ones.
pub(super) fn is_special(id: usize) -> bool {
    id < SPECIAL.len()
}

/// A `tokenizer.json`.
pub(super) fn description() -> Json {
    let vocabulary: serde_json::Map<String, Json> =
        tokens().into_iter().enumerate().map(|(id, token)| (token, json!(id))).collect();
    let added: Vec<Json> = SPECIAL
        .iter()
        .enumerate()
        .map(|(id, token)| {
            json!({
                "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true,
            })
        })
        .collect();
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": bytes, "post_processor": null, "decoder": bytes,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocabulary, "merges": merges(),
        },
    })
}

/// A `tokenizer_config.json`.
pub(super) fn settings() -> Json {
    json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[TURN as usize], "eos_token": {"content": SPECIAL[END as usize], "special": true},
        "unk_token": SPECIAL[TEXT_END as usize], "chat_template": CHAT_TEMPLATE,
    })
}
