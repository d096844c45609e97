//! The connections to one source: one, and over a long line further ones, because a sender's socket holds less than such
//! a line does (Linux: 4 MiB, which is 80 MB/s over 50 ms), and because loss slows each of them alone.
//!
//! Invariant: the first connection is the source; the further ones are dialled to the same address, side by side and beside
//! the work. Lanes keep to a connection each, so that none idles while another has two claims to send; a lane whose
//! connection could not be made, or is gone, uses the first.
//!
//! Requests used to take turns over the connections, which were dialled one after the other. A packet trace of 256 MiB over
//! 50 ms showed two connections idle for 0.6 s while the others had two claims each, the last two joining 0.5 s late, and one
//! alone for the last 0.5 s. With two lanes to each, first claims of different lengths and last ones that get shorter,
//! and what `download.rs` tells of the start, 56 MB/s became 71 (curl from nginx in the same run: 72), and over 20 ms with
//! 1 % loss 24 became 37.
//!
//! Each connection has a pace and claims of its own (`Picker::next_beside`). With those of the whole source, one whose
//! window had collapsed after a loss held a long claim to the end: without bbr, 256 MiB over 50 ms took 3.5 to 6.4 s (median
//! of eight 4.8), and then 3.3 to 3.9 (3.6). With three lanes to each, claims for four round trips and not for a second, and
//! last ones in proportion to what each carries, it takes 3.12 to 3.50 (median of fourteen 3.18); curl from nginx 2.87, in
//! which the source is found 0.15 s sooner. With bbr, which a program without privileges seldom gets, all of that made no
//! difference: 3.2 to 3.35.

use std::time::Duration;

use futures_util::{
    FutureExt,
    future::{BoxFuture, Shared},
};
use tokio_util::task::AbortOnDropHandle;

use crate::net::{self, Connection};

/// Connections over a long line; a listener takes eight of one member.
pub const CONNECTIONS: u32 = 4;

/// A connection that is being made, or was.
type Dialled = Shared<BoxFuture<'static, Option<Connection>>>;

/// Clones share the connections.
#[derive(Clone)]
pub(super) struct Links {
    first: Connection,
    further: Vec<Dialled>,
}

impl Links {
    /// `first`, and what `dial` gives for its address if the line is long.
    pub(super) fn new<F>(first: Connection, dial: impl Fn(String) -> F) -> Self
    where
        F: Future<Output = Result<Connection, net::DialError>> + Send + 'static,
    {
        let far = first.remote().filter(|_| first.round_trip() >= net::LONG);
        let further = far.iter().flat_map(|far| (1..CONNECTIONS).map(|_| begin(dial(far.to_string())))).collect();
        Self { first, further }
    }

    pub(super) const fn first(&self) -> &Connection {
        &self.first
    }

    /// The connection of this lane, when it is made.
    pub(super) async fn of(&self, lane: usize) -> Connection {
        let further = (lane % (self.further.len() + 1)).checked_sub(1).map(|i| self.further[i].clone());
        let dialled = match further {
            Some(dialled) => dialled.await,
            None => None,
        };
        dialled.filter(|connection| !connection.is_closed()).unwrap_or_else(|| self.first.clone())
    }

    pub(super) fn take_tls_time(&self) -> Duration {
        let further = self.further.iter().filter_map(|dialled| dialled.peek()?.as_ref());
        self.first.take_tls_time() + further.map(Connection::take_tls_time).sum::<Duration>()
    }
}

/// Dials at once, whether somebody waits for it or not.
fn begin<F>(dial: F) -> Dialled
where
    F: Future<Output = Result<Connection, net::DialError>> + Send + 'static,
{
    let dialling = AbortOnDropHandle::new(tokio::spawn(dial));
    let dialled = async move {
        match dialling.await.ok()? {
            Ok(connection) => Some(connection),
            Err(error) => {
                tracing::debug!("a further connection: {error}");
                None
            }
        }
    };
    dialled.boxed().shared()
}
