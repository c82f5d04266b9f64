//! What went wrong, in the shape in which OpenAI's clients read it.

use std::fmt;
use std::time::Duration;

use actix_web::http::StatusCode;
use actix_web::http::header::{ALLOW, RETRY_AFTER, WWW_AUTHENTICATE};
use actix_web::{HttpResponse, ResponseError};
use serde_json::{Value, json};

/// The kind of whatever is wrong with a request itself.
const INVALID: &str = "invalid_request_error";

/// An answer that is an error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ApiError {
    status: StatusCode,
    kind: &'static str,
    code: Option<&'static str>,
    /// The field that is wrong.
    param: Option<String>,
    message: String,
    retry_after: Option<Duration>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        Self { status, kind, code: None, param: None, message: message.into(), retry_after: None }
    }

    /// A field has a value that it cannot have.
    pub(super) fn field(name: &str, why: impl fmt::Display) -> Self {
        let error = Self::new(StatusCode::BAD_REQUEST, INVALID, format!("`{name}` {why}"));
        Self { param: Some(name.to_owned()), ..error }
    }

    /// A field that this server does not follow: it is refused, since it would else be ignored.
    pub(super) fn unsupported(name: &str, why: impl fmt::Display) -> Self {
        Self { code: Some("unsupported_parameter"), ..Self::field(name, why) }
    }

    /// A field that nobody knows.
    pub(super) fn unknown_field(name: &str) -> Self {
        Self { code: Some("unknown_parameter"), ..Self::field(name, "is not a field of this request") }
    }

    /// A body that is not what it should be, as a whole.
    pub(super) fn body(why: impl fmt::Display) -> Self {
        Self::new(StatusCode::BAD_REQUEST, INVALID, format!("the body {why}"))
    }

    /// Prompt and answer do not fit.
    pub(super) fn too_long(message: String) -> Self {
        Self { code: Some("context_length_exceeded"), ..Self::new(StatusCode::BAD_REQUEST, INVALID, message) }
    }

    /// The body is larger than so many bytes.
    pub(super) fn too_large(limit: usize) -> Self {
        let message = format!("the body has more than the {limit} bytes that are taken");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, INVALID, message)
    }

    /// The body does not come.
    pub(super) fn slow(limit: Duration) -> Self {
        let message = format!("the body did not come within {} seconds", limit.as_secs());
        Self::new(StatusCode::REQUEST_TIMEOUT, INVALID, message)
    }

    /// The body is not said to be JSON.
    pub(super) fn not_json() -> Self {
        let message = "the Content-Type must be application/json";
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, INVALID, message)
    }

    /// No token, or a wrong one.
    pub(super) fn unauthorized() -> Self {
        let message = "this server asks for its token: send `Authorization: Bearer TOKEN`";
        Self { code: Some("invalid_api_key"), ..Self::new(StatusCode::UNAUTHORIZED, INVALID, message) }
    }

    /// A request that comes by way of somebody else's page.
    pub(super) fn forbidden(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, INVALID, message)
    }

    /// Nothing is there.
    pub(super) fn no_such_path(path: &str) -> Self {
        let message = format!(
            "there is no {path} here; /v1/chat/completions, /v1/completions, /v1/models and /health are served"
        );
        Self::new(StatusCode::NOT_FOUND, INVALID, message)
    }

    /// Something is there, and not for this method.
    pub(super) fn wrong_method(method: &str, path: &str) -> Self {
        Self::new(StatusCode::METHOD_NOT_ALLOWED, INVALID, format!("{path} has no {method}"))
    }

    /// A model that is not served.
    pub(super) fn no_such_model(name: &str, known: &[&str]) -> Self {
        let message = format!("there is no model `{name}` here; there are {}", known.join(", "));
        let error = Self::new(StatusCode::NOT_FOUND, INVALID, message);
        Self { code: Some("model_not_found"), param: Some("model".to_owned()), ..error }
    }

    /// Too many wait already.
    pub(super) fn busy(retry_after: Duration) -> Self {
        let message = "too many requests wait already; come again later";
        let error = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message);
        Self { code: Some("rate_limit_exceeded"), retry_after: Some(retry_after), ..error }
    }

    /// The server is about to end.
    pub(super) fn stopping() -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", "the server is being stopped")
    }

    /// Something failed that is not the request's fault.
    pub(super) fn failed(why: impl fmt::Display) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", why.to_string())
    }

    /// The body of the answer.
    pub(super) fn json(&self) -> Value {
        let Self { kind, code, param, message, .. } = self;
        json!({"error": {"message": message, "type": kind, "param": param, "code": code}})
    }
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl ResponseError for ApiError {
    fn status_code(&self) -> StatusCode {
        self.status
    }

    fn error_response(&self) -> HttpResponse {
        let mut response = HttpResponse::build(self.status);
        if let Some(after) = self.retry_after {
            response.insert_header((RETRY_AFTER, after.as_secs().max(1).to_string()));
        }
        match self.status {
            StatusCode::UNAUTHORIZED => drop(response.insert_header((WWW_AUTHENTICATE, "Bearer"))),
            StatusCode::METHOD_NOT_ALLOWED => drop(response.insert_header((ALLOW, "GET, POST"))),
            _ => {}
        }
        response.json(self.json())
    }
}
