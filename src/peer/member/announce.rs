//! Keeps the tracker's picture of this peer true: registers the library, sends deltas when it or the addresses change,
//! heartbeats, and says goodbye. When the line to the tracker breaks it is dialled again at once, so that a tracker that
//! restarts soon knows everybody.
//!
//! Invariant: a generation names one state of the listing, rises with each announcement, and is told in heartbeats only
//! after the tracker accepted it.

use std::{
    future::pending,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::Result;
use tokio::{
    sync::watch,
    time::{Instant, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;
use tonic::Code;

use super::{
    membership::Membership,
    standing::{TrackerStanding, one_line},
    tracker_client::{TrackerClient, batches, status_of},
};
use crate::peer::sharing::{
    library::{Library, Update},
    shares::Shares,
};
use crate::{
    backoff::Backoff,
    exit::{Exit, Failed},
    net,
    proto::{
        Activity, HeartbeatRequest, RegisterHeader, RegisterRequest, heartbeat_response::State,
        register_request::Part,
    },
};

/// Changes within this time travel together; while one announcement follows another, the time doubles up to a limit.
const GATHER: Duration = Duration::from_millis(100);
const LONGEST_GATHER: Duration = Duration::from_millis(400);
/// The same for a peer that lives as long as a command and fetches small files only. Whoever fetches the same asks the tracker
/// for others as late as this, and by then both are mostly done: to list 10,000 files for the half second that is left took a
/// fortieth of all the time.
const SHORT_LIVED_GATHER: Duration = Duration::from_secs(1);
/// How long the answer to a goodbye is waited for; by a peer that lives as long as a command, only so long that the goodbye
/// is certainly sent. Over 50 ms that is a thirtieth of a second less, of the three that 256 MiB take at 1 Gbit/s.
const GOODBYE: Duration = Duration::from_secs(2);
const SHORT_GOODBYE: Duration = Duration::from_millis(20);
const FIRST_INTERVAL: Duration = Duration::from_secs(10);
/// When to dial again after the line broke, and how often while nobody answers; the shortest is half of the first.
const REDIAL: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(1));
/// The same while the tracker answers, but not as it should.
const RETRY: (Duration, Duration) = (Duration::from_millis(500), FIRST_INTERVAL);
/// How often this machine's addresses are looked at.
const LOOK: Duration = Duration::from_secs(2);
/// Between two heartbeats, whatever happens meanwhile.
const SOONEST: Duration = Duration::from_secs(1);

/// Where this peer can be reached.
#[derive(Clone, Debug)]
pub struct Reachable {
    /// The bound socket.
    pub bound: SocketAddr,
    /// What the operator says instead of the interfaces.
    pub advertise: Vec<String>,
}

impl Reachable {
    /// "HOST:PORT" values as of now.
    #[must_use]
    pub fn addresses(&self) -> Vec<String> {
        if !self.advertise.is_empty() {
            return self.advertise.clone();
        }
        let found = net::reachable_at(self.bound).unwrap_or_else(|error| {
            tracing::warn!("listing this machine's addresses: {error}");
            vec![]
        });
        found.iter().map(ToString::to_string).collect()
    }
}

/// The announcing task of a Node.
pub struct Announcer {
    /// What is announced.
    pub library: Library,
    /// Where it comes from: whether there is more to come.
    pub shares: Arc<Shares>,
    /// To whom.
    pub tracker: Arc<TrackerClient>,
    /// Whose trust list is kept up to date.
    pub membership: Arc<Membership>,
    /// From where.
    pub reachable: Reachable,
    /// Shown in `status`.
    pub standing: watch::Sender<TrackerStanding>,
    /// What moves now, and whether anything does.
    pub activity: Box<dyn FnMut() -> (Activity, bool) + Send + Sync>,
    /// Changes when a Get begins or ends, so that the tracker soon hears of it.
    pub attached: watch::Receiver<usize>,
    /// It lives as long as a command.
    pub is_short_lived: bool,
}

/// When the next heartbeat is due.
struct Rhythm {
    quiet: Duration,
    busy: Duration,
    is_busy: bool,
}

impl Rhythm {
    fn quiet(&mut self, heartbeat_ms: u32) {
        self.quiet = Duration::from_millis(heartbeat_ms.max(100).into());
    }

    fn busy(&mut self, busy_ms: u32) {
        let told = if busy_ms > 0 {
            Duration::from_millis(busy_ms.into())
        } else {
            self.quiet
        };
        self.busy = told.clamp(SOONEST, self.quiet.max(SOONEST));
    }

    fn next(&self) -> Duration {
        let interval = if self.is_busy { self.busy } else { self.quiet };
        interval.mul_f64(0.9 + 0.2 * rand::random::<f64>())
    }
}

/// What the tracker is known to hold.
struct Announced {
    generation: u64,
    version: u64,
    is_scanning: bool,
    addresses: Vec<String>,
}

impl Announcer {
    /// Announces until cancelled, then leaves.
    pub async fn run(mut self, cancel: CancellationToken) {
        let mut announced: Option<Announced> = None;
        let mut rhythm = Rhythm {
            quiet: FIRST_INTERVAL,
            busy: SOONEST,
            is_busy: false,
        };
        let (mut away, mut refused) = (
            Backoff::new(REDIAL.0, REDIAL.1),
            Backoff::new(RETRY.0, RETRY.1),
        );
        let mut changed = self.library.changed();
        let (mut due, mut beat) = (Instant::now(), Instant::now());
        let (mut gather, mut last) = (GATHER, due);
        loop {
            // While the tracker is not reached, nothing hurries the next attempt.
            let wait = async {
                tokio::select! {
                    () = sleep_until(due) => due,
                    Ok(()) = changed.changed(), if announced.is_some() => {
                        gather = if last.elapsed() < gather { LONGEST_GATHER.min(gather * 2) } else { GATHER };
                        self.gather(gather).await;
                        due
                    }
                    Ok(()) = self.attached.changed(), if announced.is_some() => due.min(beat + rhythm.busy),
                    () = outdated(&self.shares, &self.reachable, announced.as_ref()) => due,
                    () = self.tracker.broken(), if announced.is_some() => {
                        let pause = REDIAL.1.mul_f64(0.1 + 0.9 * rand::random::<f64>());
                        tokio::time::sleep(pause).await;
                        Instant::now()
                    }
                }
            };
            let Some(next) = cancel.run_until_cancelled(wait).await else {
                break;
            };
            due = next;
            let is_first = announced.is_none();
            let Some(outcome) = cancel
                .run_until_cancelled(self.step(&mut announced, &mut rhythm, due))
                .await
            else {
                break;
            };
            last = Instant::now();
            match outcome {
                Ok(()) => {
                    away.reset();
                    refused.reset();
                    self.standing.send_replace(TrackerStanding::ONLINE);
                    if due <= Instant::now() {
                        beat = Instant::now();
                        // The first report follows a full registration at once: what comes later is counted from it.
                        due = if is_first { beat } else { beat + rhythm.next() };
                    }
                }
                Err(error) => {
                    announced = None;
                    let standing = TrackerStanding::after(&error);
                    if *self.standing.borrow() != standing {
                        tracing::warn!("{}", one_line(&error));
                    }
                    self.standing.send_replace(standing);
                    let backoff = if is_away(&error) {
                        &mut away
                    } else {
                        &mut refused
                    };
                    due = Instant::now() + backoff.delay(rand::random());
                }
            }
        }
        if let Some(announced) = announced {
            let request = HeartbeatRequest {
                generation: announced.generation,
                leaving: true,
                ..Default::default()
            };
            let patience = if self.is_short_lived {
                SHORT_GOODBYE
            } else {
                GOODBYE
            };
            let _ = timeout(patience, self.tracker.heartbeat(request)).await;
        }
    }

    /// Lets changes come together.
    async fn gather(&self, usual: Duration) {
        let began = Instant::now();
        loop {
            tokio::time::sleep(usual).await;
            if !self.is_short_lived
                || began.elapsed() >= SHORT_LIVED_GATHER
                || self.library.has_partial()
            {
                return;
            }
        }
    }

    /// Brings the tracker up to date: a registration if there is news, and a heartbeat when one is due.
    async fn step(
        &mut self,
        announced: &mut Option<Announced>,
        rhythm: &mut Rhythm,
        due: Instant,
    ) -> Result<()> {
        if let Some(known) = announced.as_ref()
            && Instant::now() >= due
        {
            let (activity, is_busy) = (self.activity)();
            rhythm.is_busy = is_busy;
            let request = HeartbeatRequest {
                generation: known.generation,
                trust_epoch: self.membership.trust().list().epoch,
                activity: Some(activity),
                ..Default::default()
            };
            let answer = self.tracker.heartbeat(request).await?;
            rhythm.quiet(answer.heartbeat_interval_ms);
            rhythm.busy(answer.busy_interval_ms);
            if let Some(list) = &answer.trust_list {
                self.membership.adopt(list)?;
            }
            if answer.state() != State::Renewed {
                tracing::info!("the tracker does not hold our library: registering again");
                *announced = None;
            }
        }
        let version = *self.library.changed().borrow();
        let has_moved = announced
            .as_ref()
            .is_some_and(|known| known.addresses != self.reachable.addresses());
        if has_moved {
            // The old line may lead from an address that is gone.
            self.tracker.reconnect().await;
        }
        let is_scanning = self.shares.is_scanning();
        match announced {
            Some(known)
                if known.version == version && known.is_scanning <= is_scanning && !has_moved =>
            {
                Ok(())
            }
            Some(known) => match self.register(Some(known), rhythm).await {
                Err(error) if status_of(&error) == Some(Code::FailedPrecondition) => {
                    *announced = Some(self.register(None, rhythm).await?);
                    Ok(())
                }
                registered => {
                    *announced = Some(registered?);
                    Ok(())
                }
            },
            None => {
                *announced = Some(self.register(None, rhythm).await?);
                Ok(())
            }
        }
    }

    async fn register(&self, base: Option<&Announced>, rhythm: &mut Rhythm) -> Result<Announced> {
        // Before the library: what the scan found is in it.
        let is_scanning = self.shares.is_scanning();
        let addresses = self.reachable.addresses();
        let changes = self
            .library
            .changes_since(base.map_or(0, |base| base.version));
        let (base_generation, added, removed) = match (base, changes.update) {
            (Some(base), Update::Delta { added, removed }) => (base.generation, added, removed),
            (None, Update::Delta { .. }) => (0, self.library.files(), vec![]),
            (_, Update::Full(files)) => (0, files, vec![]),
        };
        let generation = next_generation(base.map_or(0, |base| base.generation));
        let header = RegisterHeader {
            peer_id: String::new(),
            generation,
            base_generation,
            addresses: addresses.clone(),
            port: self.reachable.bound.port().into(),
            is_scanning,
            is_short_lived: self.is_short_lived,
        };
        let (n_added, n_removed) = (added.len(), removed.len());
        let added = added.iter().map(Into::into).collect();
        let removed = removed.iter().map(Into::into).collect();
        let header = RegisterRequest {
            part: Some(Part::Header(header)),
        };
        let parts = std::iter::once(header)
            .chain(batches(added, removed))
            .collect::<Vec<_>>();
        let answer = self
            .tracker
            .register(futures_util::stream::iter(parts))
            .await?;
        rhythm.quiet(answer.heartbeat_interval_ms);
        if let Some(list) = &answer.trust_list {
            self.membership.adopt(list)?;
        }
        tracing::debug!(
            generation,
            base_generation,
            n_added,
            n_removed,
            "registered"
        );
        Ok(Announced {
            generation,
            version: changes.version,
            is_scanning,
            addresses,
        })
    }
}

/// Returns when something beside the library is not as it was announced: the first scan is over, or this machine has
/// other addresses.
async fn outdated(shares: &Shares, reachable: &Reachable, announced: Option<&Announced>) {
    let Some(known) = announced else {
        return pending().await;
    };
    let moved = async {
        while reachable.addresses() == known.addresses {
            tokio::time::sleep(LOOK).await;
        }
    };
    tokio::select! {
        () = shares.scanned(), if known.is_scanning => {}
        () = moved => {}
    }
}

/// Does nobody answer, so that to dial again costs nobody anything?
fn is_away(error: &anyhow::Error) -> bool {
    let failed = error.downcast_ref::<Failed>();
    status_of(error).is_none() && failed.is_some_and(|failed| failed.exit == Exit::Tracker)
}

/// Above the last one, and above those of earlier lives of this peer: milliseconds since the epoch, or one more.
fn next_generation(last: u64) -> u64 {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_millis();
    u64::try_from(now).unwrap_or(u64::MAX - 1).max(last + 1)
}
