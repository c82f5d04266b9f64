//! The page at `/`: one file, with all that it needs in it, and nothing that it fetches from elsewhere.

use std::sync::LazyLock;

use actix_web::HttpResponse;
use actix_web::http::header::{CONTENT_SECURITY_POLICY, CONTENT_TYPE};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest as _, Sha256};

/// The page.
const PAGE: &str = include_str!("page.html");

/// What the page may do: run its own script and style, which are named by what they are, and ask this server.
static POLICY: LazyLock<String> = LazyLock::new(|| {
    let hash = |tag: &str| format!("'sha256-{}'", STANDARD.encode(Sha256::digest(inside(tag))));
    format!(
        "default-src 'none'; script-src {}; style-src {}; img-src data:; connect-src 'self'; base-uri 'none'; \
         form-action 'none'; frame-ancestors 'none'",
        hash("script"),
        hash("style")
    )
});

/// What stands in the page's only element of this name.
fn inside(tag: &str) -> &'static str {
    let (open, close) = (format!("<{tag}>"), format!("</{tag}>"));
    let start = PAGE.find(&open).map_or(0, |at| at + open.len());
    let length = PAGE[start..].find(&close).unwrap_or(0);
    &PAGE[start..start + length]
}

/// Sends the page.
pub(super) async fn page() -> HttpResponse {
    HttpResponse::Ok()
        .insert_header((CONTENT_TYPE, "text/html; charset=utf-8"))
        .insert_header((CONTENT_SECURITY_POLICY, POLICY.as_str()))
        .body(PAGE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_is_one_script_and_one_style_and_asks_nobody_else() {
        for tag in ["script", "style"] {
            assert_eq!(PAGE.matches(&format!("<{tag}")).count(), 1, "{tag}");
            assert!(inside(tag).len() > 100, "{tag}");
        }
        for outside in ["http://", "https://", "//cdn", "@import", "style=", "onclick", "innerHTML", "eval("] {
            assert!(!PAGE.contains(outside), "{outside}");
        }
        assert!(POLICY.starts_with("default-src 'none'; script-src 'sha256-"));
    }
}
