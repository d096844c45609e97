//! The dialling side of a TLS session, which is the receiving side of all that moves bytes.
//!
//! rustls can own its buffers, as it does on the accepting side, under tokio-rustls. Then it takes 4 KiB of ciphertext at
//! a time and copies every byte four times between socket and reader, two of them because its buffer grows and shrinks
//! around each record. Here the ciphertext stays where it was received and is decrypted there, record by record.
//!
//! Invariant: plaintext is given only of a session whose handshake is complete, and an end without TLS's own farewell is
//! an error. Who is owed an alert gets it.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use rustls::{
    ClientConfig,
    client::UnbufferedClientConnection,
    pki_types::ServerName,
    unbuffered::{ConnectionState, EncodeError, EncryptError},
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};

/// Ciphertext that one system call may bring: several records, which have 16 KiB and some bytes each at most.
const RECEIVED: usize = 128 << 10;
/// Ciphertext that may wait for the socket before a writer has to.
const UNSENT: usize = 64 << 10;
/// Plaintext taken from a writer at a time.
const TAKEN: usize = 64 << 10;
/// More than is added to that by its records, and than most messages of a handshake have.
const ROOM: usize = 1 << 10;

/// How long decryption took. Clones share it.
#[derive(Clone, Debug, Default)]
pub(super) struct Clock(Arc<AtomicU64>);

impl Clock {
    /// Time since this was last asked.
    pub(super) fn take(&self) -> Duration {
        Duration::from_nanos(self.0.swap(0, Ordering::Relaxed))
    }

    fn add(&self, since: Instant) {
        self.0.fetch_add(
            u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX),
            Ordering::Relaxed,
        );
    }
}

/// TLS over `I`.
pub(super) struct ClientTls<I> {
    io: I,
    session: UnbufferedClientConnection,
    /// Ciphertext is `received[begin..end]`.
    received: Box<[u8]>,
    begin: usize,
    end: usize,
    /// Plaintext that found no reader with room, from `given` on.
    plain: Vec<u8>,
    given: usize,
    /// Ciphertext for the socket, from `sent` on.
    unsent: Vec<u8>,
    sent: usize,
    /// The other end has said farewell.
    is_over: bool,
    has_said_farewell: bool,
    clock: Clock,
}

/// What is to be said to the other end.
#[derive(Clone, Copy)]
enum Say<'a> {
    Nothing,
    Bytes(&'a [u8]),
    Farewell,
}

/// What came of one step of a session.
enum Step {
    /// Something; there may be more to do at once.
    Done,
    /// It was said: encrypted.
    Said,
    /// Nothing can be done before more ciphertext comes.
    Blocked,
    /// The other end has said farewell.
    Over,
}

fn failed(error: rustls::Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// Appends what `write` puts into a slice of `room` bytes, or of as many as it then asks for.
fn append(
    to: &mut Vec<u8>,
    mut room: usize,
    mut write: impl FnMut(&mut [u8]) -> Result<usize, Option<usize>>,
) -> io::Result<()> {
    let before = to.len();
    loop {
        to.resize(before + room, 0);
        let written = write(&mut to[before..]);
        to.truncate(before + *written.as_ref().unwrap_or(&0));
        match written {
            Ok(_) => return Ok(()),
            Err(Some(needed)) if needed > room => room = needed,
            Err(_) => return Err(io::Error::other("TLS refuses to encrypt more")),
        }
    }
}

const fn needed(error: &EncryptError) -> Option<usize> {
    match error {
        EncryptError::InsufficientSize(size) => Some(size.required_size),
        EncryptError::EncryptExhausted => None,
    }
}

const fn needed_to_encode(error: &EncodeError) -> Option<usize> {
    match error {
        EncodeError::InsufficientSize(size) => Some(size.required_size),
        EncodeError::AlreadyEncoded => None,
    }
}

impl<I> ClientTls<I> {
    /// The protocol that both ends agreed on.
    pub(super) fn protocol(&self) -> Option<&[u8]> {
        self.session.alpn_protocol()
    }

    /// One step of the session. Plaintext of one record goes to `to`, and what that has no room for into `plain`.
    fn step(&mut self, to: &mut ReadBuf<'_>, say: Say<'_>) -> io::Result<Step> {
        let status = self
            .session
            .process_tls_records(&mut self.received[self.begin..self.end]);
        let mut discard = status.discard;
        let step = match status.state {
            Ok(ConnectionState::ReadTraffic(mut traffic)) => {
                while let Some(record) = traffic.next_record() {
                    let record = record.map_err(failed)?;
                    let at_once = if self.plain.is_empty() {
                        record.payload.len().min(to.remaining())
                    } else {
                        0
                    };
                    let (now, later) = record.payload.split_at(at_once);
                    to.put_slice(now);
                    self.plain.extend_from_slice(later);
                    discard += record.discard;
                }
                Ok(Step::Done)
            }
            Ok(ConnectionState::EncodeTlsData(mut data)) => {
                append(&mut self.unsent, ROOM, |room| {
                    data.encode(room).map_err(|e| needed_to_encode(&e))
                })?;
                Ok(Step::Done)
            }
            Ok(ConnectionState::TransmitTlsData(data)) => {
                data.done();
                Ok(Step::Done)
            }
            Ok(ConnectionState::WriteTraffic(mut traffic)) => match say {
                Say::Nothing => Ok(Step::Blocked),
                Say::Bytes(bytes) => {
                    let encrypt =
                        |room: &mut [u8]| traffic.encrypt(bytes, room).map_err(|e| needed(&e));
                    append(&mut self.unsent, bytes.len() + ROOM, encrypt)
                        .map(|()| Ok(Step::Said))?
                }
                Say::Farewell => {
                    let close =
                        |room: &mut [u8]| traffic.queue_close_notify(room).map_err(|e| needed(&e));
                    append(&mut self.unsent, ROOM, close).map(|()| Ok(Step::Said))?
                }
            },
            Ok(ConnectionState::BlockedHandshake) => Ok(Step::Blocked),
            // The last arm is early data, which no client receives.
            Ok(ConnectionState::PeerClosed | ConnectionState::Closed | _) => Ok(Step::Over),
            Err(error) => Err(error),
        };
        self.begin += discard;
        self.is_over |= matches!(step, Ok(Step::Over));
        step.map_err(|error| {
            if let Ok(ConnectionState::EncodeTlsData(mut alert)) =
                self.session.process_tls_records(&mut []).state
            {
                let _ = append(&mut self.unsent, ROOM, |room| {
                    alert.encode(room).map_err(|e| needed_to_encode(&e))
                });
            }
            failed(error)
        })
    }

    /// Puts the beginning of a record to the front, for its rest to have room.
    fn make_room(&mut self) {
        if self.begin > 0 {
            self.received.copy_within(self.begin..self.end, 0);
            (self.begin, self.end) = (0, self.end - self.begin);
        }
    }

    /// Gives plaintext that waited for a reader.
    fn give(&mut self, to: &mut ReadBuf<'_>) {
        let n = to.remaining().min(self.plain.len() - self.given);
        to.put_slice(&self.plain[self.given..self.given + n]);
        self.given += n;
        if self.given == self.plain.len() {
            self.plain.clear();
            self.given = 0;
        }
    }
}

impl<I: AsyncRead + AsyncWrite + Unpin> ClientTls<I> {
    /// Shakes hands over `io` with whoever `config` says it has to be.
    ///
    /// # Errors
    /// What TLS has to say is a [`rustls::Error`] inside; the other end is told.
    pub(super) async fn connect(
        io: I,
        config: Arc<ClientConfig>,
        name: ServerName<'static>,
        clock: Clock,
    ) -> io::Result<Self> {
        let mut tls = Self {
            io,
            session: UnbufferedClientConnection::new(config, name).map_err(failed)?,
            received: vec![0; RECEIVED].into(),
            begin: 0,
            end: 0,
            plain: vec![],
            given: 0,
            unsent: vec![],
            sent: 0,
            is_over: false,
            has_said_farewell: false,
            clock,
        };
        loop {
            let step = tls.step(&mut ReadBuf::new(&mut []), Say::Nothing);
            let is_blocked = !matches!(step, Ok(Step::Done));
            if is_blocked && !tls.unsent.is_empty() {
                let sent = tls.io.write_all(&tls.unsent).await;
                tls.unsent.clear();
                // That the other end cannot be told is no news beside what went wrong.
                if step.is_ok() {
                    sent?;
                }
            }
            match step? {
                Step::Blocked if !tls.session.is_handshaking() => return Ok(tls),
                Step::Blocked => {
                    tls.make_room();
                    match tls.io.read(&mut tls.received[tls.end..]).await? {
                        0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                        n => tls.end += n,
                    }
                }
                Step::Over => return Err(io::ErrorKind::UnexpectedEof.into()),
                Step::Done | Step::Said => {}
            }
        }
    }

    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.sent < self.unsent.len() {
            match ready!(Pin::new(&mut self.io).poll_write(cx, &self.unsent[self.sent..]))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                n => self.sent += n,
            }
        }
        self.unsent.clear();
        self.sent = 0;
        Poll::Ready(Ok(()))
    }

    /// Takes what is to be said, as soon as what waits for the socket lets it.
    fn poll_say(&mut self, cx: &mut Context<'_>, say: Say<'_>) -> Poll<io::Result<()>> {
        loop {
            if self.unsent.len() - self.sent >= UNSENT {
                ready!(self.poll_send(cx))?;
            }
            match self.step(&mut ReadBuf::new(&mut []), say)? {
                Step::Said => return Poll::Ready(Ok(())),
                Step::Done | Step::Over => {}
                Step::Blocked => return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
            }
        }
    }
}

impl<I: AsyncRead + AsyncWrite + Unpin> AsyncRead for ClientTls<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        to: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let (this, before) = (&mut *self, to.filled().len());
        this.give(to);
        loop {
            let start = Instant::now();
            while to.remaining() > 0
                && !this.is_over
                && matches!(this.step(to, Say::Nothing)?, Step::Done)
            {}
            let is_given = to.filled().len() > before;
            if is_given {
                this.clock.add(start);
            }
            if !this.unsent.is_empty()
                && let Poll::Ready(sent) = this.poll_send(cx)
            {
                sent?;
            }
            if is_given || this.is_over || to.remaining() == 0 {
                return Poll::Ready(Ok(()));
            }
            this.make_room();
            let mut more = ReadBuf::new(&mut this.received[this.end..]);
            ready!(Pin::new(&mut this.io).poll_read(cx, &mut more))?;
            match more.filled().len() {
                0 => return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())),
                n => this.end += n,
            }
        }
    }
}

impl<I: AsyncRead + AsyncWrite + Unpin> AsyncWrite for ClientTls<I> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let bytes = &bytes[..bytes.len().min(TAKEN)];
        ready!(self.poll_say(cx, Say::Bytes(bytes)))?;
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_send(cx))?;
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.has_said_farewell {
            ready!(self.poll_say(cx, Say::Farewell))?;
            self.has_said_farewell = true;
        }
        ready!(self.poll_send(cx))?;
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
    use tokio::io::{DuplexStream, duplex};
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
    async fn connected(line: usize) -> (ClientTls<DuplexStream>, TlsStream<DuplexStream>) {
        let (ends, (near, far)) = (ends(), duplex(line));
        let name = ServerName::try_from("it").unwrap();
        let near = ClientTls::connect(near, ends.client, name, Clock::default());
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
            let clock = near.clock.clone();
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
            assert!(clock.take() > Duration::ZERO);
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
        let near = ClientTls::connect(near, ends.client, name, Clock::default());
        let (near, far) = tokio::join!(near, stranger.server.accept(far));
        let error = near.err().unwrap();
        let inner = error
            .get_ref()
            .and_then(|inner| inner.downcast_ref::<rustls::Error>());
        assert!(
            matches!(inner, Some(rustls::Error::InvalidCertificate(_))),
            "{error}"
        );
        assert!(
            far.unwrap_err()
                .to_string()
                .contains("received fatal alert")
        );
    }

    #[tokio::test]
    async fn noise_is_no_session() {
        let (near, mut far) = duplex(1 << 16);
        let name = ServerName::try_from("it").unwrap();
        far.write_all(b"SSH-2.0-OpenSSH_9.2p1 Debian-2+deb12u3\r\n")
            .await
            .unwrap();
        let near = ClientTls::connect(near, ends().client, name, Clock::default());
        assert_eq!(near.await.err().unwrap().kind(), io::ErrorKind::InvalidData);
    }
}
