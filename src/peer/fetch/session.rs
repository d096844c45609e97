//! One piece of work with one source: connecting, asking for manifests, following what it holds, and the lanes that fetch.
//!
//! Invariants: how it ends is in the book-keeping when its future is gone, also if that was dropped; the first part that fails
//! ends the others; what the source tells goes to the engine and nowhere else.

use std::{
    collections::HashSet,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::{
    FutureExt, StreamExt, TryStreamExt, future::BoxFuture, stream::FuturesUnordered,
};
use tokio::time::{sleep, timeout};

use super::{
    connections::Line,
    contents::{Learnt, Position},
    engine::Penalty,
    picker::SourceKey,
    source::{Begun, Described, HaveWatch, News, Opening, Source, SourceError},
    source_stats::Standing,
    sources::{Ending, Holding, Refusal},
    swarm::{Acquaintance, Swarm, lock},
};
use crate::{
    content::{ContentId, Layout, MAX_SINGLE},
    identity::PeerId,
    metrics,
    peer::limit::Rates,
    proto::{MAX_CONTENTS, content_error::Code},
    safe_path::escape,
};

/// The longest that something stands still before it looks again.
pub(super) const LOOK: Duration = Duration::from_secs(1);
/// Between two looks for manifests to ask for, when others were asked for all of them.
const ASK_AGAIN: Duration = Duration::from_millis(250);
/// News streams to one source; one more, and all of them become one.
const MAX_WATCHES: usize = 8;
/// A source of which nothing came for so long makes room for others.
const IDLE: Duration = Duration::from_secs(10);

/// Connects to a source that was chosen, and works with it until there is nothing to do with it any more.
pub async fn work_with(swarm: Arc<Swarm>, peer: PeerId) {
    let mut attempt = Attempt {
        swarm: &swarm,
        peer,
        ending: Ending::Idle,
    };
    let ended = session(&swarm, peer).await;
    attempt.ending = ended.unwrap_or_else(|error| match error {
        SourceError::Lied(_) => Ending::Lied(error.to_string()),
        error => Ending::Failed(error.to_string()),
    });
}

/// Work with a source; its end is told to the engine.
struct Attempt<'a> {
    swarm: &'a Swarm,
    peer: PeerId,
    ending: Ending,
}

impl Drop for Attempt<'_> {
    fn drop(&mut self) {
        let ending = std::mem::replace(&mut self.ending, Ending::Idle);
        let text = match &ending {
            Ending::Idle | Ending::MadeRoom => String::new(),
            Ending::Failed(text) | Ending::Lied(text) => text.clone(),
        };
        if matches!(ending, Ending::Lied(_)) {
            metrics::BANS.one();
        }
        let standing = self
            .swarm
            .engine()
            .ended(self.peer, ending, Instant::now(), rand::random());
        if let Some(standing) = standing {
            self.swarm.note_standing(self.peer, standing, &text);
        }
        self.swarm.wake_all();
    }
}

impl Swarm {
    /// One line about what becomes of a source.
    pub(super) fn note_standing(&self, peer: PeerId, standing: Standing, why: &str) {
        let what = match standing {
            Standing::Gone => "given up",
            Standing::Banned => "banned for a while",
            _ => "lost, trying again",
        };
        let text = format!("source {}: {what}: {why}", peer.short());
        self.note(Some(peer), text);
    }
}

/// Sources at work, counted while this lives.
struct AtWork<'a>(&'a AtomicUsize);

impl<'a> AtWork<'a> {
    fn begin(n: &'a AtomicUsize) -> Self {
        n.fetch_add(1, Ordering::Relaxed);
        Self(n)
    }
}

impl Drop for AtWork<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// One source that is connected.
pub(super) struct SourceSession {
    pub(super) swarm: Arc<Swarm>,
    pub(super) source: Source,
    /// Of its first connection, and of the source.
    pub(super) key: SourceKey,
    pub(super) line: Line,
    pub(super) known: Arc<Acquaintance>,
}

/// What a part of a session ended with.
enum Part {
    Lane,
    /// The source is of no use, and others may be.
    Useless(Ending),
}

async fn session(swarm: &Arc<Swarm>, peer: PeerId) -> Result<Ending, SourceError> {
    let (addresses, key, opening) = {
        let engine = swarm.engine();
        let addresses = engine.sources.addresses(peer).to_vec();
        let Some(key) = engine.sources.key(peer) else {
            return Ok(Ending::Idle);
        };
        drop(engine);
        (addresses, key, swarm.opening(peer))
    };
    let source = Source::connect(&swarm.membership, peer, &addresses, opening.is_some()).await?;
    swarm
        .engine()
        .connected(peer, source.address(), Instant::now());
    let _at_work = AtWork::begin(&swarm.n_at_work);
    let begun = opening.and_then(|opening| source.begin(&opening));
    let known = swarm.acquaintance(peer);
    let line = line(key, &known, begun.as_ref(), source.connections());
    let session = SourceSession {
        swarm: swarm.clone(),
        source,
        key,
        line,
        known,
    };
    session.run(begun).await
}

/// The connections, each with its pace: those that were begun with, else that of the last session and fresh ones.
fn line(key: SourceKey, known: &Acquaintance, begun: Option<&Begun>, n: usize) -> Line {
    let begun = begun.map_or(&[][..], |begun| &begun.paces);
    let first = begun.first().cloned();
    let first = match first {
        Some(first) => {
            known.set_pace(&first);
            first
        }
        None => known.pace(),
    };
    let fresh = || Arc::new(std::sync::Mutex::new(lock(&first).fresh()));
    let further = begun.iter().skip(1).cloned();
    let further = further.chain(std::iter::repeat_with(fresh)).take(n - 1);
    Line::new(key, std::iter::once(first.clone()).chain(further))
}

impl SourceSession {
    pub(super) fn peer(&self) -> PeerId {
        self.source.id
    }

    async fn run(&self, begun: Option<Begun>) -> Result<Ending, SourceError> {
        let (watch, asked) = match begun {
            Some(begun) => {
                let (answered, described) = tokio::join!(begun.answered(), self.describe_some());
                described?;
                answered
            }
            None => (None, vec![]),
        };
        // The watch begins before the first claim: a source promises first copies to those who watch. Only who is woken is
        // polled, which counts where pieces trickle in from many sources.
        let mut parts: FuturesUnordered<BoxFuture<'_, Result<Part, SourceError>>> =
            FuturesUnordered::from_iter([
                self.watch(watch).boxed(),
                self.describe().boxed(),
                self.until_useless().boxed(),
            ]);
        let (n_lanes, mut asked) = (self.n_lanes(), asked.into_iter());
        for lane in 0..n_lanes {
            let lane = self.lane(lane, asked.next());
            parts.push(lane.map(|ended| ended.map(|()| Part::Lane)).boxed());
        }
        let mut n_ended = 0;
        while let Some(part) = parts.try_next().await? {
            match part {
                Part::Lane => n_ended += 1,
                Part::Useless(ending) => return Ok(ending),
            }
            if n_ended == n_lanes {
                break;
            }
        }
        Ok(Ending::Idle)
    }

    /// Asks for manifests whenever there are some to ask for.
    async fn describe(&self) -> Result<Part, SourceError> {
        loop {
            let changed = self.swarm.changed.notified();
            if !self.describe_some().await? {
                // Each look goes through all that are wanted.
                let is_wanted = self.swarm.engine().contents.wanted().next().is_some();
                match is_wanted {
                    true => sleep(ASK_AGAIN).await,
                    false => _ = timeout(LOOK, changed).await,
                }
            }
        }
    }

    /// Asks for manifests, if there are some to ask for.
    async fn describe_some(&self) -> Result<bool, SourceError> {
        let positions = self
            .swarm
            .engine()
            .next_manifests(self.peer(), Instant::now());
        if positions.is_empty() {
            return Ok(false);
        }
        let asking = Asking {
            session: self,
            positions,
        };
        let ids: Vec<ContentId> = {
            let engine = self.swarm.engine();
            let positions = asking.positions.iter();
            positions.map(|at| engine.contents.id(*at)).collect()
        };
        let mut trouble = None;
        self.source
            .manifests(&ids, |i, described| {
                let ended = self.described(asking.positions[i], described);
                trouble = trouble.take().or(ended);
            })
            .await?;
        match trouble {
            Some(error) => Err(error),
            None => Ok(true),
        }
    }

    /// What the source says of a content; gives the error that ends the session, if one does.
    fn described(&self, at: Position, described: Described) -> Option<SourceError> {
        let (swarm, now) = (&self.swarm, Instant::now());
        match described {
            Described::Manifest(manifest) => {
                let mut engine = swarm.engine();
                let n_names = engine.contents.same(at).count() as u64;
                if let Learnt::Known(is, said) = engine.learn(at, manifest) {
                    let change = is.wrapping_sub(said).wrapping_mul(n_names);
                    swarm.bytes_corrected.fetch_add(change, Ordering::Relaxed);
                }
                engine.last_use = now;
                drop(engine);
                swarm.wake_all();
                None
            }
            Described::Refused(code) => {
                let why = refusal(code);
                swarm.engine().refuses(self.peer(), at, why, now);
                None
            }
            Described::Wrong(why) => self.is_wrong(at, &SourceError::Lied(why)),
        }
    }

    /// Something wrong came of a content; gives the error that ends the session, if one does.
    pub(super) fn is_wrong(&self, at: Position, error: &SourceError) -> Option<SourceError> {
        metrics::PIECES_BAD.one();
        let bytes = error.bad_bytes();
        metrics::BYTES_WASTED.add(bytes);
        let (peer, text) = (self.peer(), error.to_string());
        let (penalty, name) = {
            let mut engine = self.swarm.engine();
            engine.sources.note(peer, |stats| stats.wasted += bytes);
            let penalty = engine.is_wrong(peer, at, &text, Instant::now());
            let file = engine.contents.opened(at).map(|open| open.handle.clone());
            (penalty, file.map(|file| escape(file.name.as_str())))
        };
        self.swarm.wake_all();
        match penalty {
            Penalty::Known => None,
            Penalty::Content => {
                let name = name.unwrap_or_else(|| "a manifest".into());
                let text = format!(
                    "source {}: {text}: not asked for {name} again",
                    peer.short()
                );
                self.swarm.note(Some(peer), text);
                None
            }
            Penalty::Source(standing) => {
                metrics::BANS.one();
                self.swarm.note_standing(peer, standing, &text);
                Some(SourceError::Banned)
            }
        }
    }

    /// Follows what the source holds of the open contents of several pieces, through a watch that has `begun` if it is of
    /// use. A refusal is no reason to leave the source.
    async fn watch(&self, begun: Option<HaveWatch>) -> Result<Part, SourceError> {
        let mut watched = HashSet::new();
        let mut streams = FuturesUnordered::new();
        // After trouble no stream is begun before.
        let mut pause: Option<Instant> = None;
        if let Some(watch) = begun
            && let [(id, layout)] = *watch.contents()
            && let Some(at) = self.opened_as(id, layout).await
        {
            watched.insert(at);
            streams.push(Watching::next(self, vec![at], Some(watch)).boxed());
        }
        loop {
            let mut changed = pin!(self.swarm.changed.notified());
            changed.as_mut().enable();
            let mut new = self.unwatched(&watched);
            if !new.is_empty() && streams.len() == MAX_WATCHES {
                (streams, watched) = (FuturesUnordered::new(), HashSet::new());
                new = self.unwatched(&watched);
            }
            if !new.is_empty() && pause.is_none() {
                watched.extend(new.iter().copied());
                streams.push(Watching::next(self, new, None).boxed());
            }
            if streams.is_empty() && self.swarm.engine().contents.n_pieces() > 0 {
                self.told();
            }
            let step = tokio::select! {
                Some(step) = streams.next() => step,
                () = changed => continue,
                () = sleep_until(pause), if pause.is_some() => { pause = None; continue }
            };
            let Watching { group, outcome } = step;
            match outcome {
                Ok(Some((watch, news))) => {
                    if let Some((at, news)) = news {
                        self.told();
                        self.hear(group[at], news);
                    }
                    streams.push(Watching::next(self, group, Some(watch)).boxed());
                }
                // The source knows no such call.
                Ok(None) => self.told(),
                Err(error @ SourceError::Lied(_)) => return Err(error),
                Err(error) if self.source.is_closed() => return Err(error),
                Err(error) => {
                    tracing::debug!(peer = %self.peer(), "news of what it holds: {error}");
                    group.iter().for_each(|at| _ = watched.remove(at));
                    pause = Some(Instant::now() + LOOK);
                    self.told();
                }
            }
        }
    }

    /// Waits until a content is open, or not needed; gives its position if it is open with this layout.
    pub(super) async fn opened_as(&self, id: ContentId, layout: Layout) -> Option<Position> {
        let at = self.swarm.engine().contents.position(&id)?;
        let is_settled = |engine: &super::engine::Engine<_>| {
            let may_be = engine.contents.needs(at) && engine.sources.may_have(self.peer(), at);
            engine.contents.opened(at).is_some() || !may_be
        };
        self.swarm.until(self.peer(), is_settled).await;
        let engine = self.swarm.engine();
        let open = engine.contents.opened(at)?;
        (open.layout == layout).then_some(at)
    }

    /// Open contents of several pieces that are not watched.
    fn unwatched(&self, watched: &HashSet<Position>) -> Vec<Position> {
        let engine = self.swarm.engine();
        let long = engine.contents.long().filter(|at| !watched.contains(at));
        long.take(MAX_CONTENTS).collect()
    }

    fn told(&self) {
        let mut engine = self.swarm.engine();
        if !engine.sources.has_told(self.peer()) {
            engine.sources.told(self.peer());
            drop(engine);
            self.swarm.wake(self.peer());
        }
    }

    fn hear(&self, at: Position, news: News) {
        let (swarm, peer, now) = (&self.swarm, self.peer(), Instant::now());
        let frees = matches!(news, News::Have(_) | News::Gone);
        let mut is_new_source = false;
        {
            let mut engine = swarm.engine();
            match news {
                News::Have(map) if map.is_complete() => engine.has_whole(peer, at),
                News::Have(map) => engine.has_pieces(peer, at, map),
                News::Added(pieces) => engine.has_more(peer, at, &pieces),
                News::Promised(pieces) => engine.promised(at, &pieces, now),
                News::Gone => engine.refuses(peer, at, Refusal::Gone, now),
                News::Peer(other, addresses) => {
                    swarm.in_company.store(true, Ordering::Relaxed);
                    is_new_source = other != swarm.membership.id()
                        && engine.hinted(peer, other, &addresses, at);
                }
            }
        }
        if is_new_source {
            swarm.news.notify_one();
        }
        if frees {
            swarm.changed.notify_waiters();
        }
        swarm.wake(peer);
    }

    /// Ends when the source has nothing of use, or when others wait for its place and nothing comes from it.
    async fn until_useless(&self) -> Result<Part, SourceError> {
        loop {
            sleep(LOOK).await;
            let (engine, now) = (self.swarm.engine(), Instant::now());
            let peer = self.peer();
            if !engine.is_of_use(peer) {
                return Ok(Part::Useless(Ending::Idle));
            }
            if engine.is_crowded(now) && engine.sources.idle_for(peer, now) >= IDLE {
                return Ok(Part::Useless(Ending::MadeRoom));
            }
        }
    }
}

impl Swarm {
    /// What a far source may be asked for together with its manifests: the first long content that it has whole, once in a
    /// get, unless a limit has a say in when it comes, or sizes are given that this would not have.
    fn opening(&self, peer: PeerId) -> Option<Opening> {
        let is_free = self.limit.rates() == Rates::default() && self.fixed == Default::default();
        if !self.is_far || !is_free {
            return None;
        }
        let engine = self.engine();
        let contents = &engine.contents;
        let is_long = |at: &Position| contents.size(*at) > MAX_SINGLE.into();
        let at = contents.wanted().find(is_long)?;
        if engine.sources.holding(peer, at) != Holding::Whole {
            return None;
        }
        let layout = Layout::new(contents.size(at)).ok()?;
        if self.has_begun.swap(true, Ordering::Relaxed) {
            return None;
        }
        Some(Opening {
            id: contents.id(at),
            layout,
            here: (self.here.addresses.clone(), self.here.port),
            is_far: true,
        })
    }
}

async fn sleep_until(when: Option<Instant>) {
    if let Some(when) = when {
        tokio::time::sleep_until(when.into()).await;
    }
}

/// Manifests that a source is asked for; others may be asked when this is gone.
struct Asking<'a> {
    session: &'a SourceSession,
    positions: Vec<Position>,
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        let swarm = &self.session.swarm;
        swarm
            .engine()
            .answered(self.session.peer(), &self.positions);
        swarm.changed.notify_waiters();
    }
}

/// A step of a news stream.
struct Watching {
    /// Its contents, in the order of the request.
    group: Vec<Position>,
    outcome: Watched,
}

/// The stream with its next news, none when it has just begun; `None` if the source knows no such call.
type Watched = Result<Option<(HaveWatch, Option<(usize, News)>)>, SourceError>;

impl Watching {
    /// Begins a stream, or waits for its next news.
    async fn next(session: &SourceSession, group: Vec<Position>, watch: Option<HaveWatch>) -> Self {
        let outcome = match watch {
            Some(watch) => Self::wait(watch).await,
            None => Self::begin(session, &group).await,
        };
        Self { group, outcome }
    }

    async fn wait(mut watch: HaveWatch) -> Watched {
        match watch.next().await? {
            Some(news) => Ok(Some((watch, Some(news)))),
            None => Err(SourceError::Broken("it ended its news".into())),
        }
    }

    async fn begin(session: &SourceSession, group: &[Position]) -> Watched {
        let contents: Vec<(ContentId, Layout)> = {
            let engine = session.swarm.engine();
            let layout = |at: &Position| Some(engine.contents.opened(*at)?.layout);
            let watched = |at: &Position| Some((engine.contents.id(*at), layout(at)?));
            // All that are in the group, or none: news go by position.
            let watched: Option<Vec<_>> = group.iter().map(watched).collect();
            watched.ok_or_else(|| SourceError::Broken("what was watched ended".into()))?
        };
        let here = session.swarm.here.clone();
        let begun = session
            .source
            .watch_have(&contents, here.addresses, here.port);
        Ok(begun.await?.map(|watch| (watch, None)))
    }
}

/// Why a content is not served, in the words of the owner of sources.
pub(super) const fn refusal(code: Code) -> Refusal {
    match code {
        Code::Changed => Refusal::Changed,
        Code::Io => Refusal::Unreadable,
        _ => Refusal::Gone,
    }
}
