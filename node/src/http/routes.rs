//! What is served where.

use std::sync::Arc;

use actix_web::body::MessageBody;
use actix_web::dev::{ServiceRequest, ServiceResponse};
use actix_web::http::{ConnectionType, StatusCode};
use actix_web::middleware::Next;
use actix_web::{HttpRequest, HttpResponse, ResponseError as _, web};
use futures::StreamExt as _;
use serde_json::{Value, json};

use super::answer::Shape;
use super::asked::{encode, submit};
use super::choices::Choices;
use super::error::ApiError;
use super::pieces::Pieces;
use super::request::{Endpoint, Request};
use super::served::{Limits, Served, now};
use super::{Connection, page, stream};

type State = web::Data<Served>;

/// All paths.
pub(super) fn configure(app: &mut web::ServiceConfig) {
    let resource = |path: &str| web::resource(path).default_service(web::to(wrong_method));
    app.service(resource("/v1/chat/completions").route(web::post().to(chat)))
        .service(resource("/v1/completions").route(web::post().to(completions)))
        .service(resource("/v1/models").route(web::get().to(models)))
        .service(resource("/v1/models/{model:.*}").route(web::get().to(model)))
        .service(resource("/health").route(web::get().to(health)))
        .service(resource("/").route(web::get().to(page::page)))
        .default_service(web::to(nothing));
}

/// Lets in whom the gate lets in. A connection whose request was refused before all of it was read is ended.
pub(super) async fn guarded(
    state: State,
    request: ServiceRequest,
    next: Next<impl MessageBody + 'static>,
) -> Result<ServiceResponse<impl MessageBody>, actix_web::Error> {
    let connection = request.conn_data::<Connection>().cloned();
    let mut response = match state.gate.check(request.head()) {
        Ok(()) => next.call(request).await?.map_into_left_body(),
        Err(refusal) => request.into_response(refusal.error_response()).map_into_right_body(),
    };
    let status = response.status();
    let read = !status.is_client_error() || [StatusCode::BAD_REQUEST, StatusCode::TOO_MANY_REQUESTS].contains(&status);
    if !read {
        response.response_mut().head_mut().set_connection_type(ConnectionType::Close);
        connection.into_iter().for_each(Connection::end_soon);
    }
    Ok(response)
}

async fn chat(state: State, payload: web::Payload) -> Result<HttpResponse, ApiError> {
    answer(state, Endpoint::Chat, payload).await
}

async fn completions(state: State, payload: web::Payload) -> Result<HttpResponse, ApiError> {
    answer(state, Endpoint::Completions, payload).await
}

async fn answer(state: State, endpoint: Endpoint, payload: web::Payload) -> Result<HttpResponse, ApiError> {
    let served = state.into_inner();
    let body = body(payload, &served.limits).await?;
    let request = web::block(move || Request::read(endpoint, &body)).await.map_err(ApiError::failed)??;
    served.models.find(&request.model)?;
    let seats = served.seats(request.prompts.len() * request.choices)?;
    let (asking, encoding) = (Arc::new(request), Arc::clone(&served));
    let request = Arc::clone(&asking);
    // Long texts take a while, in which others are served.
    let prompts = web::block(move || encode(&encoding.models, &asking)).await.map_err(ApiError::failed)??;
    let adapter = served.models.find(&request.model)?;
    let asked = submit(&served.models, &request, adapter, prompts)?;
    let mut choices = Choices::new(&request, asked, seats);
    if request.stream {
        let request = Arc::clone(&request);
        let shape: stream::MakeShape = Box::new(move |served| shape(served, &request));
        return Ok(stream::response(served, shape, choices));
    }
    let whole = choices.all(&served.models).await?;
    let used = choices.used;
    // Each token's alternatives are spelled out.
    let told = web::block(move || shape(&served, &request).whole(&whole, used)).await.map_err(ApiError::failed)?;
    Ok(HttpResponse::Ok().json(told))
}

fn shape<'a>(served: &'a Served, request: &Request) -> Shape<'a> {
    let prefix = match request.endpoint {
        Endpoint::Chat => "chatcmpl",
        Endpoint::Completions => "cmpl",
    };
    Shape {
        endpoint: request.endpoint,
        id: served.answer_id(prefix),
        created: now(),
        model: request.model.clone(),
        logprobs: request.logprobs.is_some(),
        include_usage: request.include_usage,
        pieces: Pieces::new(served.models.engine.tokenizer()),
    }
}

/// The body, as large and as long as bodies may be.
async fn body(mut payload: web::Payload, limits: &Limits) -> Result<Vec<u8>, ApiError> {
    let read = async {
        let mut all = Vec::new();
        while let Some(bytes) = payload.next().await {
            let bytes = bytes.map_err(|error| ApiError::body(format_args!("cannot be read: {error}")))?;
            if all.len() + bytes.len() > limits.body_bytes {
                return Err(ApiError::too_large(limits.body_bytes));
            }
            all.extend_from_slice(&bytes);
        }
        Ok(all)
    };
    tokio::time::timeout(limits.body_time, read).await.unwrap_or_else(|_| Err(ApiError::slow(limits.body_time)))
}

async fn models(state: State) -> HttpResponse {
    let all: Vec<Value> = state.models.names().into_iter().map(|name| state.model_card(name)).collect();
    HttpResponse::Ok().json(json!({"object": "list", "data": all}))
}

async fn model(state: State, name: web::Path<String>) -> Result<HttpResponse, ApiError> {
    state.models.find(&name)?;
    Ok(HttpResponse::Ok().json(state.model_card(&name)))
}

async fn health() -> HttpResponse {
    HttpResponse::Ok().json(json!({"status": "ok"}))
}

async fn nothing(request: HttpRequest) -> Result<HttpResponse, ApiError> {
    Err(ApiError::no_such_path(request.path()))
}

async fn wrong_method(request: HttpRequest) -> Result<HttpResponse, ApiError> {
    Err(ApiError::wrong_method(request.method().as_str(), request.path()))
}
