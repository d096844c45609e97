//! Accepting: from a raw TCP connection to requests that carry a [`Caller`].
//!
//! Invariants: nothing unauthenticated lives longer than five seconds or counts more than its cap; a full descriptor
//! table makes the loop pause, never spin or end; a connection ends with its certificate, with its member's denial, or
//! with the listener (after a drain deadline).

use std::{
    collections::HashMap,
    fs::File,
    hash::Hash,
    io,
    net::SocketAddr,
    pin::pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use http::Request;
use hyper::{body::Incoming, server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls::ServerConfig;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream, UnixListener},
    sync::Semaphore,
    time::{sleep, timeout},
};
use tokio_rustls::{LazyConfigAcceptor, server::TlsStream};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::service::Routes;

use super::{CONTROL, Caller, Http2, READ_BUFFER, first_byte::FirstByte, rpc::answer};
use crate::net::congestion::{RoundTrip, Tuned};
use crate::{
    identity::{CertificateFacts, JOIN_NAME, PeerId, Subject},
    metrics,
    trust::Trust,
};

const HANDSHAKE: Duration = Duration::from_secs(5);
const PREFACE: Duration = Duration::from_secs(5);
const DRAIN: Duration = Duration::from_secs(10);
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(20), Duration::from_secs(10));
const HEADER_LIST: u32 = 8 << 10;
const PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));
/// Ciphertext waiting for the socket: what one system call hands over.
const SEND_BUFFER: usize = 256 << 10;
/// Handshakes computed at once: they cost CPU before anybody is known.
const HANDSHAKES: usize = 64;

/// How much a listener takes on.
#[derive(Clone, Copy, Debug)]
pub struct ListenerLimits {
    /// Connections in all.
    pub connections: usize,
    /// Connections from one address that have not shown who they are.
    pub strangers_per_address: usize,
    /// Connections per member.
    pub per_member: usize,
    /// Settings of its connections.
    pub http2: Http2,
}

/// One set of TLS rules with the services behind it.
#[derive(Clone)]
pub struct Front {
    /// Who may come in.
    pub tls: Arc<ServerConfig>,
    /// What they find.
    pub routes: Routes,
}

/// Serves a TCP port: members, and, where there is a second front, those who ask for [`JOIN_NAME`].
pub struct Listener {
    /// For certificates of the network.
    pub members: Front,
    /// For those who have none yet.
    pub joiners: Option<Front>,
    /// Bounds.
    pub limits: ListenerLimits,
    /// Who is denied.
    pub trust: Arc<Trust>,
    /// Ends the listener.
    pub cancel: CancellationToken,
    /// Where connections are spawned.
    pub tasks: TaskTracker,
}

/// A counted place, given back when dropped.
struct Guest<K: Eq + Hash + Copy> {
    key: K,
    counts: Arc<Mutex<HashMap<K, usize>>>,
}

impl<K: Eq + Hash + Copy> Guest<K> {
    fn admit(counts: &Arc<Mutex<HashMap<K, usize>>>, key: K, limit: usize) -> Option<Self> {
        let mut map = counts.lock().expect("no panic while the lock is held");
        let count = map.entry(key).or_insert(0);
        if *count >= limit {
            return None;
        }
        *count += 1;
        Some(Self {
            key,
            counts: counts.clone(),
        })
    }
}

impl<K: Eq + Hash + Copy> Drop for Guest<K> {
    fn drop(&mut self) {
        let mut map = self.counts.lock().expect("no panic while the lock is held");
        if let Some(count) = map.get_mut(&self.key) {
            *count -= 1;
            if *count == 0 {
                map.remove(&self.key);
            }
        }
    }
}

type Counts<K> = Arc<Mutex<HashMap<K, usize>>>;

#[derive(Clone, Default)]
struct Doors {
    strangers: Counts<std::net::IpAddr>,
    members: Counts<PeerId>,
}

impl Listener {
    /// Accepts until cancelled. Never fails: what goes wrong with one connection is that connection's end.
    pub async fn run(self, listener: TcpListener) {
        let listener_limits = self.limits;
        metrics::CONNECTIONS_LIMIT.set(listener_limits.connections);
        let this = Arc::new(self);
        let connections = Arc::new(Semaphore::new(listener_limits.connections));
        let handshakes = Arc::new(Semaphore::new(HANDSHAKES));
        let doors = Doors::default();
        let mut reserve = File::open("/dev/null").ok();
        let mut pause = PAUSE.0;
        loop {
            let accepted = tokio::select! {
                () = this.cancel.cancelled() => return,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, remote)) => {
                    pause = PAUSE.0;
                    let guest = Guest::admit(
                        &doors.strangers,
                        remote.ip(),
                        listener_limits.strangers_per_address,
                    );
                    let (Some(guest), Ok(place)) = (guest, connections.clone().try_acquire_owned())
                    else {
                        metrics::CONNECTIONS_REFUSED.one();
                        tracing::debug!(%remote, "too many connections: refused");
                        continue;
                    };
                    let (this, doors, handshakes) =
                        (this.clone(), doors.clone(), handshakes.clone());
                    let tasks = this.tasks.clone();
                    tasks.spawn(async move {
                        let (_place, _here) = (place, metrics::CONNECTIONS.enter());
                        if let Err(error) = this
                            .connection(stream, remote, guest, &doors, &handshakes)
                            .await
                        {
                            tracing::debug!(%remote, "connection ended: {error}");
                        }
                    });
                }
                Err(error) => {
                    tracing::warn!("accepting connections: {error}; waiting {pause:?}");
                    // Out of descriptors: give up the reserved one to refuse the caller rather than let it hang.
                    drop(reserve.take());
                    if let Ok(Ok((stream, _))) =
                        timeout(Duration::from_millis(1), listener.accept()).await
                    {
                        drop(stream);
                    }
                    reserve = File::open("/dev/null").ok();
                    sleep(pause).await;
                    pause = (pause * 2).min(PAUSE.1);
                }
            }
        }
    }

    async fn connection(
        &self,
        stream: TcpStream,
        remote: SocketAddr,
        guest: Guest<std::net::IpAddr>,
        doors: &Doors,
        handshakes: &Semaphore,
    ) -> io::Result<()> {
        stream.set_nodelay(true)?;
        let line = RoundTrip::default();
        let (tls, routes) = timeout(
            HANDSHAKE,
            self.handshake(Tuned::new(stream, line.clone()), handshakes),
        )
        .await
        .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "no TLS handshake within 5 s"))
        .and_then(|shaken| shaken)
        .inspect_err(|_| metrics::HANDSHAKES_FAILED.one())?;
        let session = tls.get_ref().1;
        if session.alpn_protocol() != Some(b"h2") {
            return Err(io::Error::other("the client does not speak HTTP/2"));
        }
        let shown = session.peer_certificates().and_then(|chain| chain.first());
        let facts = shown
            .map(|cert| CertificateFacts::read(cert))
            .transpose()
            .map_err(io::Error::other)?;
        let subject = facts
            .as_ref()
            .map(CertificateFacts::subject)
            .transpose()
            .map_err(io::Error::other)?;
        let _member = match subject {
            Some(subject) => {
                let member = Guest::admit(&doors.members, subject.id, self.limits.per_member);
                Some(member.ok_or_else(|| {
                    io::Error::other(format!("{} has too many connections", subject.id))
                })?)
            }
            None => None,
        };
        // A member is counted as such; a joiner stays a stranger for as long as it is here.
        let _stranger = if subject.is_some() {
            drop(guest);
            None
        } else {
            Some(guest)
        };
        let caller = Caller {
            subject,
            remote: Some(remote),
            line,
        };
        let served = serve_h2(tls, routes, caller, self.limits.http2, self.cancel.clone());
        let until = facts.map(|facts| until(facts.not_after));
        tokio::select! {
            served = served => served,
            () = async { match until { Some(until) => sleep(until).await, None => std::future::pending().await } } => {
                Err(io::Error::other("the certificate has ended"))
            }
            () = self.denied(subject) => Err(io::Error::other("the member was revoked")),
        }
    }

    async fn handshake(
        &self,
        stream: Tuned,
        handshakes: &Semaphore,
    ) -> io::Result<(TlsStream<BufReader<Tuned>>, Routes)> {
        let stream = BufReader::with_capacity(READ_BUFFER, stream);
        let start = LazyConfigAcceptor::new(rustls::server::Acceptor::default(), stream).await?;
        let busy = handshakes.acquire().await.map_err(io::Error::other)?;
        let wants_to_join = start.client_hello().server_name() == Some(JOIN_NAME);
        let front = match &self.joiners {
            Some(joiners) if wants_to_join => joiners,
            _ => &self.members,
        };
        let shaken = start.into_stream(front.tls.clone()).into_fallible().await;
        drop(busy);
        match shaken {
            Ok(mut tls) => {
                tls.get_mut().1.set_buffer_limit(Some(SEND_BUFFER));
                Ok((tls, front.routes.clone()))
            }
            Err((error, mut stream)) => {
                // Closing with bytes unread would reset the connection, and the caller would never read why.
                stream.shutdown().await?;
                tokio::io::copy(&mut stream.take(64 << 10), &mut tokio::io::sink()).await?;
                Err(error)
            }
        }
    }

    async fn denied(&self, subject: Option<Subject>) {
        let Some(subject) = subject else {
            return std::future::pending().await;
        };
        let mut list = self.trust.follow();
        // Cannot fail: `self.trust` holds the sender.
        let _ = list
            .wait_for(|list| list.denied.contains(&subject.id))
            .await;
    }
}

fn until(not_after: i64) -> Duration {
    let end = UNIX_EPOCH + Duration::from_secs(u64::try_from(not_after).unwrap_or(0));
    end.duration_since(SystemTime::now()).unwrap_or_default() + Duration::from_secs(1)
}

/// Serves a Unix socket to the same user until cancelled.
pub async fn serve_unix(
    listener: UnixListener,
    routes: Routes,
    cancel: CancellationToken,
    tasks: TaskTracker,
) {
    let me = rustix::process::geteuid().as_raw();
    loop {
        let accepted = tokio::select! {
            () = cancel.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _))
                if stream
                    .peer_cred()
                    .is_ok_and(|peer| peer.uid() == me || peer.uid() == 0) =>
            {
                let caller = Caller {
                    subject: None,
                    remote: None,
                    line: RoundTrip::default(),
                };
                let served = serve_h2(stream, routes.clone(), caller, CONTROL, cancel.clone());
                tasks.spawn(async move {
                    if let Err(error) = served.await {
                        tracing::debug!("control connection ended: {error}");
                    }
                });
            }
            Ok(_) => tracing::warn!("another user tried the control socket: refused"),
            Err(error) => {
                tracing::warn!("control socket: {error}");
                sleep(PAUSE.1).await;
            }
        }
    }
}

/// Serves one established connection until it ends, or until `cancel` and the drain deadline.
pub(super) async fn serve_h2<I>(
    stream: I,
    routes: Routes,
    caller: Caller,
    http2: Http2,
    cancel: CancellationToken,
) -> io::Result<()>
where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let spoke = Arc::new(AtomicBool::new(false));
    let io = TokioIo::new(FirstByte {
        io: stream,
        spoke: spoke.clone(),
    });
    let service = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(caller.clone());
        answer(routes.clone(), request)
    });
    let connection = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .initial_stream_window_size(http2.stream_window)
        .initial_connection_window_size(http2.connection_window)
        .max_frame_size(http2.frame)
        .max_concurrent_streams(http2.streams)
        .max_send_buf_size(http2.send_buffer)
        .max_header_list_size(HEADER_LIST)
        .max_pending_accept_reset_streams(100)
        .max_local_error_reset_streams(1024)
        .keep_alive_interval(KEEPALIVE.0)
        .keep_alive_timeout(KEEPALIVE.1)
        .serve_connection(io, service);
    let mut connection = pin!(connection);
    // Whether anything was said must be asked when the time is up, not before.
    let silent = async {
        sleep(PREFACE).await;
        if spoke.load(Ordering::Relaxed) {
            std::future::pending::<()>().await;
        }
    };
    tokio::select! {
        ended = connection.as_mut() => return ended.map_err(io::Error::other),
        () = silent => return Err(io::Error::new(io::ErrorKind::TimedOut, "no HTTP/2 preface within 5 s")),
        () = cancel.cancelled() => {}
    }
    connection.as_mut().graceful_shutdown();
    timeout(DRAIN, connection)
        .await
        .unwrap_or(Ok(()))
        .map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_given_back() {
        let counts = Counts::default();
        let first = Guest::admit(&counts, 1, 1).unwrap();
        assert!(Guest::admit(&counts, 1, 1).is_none());
        assert!(Guest::admit(&counts, 2, 1).is_some());
        drop(first);
        assert!(Guest::admit(&counts, 1, 1).is_some());
        assert!(counts.lock().unwrap().is_empty());
    }
}
