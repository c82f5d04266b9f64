//! Server-sent events: the stream that an answer comes as.

use actix_web::web::Bytes;
use serde_json::Value;

/// An event with JSON in it, which has no line breaks of its own.
pub(super) fn event(json: &Value) -> Bytes {
    Bytes::from(format!("data: {json}\n\n"))
}

/// The end of a stream, by which clients know that nothing is missing.
pub(super) fn done() -> Bytes {
    Bytes::from_static(b"data: [DONE]\n\n")
}

/// A line that clients skip: keeps what lies between alive while nothing is said, and finds out whether anybody listens.
pub(super) fn comment() -> Bytes {
    Bytes::from_static(b": waiting\n\n")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_event_is_one_line_of_data_whatever_is_in_it() {
        let bytes = event(&json!({"text": "a\n\ndata: [DONE]\r\nb\u{2028}"}));
        let lines: Vec<&[u8]> = bytes.split(|&byte| byte == b'\n').collect();
        assert_eq!(lines.len(), 3);
        assert!(lines[0].starts_with(b"data: {") && lines[1..].iter().all(|line| line.is_empty()));
        assert!(!lines[0].contains(&b'\r'));
    }
}
