//! The dialling side of a TLS session, and what it leaves for others to tell: how much time reading from it takes, and
//! with which error of TLS it ended, of which the layers above pass on the text at most.
//!
//! Invariant: the time of the system calls below is not counted.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, Instant},
};

use rustls::{ClientConfig, pki_types::ServerName};
use tokio::io::{AsyncRead, AsyncWrite, BufReader, ReadBuf};
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::READ_BUFFER;

/// What is told of a session. Clones share it.
#[derive(Clone, Debug, Default)]
pub(super) struct Notes(Arc<Told>);

#[derive(Debug, Default)]
struct Told {
    /// Nanoseconds of decryption.
    reading: AtomicU64,
    error: OnceLock<rustls::Error>,
}

impl Notes {
    /// How long decryption took since this was last asked.
    pub(super) fn take_reading(&self) -> Duration {
        Duration::from_nanos(self.0.reading.swap(0, Ordering::Relaxed))
    }

    /// The first error of TLS itself.
    pub(super) fn error(&self) -> Option<&rustls::Error> {
        self.0.error.get()
    }

    fn add(&self, time: Duration) {
        let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.0.reading.fetch_add(nanos, Ordering::Relaxed);
    }

    fn keep(&self, error: &io::Error) {
        if let Some(error) = tls_error(error) {
            let _ = self.0.error.set(error.clone());
        }
    }
}

/// The error of TLS that an error of reading or shaking hands is made of.
pub(super) fn tls_error(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref().and_then(|inner| inner.downcast_ref())
}

/// What TLS reads from, with the time that this took in all.
struct Below<I> {
    io: I,
    reading: Duration,
}

/// TLS over `I`.
pub(super) struct TimedTls<I> {
    tls: TlsStream<BufReader<Below<I>>>,
    notes: Notes,
}

impl<I: AsyncRead + AsyncWrite + Unpin> TimedTls<I> {
    /// Shakes hands over `io` with whoever `config` says it has to be.
    ///
    /// # Errors
    /// What TLS has to say is a [`rustls::Error`] inside; the other end is told.
    pub(super) async fn connect(
        io: I,
        config: Arc<ClientConfig>,
        name: ServerName<'static>,
        notes: Notes,
    ) -> io::Result<Self> {
        let reading = Duration::ZERO;
        let below = BufReader::with_capacity(READ_BUFFER, Below { io, reading });
        let tls = TlsConnector::from(config).connect(name, below).await?;
        Ok(Self { tls, notes })
    }

    /// The protocol that both ends agreed on.
    pub(super) fn protocol(&self) -> Option<&[u8]> {
        self.tls.get_ref().1.alpn_protocol()
    }

    fn reading(&self) -> Duration {
        self.tls.get_ref().0.get_ref().reading
    }
}

impl<I: AsyncRead + AsyncWrite + Unpin> AsyncRead for TimedTls<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        to: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let (began, before) = (Instant::now(), self.reading());
        let read = Pin::new(&mut self.tls).poll_read(cx, to);
        let below = self.reading().saturating_sub(before);
        self.notes.add(began.elapsed().saturating_sub(below));
        if let Poll::Ready(Err(error)) = &read {
            self.notes.keep(error);
        }
        read
    }
}

impl<I: AsyncRead + AsyncWrite + Unpin> AsyncWrite for TimedTls<I> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tls).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_shutdown(cx)
    }
}

impl<I: AsyncRead + Unpin> AsyncRead for Below<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        to: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let began = Instant::now();
        let read = Pin::new(&mut self.io).poll_read(cx, to);
        self.reading += began.elapsed();
        read
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for Below<I> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use rustls::{
        RootCertStore, ServerConfig,
        pki_types::{CertificateDer, PrivateKeyDer},
    };
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
    use tokio_rustls::{TlsAcceptor, server::TlsStream};

    use super::*;
    use crate::tls::provider;

    struct Ends {
        server: TlsAcceptor,
        client: Arc<ClientConfig>,
    }

    fn ends() -> Ends {
        let made = rcgen::generate_simple_self_signed(["it".to_owned()]).unwrap();
        let certificate: CertificateDer<'static> = made.cert.der().clone();
        let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(certificate.clone()).unwrap();
        let versions = &[&rustls::version::TLS13];
        let client = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(versions)
            .unwrap();
        let server = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(versions)
            .unwrap();
        let mut server = server
            .with_no_client_auth()
            .with_single_cert(vec![certificate], key)
            .unwrap();
        server.send_tls13_tickets = 0;
        Ends {
            server: Arc::new(server).into(),
            client: Arc::new(client.with_root_certificates(roots).with_no_client_auth()),
        }
    }

    /// Both ends of a line that holds `line` bytes; a socket always has room for the few that are said in the middle of a
    /// handshake.
    async fn connected(line: usize) -> (TimedTls<DuplexStream>, TlsStream<DuplexStream>) {
        let (ends, (near, far)) = (ends(), duplex(line));
        let name = ServerName::try_from("it").unwrap();
        let near = TimedTls::connect(near, ends.client, name, Notes::default());
        let (near, far) = tokio::join!(near, ends.server.accept(far));
        (near.unwrap(), far.unwrap())
    }

    #[tokio::test]
    async fn bytes_pass_both_ways_over_lines_of_any_length() {
        let sent: Vec<u8> = (0..300_000_u32)
            .map(|i| (i % 251).to_le_bytes()[0])
            .collect();
        for line in [64, 1000, 20_000, 1 << 20] {
            let (near, far) = connected(line).await;
            let (mut far_in, mut far_out) = tokio::io::split(far);
            let echo = async {
                tokio::io::copy(&mut far_in, &mut far_out).await.unwrap();
                far_out.shutdown().await.unwrap();
            };
            let notes = near.notes.clone();
            let (mut near_in, mut near_out) = tokio::io::split(near);
            let talk = async {
                for chunk in sent.chunks(70_001) {
                    near_out.write_all(chunk).await.unwrap();
                }
                near_out.shutdown().await.unwrap();
            };
            let mut got = vec![];
            let listen = async {
                // A few bytes first, so that the rest of their record has to wait.
                let mut some = [0; 7];
                near_in.read_exact(&mut some).await.unwrap();
                got.extend_from_slice(&some);
                near_in.read_to_end(&mut got).await.unwrap();
            };
            tokio::join!(echo, talk, listen);
            assert!(got == sent, "over a line of {line}");
            assert!(notes.take_reading() > Duration::ZERO);
        }
    }

    #[tokio::test]
    async fn an_end_without_farewell_is_an_error() {
        let (mut near, mut far) = connected(1 << 16).await;
        far.write_all(b"half of").await.unwrap();
        far.flush().await.unwrap();
        drop(far.into_inner().0);
        let mut got = vec![];
        let error = near.read_to_end(&mut got).await.unwrap_err();
        assert_eq!(
            (error.kind(), &got[..]),
            (io::ErrorKind::UnexpectedEof, &b"half of"[..])
        );
    }

    #[tokio::test]
    async fn whoever_is_refused_is_told() {
        let (ends, stranger, (near, far)) = (ends(), ends(), duplex(1 << 16));
        let name = ServerName::try_from("it").unwrap();
        let near = TimedTls::connect(near, ends.client, name, Notes::default());
        let (near, far) = tokio::join!(near, stranger.server.accept(far));
        let error = near.err().unwrap();
        assert!(
            matches!(
                tls_error(&error),
                Some(rustls::Error::InvalidCertificate(_))
            ),
            "{error}"
        );
        let told = far.unwrap_err();
        assert!(
            matches!(tls_error(&told), Some(rustls::Error::AlertReceived(_))),
            "{told}"
        );
    }

    #[tokio::test]
    async fn noise_is_no_session() {
        let (near, mut far) = duplex(1 << 16);
        let name = ServerName::try_from("it").unwrap();
        far.write_all(b"SSH-2.0-OpenSSH_9.2p1 Debian-2+deb12u3\r\n")
            .await
            .unwrap();
        let near = TimedTls::connect(near, ends().client, name, Notes::default());
        assert_eq!(near.await.err().unwrap().kind(), io::ErrorKind::InvalidData);
    }
}
