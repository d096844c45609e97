//! A TCP connection whose congestion control follows what the line is like.
//!
//! With loss a connection under bbr carries many times what one under cubic does; on a LAN it carries half of that, and over
//! a long line that loses nothing it lets the line run dry every few round trips. So it is bbr where the line is long and the
//! socket, always full, takes little in a round trip all the same. Which lines are long, the receiver knows and says in its
//! request, so the sender is told while it serves.
//!
//! Among several receivers of one content it is cubic for all: a round trip is then mostly the queue before the sender's own
//! line, and who connected a moment later than the first, and got bbr, would get another share.
//!
//! Invariant: what the kernel refuses changes nothing.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, Instant},
};

use rustix::net::sockopt::set_tcp_congestion;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

/// A line is long from this round trip on: more than a busy LAN and a busy machine make of a short one.
pub const LONG: Duration = Duration::from_millis(10);

/// Round trips of waiting for the socket after which it is known what a line takes: one that loses nothing has come from ten
/// packets to more than is looked for in half of them.
const TRIAL: u32 = 8;

/// Less than so many bytes in each of these: the line loses packets, or is slower than 1 Gbit/s over 20 ms, where bbr costs a
/// few percent. With 1 % loss cubic comes to 16 KB, with 0.1 % to 100.
const NARROW: usize = 256 << 10;

const UNKNOWN: u32 = 0;
const IS_PLAIN: u32 = 1;

/// What is known of a connection's line: its round trip in microseconds, if it is long. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct RoundTrip(Arc<AtomicU32>);

impl RoundTrip {
    /// What it leads to is sent to others as well: as if it were short, from the next byte sent on.
    pub fn shared(&self) {
        self.0.store(IS_PLAIN, Ordering::Relaxed);
    }

    /// The round trip as measured by the other end; applies from the next byte sent.
    pub fn measured(&self, round_trip: Duration) {
        let micros = u32::try_from(round_trip.as_micros()).unwrap_or(u32::MAX);
        self.0.store(
            if round_trip >= LONG { micros } else { IS_PLAIN },
            Ordering::Relaxed,
        );
    }
}

/// A TCP connection that obeys its [`RoundTrip`].
pub(super) struct Tuned {
    stream: TcpStream,
    line: RoundTrip,
    /// Set to this; nothing while it has what the system gave it.
    applied: Option<&'static str>,
    waits_since: Option<Instant>,
    /// Since the trial began: for how long the socket was full, and bytes that it took.
    waited: Duration,
    taken: usize,
}

impl Tuned {
    pub(super) const fn new(stream: TcpStream, line: RoundTrip) -> Self {
        Self {
            stream,
            line,
            applied: None,
            waits_since: None,
            waited: Duration::ZERO,
            taken: 0,
        }
    }

    fn apply(&mut self, name: &'static str) {
        if self.applied.replace(name) != Some(name)
            && let Err(error) = set_tcp_congestion(&self.stream, name)
        {
            tracing::debug!("congestion control {name}: {error}");
        }
    }

    /// Learns from what became of a write.
    fn weigh(&mut self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        let round_trip = match self.line.0.load(Ordering::Relaxed) {
            UNKNOWN => return written,
            IS_PLAIN => {
                self.apply("cubic");
                (self.waits_since, self.waited, self.taken) = (None, Duration::ZERO, 0);
                return written;
            }
            micros => Duration::from_micros(micros.into()),
        };
        match &written {
            Poll::Pending => _ = self.waits_since.get_or_insert_with(Instant::now),
            Poll::Ready(Ok(n)) => {
                self.waited += self
                    .waits_since
                    .take()
                    .map_or(Duration::ZERO, |since| since.elapsed());
                self.taken = self.taken.saturating_add(*n);
                if self.waited >= round_trip * TRIAL {
                    if self.taken < NARROW * TRIAL as usize {
                        self.apply("bbr");
                    }
                    (self.waited, self.taken) = (Duration::ZERO, 0);
                }
            }
            Poll::Ready(Err(_)) => {}
        }
        written
    }
}

impl AsyncRead for Tuned {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Tuned {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.weigh(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.weigh(written)
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
    async fn a_long_line_that_takes_little_gets_bbr_where_the_kernel_allows_it() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (near, far) = tokio::join!(
            TcpStream::connect(listener.local_addr().unwrap()),
            listener.accept()
        );
        let (line, mut far) = (RoundTrip::default(), far.unwrap().0);
        let before = tcp_congestion(near.as_ref().unwrap()).unwrap();
        let allowed = |name: &str| {
            if set_tcp_congestion(&far, name).is_ok() {
                name.to_owned()
            } else {
                before.clone()
            }
        };
        let (cubic, bbr) = (allowed("cubic"), allowed("bbr"));
        let mut near = Tuned::new(near.unwrap(), line.clone());
        let mut written = Vec::new();
        for (told, waited, taken, expected) in [
            (None, LONG * TRIAL, 0, &before),
            (Some(LONG), LONG * TRIAL, NARROW * TRIAL as usize, &before),
            (Some(LONG), LONG * (TRIAL - 1), 0, &before),
            (Some(LONG), LONG * TRIAL, 0, &bbr),
            (Some(LONG), LONG * TRIAL, NARROW * TRIAL as usize, &bbr),
            (Some(LONG / 2), LONG * TRIAL, 0, &cubic),
        ] {
            told.inspect(|round_trip| line.measured(*round_trip));
            (near.waited, near.taken) = (waited, taken);
            near.write_all(b"a").await.unwrap();
            written.push(b'a');
            let now = tcp_congestion(&near.stream).unwrap();
            assert!(
                now == *expected || bbr == before || cubic == before,
                "{told:?} {waited:?} {taken}: {now}"
            );
        }
        line.shared();
        near.write_all(b"b").await.unwrap();
        written.push(b'b');
        assert_eq!(tcp_congestion(&near.stream).unwrap(), cubic);
        let mut got = vec![0; written.len()];
        far.read_exact(&mut got).await.unwrap();
        assert_eq!(
            got, written,
            "bytes flow whatever the kernel says to the wish"
        );
    }
}
