//! Answering one call: its deadline, its id, and what is counted of it. Every call that this process answers comes
//! through here.
//!
//! Invariants: a call is counted once, when its answer has ended or was given up; whatever it logs stands under its id.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, Bytes};
use http::{HeaderMap, Request, Response};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::time::timeout;
use tonic::{Status, service::Routes};
use tower::Service;
use tracing::{Instrument, Span, error_span};

use super::Caller;
use crate::{
    metrics::{Counter, rpc::Call},
    request::{HEADER, RequestId},
};

/// Longest wait for the first byte of an answer when the caller names none.
const ANSWER: Duration = Duration::from_secs(120);

pub(super) async fn answer(
    mut routes: Routes,
    request: Request<Incoming>,
) -> Result<Response<tonic::body::Body>, io::Error> {
    let id = request
        .headers()
        .get(HEADER)
        .and_then(|id| RequestId::read(id.as_bytes()));
    let id = id.unwrap_or_else(RequestId::random);
    let mut call = Call::begin(request.uri().path());
    // Of the highest level, so that a line of any level is told whose it is.
    let span = error_span!("rpc", request_id = %id, method = call.method.name, caller = tracing::field::Empty);
    if let Some(subject) = request
        .extensions()
        .get::<Caller>()
        .and_then(|caller| caller.subject)
    {
        span.record("caller", tracing::field::display(subject.id));
    }
    let deadline = match grpc_timeout(request.headers()) {
        Ok(asked) => asked.map_or(ANSWER, |asked| asked.min(ANSWER)),
        Err(status) => {
            call.end(b"3");
            return Ok(status.into_http());
        }
    };
    let received = &call.method.received;
    let request = request.map(|body| Received {
        body,
        bytes: received,
    });
    let answering = id
        .over(timeout(deadline, routes.call(request)))
        .instrument(span.clone());
    let response = match answering.await {
        Ok(response) => response.map_err(io::Error::other)?,
        Err(_) => Status::deadline_exceeded("the call took longer than its deadline").into_http(),
    };
    if let Some(status) = response.headers().get(Status::GRPC_STATUS) {
        call.end(status.as_bytes());
    }
    Ok(response.map(|body| tonic::body::Body::new(Sent { body, call, span })))
}

/// A request's body, which is counted as it comes.
struct Received {
    body: Incoming,
    bytes: &'static Counter,
}

impl Body for Received {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        if let Some(Ok(frame)) = &frame {
            self.bytes
                .add(frame.data_ref().map_or(0, Buf::remaining) as u64);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// An answer's body, which is counted as it goes; its end is the call's.
struct Sent {
    body: tonic::body::Body,
    call: Call,
    span: Span,
}

impl Body for Sent {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        match &frame {
            Some(Ok(frame)) => {
                self.call
                    .method
                    .sent
                    .add(frame.data_ref().map_or(0, Buf::remaining) as u64);
                if let Some(status) = frame
                    .trailers_ref()
                    .and_then(|trailers| trailers.get(Status::GRPC_STATUS))
                {
                    self.call.end(status.as_bytes());
                }
            }
            Some(Err(status)) => self.call.end((status.code() as i32).to_string().as_bytes()),
            None => self.call.end_well(),
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Sent {
    fn drop(&mut self) {
        if self.body.is_end_stream() {
            self.call.end_well();
        }
        let _entered = self.span.enter();
        tracing::debug!(
            code = self.call.code(),
            micros = self.call.micros(),
            "answered"
        );
    }
}

/// The `grpc-timeout` header: at most eight digits and a unit (gRPC over HTTP/2, "Timeout").
fn grpc_timeout(headers: &HeaderMap) -> Result<Option<Duration>, Status> {
    let Some(value) = headers.get("grpc-timeout") else {
        return Ok(None);
    };
    let malformed = || Status::invalid_argument("malformed grpc-timeout");
    let text = value.to_str().map_err(|_| malformed())?;
    let (digits, unit) = text
        .split_at_checked(text.len().wrapping_sub(1))
        .ok_or_else(malformed)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(malformed());
    }
    let n: u64 = digits.parse().map_err(|_| malformed())?;
    Ok(Some(match unit {
        "H" => Duration::from_secs(n * 3600),
        "M" => Duration::from_secs(n * 60),
        "S" => Duration::from_secs(n),
        "m" => Duration::from_millis(n),
        "u" => Duration::from_micros(n),
        "n" => Duration::from_nanos(n),
        _ => return Err(malformed()),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_are_read_as_the_protocol_says_and_never_panic() {
        let read = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("grpc-timeout", text.parse().unwrap());
            grpc_timeout(&headers)
        };
        assert_eq!(read("5S").unwrap(), Some(Duration::from_secs(5)));
        assert_eq!(read("1n").unwrap(), Some(Duration::from_nanos(1)));
        assert_eq!(
            read("99999999H").unwrap(),
            Some(Duration::from_secs(99_999_999 * 3600))
        );
        for bad in ["", "S", "5", "123456789S", "-1S", "5x", "1e3S"] {
            assert!(read(bad).is_err(), "{bad}");
        }
        assert_eq!(grpc_timeout(&HeaderMap::new()).unwrap(), None);
    }
}
