//! A GetChunks answer whose payloads go from the disk's buffers to TLS as they are.
//!
//! tonic encodes a message by copying it, which for chunks is a quarter of the copying a sender does. So the service hands
//! tonic an empty stream together with the real one, and [`Uncopied`] exchanges them once tonic has done all the rest:
//! the request's checks, the headers, the refusals. On the wire it is the same gRPC.
//!
//! Invariant: an answer without a real stream passes unchanged.

use std::{
    convert::Infallible,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use futures_util::{FutureExt, future::BoxFuture};
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body::Frame;
use tokio::sync::mpsc;
use tonic::{Status, body::Body, server::NamedService};
use tower::Service;

/// A message in two parts that follow each other on the wire; the second may be empty.
#[derive(Debug)]
pub(super) struct BodyPart {
    pub(super) head: Bytes,
    pub(super) data: Bytes,
}

/// The real stream, on its way through tonic.
#[derive(Clone)]
pub(super) struct BodyParts(Arc<Mutex<Option<mpsc::Receiver<BodyPart>>>>);

impl BodyParts {
    pub(super) fn new(receiver: mpsc::Receiver<BodyPart>) -> Self {
        Self(Arc::new(Mutex::new(Some(receiver))))
    }

    fn take(&self) -> Option<mpsc::Receiver<BodyPart>> {
        self.0
            .lock()
            .expect("no panic while the lock is held")
            .take()
    }
}

/// A service whose answers may carry `BodyParts`.
#[derive(Clone, Debug)]
pub struct Uncopied<S>(pub S);

impl<S: NamedService> NamedService for Uncopied<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<Request<Body>> for Uncopied<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response<Body>, Infallible>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let answer = self.0.call(request);
        async move {
            let mut answer = answer.await?;
            if let Some(parts) = answer
                .extensions_mut()
                .remove::<BodyParts>()
                .and_then(|parts| parts.take())
            {
                *answer.body_mut() = Body::new(PartsBody {
                    parts: Some(parts),
                    data: Bytes::new(),
                });
            }
            Ok(answer)
        }
        .boxed()
    }
}

struct PartsBody {
    /// None once the trailers are out.
    parts: Option<mpsc::Receiver<BodyPart>>,
    /// What belongs after the head that went out last.
    data: Bytes,
}

impl http_body::Body for PartsBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if !self.data.is_empty() {
            return Poll::Ready(Some(Ok(Frame::data(std::mem::take(&mut self.data)))));
        }
        let Some(parts) = &mut self.parts else {
            return Poll::Ready(None);
        };
        let Some(part) = ready!(parts.poll_recv(cx)) else {
            self.parts = None;
            let trailers =
                HeaderMap::from_iter([(Status::GRPC_STATUS, HeaderValue::from_static("0"))]);
            return Poll::Ready(Some(Ok(Frame::trailers(trailers))));
        };
        self.data = part.data;
        Poll::Ready(Some(Ok(Frame::data(part.head))))
    }

    fn is_end_stream(&self) -> bool {
        self.parts.is_none()
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use http_body::Body as _;
    use tower::{ServiceExt, service_fn};

    use super::*;

    #[tokio::test]
    async fn payloads_pass_as_they_are_between_heads_and_trailers() {
        let payload = Bytes::from(vec![7; 1000]);
        let (sender, receiver) = mpsc::channel(2);
        for (head, data) in [(&b"head"[..], payload.clone()), (b"end", Bytes::new())] {
            sender
                .send(BodyPart {
                    head: Bytes::from_static(head),
                    data,
                })
                .await
                .unwrap();
        }
        drop(sender);
        let parts = BodyParts::new(receiver);
        let service = Uncopied(service_fn(move |_: Request<Body>| {
            let mut answer = Response::new(Body::empty());
            answer.extensions_mut().insert(parts.clone());
            async move { Ok::<_, Infallible>(answer) }
        }));
        let mut body = service
            .oneshot(Request::new(Body::empty()))
            .await
            .unwrap()
            .into_body();
        let mut frames = vec![];
        while let Some(frame) = poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await {
            frames.push(frame.unwrap());
        }
        let data: Vec<_> = frames.iter().filter_map(Frame::data_ref).collect();
        assert_eq!(
            data,
            [
                &Bytes::from_static(b"head"),
                &payload,
                &Bytes::from_static(b"end")
            ]
        );
        assert_eq!(data[1].as_ptr(), payload.as_ptr(), "the very same bytes");
        assert_eq!(
            frames.last().unwrap().trailers_ref().unwrap()["grpc-status"],
            "0"
        );
    }
}
