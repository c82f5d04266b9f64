//! A client of a server under test: one request a connection, written and read byte by byte, so that a test can also do what no
//! library would.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use serde_json::Value;

use crate::Node;

/// Longer than any answer of a small model takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// An answer.
#[derive(Clone, Debug)]
pub struct Response {
    /// Its status.
    pub status: u16,
    /// Its headers, with their names in small letters.
    pub headers: Vec<(String, String)>,
    /// Its body, as far as it came.
    pub body: String,
}

impl Response {
    /// The body, as JSON.
    ///
    /// # Panics
    /// When it is none.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// A header.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// The events of a stream that came to its end, as JSON.
    ///
    /// # Panics
    /// When it did not, or an event is no JSON.
    pub fn events(&self) -> Vec<Value> {
        assert_eq!(self.header("content-type"), Some("text/event-stream; charset=utf-8"), "{self:?}");
        let mut data: Vec<&str> = self.body.split("\n\n").filter_map(|event| event.strip_prefix("data: ")).collect();
        assert_eq!(data.pop(), Some("[DONE]"), "{self:?}");
        data.into_iter().map(|event| serde_json::from_str(event).expect("an event is JSON")).collect()
    }
}

/// Where a server listens.
#[derive(Clone, Debug)]
pub struct Client {
    address: SocketAddr,
    /// Headers of every request.
    headers: Vec<(String, String)>,
}

impl Client {
    /// Waits for a `node serve` to say where it serves.
    ///
    /// # Panics
    /// When it does not.
    pub fn of(node: &mut Node) -> Self {
        let url = node.expect_line("serving on ");
        let address =
            url.trim_start_matches("http://").trim_end_matches('/').parse().expect("a server says its address");
        Self { address, headers: Vec::new() }
    }

    /// The same with one more header in every request.
    #[must_use]
    pub fn with(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    /// A connection on which nothing was said yet.
    ///
    /// # Panics
    /// When there is none to be had.
    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).expect("the server listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("a socket takes a time-out");
        stream
    }

    /// A request as it is written, its connection to be closed after the answer.
    pub fn request(&self, method: &str, path: &str, body: Option<&str>) -> Vec<u8> {
        let mut head = format!("{method} {path} HTTP/1.1\r\nConnection: close\r\n");
        if self.headers.iter().all(|(name, _)| name != "Host") {
            head.push_str(&format!("Host: {}\r\n", self.address));
        }
        for (name, value) in &self.headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        if let Some(body) = body {
            if self.headers.iter().all(|(name, _)| name != "Content-Type") {
                head.push_str("Content-Type: application/json\r\n");
            }
            head.push_str(&format!("Content-Length: {}\r\n", body.len()));
        }
        (head + "\r\n" + body.unwrap_or_default()).into_bytes()
    }

    /// Sends bytes and reads all that comes.
    ///
    /// # Panics
    /// When what comes is no answer.
    pub fn raw(&self, bytes: &[u8]) -> Response {
        let mut stream = self.connect();
        // A server that refuses a request need not read all of it.
        let _ = stream.write_all(bytes);
        read(stream)
    }

    /// Asks for a path.
    ///
    /// # Panics
    /// When there is no answer.
    pub fn get(&self, path: &str) -> Response {
        self.raw(&self.request("GET", path, None))
    }

    /// Sends JSON.
    ///
    /// # Panics
    /// When there is no answer.
    pub fn post(&self, path: &str, json: &Value) -> Response {
        self.raw(&self.request("POST", path, Some(&json.to_string())))
    }

    /// Sends JSON, and reads the beginning of the answer, up to some text in it.
    ///
    /// # Panics
    /// When it does not come.
    pub fn begin(&self, path: &str, json: &Value, until: &str) -> TcpStream {
        let mut stream = self.connect();
        stream.write_all(&self.request("POST", path, Some(&json.to_string()))).expect("the server reads");
        let (mut all, mut some) = (Vec::new(), [0; 1024]);
        while !String::from_utf8_lossy(&all).contains(until) {
            let count = stream.read(&mut some).expect("the server answers");
            assert!(count > 0, "the answer ended: {}", String::from_utf8_lossy(&all));
            all.extend_from_slice(&some[..count]);
        }
        stream
    }
}

/// Reads a connection to its end.
///
/// # Panics
/// When what comes is no answer.
pub fn read(mut stream: TcpStream) -> Response {
    let mut all = Vec::new();
    // One that is reset has said what it had to say.
    let _ = stream.read_to_end(&mut all);
    let end = all.windows(4).position(|bytes| bytes == b"\r\n\r\n");
    let end = end.unwrap_or_else(|| panic!("no answer, but {:?}", String::from_utf8_lossy(&all)));
    let head = String::from_utf8_lossy(&all[..end]).into_owned();
    let mut lines = head.lines();
    let status = lines.next().and_then(|line| line.split(' ').nth(1)?.parse().ok()).expect("an answer has a status");
    let header = |line: &str| line.split_once(':').map(|(name, value)| (name.to_lowercase(), value.trim().to_owned()));
    let headers: Vec<(String, String)> = lines.filter_map(header).collect();
    let mut body = all[end + 4..].to_vec();
    if headers.iter().any(|(name, value)| name == "transfer-encoding" && value == "chunked") {
        body = unchunked(&body);
    }
    Response { status, headers, body: String::from_utf8_lossy(&body).into_owned() }
}

/// A body without the lengths of its chunks.
fn unchunked(mut bytes: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    while let Some(line) = bytes.windows(2).position(|two| two == b"\r\n") {
        let length = usize::from_str_radix(&String::from_utf8_lossy(&bytes[..line]), 16).unwrap_or(0);
        bytes = &bytes[line + 2..];
        if length == 0 {
            break;
        }
        body.extend_from_slice(&bytes[..length.min(bytes.len())]);
        bytes = &bytes[(length + 2).min(bytes.len())..];
    }
    body
}
