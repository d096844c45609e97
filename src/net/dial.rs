//! Dialling: a verified connection to one of several addresses, as a service that generated clients call.
//!
//! Invariant: a [`Connection`] is one TLS session that was verified before it was handed out; it never redials on its
//! own, so whoever uses it learns that it ended.

use std::{
    fmt, io,
    net::SocketAddr,
    path::Path,
    pin::pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use futures_util::{StreamExt, future::BoxFuture, stream::FuturesUnordered};
use http::{HeaderValue, Request, Response, Uri};
use hyper::{body::Incoming, client::conn::http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls::{
    ClientConfig,
    pki_types::{ServerName, UnixTime},
};
use time::OffsetDateTime;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpStream, lookup_host},
    sync::watch,
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tonic::{body::Body, service::Routes};
use tower::Service;

use super::{
    Caller, Http2, RoundTrip, connect_unix,
    serve::serve_h2,
    timed_tls::{Notes, TimedTls, tls_error},
};
use crate::net::congestion::Tuned;
use crate::request::{self, RequestId};

/// Between two addresses of the same target (RFC 8305, "Connection Attempt Delay").
const STAGGER: Duration = Duration::from_millis(250);
const CONNECT: Duration = Duration::from_secs(5);
const WHY: Duration = Duration::from_millis(300);
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(15), Duration::from_secs(10));

/// Why nobody could be reached.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// Nothing to dial.
    #[error("no address to dial")]
    NoAddress,
    /// No TCP connection.
    #[error("cannot reach {0}: {1}")]
    Unreachable(String, io::Error),
    /// Somebody answers, but not the one we mean, or not with our protocol, or does not want us.
    #[error("{0} answers, but {1}")]
    Refused(String, DialRefusal),
}

/// Why somebody who answers is of no use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DialRefusal {
    /// A certificate that the other side's authority did not sign.
    #[error("{0}")]
    OtherNetwork(&'static str),
    /// A certificate that does not hold now, by one of the two clocks.
    #[error("{0}")]
    Clock(String),
    /// Our certificate is not accepted.
    #[error("it does not accept our certificate, as if we were no member any more")]
    NotAMember,
    /// The certificate of the other side was denied.
    #[error("it was revoked")]
    Revoked,
    /// A member, and not the one we mean.
    #[error("it is somebody else than expected")]
    SomebodyElse,
    /// Not with our protocol.
    #[error("{0}")]
    NotSprat(&'static str),
    /// Anything else; it may be different the next time.
    #[error("{0}")]
    Broken(String),
}

/// An established connection; clones share it.
#[derive(Clone)]
pub struct Connection {
    requests: http2::SendRequest<Body>,
    origin: Uri,
    remote: Option<SocketAddr>,
    round_trip: Duration,
    notes: Notes,
    ended: watch::Receiver<Option<DialRefusal>>,
    /// Those that drive it: this end, and of a [`pipe`] the other one.
    _drivers: Arc<[AbortOnDropHandle<()>]>,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection")
            .field("remote", &self.remote)
            .finish_non_exhaustive()
    }
}

impl Connection {
    /// What generated clients want as origin.
    #[must_use]
    pub fn origin(&self) -> Uri {
        self.origin.clone()
    }

    /// The address that answered.
    #[must_use]
    pub const fn remote(&self) -> Option<SocketAddr> {
        self.remote
    }

    /// How long the TCP connection took to be made; zero where there is none.
    #[must_use]
    pub const fn round_trip(&self) -> Duration {
        self.round_trip
    }

    /// Time spent in TLS reading from this connection since this was last asked.
    #[must_use]
    pub fn take_tls_time(&self) -> Duration {
        self.notes.take_reading()
    }

    /// Has the other end gone?
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.requests.is_closed()
    }

    /// Returns when the connection has ended; does not keep it alive.
    pub fn ended(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut ended = self.ended.clone();
        // An error says that it ended without a reason.
        async move { drop(ended.wait_for(Option::is_some).await) }
    }

    /// Why the connection ended; `None` if it lives, or ended in good order. A server judges our
    /// certificate only after our side of the handshake is done, so its refusal shows here, after the first call.
    pub async fn why_ended(&self) -> Option<DialRefusal> {
        let mut ended = self.ended.clone();
        timeout(WHY, ended.wait_for(Option::is_some))
            .await
            .ok()?
            .ok()?
            .clone()
    }

    async fn over<I>(
        stream: I,
        http2: Http2,
        remote: Option<SocketAddr>,
        notes: Notes,
        far: Option<AbortOnDropHandle<()>>,
    ) -> Result<Self, hyper::Error>
    where
        I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (requests, driver) = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .initial_stream_window_size(http2.stream_window)
            .initial_connection_window_size(http2.connection_window)
            .max_frame_size(http2.frame)
            .max_send_buf_size(http2.send_buffer)
            .keep_alive_interval(KEEPALIVE.0)
            .keep_alive_timeout(KEEPALIVE.1)
            .handshake(TokioIo::new(stream))
            .await?;
        let (end, ended) = watch::channel(None);
        let told = notes.clone();
        let driver = AbortOnDropHandle::new(tokio::spawn(async move {
            if let Err(error) = driver.await {
                tracing::debug!("connection ended: {error}");
                let refusal = told.error().map_or_else(|| broken(&error), explain);
                end.send_replace(Some(refusal));
            }
        }));
        let origin = Uri::from_static("https://sprat");
        Ok(Self {
            requests,
            origin,
            remote,
            round_trip: Duration::ZERO,
            notes,
            ended,
            _drivers: [driver].into_iter().chain(far).collect(),
        })
    }
}

impl Service<Request<Body>> for Connection {
    type Response = Response<Incoming>;
    type Error = Box<dyn std::error::Error + Send + Sync>;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.requests.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        if let Ok(id) = HeaderValue::from_str(&RequestId::current().to_string()) {
            request.headers_mut().insert(request::HEADER, id);
        }
        let (answer, mut ended) = (self.requests.send_request(request), self.ended.clone());
        Box::pin(async move {
            let mut answer = pin!(answer);
            tokio::select! {
                biased;
                answer = answer.as_mut() => return Ok(answer?),
                // Both when it has ended with a reason and when nobody is left to give one.
                _ = ended.wait_for(Option::is_some) => {}
            }
            // A request handed over at the very moment the connection ends is never answered by the library.
            match timeout(WHY, answer).await {
                Ok(answer) => Ok(answer?),
                Err(_) => Err("the connection ended before the call was answered".into()),
            }
        })
    }
}

/// Dials "HOST:PORT" targets side by side, each 250 ms after the one before; the first that completes the handshake
/// under `config` wins. `name` is what the TLS library is told; only enrollment sends it.
///
/// # Errors
/// The most telling one: a refusal by somebody who answered, else the last failure to connect.
pub async fn dial(
    targets: &[String],
    config: Arc<ClientConfig>,
    name: &'static str,
    http2: Http2,
) -> Result<Connection, DialError> {
    let mut attempts: FuturesUnordered<_> = targets
        .iter()
        .zip(0_u32..)
        .map(|(target, i)| {
            let config = config.clone();
            async move {
                tokio::time::sleep(STAGGER * i).await;
                dial_one(target, config, name, http2).await
            }
        })
        .collect();
    let mut telling = DialError::NoAddress;
    while let Some(attempt) = attempts.next().await {
        match attempt {
            Ok(connection) => return Ok(connection),
            Err(error) if matches!(telling, DialError::Refused(..)) => tracing::debug!("{error}"),
            Err(error) => telling = error,
        }
    }
    Err(telling)
}

async fn dial_one(
    target: &str,
    config: Arc<ClientConfig>,
    name: &'static str,
    http2: Http2,
) -> Result<Connection, DialError> {
    let unreachable = |error| DialError::Unreachable(target.to_owned(), error);
    let refused = |reason| DialError::Refused(target.to_owned(), reason);
    let late = |_| io::Error::new(io::ErrorKind::TimedOut, "no answer within 5 s");
    let (stream, round_trip) = timeout(CONNECT, connect(target))
        .await
        .map_err(late)
        .and_then(|c| c)
        .map_err(unreachable)?;
    let remote = stream.peer_addr().ok();
    stream.set_nodelay(true).map_err(unreachable)?;
    let notes = Notes::default();
    let stream = Tuned::new(stream, RoundTrip::default());
    let name = ServerName::try_from(name).map_err(|e| refused(broken(&e)))?;
    let shaking = Instant::now();
    let tls = timeout(
        CONNECT,
        TimedTls::connect(stream, config, name, notes.clone()),
    )
    .await
    .map_err(late)
    .and_then(|tls| tls)
    .map_err(|error| refused(explain_handshake(&error)))?;
    if tls.protocol() != Some(b"h2") {
        return Err(refused(DialRefusal::NotSprat(
            "it does not speak HTTP/2: not a sprat",
        )));
    }
    // A TLS 1.3 handshake takes one round trip, too, and a busy machine seldom delays both.
    let round_trip = round_trip.min(shaking.elapsed());
    let connection = Connection::over(tls, http2, remote, notes, None)
        .await
        .map_err(|error| refused(broken(&error)))?;
    Ok(Connection {
        round_trip,
        ..connection
    })
}

async fn connect(target: &str) -> io::Result<(TcpStream, Duration)> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in lookup_host(target).await? {
        let started = Instant::now();
        match TcpStream::connect(address).await {
            Ok(stream) => return Ok((stream, started.elapsed())),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// An error that TLS has no part in, with its first cause.
fn broken(error: &(dyn std::error::Error + 'static)) -> DialRefusal {
    let mut cause = error;
    while let Some(below) = cause.source() {
        cause = below;
    }
    DialRefusal::Broken(format!("the connection broke: {cause}"))
}

fn explain_handshake(error: &io::Error) -> DialRefusal {
    match tls_error(error) {
        Some(error) => explain(error),
        None if error.kind() == io::ErrorKind::UnexpectedEof => {
            DialRefusal::NotSprat("it hangs up: not a sprat, or too busy")
        }
        None => broken(error),
    }
}

/// What an error of TLS means.
fn explain(error: &rustls::Error) -> DialRefusal {
    use rustls::{AlertDescription as Alert, CertificateError as Bad, Error};
    match error {
        Error::InvalidCertificate(bad) => match bad {
            Bad::UnknownIssuer | Bad::BadSignature => DialRefusal::OtherNetwork(
                "its certificate is of another network (unknown authority)",
            ),
            Bad::ExpiredContext { time, not_after } => DialRefusal::Clock(format!(
                "its certificate ended {}, and this machine's clock says {}",
                date(*not_after),
                date(*time)
            )),
            Bad::NotValidYetContext { time, not_before } => DialRefusal::Clock(format!(
                "its certificate begins {}, and this machine's clock says {}",
                date(*not_before),
                date(*time)
            )),
            Bad::Revoked => DialRefusal::Revoked,
            Bad::NotValidForName | Bad::NotValidForNameContext { .. } => DialRefusal::SomebodyElse,
            _ => DialRefusal::OtherNetwork(
                "its certificate is not one of this network's; if the tracker got a new one, join again with a new link",
            ),
        },
        Error::InvalidMessage(_) => DialRefusal::NotSprat("it does not speak TLS: not a sprat"),
        Error::AlertReceived(alert) => match alert {
            Alert::CertificateRequired | Alert::AccessDenied | Alert::CertificateRevoked => {
                DialRefusal::NotAMember
            }
            Alert::CertificateExpired => DialRefusal::Clock(format!(
                "by its clock our certificate is out of date; this machine's clock says {}",
                date(UnixTime::now())
            )),
            Alert::UnknownCA | Alert::DecryptError => DialRefusal::OtherNetwork(
                "it belongs to another network (it does not know our authority)",
            ),
            _ => DialRefusal::Broken(format!("TLS failed: {error}")),
        },
        _ => DialRefusal::Broken(format!("TLS failed: {error}")),
    }
}

fn date(time: UnixTime) -> String {
    let seconds = i64::try_from(time.as_secs()).unwrap_or(i64::MAX);
    let Ok(time) = OffsetDateTime::from_unix_timestamp(seconds) else {
        return "a time out of all bounds".into();
    };
    format!(
        "{} {:02}:{:02} UTC",
        time.date(),
        time.hour(),
        time.minute()
    )
}

/// Connects to a Unix socket in `folder`.
///
/// # Errors
/// As the system answers.
pub async fn dial_unix(folder: &Path, name: &str, http2: Http2) -> io::Result<Connection> {
    let stream = connect_unix(folder, name).await?;
    Connection::over(stream, http2, None, Notes::default(), None)
        .await
        .map_err(io::Error::other)
}

/// A connection inside this process: `routes` answer at its other end until it is dropped or cancelled.
///
/// # Errors
/// If the HTTP/2 handshake fails.
pub async fn pipe(
    routes: Routes,
    http2: Http2,
    cancel: CancellationToken,
) -> io::Result<Connection> {
    let (near, far) = tokio::io::duplex(64 << 10);
    let caller = Caller {
        subject: None,
        remote: None,
        line: RoundTrip::default(),
    };
    let serving = tokio::spawn(async move {
        let _ = serve_h2(far, routes, caller, http2, cancel).await;
    });
    let serving = AbortOnDropHandle::new(serving);
    Connection::over(near, http2, None, Notes::default(), Some(serving))
        .await
        .map_err(io::Error::other)
}
