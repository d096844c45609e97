//! What the operator port of a tracker and of a peer answers alike, and its metrics on the port for members, where
//! somebody on another machine can have them over TLS.
//!
//! Invariant: an answer says how this process is and changes nothing; beyond this machine it is for operators alone.

use std::sync::Arc;

use axum::{
    Router,
    extract::Request,
    http::{StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
    routing::get,
};
use tonic::service::Routes;

use crate::{
    identity::Role,
    metrics::{self, Exposition},
    net::Caller,
};

/// The format that [`Exposition`] writes.
const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// A service that can say how it is.
pub trait Operated: Send + Sync + 'static {
    /// Does it do its work? If not, why, in one line.
    ///
    /// # Errors
    /// The line.
    fn ready(&self) -> Result<(), String>;

    /// Writes down what it counted and what is so now.
    fn measure(&self, page: &mut Exposition) -> impl Future<Output = ()> + Send;
}

async fn measured<S: Operated>(service: Arc<S>) -> Response {
    let mut page = Exposition::default();
    service.measure(&mut page).await;
    ([(CONTENT_TYPE, TEXT)], page.into_text()).into_response()
}

/// `/healthz`: the process lives. `/readyz`: it does its work, or one line that says why not. `/metrics`.
pub fn router<S: Operated>(service: Arc<S>) -> Router {
    metrics::begin();
    let asked = service.clone();
    let ready = move || async move {
        match asked.ready() {
            Ok(()) => (StatusCode::OK, "ready\n".to_owned()),
            Err(why) => (
                StatusCode::SERVICE_UNAVAILABLE,
                why.replace('\n', " ") + "\n",
            ),
        }
    };
    Router::new()
        .route("/healthz", get(async || "alive\n"))
        .route("/readyz", get(ready))
        .route("/metrics", get(move || measured(service)))
}

/// Adds `/metrics`, for callers with an operator's certificate, to what members are served.
pub fn beside<S: Operated>(mut routes: Routes, service: Arc<S>) -> Routes {
    let answer = async move |request: Request| {
        let subject = request
            .extensions()
            .get::<Caller>()
            .and_then(|caller| caller.subject);
        if subject.is_some_and(|subject| subject.role == Role::Operator) {
            measured(service).await
        } else {
            (
                StatusCode::FORBIDDEN,
                "only for operator certificates: sprat operator cert\n",
            )
                .into_response()
        }
    };
    let router = routes.axum_router_mut();
    *router = std::mem::take(router).route("/metrics", get(answer));
    routes
}
