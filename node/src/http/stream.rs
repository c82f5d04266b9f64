//! Answers that come as they are written.
//!
//! A task takes what the engine writes and hands it to the connection, a few pieces ahead of it. It ends, and with it the
//! answer, when the client has left, or reads nothing for too long.

use std::sync::Arc;
use std::time::Duration;

use actix_web::HttpResponse;
use actix_web::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use actix_web::web::Bytes;
use futures::stream;
use serde_json::Value;
use tokio::sync::mpsc;

use super::answer::Shape;
use super::choices::{Choices, Piece};
use super::events;
use super::served::Served;

/// Pieces that the connection may be behind.
const AHEAD: usize = 32;
/// Silence after which a comment is sent.
const SILENCE: Duration = Duration::from_secs(10);

/// What a shape is made of that a task can take along.
pub(super) type MakeShape = Box<dyn for<'a> FnOnce(&'a Served) -> Shape<'a> + Send>;

/// The answer to a request that asked for a stream.
pub(super) fn response(served: Arc<Served>, shape: MakeShape, choices: Choices) -> HttpResponse {
    let (pieces, received) = mpsc::channel(AHEAD);
    // It ends with the body, which holds the other end of the channel.
    drop(actix_web::rt::spawn(async move {
        let shape = shape(&served);
        let gone = write(&served, &shape, choices, &pieces).await.is_err();
        if gone {
            tracing::debug!(answer = shape.id, "the client left before its answer was complete");
        }
    }));
    let body = stream::unfold(received, |mut received: mpsc::Receiver<Bytes>| async move {
        let bytes = received.recv().await?;
        Some((Ok::<_, actix_web::Error>(bytes), received))
    });
    HttpResponse::Ok()
        .insert_header((CONTENT_TYPE, "text/event-stream; charset=utf-8"))
        .insert_header((CACHE_CONTROL, "no-store"))
        // Some proxies collect a body before they pass it on.
        .insert_header(("X-Accel-Buffering", "no"))
        .streaming(body)
}

/// Nobody listens.
struct Gone;

async fn write(served: &Served, shape: &Shape<'_>, mut choices: Choices, to: &mpsc::Sender<Bytes>) -> Result<(), Gone> {
    let patience = served.limits.patience;
    let send = |bytes: Bytes| async move {
        match tokio::time::timeout(patience, to.send(bytes)).await {
            Ok(Ok(())) => Ok(()),
            _ => Err(Gone),
        }
    };
    let json = |value: &Value| send(events::event(value));
    for choice in 0..choices.len() {
        if let Some(opening) = shape.opening(choice) {
            json(&opening).await?;
        }
    }
    let mut offsets = vec![0; choices.len()];
    loop {
        let piece = tokio::select! {
            biased;
            () = to.closed() => return Err(Gone),
            piece = choices.next(&served.models) => piece,
            () = tokio::time::sleep(SILENCE) => {
                send(events::comment()).await?;
                continue;
            }
        };
        match piece {
            None => break,
            Some(Ok(Piece { choice, mut part, reason })) => {
                part.offset = offsets[choice];
                offsets[choice] += shape.width(&part);
                json(&shape.piece(choice, &part, reason)).await?;
            }
            // The status was sent long ago; that nothing is complete shows by the missing end.
            Some(Err(error)) => return json(&error.json()).await,
        }
    }
    if shape.include_usage {
        json(&shape.usage(choices.used)).await?;
    }
    send(events::done()).await
}
