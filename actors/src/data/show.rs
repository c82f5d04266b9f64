//! An example as people read it.

use protocol::model::{ModelError, TextTokenizer};

use super::Example;

/// What stands before and behind what is learnt.
const MARKS: [&str; 2] = ["⟦", "⟧"];

/// The text of an example, what is learnt of it between ⟦ and ⟧.
///
/// # Errors
/// [`ModelError::Tokenizer`] when a token is not one of the model's.
pub fn marked(example: &Example, tokenizer: &TextTokenizer) -> Result<String, ModelError> {
    let mut out = String::new();
    let (mut shown, mut start) = (String::new(), 0);
    while start < example.tokens.len() {
        let learnt = example.learnt[start];
        let run = example.learnt[start..].iter().take_while(|&&other| other == learnt).count();
        let end = start + run;
        // Words are decoded with what stands before them, which their white space may depend on.
        let upto = tokenizer.decode(&example.tokens[..end])?;
        let piece = match upto.strip_prefix(shown.as_str()) {
            Some(piece) => piece.to_owned(),
            None => tokenizer.decode(&example.tokens[start..end])?,
        };
        out.push_str(if learnt { MARKS[0] } else { "" });
        out.push_str(&piece);
        out.push_str(if learnt { MARKS[1] } else { "" });
        (shown, start) = (upto, end);
    }
    Ok(out)
}
