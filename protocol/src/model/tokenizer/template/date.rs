//! The date that templates are told.

/// Python's `strftime` on the 26th of July 2024, midnight: the day that Llama 3's own template falls back to. What a
/// model is trained on must not depend on the day.
pub(super) fn strftime(format: &str) -> String {
    let mut out = String::new();
    let mut chars = format.chars().peekable();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        // glibc's flag for numbers without padding.
        let bare = chars.next_if_eq(&'-').is_some();
        let number =
            |padded: &str| if bare { padded.trim_start_matches(['0', ' ']).to_owned() } else { padded.to_owned() };
        let written = match chars.next() {
            Some('d') => number("26"),
            Some('e') => number("26"),
            Some('m') => number("07"),
            Some('b' | 'h') => "Jul".to_owned(),
            Some('B') => "July".to_owned(),
            Some('y') => number("24"),
            Some('Y' | 'G') => "2024".to_owned(),
            Some('a') => "Fri".to_owned(),
            Some('A') => "Friday".to_owned(),
            Some('j') => number("208"),
            Some('u' | 'w') => "5".to_owned(),
            Some('U') => number("29"),
            Some('V' | 'W') => number("30"),
            Some('H' | 'M' | 'S') if bare => "0".to_owned(),
            Some('H' | 'M' | 'S') => "00".to_owned(),
            Some('I') => number("12"),
            Some('f') => "000000".to_owned(),
            Some('p') => "AM".to_owned(),
            Some('F') => "2024-07-26".to_owned(),
            Some('D' | 'x') => "07/26/24".to_owned(),
            Some('T' | 'X') => "00:00:00".to_owned(),
            Some('R') => "00:00".to_owned(),
            Some('c') => "Fri Jul 26 00:00:00 2024".to_owned(),
            // A time without a zone has neither.
            Some('z' | 'Z') => String::new(),
            Some('n') => "\n".to_owned(),
            Some('t') => "\t".to_owned(),
            Some('%') => "%".to_owned(),
            Some(other) => format!("%{}{other}", if bare { "-" } else { "" }),
            None => format!("%{}", if bare { "-" } else { "" }),
        };
        out.push_str(&written);
    }
    out
}
