//! A TCP connection whose congestion control follows the length of the line.
//!
//! Over 20 ms with 1 % loss one connection under cubic carries 0.8 MB/s and one under bbr 21; on a LAN bbr carries half of
//! what cubic does. Which it is, the receiver knows and says in its request, so the sender is told while it serves. Among
//! several receivers of one content it is cubic for all: a round trip is then mostly the queue before the sender's own
//! line, and of 8 receivers those whose connection was made a moment later than the first, and got bbr, got another share.
//!
//! Over a long line that loses nothing bbr lets the line run dry every few round trips, and cubic does not (one connection,
//! 50 ms: 3.7 s and 3.3 for 256 MiB). To begin with cubic and to change when the socket makes us wait for long saved 0.1 s of
//! 3.2 there, and cost 0.3 s of 1.5, and once 6, where 0.1 % was lost.
//!
//! Invariant: what the kernel refuses changes nothing.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use rustix::net::sockopt::set_tcp_congestion;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

/// A line is long from this round trip on: more than a busy LAN and a busy machine make of a short one.
pub const LONG: Duration = Duration::from_millis(10);

/// Bytes that go over a long line before bbr takes over. It paces what it sends from its first measurements on, and those of
/// a line that has carried nothing but a handshake are low: over 50 ms cubic was a round trip ahead of it.
const WARM: usize = 256 << 10;

const UNKNOWN: u8 = 0;
const IS_SHORT: u8 = 1;
const IS_LONG: u8 = 2;

/// What is known of a connection's length. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Line(Arc<AtomicU8>);

impl Line {
    /// What it leads to is sent to others as well: as if it were short, from the next byte sent on.
    pub fn shared(&self) {
        self.0.store(IS_SHORT, Ordering::Relaxed);
    }

    /// The round trip as measured by the other end; applies from the next byte sent.
    pub fn measured(&self, round_trip: Duration) {
        self.0.store(if round_trip >= LONG { IS_LONG } else { IS_SHORT }, Ordering::Relaxed);
    }
}

/// A TCP connection that obeys its [`Line`].
pub(super) struct Tuned {
    stream: TcpStream,
    line: Line,
    applied: u8,
    sent: usize,
}

impl Tuned {
    pub(super) const fn new(stream: TcpStream, line: Line) -> Self {
        Self { stream, line, applied: UNKNOWN, sent: 0 }
    }

    fn tune(&mut self) {
        let wanted = self.line.0.load(Ordering::Relaxed);
        if wanted == self.applied || wanted == IS_LONG && self.sent < WARM {
            return;
        }
        self.applied = wanted;
        let name = if wanted == IS_LONG { "bbr" } else { "cubic" };
        if let Err(error) = set_tcp_congestion(&self.stream, name) {
            tracing::debug!("congestion control {name}: {error}");
        }
    }
}

impl Tuned {
    fn count(&mut self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if let Poll::Ready(Ok(n)) = &written {
            self.sent = self.sent.saturating_add(*n);
        }
        written
    }
}

impl AsyncRead for Tuned {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Tuned {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.tune();
        let polled = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.count(polled)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.tune();
        let polled = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.count(polled)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use rustix::net::sockopt::tcp_congestion;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    use super::*;

    #[tokio::test]
    async fn bytes_flow_whatever_the_kernel_says_to_the_wish() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (near, far) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
        let (line, mut far) = (Line::default(), far.unwrap().0);
        let before = tcp_congestion(near.as_ref().unwrap()).unwrap();
        let mut near = Tuned::new(near.unwrap(), line.clone());
        near.write_all(b"a").await.unwrap();
        assert_eq!(tcp_congestion(&near.stream).unwrap(), before, "nothing is known yet");
        for (round_trip, name) in [(LONG, "bbr"), (LONG / 2, "cubic")] {
            let is_allowed = set_tcp_congestion(&far, name).is_ok();
            line.measured(round_trip);
            near.sent = WARM;
            near.write_all(b"b").await.unwrap();
            assert!(!is_allowed || tcp_congestion(&near.stream).unwrap() == name);
        }
        (near.sent, near.applied) = (WARM - 1, UNKNOWN);
        line.measured(LONG);
        near.tune();
        assert_eq!(near.applied, UNKNOWN, "a long line is warmed up first");
        line.shared();
        near.write_all(b"c").await.unwrap();
        assert_ne!(tcp_congestion(&near.stream).unwrap(), "bbr");
        let mut got = [0; 4];
        far.read_exact(&mut got).await.unwrap();
        assert_eq!(&got, b"abbc");
    }
}
