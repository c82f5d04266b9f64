//! What a peer says of itself, made fit for a terminal and a log.
//!
//! A peer chooses the words of its refusals, its failures and its devices' names, and somebody prints them sooner or
//! later. Characters that steer a terminal (escape sequences, line ends), reorder a line (bidirectional marks) or are
//! invisible could have it show what the node never wrote, and a long text could bury what it did.

/// Most characters of a text: a sentence or two.
const LONGEST: usize = 300;

/// Stands for every character that is not shown.
const HIDDEN: char = '\u{fffd}';

/// The same text without characters that steer, and not too long.
pub fn printable(text: &str) -> String {
    text.chars().take(LONGEST).map(|c| if steers(c) { HIDDEN } else { c }).collect()
}

/// [`printable`], in place; costs nothing where the text is as it should be.
pub(super) fn make_printable(text: &mut String) {
    if text.chars().any(steers) || text.chars().nth(LONGEST).is_some() {
        *text = printable(text);
    }
}

/// Whether a character does anything else than stand where it is.
fn steers(c: char) -> bool {
    c.is_control()
        || matches!(c,
            // Soft hyphen, and marks of Arabic and Mongolian that are not seen.
            '\u{ad}' | '\u{61c}' | '\u{180e}'
            // Spaces of no width, joiners, marks of direction; ends of lines and paragraphs; embeddings and overrides.
            | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            // Invisible operators, isolates.
            | '\u{2060}'..='\u{206f}'
            // Byte order mark, annotations, tags.
            | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_peer_says_cannot_steer_the_terminal() {
        for harmless in ["cpu (avx2)", "Gerät 1 — größer", "显卡 0", ""] {
            assert_eq!(printable(harmless), harmless);
        }
        assert_eq!(printable("\u{1b}[2Jcpu\r\n\u{9b}1m"), "\u{fffd}[2Jcpu\u{fffd}\u{fffd}\u{fffd}1m");
        assert_eq!(printable("a\u{202e}txt.exe"), "a\u{fffd}txt.exe");
        let mut long = "ä".repeat(100_000);
        make_printable(&mut long);
        assert_eq!(long, "ä".repeat(300));
    }
}
