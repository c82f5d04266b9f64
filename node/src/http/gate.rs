//! Who is let in.
//!
//! - Where the server has a token, everything but the page and `/health` is for those who send it.
//! - A name in `Host` that is not this server's is refused: somebody's page could else make a browser believe that its own
//!   name leads here (DNS rebinding). Numbers and `localhost` cannot be taken over that way.
//! - A request from another page, as `Origin` says, is refused, and no page is told that it may ask (CORS).
//! - A request with a body says that it is JSON, which a page of another origin cannot without being allowed to.

use std::net::IpAddr;

use actix_web::dev::RequestHead;
use actix_web::http::Method;
use actix_web::http::header::{AUTHORIZATION, CONTENT_TYPE, HOST, HeaderMap, HeaderName, ORIGIN};

use super::error::ApiError;

/// The shortest token: whoever may ask tries as many as it likes.
const SHORTEST_TOKEN: usize = 16;

/// Paths that need no token.
const OPEN: [&str; 2] = ["/", "/health"];

/// A token of which only a digest is kept. Comparing digests takes the same time whatever differs.
pub(crate) struct Token(blake3::Hash);

impl Token {
    /// # Errors
    /// When it is too short, or cannot stand in a header.
    pub(crate) fn new(text: &str) -> Result<Self, String> {
        if text.len() < SHORTEST_TOKEN {
            return Err(format!("has {} characters, and must have at least {SHORTEST_TOKEN}", text.len()));
        }
        if !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err("has characters that a header cannot carry: take letters, digits and signs".to_owned());
        }
        Ok(Self(blake3::hash(text.as_bytes())))
    }

    fn is(&self, sent: &[u8]) -> bool {
        self.0 == blake3::hash(sent)
    }
}

/// What is asked of every request.
pub(crate) struct Gate {
    pub(crate) token: Option<Token>,
    /// Names that this server goes by, besides `localhost`.
    pub(crate) names: Vec<String>,
}

impl Gate {
    /// Whether a request may come in.
    ///
    /// # Errors
    /// Why it may not.
    pub(super) fn check(&self, head: &RequestHead) -> Result<(), ApiError> {
        let host = only(&head.headers, &HOST)?.ok_or_else(|| ApiError::forbidden("there is no Host header"))?;
        if !self.knows(host) {
            let why = format!(
                "this server does not go by the name of `{}`; node serve --name NAME gives it one",
                host.escape_debug()
            );
            return Err(ApiError::forbidden(why));
        }
        if let Some(origin) = only(&head.headers, &ORIGIN)? {
            let same = origin.strip_prefix("http://").or_else(|| origin.strip_prefix("https://")) == Some(host);
            if !same {
                return Err(ApiError::forbidden("requests from pages of other origins are not answered"));
            }
        }
        // What is open is named, and not what is closed: the router decodes a path, so that it can be spelled in many ways.
        if OPEN.contains(&head.uri.path()) {
            return Ok(());
        }
        if let Some(token) = &self.token {
            let sent = only(&head.headers, &AUTHORIZATION)?.and_then(bearer);
            if !sent.is_some_and(|sent| token.is(sent.as_bytes())) {
                return Err(ApiError::unauthorized());
            }
        }
        if head.method == Method::POST && !is_json(&head.headers) {
            return Err(ApiError::not_json());
        }
        Ok(())
    }

    fn knows(&self, host: &str) -> bool {
        let name = match host.rsplit_once(':') {
            Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) && !name.is_empty() => name,
            _ => host,
        };
        let number = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
        let name = name.strip_suffix('.').unwrap_or(name);
        number.parse::<IpAddr>().is_ok()
            || name.eq_ignore_ascii_case("localhost")
            || self.names.iter().any(|known| name.eq_ignore_ascii_case(known))
    }
}

/// A header that may be there once.
fn only<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Result<Option<&'a str>, ApiError> {
    let mut all = headers.get_all(name);
    let (first, second) = (all.next(), all.next());
    let wrong = || ApiError::forbidden(format!("the header `{name}` is not one text"));
    match (first, second) {
        (None, _) => Ok(None),
        (Some(one), None) => one.to_str().map(Some).map_err(|_| wrong()),
        _ => Err(wrong()),
    }
}

fn bearer(header: &str) -> Option<&str> {
    let (scheme, token) = header.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

fn is_json(headers: &HeaderMap) -> bool {
    let kind = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    kind.split(';').next().is_some_and(|kind| kind.trim().eq_ignore_ascii_case("application/json"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use actix_web::ResponseError as _;
    use actix_web::test::TestRequest;

    use super::*;

    const TOKEN: &str = "a-token-of-some-length";

    fn gate(token: bool) -> Gate {
        Gate { token: token.then(|| Token::new(TOKEN).unwrap()), names: vec!["velum.lan".into()] }
    }

    /// The status that a request gets; 200 if it comes in.
    fn status(gate: &Gate, path: &str, headers: &[(&str, &str)]) -> u16 {
        let mut request = TestRequest::get().uri(path);
        for &header in headers {
            request = request.append_header(header);
        }
        let request = request.to_http_request();
        let head = request.head();
        gate.check(head).map_or_else(|error| error.status_code().as_u16(), |()| 200)
    }

    #[test]
    fn only_the_token_itself_is_let_in() {
        let gate = gate(true);
        let of = |header: &str| status(&gate, "/v1/models", &[("Host", "localhost"), ("Authorization", header)]);
        assert_eq!(of(&format!("Bearer {TOKEN}")), 200);
        assert_eq!(of(&format!("bearer {TOKEN}")), 200);
        for wrong in
            ["Bearer", "Bearer ", "Bearer a-token-of-some-lengt", &format!("Bearer {TOKEN}x"), TOKEN, "Basic x"]
        {
            assert_eq!(of(wrong), 401, "{wrong}");
        }
        assert_eq!(status(&gate, "/v1/models", &[("Host", "localhost")]), 401);
        assert_eq!(status(&gate, "/health", &[("Host", "localhost")]), 200);
        // As the router reads them, these are `/v1/…` too.
        for path in ["/%761/models", "/v%31/models", "/%76%31/chat/completions", "//v1/models"] {
            assert_eq!(status(&gate, path, &[("Host", "localhost")]), 401, "{path}");
        }
        let twice = [("Host", "localhost"), ("Authorization", "Bearer x"), ("Authorization", "Bearer y")];
        assert_eq!(status(&gate, "/v1/models", &twice), 403);
        for (token, said) in [("short", "at least 16"), ("sixteen characters with spaces", "a header")] {
            assert!(Token::new(token).map(|_| ()).unwrap_err().contains(said), "{token}");
        }
    }

    #[test]
    fn names_that_lead_elsewhere_and_foreign_pages_are_refused() {
        let gate = gate(false);
        for host in ["localhost", "LocalHost:8080", "127.0.0.1:8080", "[::1]:8080", "192.0.2.7", "velum.lan:80"] {
            assert_eq!(status(&gate, "/", &[("Host", host)]), 200, "{host}");
        }
        for host in ["evil.example", "evil.example:8080", "localhost.evil.example", "", "velum.lan.evil", "127.0.0.1.x"]
        {
            assert_eq!(status(&gate, "/", &[("Host", host)]), 403, "{host}");
        }
        assert_eq!(status(&gate, "/", &[]), 403);
        let from = |origin: &str| status(&gate, "/v1/models", &[("Host", "localhost:8080"), ("Origin", origin)]);
        assert_eq!(from("http://localhost:8080"), 200);
        for origin in ["null", "http://localhost:8081", "https://evil.example", "http://localhost:8080.evil.example"] {
            assert_eq!(from(origin), 403, "{origin}");
        }
    }

    #[test]
    fn bodies_are_json() {
        let gate = gate(false);
        let of = |kind: Option<&str>| {
            let mut request = TestRequest::post().uri("/v1/completions").append_header(("Host", "localhost"));
            if let Some(kind) = kind {
                request = request.append_header(("Content-Type", kind));
            }
            gate.check(request.to_http_request().head()).is_ok()
        };
        assert!(of(Some("application/json")) && of(Some("Application/JSON; charset=utf-8")));
        assert!(!of(Some("text/plain")) && !of(Some("application/jsonp")) && !of(None));
    }
}
