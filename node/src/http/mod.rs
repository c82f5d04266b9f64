//! The tuned model over HTTP: `/v1/chat/completions`, `/v1/completions` and `/v1/models` as OpenAI's clients know them,
//! `/health`, and at `/` a page to chat with it.
//!
//! 1. `gate` says who is let in;
//! 2. `request` reads what is asked for, strictly, from `fields`;
//! 3. `asked` looks up the model, writes the conversation, encodes it and hands it to the engine;
//! 4. `choices` follows what the engine writes, `answer` gives it the shape that clients read, `stream` sends it piece by
//!    piece as `events`;
//! 5. `error` is what they read where it does not work; `page` is the page.

mod answer;
mod asked;
mod choices;
mod error;
mod events;
mod fields;
mod gate;
mod page;
mod pieces;
mod request;
mod routes;
mod served;
mod stream;

use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use actix_web::dev::{Server, ServerHandle};
use actix_web::middleware::{DefaultHeaders, from_fn};
use actix_web::{App, HttpServer, web};
use anyhow::Context as _;

pub(crate) use self::gate::{Gate, Token};
use self::served::Served;
pub(crate) use self::served::{Limits, Models};

/// Threads that read and write sockets; the models have their own.
const THREADS: usize = 2;
/// Connections of each of them.
const CONNECTIONS: usize = 128;
/// Time for the head of a request to come.
const HEAD_TIME: Duration = Duration::from_secs(10);
/// Time that a connection may do nothing between two requests.
const IDLE_TIME: Duration = Duration::from_secs(30);
/// Time that a connection has to be closed properly.
const CLOSE_TIME: Duration = Duration::from_secs(2);

/// A server under way.
pub(crate) struct Http {
    served: Arc<Served>,
    handle: ServerHandle,
}

impl Http {
    /// Serves on a socket that listens; the future has to be polled for anything to happen, and ends when the server has.
    ///
    /// # Errors
    /// When the socket cannot be used.
    pub(crate) fn start(
        listener: TcpListener,
        models: Models,
        gate: Gate,
        limits: Limits,
    ) -> anyhow::Result<(Self, Server)> {
        let number = actors::data::fresh_seed().context("no randomness from the operating system")?;
        let served = Arc::new(Served::new(models, gate, limits, number));
        let state = web::Data::from(Arc::clone(&served));
        let app = move || {
            let headers = DefaultHeaders::new()
                .add(("X-Content-Type-Options", "nosniff"))
                .add(("Referrer-Policy", "no-referrer"))
                .add(("Cross-Origin-Resource-Policy", "same-origin"))
                .add(("Cache-Control", "no-store"));
            App::new().app_data(state.clone()).wrap(from_fn(routes::guarded)).wrap(headers).configure(routes::configure)
        };
        let server = HttpServer::new(app)
            .workers(THREADS)
            .max_connections(CONNECTIONS)
            .keep_alive(IDLE_TIME)
            .client_request_timeout(HEAD_TIME)
            .client_disconnect_timeout(CLOSE_TIME)
            .shutdown_timeout(limits.grace.as_secs())
            .disable_signals()
            // Whoever stops sending has left: its answer is not written on.
            .h1_allow_half_closed(false)
            .on_connect(move |connection, data| {
                if let Some(stream) = connection.downcast_ref::<actix_web::rt::net::TcpStream>() {
                    close_when_stuck(stream, limits.patience);
                    if let Ok(socket) = socket2::SockRef::from(stream).try_clone() {
                        data.insert(Connection(Arc::new(socket)));
                    }
                }
            })
            .listen(listener)
            .context("the server cannot listen")?
            .run();
        let handle = server.handle();
        Ok((Self { served, handle }, server))
    }

    /// Takes no more requests, and gives answers under way their time to end.
    pub(crate) async fn drain(&self) {
        self.served.stop();
        self.handle.stop(true).await;
    }

    /// Ends at once.
    pub(crate) async fn abort(&self) {
        self.served.stop();
        self.handle.stop(false).await;
    }
}

/// A connection, for whoever has to end it.
#[derive(Clone)]
struct Connection(Arc<socket2::Socket>);

impl Connection {
    /// Ends it once what was answered had time to arrive: a client whose request is refused may have more of it to send, and
    /// would else keep its place for as long as it likes.
    fn end_soon(self) {
        drop(actix_web::rt::spawn(async move {
            tokio::time::sleep(CLOSE_TIME).await;
            // It may have ended by itself.
            let _ = self.0.shutdown(std::net::Shutdown::Both);
        }));
    }
}

/// Has the system close a connection whose other end takes nothing for too long, so that it does not occupy a place.
fn close_when_stuck(stream: &actix_web::rt::net::TcpStream, patience: Duration) {
    #[cfg(target_os = "linux")]
    if let Err(error) = socket2::SockRef::from(stream).set_tcp_user_timeout(Some(patience)) {
        tracing::debug!("a connection that is stuck will not be closed: {error}");
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (stream, patience);
}
