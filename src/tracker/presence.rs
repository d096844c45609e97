//! Who was here when the tracker ended: until they are back, the listing is not whole. The file `presence` in the state
//! directory tells the next life of the tracker.
//!
//! Invariants: a peer is in the file before its library can be listed, and as long as it can be, so that a kill at any
//! time is seen by the next life as a listing that is not whole. What is missing after a start only becomes less, and
//! nothing is after a lease, whatever anybody sends. The file is written when somebody comes or goes, never for a
//! heartbeat, and holds at most 19,000.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::{
    sync::watch,
    time::{MissedTickBehavior, interval},
};
use tokio_util::sync::CancellationToken;

use super::store::Store;
use crate::{identity::PeerId, proto::Completeness, safe_path, trust::Trust};

/// Most peers that the file names: what [`safe_path::read_private`] reads.
const MAX_PEERS: usize = 19_000;
/// First line of the file, and what its last line begins with; the number of peers follows.
const HEAD: &str = "sprat presence 1";
const END: &str = "end ";
/// How often the file is compared with who is here.
const LOOK: Duration = Duration::from_secs(1);

/// What a peer says of itself when it registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PresenceStanding {
    /// The first look at one of its folders is not over.
    pub is_scanning: bool,
    /// It lives as long as a command, so nobody waits for it.
    pub is_short_lived: bool,
}

/// Who was here when the last life of the tracker ended.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Before {
    Known(BTreeSet<PeerId>),
    /// The file is damaged, or had no room for all.
    Unknown,
}

/// Who is here, who was and is not back. No I/O, and time is an argument.
struct Presence {
    here: HashMap<PeerId, Here>,
    missing: HashSet<PeerId>,
    /// Others may be missing, too.
    is_unknown: bool,
    /// When nobody is missing any more.
    until: Instant,
    n_looks: u64,
    /// What the file says.
    written: BTreeSet<PeerId>,
}

struct Here {
    standing: PresenceStanding,
    /// Registrations on their way.
    n_arriving: u32,
    /// The look during which the last one ended.
    arrived: u64,
}

impl Presence {
    fn new(before: Before, lease: Duration, now: Instant) -> Self {
        let (missing, is_unknown) = match before {
            Before::Known(peers) => (peers, false),
            Before::Unknown => (BTreeSet::new(), true),
        };
        Self {
            here: HashMap::new(),
            missing: missing.iter().copied().collect(),
            is_unknown,
            until: now + lease,
            n_looks: 0,
            written: missing,
        }
    }

    fn is_whole(&self, now: Instant) -> bool {
        now >= self.until || (self.missing.is_empty() && !self.is_unknown)
    }

    fn completeness(&self, now: Instant) -> Completeness {
        let scanning = self.here.values().filter(|here| here.standing.is_scanning);
        let peers_scanning = count(scanning.count());
        if self.is_whole(now) {
            return Completeness {
                is_whole: true,
                peers_scanning,
                ..Default::default()
            };
        }
        let left = self.until.saturating_duration_since(now).as_millis();
        Completeness {
            is_whole: false,
            peers_missing: count(self.missing.len()),
            whole_within_ms: u32::try_from(left).unwrap_or(u32::MAX).max(1),
            peers_scanning,
        }
    }

    /// A registration of this peer is about to be taken over.
    fn arrive(&mut self, peer: PeerId, standing: PresenceStanding) {
        let here = self.here.entry(peer).or_insert(Here {
            standing,
            n_arriving: 0,
            arrived: 0,
        });
        here.n_arriving += 1;
    }

    /// It was, or was not.
    fn arrived(&mut self, peer: PeerId, accepted: Option<PresenceStanding>) {
        let Some(here) = self.here.get_mut(&peer) else {
            return;
        };
        here.n_arriving = here.n_arriving.saturating_sub(1);
        here.arrived = self.n_looks;
        if let Some(standing) = accepted {
            here.standing = standing;
            if !standing.is_scanning {
                self.missing.remove(&peer);
            }
        }
    }

    /// To be called before it is looked who can be listed: who arrives from now on may not be seen there.
    fn look(&mut self) {
        self.n_looks += 1;
    }

    /// Brings this up to date with who could be listed at the last look, and who is no member any more.
    fn settle(&mut self, listed: &HashSet<PeerId>, denied: &HashSet<PeerId>, now: Instant) {
        let n_looks = self.n_looks;
        self.here.retain(|peer, here| {
            here.n_arriving > 0 || here.arrived >= n_looks || listed.contains(peer)
        });
        self.missing.retain(|peer| !denied.contains(peer));
        if now >= self.until {
            self.missing.clear();
            self.is_unknown = false;
        }
    }

    /// What the file is to say.
    fn wanted(&self) -> BTreeSet<PeerId> {
        let here = self.here.iter();
        let staying = here.filter(|(_, here)| !here.standing.is_short_lived);
        let mut peers: BTreeSet<PeerId> = staying
            .map(|(peer, _)| peer)
            .chain(&self.missing)
            .copied()
            .collect();
        while peers.len() > MAX_PEERS {
            peers.pop_last();
        }
        peers
    }

    /// Does the file name this peer, or say that it cannot?
    fn is_noted(&self, peer: &PeerId) -> bool {
        self.written.contains(peer) || self.written.len() >= MAX_PEERS
    }
}

fn count(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

/// The file's text.
fn text(peers: &BTreeSet<PeerId>) -> String {
    let mut text = format!("{HEAD}\n");
    for peer in peers {
        text.push_str(&peer.to_string());
        text.push('\n');
    }
    text + &format!("{END}{}\n", peers.len())
}

/// What a text says, if it is whole.
fn read(text: &str) -> Option<Before> {
    let (lines, n) = text.strip_suffix('\n')?.rsplit_once('\n')?;
    let mut lines = lines.lines();
    if lines.next() != Some(HEAD) {
        return None;
    }
    let peers: BTreeSet<PeerId> = lines.map(|line| line.parse().ok()).collect::<Option<_>>()?;
    if n.strip_prefix(END) != Some(peers.len().to_string().as_str()) {
        return None;
    }
    Some(if peers.len() >= MAX_PEERS {
        Before::Unknown
    } else {
        Before::Known(peers)
    })
}

/// Reads the file. One that cannot be read is set aside.
fn load(file: &Path) -> Before {
    let trouble = match safe_path::read_private(file) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Before::Known(BTreeSet::new());
        }
        Err(error) => error.to_string(),
        Ok(bytes) => match std::str::from_utf8(&bytes).ok().and_then(read) {
            Some(before) => return before,
            None => format!("{}: damaged", file.display()),
        },
    };
    let aside = file.with_extension("damaged");
    let done = match safe_path::set_aside(file, &aside) {
        Ok(()) => format!("it was renamed to {}", aside.display()),
        Err(error) => error.to_string(),
    };
    tracing::warn!(
        "{trouble}; {done}. It told who was here before: the listing counts as whole after one lease"
    );
    Before::Unknown
}

/// Keeps who is here, and the file.
pub struct PresenceKeeper {
    file: PathBuf,
    state: Mutex<Presence>,
    is_whole: watch::Sender<bool>,
    /// Who may write the file; true while that fails.
    writing: Arc<tokio::sync::Mutex<bool>>,
}

/// A registration on its way; dropped before it is [`accepted`](Self::accepted) it was not.
pub struct Arrival<'a> {
    keeper: &'a PresenceKeeper,
    peer: PeerId,
    standing: PresenceStanding,
    is_accepted: bool,
}

impl Arrival<'_> {
    /// The library can be listed now.
    pub fn accepted(mut self) {
        self.is_accepted = true;
    }
}

impl Drop for Arrival<'_> {
    fn drop(&mut self) {
        let accepted = self.is_accepted.then_some(self.standing);
        self.keeper.lock().arrived(self.peer, accepted);
        self.keeper.tell(Instant::now());
    }
}

impl PresenceKeeper {
    /// Reads in the state directory who was here; they have a lease to come back.
    pub fn open(state_dir: &Path, lease: Duration, now: Instant) -> Arc<Self> {
        let file = state_dir.join("presence");
        let state = Presence::new(load(&file), lease, now);
        match (state.is_whole(now), state.missing.len()) {
            (true, _) => {}
            (false, 0) => tracing::info!("the listing is whole after {lease:?}"),
            (false, n) => tracing::info!(
                "{n} peers were here before: the listing is whole when they are back, or after {lease:?}"
            ),
        }
        Arc::new(Self {
            file,
            is_whole: watch::Sender::new(state.is_whole(now)),
            state: Mutex::new(state),
            writing: Arc::default(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Presence> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How whole a listing is that is begun now.
    pub fn completeness(&self) -> Completeness {
        self.lock().completeness(Instant::now())
    }

    /// Returns when the listing is whole.
    pub fn whole(&self) -> impl Future<Output = ()> + use<> {
        let mut is_whole = self.is_whole.subscribe();
        async move {
            // Fails only if the tracker ends.
            let _ = is_whole.wait_for(|is_whole| *is_whole).await;
        }
    }

    fn tell(&self, now: Instant) {
        let is_whole = self.lock().is_whole(now);
        let became = self.is_whole.send_if_modified(|was| {
            let became = is_whole && !*was;
            *was |= is_whole;
            became
        });
        if became {
            tracing::info!("the listing is whole");
        }
    }

    /// To be called before a registration is handed to the store: when this returns, the file names the peer. If it
    /// cannot be written that is logged, and the peer is let in all the same.
    pub async fn arrive(self: &Arc<Self>, peer: PeerId, standing: PresenceStanding) -> Arrival<'_> {
        self.lock().arrive(peer, standing);
        let arrival = Arrival {
            keeper: self,
            peer,
            standing,
            is_accepted: false,
        };
        if !standing.is_short_lived {
            self.write_unless(|state| state.is_noted(&peer)).await;
        }
        arrival
    }

    /// A peer said goodbye.
    pub fn left(&self, peer: PeerId) {
        self.lock().missing.remove(&peer);
        self.tell(Instant::now());
    }

    /// Looks after the file until cancelled.
    pub async fn run(
        self: Arc<Self>,
        store: Arc<dyn Store>,
        trust: Arc<Trust>,
        cancel: CancellationToken,
    ) {
        let mut ticks = interval(LOOK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while cancel.run_until_cancelled(ticks.tick()).await.is_some() {
            self.lock().look();
            match store.ids().await {
                Ok(ids) => {
                    let (ids, now) = (ids.into_iter().collect(), Instant::now());
                    self.lock().settle(&ids, &trust.list().denied, now);
                    self.tell(now);
                }
                Err(error) => tracing::error!("{error}"),
            }
            self.write_unless(|state| state.written == state.wanted())
                .await;
        }
    }

    /// Makes the file say what it should. Those who come while it is written are written together.
    async fn write_unless(self: &Arc<Self>, is_done: impl Fn(&Presence) -> bool) {
        if is_done(&self.lock()) {
            return;
        }
        let mut fails = self.writing.clone().lock_owned().await;
        if is_done(&self.lock()) {
            return;
        }
        let keeper = self.clone();
        // Goes on if the caller is dropped, and nobody else writes meanwhile.
        let written = tokio::task::spawn_blocking(move || {
            let wanted = keeper.lock().wanted();
            let outcome = safe_path::write_private(&keeper.file, text(&wanted).as_bytes());
            match outcome {
                Ok(()) => keeper.lock().written = wanted,
                Err(ref error) if !*fails => tracing::warn!(
                    "who is here cannot be noted, and after a restart the listing will not tell that it is not whole: {error}"
                ),
                Err(_) => {}
            }
            *fails = outcome.is_err();
        });
        // Fails only when the runtime ends.
        let _ = written.await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEASE: Duration = Duration::from_secs(30);
    const STAYS: PresenceStanding = PresenceStanding {
        is_scanning: false,
        is_short_lived: false,
    };
    const SCANS: PresenceStanding = PresenceStanding {
        is_scanning: true,
        ..STAYS
    };
    const VISITS: PresenceStanding = PresenceStanding {
        is_short_lived: true,
        ..STAYS
    };

    fn peer(n: u8) -> PeerId {
        PeerId::from_bytes([n; 32])
    }

    fn known(peers: &[u8]) -> Before {
        Before::Known(peers.iter().copied().map(peer).collect())
    }

    fn set<C: FromIterator<PeerId>>(peers: &[u8]) -> C {
        peers.iter().copied().map(peer).collect()
    }

    /// A look that saw these.
    fn settle(presence: &mut Presence, listed: &[u8], denied: &[u8], now: Instant) {
        presence.look();
        presence.settle(&set(listed), &set(denied), now);
    }

    fn register(presence: &mut Presence, n: u8, standing: PresenceStanding) {
        presence.arrive(peer(n), standing);
        presence.arrived(peer(n), Some(standing));
    }

    #[test]
    fn whole_when_all_are_back() {
        let now = Instant::now();
        assert!(Presence::new(known(&[]), LEASE, now).is_whole(now));
        let mut presence = Presence::new(known(&[1, 2]), LEASE, now);
        register(&mut presence, 3, STAYS);
        register(&mut presence, 1, STAYS);
        let later = now + Duration::from_secs(10);
        let expected = Completeness {
            is_whole: false,
            peers_missing: 1,
            whole_within_ms: 20_000,
            peers_scanning: 0,
        };
        assert_eq!(presence.completeness(later), expected);
        register(&mut presence, 2, STAYS);
        let whole = Completeness {
            is_whole: true,
            ..Default::default()
        };
        assert_eq!(presence.completeness(later), whole);
        // Once whole it stays so, whoever goes.
        settle(&mut presence, &[], &[], later);
        assert!(presence.is_whole(later));
    }

    #[test]
    fn a_refused_registration_brings_nobody_back_and_is_forgotten() {
        let now = Instant::now();
        let mut presence = Presence::new(known(&[1]), LEASE, now);
        presence.arrive(peer(1), STAYS);
        presence.arrive(peer(2), STAYS);
        settle(&mut presence, &[], &[], now);
        assert_eq!(presence.wanted(), set(&[1, 2]), "noted while on its way");
        presence.arrived(peer(1), None);
        presence.arrived(peer(2), None);
        settle(&mut presence, &[], &[], now);
        assert!(!presence.is_whole(now));
        assert_eq!(presence.wanted(), set(&[1]));
    }

    #[test]
    fn who_was_here_is_back_when_it_has_looked_through_its_folders() {
        let now = Instant::now();
        let mut presence = Presence::new(known(&[1]), LEASE, now);
        register(&mut presence, 1, SCANS);
        register(&mut presence, 2, SCANS);
        let told = presence.completeness(now);
        assert_eq!((told.is_whole, told.peers_missing), (false, 1));
        assert_eq!(told.peers_scanning, 2);
        register(&mut presence, 1, STAYS);
        let told = presence.completeness(now);
        assert_eq!((told.is_whole, told.peers_scanning), (true, 1));
    }

    #[test]
    fn nobody_keeps_it_from_being_whole_after_a_lease() {
        let now = Instant::now();
        for before in [known(&[1, 2]), Before::Unknown] {
            let mut presence = Presence::new(before, LEASE, now);
            for second in 0..30 {
                let now = now + Duration::from_secs(second);
                register(&mut presence, 1, SCANS);
                settle(&mut presence, &[1], &[], now);
                assert!(!presence.is_whole(now));
            }
            assert!(presence.is_whole(now + LEASE));
            settle(&mut presence, &[1], &[], now + LEASE);
            assert_eq!(presence.wanted(), set(&[1]));
        }
    }

    #[test]
    fn who_comes_while_it_is_looked_is_not_overlooked() {
        let now = Instant::now();
        let mut presence = Presence::new(known(&[]), LEASE, now);
        presence.look();
        register(&mut presence, 1, STAYS);
        presence.settle(&set(&[]), &set(&[]), now);
        assert_eq!(presence.wanted(), set(&[1]));
        settle(&mut presence, &[], &[], now);
        assert!(presence.wanted().is_empty());
    }

    #[test]
    fn who_is_revoked_is_not_waited_for() {
        let now = Instant::now();
        let mut presence = Presence::new(known(&[1]), LEASE, now);
        settle(&mut presence, &[], &[1], now);
        assert!(presence.is_whole(now) && presence.wanted().is_empty());
    }

    #[test]
    fn visitors_are_not_noted() {
        let now = Instant::now();
        let mut presence = Presence::new(known(&[]), LEASE, now);
        register(&mut presence, 1, VISITS);
        register(&mut presence, 2, STAYS);
        assert_eq!(presence.wanted(), set(&[2]));
        // The same member may come to stay.
        register(&mut presence, 1, STAYS);
        assert_eq!(presence.wanted(), set(&[1, 2]));
    }

    #[test]
    fn the_file_is_bounded_and_a_full_one_tells_nothing() {
        let now = Instant::now();
        let mut presence = Presence::new(known(&[]), LEASE, now);
        for n in 0..=u32::try_from(MAX_PEERS).unwrap() {
            let mut bytes = [0; 32];
            bytes[..4].copy_from_slice(&n.to_le_bytes());
            presence.arrive(PeerId::from_bytes(bytes), STAYS);
        }
        presence.written = presence.wanted();
        assert_eq!(presence.written.len(), MAX_PEERS);
        assert!(presence.is_noted(&peer(255)), "it is not written again");
        let text = text(&presence.written);
        assert!(text.len() <= 1 << 20, "{}", text.len());
        assert_eq!(read(&text), Some(Before::Unknown));
    }

    #[test]
    fn what_is_written_is_read_and_damage_is_seen() {
        for peers in [&[][..], &[7], &[1, 2, 3]] {
            let text = text(&set(peers));
            assert_eq!(read(&text), Some(known(peers)));
            for end in 0..text.len() {
                assert_eq!(read(&text[..end]), None, "cut at {end}");
            }
        }
        assert_eq!(read("sprat presence 2\nend 0\n"), None);
        assert_eq!(read(&text(&set(&[1])).replace("end 1", "end 2")), None);
    }

    fn keeper(state: &Path) -> Arc<PresenceKeeper> {
        PresenceKeeper::open(state, LEASE, Instant::now())
    }

    #[tokio::test]
    async fn who_is_here_is_known_to_the_next_life_before_it_is_accepted() {
        let dir = tempfile::tempdir().unwrap();
        let first = keeper(dir.path());
        assert!(first.completeness().is_whole);
        let arrival = first.arrive(peer(1), STAYS).await;
        assert_eq!(keeper(dir.path()).completeness().peers_missing, 1);
        arrival.accepted();
        drop(first.arrive(peer(2), VISITS).await);

        let second = keeper(dir.path());
        let whole = second.whole();
        assert!(!second.completeness().is_whole);
        // Nothing is written for who is in the file.
        std::fs::remove_file(&second.file).unwrap();
        second.arrive(peer(1), STAYS).await.accepted();
        assert!(!second.file.exists());
        whole.await;
        assert!(second.completeness().is_whole);
    }

    #[tokio::test]
    async fn many_who_come_at_once_are_all_noted() {
        let dir = tempfile::tempdir().unwrap();
        let first = keeper(dir.path());
        let arrive = async |n| first.arrive(peer(n), STAYS).await.accepted();
        futures_util::future::join_all((0..100).map(arrive)).await;
        assert_eq!(keeper(dir.path()).completeness().peers_missing, 100);
    }

    #[tokio::test]
    async fn a_damaged_file_is_set_aside_and_one_that_cannot_be_written_refuses_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("presence");
        safe_path::write_private(&file, b"sprat presence 1\nend 9\n").unwrap();
        let first = keeper(dir.path());
        let told = first.completeness();
        assert_eq!((told.is_whole, told.peers_missing), (false, 0));
        assert!(dir.path().join("presence.damaged").exists() && !file.exists());

        std::fs::create_dir(&file).unwrap();
        first.arrive(peer(1), STAYS).await.accepted();
        std::fs::remove_dir(&file).unwrap();
        first.arrive(peer(1), STAYS).await.accepted();
        assert_eq!(keeper(dir.path()).completeness().peers_missing, 1);
    }
}
