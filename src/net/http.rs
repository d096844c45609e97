//! The operator port: HTTP/1.1 without TLS, on loopback, for the person at this machine and their browser.
//!
//! Invariants: no other address than a loopback one is bound; a request that names any host but this port of this
//! machine is refused (DNS rebinding), and so is everything but reading; every answer of ours forbids foreign content,
//! framing, sniffing and caching. (What is not HTTP at all is answered by hyper, without headers or body.)

use std::{convert::Infallible, net::SocketAddr, pin::pin, sync::Arc, time::Duration};

use axum::{
    Router,
    body::Body,
    response::{IntoResponse, Response},
};
use http::{HeaderName, HeaderValue, Method, Request, StatusCode, header};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::{sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower::Service;

use crate::exit::{Exit, Failed};
use crate::net::write_timeout::Patience;

/// Connections at once: a few pages, each with its stream of events.
const CONNECTIONS: usize = 64;
/// Longest wait for a whole request, which also ends a connection that is idle between two.
const HEAD: Duration = Duration::from_secs(10);
/// How long a reader may take nothing of what waits for it.
const SLOW: Duration = Duration::from_secs(20);
const HEAD_BYTES: usize = 16 << 10;
const HEADERS: usize = 64;
/// Ports tried after the usual one.
const SPREAD: u16 = 32;
const DRAIN: Duration = Duration::from_secs(1);
const PAUSE: Duration = Duration::from_secs(1);

const EVERYWHERE: [(HeaderName, &str); 7] = [
    (
        header::CONTENT_SECURITY_POLICY,
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (header::X_FRAME_OPTIONS, "DENY"),
    (header::REFERRER_POLICY, "no-referrer"),
    (
        HeaderName::from_static("cross-origin-resource-policy"),
        "same-origin",
    ),
    (
        HeaderName::from_static("cross-origin-opener-policy"),
        "same-origin",
    ),
    (header::CACHE_CONTROL, "no-store"),
];

/// Binds an operator port, if there is to be one; if `usual` is taken, one of the next.
///
/// # Errors
/// [`Exit::Usage`] for an address that is not loopback; a port in use.
pub fn bind_http(address: Option<SocketAddr>, usual: u16) -> Result<Option<TcpListener>, Failed> {
    let Some(address) = address else {
        return Ok(None);
    };
    if !address.ip().to_canonical().is_loopback() {
        let text = format!(
            "--operator {address} is no loopback address: the operator page is for this machine alone"
        );
        return Err(Failed::new(Exit::Usage, text));
    }
    let spread = if address.port() == usual { SPREAD } else { 0 };
    let bound = super::bind_near(address, spread, "--operator");
    bound
        .map(Some)
        .map_err(|error| Failed::new(Exit::Failure, error.to_string()))
}

/// Serves `router` on what [`bind_http`] gave until cancelled.
pub async fn serve_http(
    listener: TcpListener,
    router: Router,
    cancel: CancellationToken,
    tasks: TaskTracker,
) {
    let Ok(here) = listener.local_addr() else {
        return;
    };
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let accepted = tokio::select! {
            () = cancel.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                let Ok(place) = places.clone().try_acquire_owned() else {
                    tracing::debug!("too many connections to the operator page: refused");
                    continue;
                };
                let served = connection(stream, here, router.clone(), cancel.clone());
                tasks.spawn(async move {
                    let _place = place;
                    if let Err(error) = served.await {
                        tracing::debug!("operator page: connection ended: {error}");
                    }
                });
            }
            Err(error) => {
                tracing::warn!("operator page: {error}");
                sleep(PAUSE).await;
            }
        }
    }
}

async fn connection(
    stream: TcpStream,
    here: SocketAddr,
    router: Router,
    cancel: CancellationToken,
) -> Result<(), hyper::Error> {
    let service = service_fn(move |request| answer(here, router.clone(), request));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD)
        .max_headers(HEADERS)
        .max_buf_size(HEAD_BYTES)
        .serve_connection(TokioIo::new(Patience::new(stream, SLOW)), service);
    let mut connection = pin!(connection);
    tokio::select! {
        ended = connection.as_mut() => return ended,
        () = cancel.cancelled() => {}
    }
    connection.as_mut().graceful_shutdown();
    timeout(DRAIN, connection).await.unwrap_or(Ok(()))
}

async fn answer(
    here: SocketAddr,
    mut router: Router,
    request: Request<Incoming>,
) -> Result<Response<Body>, Infallible> {
    let mut response = match refusal(here, &request) {
        Some(refused) => refused,
        None => router.call(request).await?,
    };
    for (name, value) in EVERYWHERE {
        response
            .headers_mut()
            .insert(name, HeaderValue::from_static(value));
    }
    Ok(response)
}

fn refusal<B>(here: SocketAddr, request: &Request<B>) -> Option<Response<Body>> {
    let mut hosts = request.headers().get_all(header::HOST).iter();
    let host = hosts
        .next()
        .and_then(|host| host.to_str().ok())
        .filter(|_| hosts.next().is_none());
    let named = request
        .uri()
        .authority()
        .map(|authority| authority.as_str());
    if !host.is_some_and(|host| is_here(here, host))
        || !named.is_none_or(|named| is_here(here, named))
    {
        let text = format!(
            "this page is only at http://localhost:{}/ and http://{here}/\n",
            here.port()
        );
        return Some((StatusCode::FORBIDDEN, text).into_response());
    }
    if ![Method::GET, Method::HEAD].contains(request.method()) {
        let text = "only GET and HEAD: nothing can be changed here\n";
        return Some(
            (
                StatusCode::METHOD_NOT_ALLOWED,
                [(header::ALLOW, "GET, HEAD")],
                text,
            )
                .into_response(),
        );
    }
    None
}

/// Does `host`, as a browser would write it, mean this port of this machine?
fn is_here(here: SocketAddr, host: &str) -> bool {
    let name = match host.strip_suffix(&format!(":{}", here.port())) {
        Some(name) => name,
        None if here.port() == 80 => host,
        None => return false,
    };
    let bound = SocketAddr::new(here.ip(), 80).to_string();
    name.eq_ignore_ascii_case("localhost")
        || ["127.0.0.1", "[::1]", bound.trim_end_matches(":80")].contains(&name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(here: &str, hosts: &[&str], method: &str, uri: &str) -> Option<u16> {
        let request = hosts
            .iter()
            .fold(Request::builder().method(method).uri(uri), |r, host| {
                r.header("host", *host)
            });
        refusal(here.parse().unwrap(), &request.body(()).unwrap())
            .map(|response| response.status().as_u16())
    }

    #[test]
    fn only_this_machine_is_named_and_only_reading_is_done() {
        for host in [
            "localhost:7790",
            "127.0.0.1:7790",
            "[::1]:7790",
            "LocalHost:7790",
            "127.0.0.5:7790",
        ] {
            assert_eq!(
                refused("127.0.0.5:7790", &[host], "GET", "/"),
                None,
                "{host}"
            );
        }
        assert_eq!(refused("127.0.0.1:80", &["localhost"], "HEAD", "/"), None);
        assert_eq!(
            refused("[::1]:7790", &["[::1]:7790"], "GET", "http://[::1]:7790/"),
            None
        );
        let foreign = [
            "evil.example:7790",
            "localhost",
            "localhost:7791",
            "localhost.evil.example:7790",
            "10.0.0.1:7790",
            "127.0.0.9:7790",
            "user@localhost:7790",
            "localhost:7790:7790",
            "",
        ];
        for host in foreign {
            assert_eq!(
                refused("127.0.0.1:7790", &[host], "GET", "/"),
                Some(403),
                "{host}"
            );
        }
        assert_eq!(refused("127.0.0.1:7790", &[], "GET", "/"), Some(403));
        assert_eq!(
            refused(
                "127.0.0.1:7790",
                &["localhost:7790", "evil.example"],
                "GET",
                "/"
            ),
            Some(403)
        );
        assert_eq!(
            refused(
                "127.0.0.1:7790",
                &["localhost:7790"],
                "GET",
                "http://evil.example/"
            ),
            Some(403)
        );
        for method in [
            "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "BREW",
        ] {
            assert_eq!(
                refused("127.0.0.1:7790", &["localhost:7790"], method, "/"),
                Some(405),
                "{method}"
            );
        }
    }

    #[tokio::test]
    async fn no_address_but_loopback_is_bound() {
        let bind = |address: &str, usual| bind_http(Some(address.parse().unwrap()), usual);
        for address in ["0.0.0.0:0", "[::]:0", "192.0.2.1:0", "[::ffff:192.0.2.1]:0"] {
            let error = bind(address, 7790).unwrap_err();
            assert!(
                error.exit == Exit::Usage && error.to_string().contains("--operator"),
                "{error}"
            );
        }
        assert!(bind_http(None, 7790).unwrap().is_none());
        let first = bind("127.0.0.1:0", 7790).unwrap().unwrap();
        let taken = first.local_addr().unwrap();
        let error = bind(&taken.to_string(), 7790).unwrap_err();
        assert!(
            error.exit == Exit::Failure && error.to_string().contains("in use"),
            "{error}"
        );
        if taken.port() < u16::MAX - SPREAD {
            let next = bind(&taken.to_string(), taken.port()).unwrap().unwrap();
            assert!(next.local_addr().unwrap().port() > taken.port());
        }
    }
}
