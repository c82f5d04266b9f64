//! What transformers' Jinja understands and minijinja does not, written so that minijinja does.
//!
//! Two things are rewritten in the source of a template, and nothing else is touched:
//! - `{% generation %} … {% endgeneration %}`, the tag in which a template says what the model itself writes, becomes a
//!   filter block, which keeps white space control and scopes as they are;
//! - `a % b`, which on a text is Python's formatting and not a remainder, becomes a filter that does either.
//!
//! For that the source is cut into tokens as Jinja cuts it: comments and raw blocks are left alone, and the end of a tag
//! does not count inside of brackets and strings.

/// Name of the filter that marks what the model writes.
pub(super) const GENERATION: &str = "_generation";
/// Name of the filter that is Python's `%`.
pub(super) const PERCENT: &str = "_percent";

/// A template's source for minijinja, and whether it has generation tags.
pub(super) fn adapt(source: &str) -> (String, bool) {
    let mut out = String::with_capacity(source.len() + 64);
    let mut generation = false;
    let mut at = 0;
    while let Some(start) = next_tag(source, at) {
        out.push_str(&source[at..start]);
        let rest = &source[start..];
        if rest.starts_with("{#") {
            let end = rest.find("#}").map_or(rest.len(), |end| end + 2);
            out.push_str(&rest[..end]);
            at = start + end;
            continue;
        }
        let block = rest.starts_with("{%");
        // White space control belongs to the beginning of the tag.
        let first = start + 2 + usize::from(rest[2..].starts_with(['-', '+']));
        let (tokens, inner, end) = cut(source, first, if block { "%}" } else { "}}" });
        at = end;
        match tokens.first().filter(|_| block).map(|token| &source[token.start..token.end]) {
            Some("raw") => {
                at = end_of_raw(source, end);
                out.push_str(&source[start..at]);
            }
            Some(word @ ("generation" | "endgeneration")) if tokens.len() == 1 => {
                generation = true;
                out.push_str(&source[start..tokens[0].start]);
                out.push_str(if word == "generation" { "filter " } else { "endfilter" });
                if word == "generation" {
                    out.push_str(GENERATION);
                }
                out.push_str(&source[tokens[0].end..end]);
            }
            _ => {
                out.push_str(&source[start..first]);
                percent(source, &tokens, first..inner, &mut out);
                out.push_str(&source[inner..end]);
            }
        }
    }
    out.push_str(&source[at..]);
    (out, generation)
}

fn next_tag(source: &str, from: usize) -> Option<usize> {
    let mut at = from;
    loop {
        at += source[at..].find('{')?;
        if matches!(source.as_bytes().get(at + 1), Some(b'{' | b'%' | b'#')) {
            return Some(at);
        }
        at += 1;
    }
}

/// Behind the tag that ends a raw block which begins before `from`.
fn end_of_raw(source: &str, from: usize) -> usize {
    let mut at = from;
    while let Some(start) = source[at..].find("{%").map(|start| at + start) {
        let inner = source[start + 2..].trim_start_matches(['-', '+']).trim_start();
        if let Some(rest) = inner.strip_prefix("endraw") {
            return rest.find("%}").map_or(source.len(), |end| source.len() - rest.len() + end + 2);
        }
        at = start + 2;
    }
    source.len()
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// A string or a number.
    Literal,
    Name,
    Operator,
    Open,
    Close,
}

struct Token {
    kind: Kind,
    start: usize,
    end: usize,
}

/// The tokens from `at` to the mark that closes the tag, where the inner part ends, and where the tag does.
fn cut(source: &str, at: usize, close: &str) -> (Vec<Token>, usize, usize) {
    let bytes = source.as_bytes();
    let (mut tokens, mut depth, mut i) = (Vec::new(), 0usize, at);
    while i < bytes.len() {
        let rest = &source[i..];
        if depth == 0 {
            if rest.starts_with(close) {
                return (tokens, i, i + 2);
            }
            // White space control belongs to the end of the tag.
            if matches!(bytes[i], b'-' | b'+') && rest[1..].starts_with(close) {
                return (tokens, i, i + 3);
            }
        }
        let c = rest.chars().next().expect("i is within the text");
        let (kind, length) = match c {
            c if c.is_whitespace() => {
                i += c.len_utf8();
                continue;
            }
            '"' | '\'' => (Kind::Literal, string_length(rest, c)),
            '0'..='9' => {
                // A dot belongs to a number where a digit follows it.
                let number = |(k, c): (usize, char)| {
                    let follows = || rest[k + 1..].starts_with(|d: char| d.is_ascii_digit());
                    !(c.is_alphanumeric() || c == '_' || c == '.' && follows())
                };
                (Kind::Literal, rest.char_indices().find(|&c| number(c)).map_or(rest.len(), |(k, _)| k))
            }
            c if c.is_alphabetic() || c == '_' => {
                let end = rest.find(|c: char| !(c.is_alphanumeric() || c == '_'));
                (Kind::Name, end.unwrap_or(rest.len()))
            }
            '(' | '[' | '{' => {
                depth += 1;
                (Kind::Open, 1)
            }
            ')' | ']' | '}' => {
                depth = depth.saturating_sub(1);
                (Kind::Close, 1)
            }
            _ if ["**", "//", "==", "!=", "<=", ">="].iter().any(|two| rest.starts_with(two)) => (Kind::Operator, 2),
            c => (Kind::Operator, c.len_utf8()),
        };
        tokens.push(Token { kind, start: i, end: i + length });
        i += length;
    }
    (tokens, source.len(), source.len())
}

/// Bytes of the string that `rest` begins with, its quotes included.
fn string_length(rest: &str, quote: char) -> usize {
    let mut escaped = false;
    for (k, c) in rest.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            c if c == quote => return k + 1,
            _ => {}
        }
    }
    rest.len()
}

/// Words that stand between operands, or before one.
const WORDS: [&str; 21] = [
    "if",
    "else",
    "elif",
    "and",
    "or",
    "not",
    "in",
    "is",
    "for",
    "set",
    "recursive",
    "with",
    "without",
    "macro",
    "call",
    "filter",
    "block",
    "do",
    "include",
    "import",
    "as",
];

/// Copies the expressions of a tag, every `%` of them as a filter.
///
/// `a * b % c` is `(a * b) % c`, so that the filter takes the whole chain of factors to its left, and one operand, with
/// its own attributes, calls and filters, to its right.
fn percent(source: &str, tokens: &[Token], inner: std::ops::Range<usize>, out: &mut String) {
    let text = |token: &Token| &source[token.start..token.end];
    if !tokens.iter().any(|token| text(token) == "%") {
        out.push_str(&source[inner]);
        return;
    }
    // What is put before byte `.0`, and how many bytes of the source it replaces.
    let mut edits: Vec<(usize, usize, &str)> = Vec::new();
    // For each open bracket, where the chain of factors under way begins.
    let mut chains: Vec<Option<usize>> = vec![None];
    let mut expecting = true;
    let mut i = 0;
    while i < tokens.len() {
        let token = &tokens[i];
        let chain = chains.last_mut().expect("there is always the outermost one");
        match (token.kind, text(token)) {
            (Kind::Name, word) if WORDS.contains(&word) => {
                *chain = None;
                expecting = true;
            }
            (Kind::Literal | Kind::Name, _) => {
                if expecting {
                    chain.get_or_insert(token.start);
                } else {
                    *chain = Some(token.start);
                }
                expecting = false;
            }
            (Kind::Open, _) => {
                if expecting {
                    chain.get_or_insert(token.start);
                }
                chains.push(None);
                expecting = true;
            }
            (Kind::Close, _) => {
                if chains.len() > 1 {
                    chains.pop();
                }
                expecting = false;
            }
            // The name behind it is no operand.
            (Kind::Operator, "." | "|") => i += 1,
            (Kind::Operator, "-" | "+") if expecting => {
                chain.get_or_insert(token.start);
            }
            (Kind::Operator, "%") => {
                if let Some(start) = *chain {
                    let end = operand(source, tokens, i + 1);
                    edits.push((start, 0, "("));
                    if is_tuple(source, tokens, i + 1, end) {
                        edits.push((token.start, 1, ")|_percent"));
                    } else {
                        edits.push((token.start, 1, ")|_percent("));
                        edits.push((tokens[end - 1].end, 0, ")"));
                    }
                }
                expecting = true;
            }
            (Kind::Operator, "*" | "/" | "//" | "**") => expecting = true,
            (Kind::Operator, _) => {
                *chain = None;
                expecting = true;
            }
        }
        i += 1;
    }
    edits.sort_by_key(|&(at, ..)| at);
    let mut at = inner.start;
    for (place, skipped, new) in edits {
        out.push_str(&source[at..place]);
        out.push_str(new);
        at = place + skipped;
    }
    out.push_str(&source[at..inner.end]);
}

/// Behind the operand that begins with token `i`: a sign, a value, and what is asked of it.
fn operand(source: &str, tokens: &[Token], mut i: usize) -> usize {
    let text = |i: usize| tokens.get(i).map(|token: &Token| &source[token.start..token.end]);
    let kind = |i: usize| tokens.get(i).map(|token| token.kind);
    while matches!(text(i), Some("-" | "+")) {
        i += 1;
    }
    i = if kind(i) == Some(Kind::Open) { closing(tokens, i) } else { i + 1 };
    loop {
        match (kind(i), text(i)) {
            (_, Some("." | "|")) => i += 2,
            (_, Some("**")) => i = operand(source, tokens, i + 1),
            (Some(Kind::Open), Some("(" | "[")) => i = closing(tokens, i),
            _ => return i.min(tokens.len()),
        }
    }
}

/// Behind the bracket that closes the one at token `i`.
fn closing(tokens: &[Token], i: usize) -> usize {
    let mut depth = 0usize;
    for (k, token) in tokens.iter().enumerate().skip(i) {
        match token.kind {
            Kind::Open => depth += 1,
            Kind::Close => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth == 0 {
            return k + 1;
        }
    }
    tokens.len()
}

/// Whether the operand is a tuple, whose members are what is to be formatted.
fn is_tuple(source: &str, tokens: &[Token], start: usize, end: usize) -> bool {
    let text = |token: &Token| &source[token.start..token.end];
    if tokens.get(start).is_none_or(|token| text(token) != "(") || closing(tokens, start) != end {
        return false;
    }
    let mut depth = 0usize;
    tokens[start..end].iter().any(|token| {
        match token.kind {
            Kind::Open => depth += 1,
            Kind::Close => depth = depth.saturating_sub(1),
            _ => {}
        }
        depth == 1 && text(token) == ","
    })
}

#[cfg(test)]
mod tests {
    use super::adapt;

    #[test]
    fn nothing_but_the_two_constructs_is_touched() {
        for source in [
            "{% if loop.index0 is odd %}50% {{ x }}{% endif %}{# {% generation %} 3 % 4 #}",
            "{% raw %}{{ 3 % 4 }}{% generation %}{% endraw %}",
            "{{ '%}' ~ \"}}\" ~ {'a': {'b': 1}}['a'] }}%",
            "{{ unfinished",
        ] {
            assert_eq!(adapt(source), (source.to_owned(), false));
        }
    }

    #[test]
    fn generation_becomes_a_filter_block() {
        let (found, generation) = adapt("{%- generation -%}{{ x }}{%+ endgeneration %}");
        assert_eq!(found, "{%- filter _generation -%}{{ x }}{%+ endfilter %}");
        assert!(generation);
    }

    #[test]
    fn a_percent_sign_takes_the_factors_before_it_and_one_operand_behind() {
        for (source, expected) in [
            ("{{ '%s' % x }}", "{{ ('%s' )|_percent( x) }}"),
            ("{{ 1 + a * b % c + 2 }}", "{{ 1 + (a * b )|_percent( c) + 2 }}"),
            ("{{- a % b -}}", "{{- (a )|_percent( b) -}}"),
            ("{{ a % b % c }}", "{{ ((a )|_percent( b) )|_percent( c) }}"),
            ("{{ '%s%s' % (m.role, 2) ~ y }}", "{{ ('%s%s' )|_percent (m.role, 2) ~ y }}"),
            ("{{ f % m['a'].b(1)|upper }}", "{{ (f )|_percent( m['a'].b(1)|upper) }}"),
            ("{%- if not loop.index % 2 == 0 -%}", "{%- if not (loop.index )|_percent( 2) == 0 -%}"),
            ("{{ (x % 2) + g('%d' % 3) }}", "{{ ((x )|_percent( 2)) + g(('%d' )|_percent( 3)) }}"),
            ("{% set a = -n % 3 %}", "{% set a = (-n )|_percent( 3) %}"),
        ] {
            assert_eq!(adapt(source).0, expected);
        }
    }
}
