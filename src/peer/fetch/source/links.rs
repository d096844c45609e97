//! The connections to one source: one, and over a long line further ones, because a sender's socket holds less than such
//! a line does (Linux: 4 MiB, which is 80 MB/s over 50 ms), because each begins with ten packets, and because loss slows
//! each of them alone.
//!
//! Invariant: the first connection is the source; the further ones are dialled side by side and beside the work, and let go
//! but for one where others fetch the same. Lanes keep to a connection each, so that none idles while another has two
//! claims to send; a lane whose connection could not be made, or is gone, uses the first.
//!
//! They are made at once with the first, where the tracker is far and its members are so, too; else when the source has
//! told that nobody else fetches from it, for a line that is full of others' bytes looks long.
//!
//! Each has a pace and claims of its own (`Picker::next_beside`): with those of the whole source, one whose window collapsed
//! after a loss holds a long claim to the end. Over a line that one connection fills, further ones only race with one
//! another: they wait while others have the line, and are let go when they get nothing (`fetch/connections.rs`).

use std::{
    future::ready,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use futures_util::{
    FutureExt,
    future::{BoxFuture, Shared},
};
use tokio_util::task::AbortOnDropHandle;

use crate::net::{self, Connection};

/// Connections over a long line; a listener takes 256 of one member.
pub const CONNECTIONS: u32 = 8;

/// A connection that is being made, or was.
pub(super) type Dialled = Shared<BoxFuture<'static, Option<Connection>>>;

/// Makes one more connection.
type Dial = Arc<dyn Fn() -> Dialled + Send + Sync>;

/// Clones share the connections.
#[derive(Clone)]
pub(super) struct Links {
    first: Connection,
    further: Arc<Mutex<Vec<Dialled>>>,
    dial: Dial,
}

impl Links {
    /// `first`, and what `dial` makes when it is wanted.
    pub(super) fn new<F>(first: Connection, dial: impl Fn() -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Result<Connection, net::DialError>> + Send + 'static,
    {
        Self {
            first,
            further: Arc::default(),
            dial: Arc::new(move || begin(dial())),
        }
    }

    /// Takes what was dialled beside the first one.
    pub(super) fn add(&self, further: Vec<Dialled>) {
        self.further().extend(further);
    }

    pub(super) const fn first(&self) -> &Connection {
        &self.first
    }

    fn further(&self) -> MutexGuard<'_, Vec<Dialled>> {
        self.further
            .lock()
            .expect("no panic while the lock is held")
    }

    /// Makes the further connections, unless they are made already.
    pub(super) fn widen(&self) {
        let mut further = self.further();
        if further.is_empty() {
            further.extend((1..CONNECTIONS).map(|_| (self.dial)()));
        }
    }

    /// Lets go of the further connections but one. What is under way over them goes on.
    pub(super) fn narrow(&self) {
        self.further().truncate(1);
    }

    /// Lets go of this further connection; its lanes are to fetch no more.
    pub(super) fn let_go(&self, connection: usize) {
        let mut further = self.further();
        if let Some(link) = connection.checked_sub(1).and_then(|at| further.get_mut(at)) {
            *link = ready(None).boxed().shared();
        }
    }

    /// Are there further connections, or will there be?
    pub(super) fn are_wide(&self) -> bool {
        !self.further().is_empty()
    }

    /// The connection of this lane, when it is made.
    pub(super) async fn of(&self, lane: usize) -> Connection {
        let further = {
            let further = self.further();
            (lane % (further.len() + 1))
                .checked_sub(1)
                .map(|i| further[i].clone())
        };
        let dialled = match further {
            Some(dialled) => dialled.await,
            None => None,
        };
        dialled
            .filter(|connection| !connection.is_closed())
            .unwrap_or_else(|| self.first.clone())
    }

    pub(super) fn take_tls_time(&self) -> Duration {
        let further = self.further();
        let further = further
            .iter()
            .filter_map(|dialled| dialled.peek()?.as_ref());
        self.first.take_tls_time() + further.map(Connection::take_tls_time).sum::<Duration>()
    }
}

/// Dials at once, whether somebody waits for it or not.
pub(super) fn begin<F>(dial: F) -> Dialled
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
