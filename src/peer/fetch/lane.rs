//! One claim after the other over one connection to a source: what to ask for, how much, and what becomes of it.
//!
//! Invariants: what a lane was promised and did not bring is given back when it ends, however it ends; of a source from which
//! no good piece came yet, or none since its last lie, one lane reads alone, a piece at a time.

use std::{
    ops::Range,
    pin::pin,
    sync::{Arc, Mutex, atomic::Ordering},
    time::{Duration, Instant},
};

use tokio::time::{sleep, timeout};

use super::{
    claim_guard::ClaimGuard,
    connections::Link,
    contents::Position,
    engine::Engine,
    picker::Next,
    session::{LOOK, SourceSession, refusal},
    source::{Asked, Event, Fetch, SourceError, Wanted},
    sources::Refusal,
    stage_times::Stage,
    storage::Storage,
    swarm::{OpenFile, lock},
    writer::{Landed, Landing, Outcome, Parcel, received},
};
use crate::{content::PieceIndex, proto::content_error::Code, request::carried};

/// After a claim of nothing.
const PAUSE: Duration = Duration::from_millis(20);
/// Claims under way per connection: while one ends, the next is on its way.
const LANES: usize = 2;
/// Over a long line the next one is a round trip on its way, in which two may end: with two lanes each connection idles now
/// and then.
const FAR_LANES: usize = 3;
/// Over several connections a claim is for so many round trips. They take turns in being fast: one that has slowed down must
/// not hold more than the others can wait for.
const ROUND_TRIPS: u32 = 4;
/// And at most for one in so many parts of what its connection will carry to the end.
const LAST_PART: u64 = 4;
/// Over a long line the first claim of a connection is so many times longer than those beside it: else its lanes end theirs
/// together, and it idles for a round trip.
const APART: u32 = 4;
/// With so many sources one claim of each is enough: another one is always on its way, and the fewer there are under
/// way, the sooner each of them is a piece that others can have.
const MANY: usize = 4;
/// How long a piece may take at a source whose speed is not known yet.
const UNKNOWN: Duration = Duration::from_secs(2);
/// Bytes of the first claim over a short line. Receivers that begin together do not know of one another yet, and what they
/// are sent side by side keeps all of them from having a piece to pass on.
const FIRST_TASTE: u32 = 256 << 10;

/// A claim on its way: what it was sent as.
struct Claim {
    wanted: Vec<Wanted>,
    /// Of each range, the position of its content.
    positions: Vec<Position>,
}

impl SourceSession {
    pub(super) fn n_lanes(&self) -> usize {
        let connections = self.source.connections();
        connections * if connections > 1 { FAR_LANES } else { LANES }
    }

    /// One claim after the other over one of the source's connections, each of which has its pace; the first claim may have
    /// been `asked` for already. Ends well when no source can bring anything any more, or the connection was let go.
    pub(super) async fn lane(&self, lane: usize, asked: Option<Asked>) -> Result<(), SourceError> {
        let limit = self.swarm.limit.lane(self.peer());
        let n_links = self.line.links().len();
        let connection = || {
            if self.source.is_wide() {
                lane % n_links
            } else {
                0
            }
        };
        if let Some(asked) = asked {
            self.take_asked(lane, asked, connection()).await?;
        }
        self.until_open().await;
        // Over a long line the first of each connection asks at once, and only does not read on.
        match lane {
            0 => {}
            _ if lane < self.source.connections() => self.until_told().await,
            _ => self.until_proven().await,
        }
        loop {
            if !self.has_use_for(lane) {
                sleep(LOOK).await;
                continue;
            }
            let connection = connection();
            let link = &self.line.links()[connection];
            if link.is_gone() {
                return Ok(());
            }
            // Once it has lied, one lane alone finds out what it is worth, and the others hold no claims meanwhile.
            let n_lies = self.n_lies();
            if lane > 0 && n_lies > 0 {
                self.until_proven().await;
            }
            let piece_len = self.swarm.engine().contents.mean_piece_len();
            link.pace().set_piece_len(piece_len);
            let pieces = limit.at_once(self.claim_pieces(lane, link, piece_len), piece_len);
            // Before the claim, so that its pieces are not kept from the others meanwhile.
            let paid = pieces.saturating_mul(piece_len);
            self.swarm
                .stage_times
                .add(Stage::Limit, limit.take(paid).await);
            let (mut changed, mut woken) = (
                pin!(self.swarm.changed.notified()),
                pin!(self.known.wake.notified()),
            );
            changed.as_mut().enable();
            woken.as_mut().enable();
            let (next, first_copies, held) = self.next(pieces, link);
            limit.correct(paid, self.swarm.engine().bytes(next.pieces()));
            match next {
                Next::Done if self.swarm.engine().contents.need_nobody() => return Ok(()),
                Next::Done | Next::Wait(_) if self.source.is_closed() => {
                    return Err(SourceError::Broken("it hung up".into()));
                }
                Next::Done => {
                    tokio::select! { () = changed => {}, () = woken => {}, () = sleep(LOOK) => {} }
                    continue;
                }
                Next::Wait(until) => {
                    // A look now and then also notices a source that hung up while it had nothing to do.
                    let until =
                        until.map_or(LOOK, |at| at.saturating_duration_since(Instant::now()));
                    let until = until.clamp(Duration::from_millis(5), LOOK);
                    tokio::select! { () = changed => {}, () = woken => {}, () = sleep(until) => {} }
                    continue;
                }
                Next::Claim(_) | Next::Repeat(_) | Next::Steal(_) => {}
            }
            let ended = tokio::select! {
                ended = self.fetch((lane, n_lies), &held, first_copies, link) => ended,
                () = self.look_on(connection) => return Ok(()),
            };
            drop(held);
            match ended {
                // There is one before it, which the source is judged by.
                Err(SourceError::Busy) if lane > 0 => sleep(LOOK).await,
                Err(SourceError::Stalled) if lane >= n_links => sleep(LOOK).await,
                ended => ended?,
            }
        }
    }

    /// Whether a lane has something to do for now; as many connections as the source needs are kept.
    fn has_use_for(&self, lane: usize) -> bool {
        let is_too_much = lane > 0 && self.swarm.n_at_work.load(Ordering::Relaxed) >= MANY;
        let in_company = self.swarm.in_company();
        if in_company {
            self.source.narrow();
        }
        let is_rest = is_too_much || lane >= LANES && in_company;
        if is_rest && !self.swarm.engine().contents.need_nobody() {
            return false;
        }
        if lane > 0 && !in_company {
            self.source.widen();
        }
        true
    }

    /// What a connection is to fetch now, up to so many pieces, whether that is a first copy, and the guard of what was
    /// claimed; the source's stats tell how fast all its connections are.
    fn next(&self, pieces: u32, link: &Link) -> (Next, bool, ClaimGuard<'_>) {
        let (now, key) = (Instant::now(), link.key);
        let goodput = self.line.goodput();
        let (chunk_length, expected, is_line_busy) = {
            let pace = link.pace();
            // Of a source that has shown nothing yet, nothing is late soon.
            let doubt = if pace.goodput().is_none() {
                UNKNOWN * pieces
            } else {
                Duration::ZERO
            };
            // A short claim among others does not wait for a round trip of its own.
            let usual = pace.claim_pieces().max(pieces);
            let expected = (pace.expected(usual) * pieces / usual).max(doubt);
            (pace.chunk_length(), expected, pace.is_line_busy(now))
        };
        let mut engine = self.swarm.engine();
        engine.sources.note(self.peer(), |stats| {
            (stats.sizes, stats.goodput) = ((chunk_length, pieces), goodput);
        });
        let epoch = engine.epoch();
        let picker = &mut engine.picker;
        picker.set_line_busy(self.key, is_line_busy && self.line.links().len() > 1);
        let next = match key == self.key {
            true => picker.next(key, pieces, expected, now),
            false => picker.next_beside(self.key, key, (pieces, expected), now),
        };
        // Who has promised a piece to others keeps its first copy for them.
        let is_first = matches!(&next, Next::Claim(pieces) if !pieces.iter().any(|piece| engine.picker.is_promised(*piece)));
        drop(engine);
        let held = ClaimGuard {
            swarm: &self.swarm,
            key,
            epoch,
            pieces: Mutex::new(next.pieces().to_vec()),
        };
        (next, is_first, held)
    }

    /// Takes in what was asked for already, over a connection and at its pace, if it is of use.
    async fn take_asked(
        &self,
        lane: usize,
        asked: Asked,
        connection: usize,
    ) -> Result<(), SourceError> {
        let wanted = asked.wanted;
        let Some(at) = self.opened_as(wanted.id, wanted.layout).await else {
            return Ok(());
        };
        let link = &self.line.links()[connection];
        let expected = link
            .pace()
            .expected(wanted.count)
            .max(UNKNOWN * wanted.count);
        let held = {
            let mut engine = self.swarm.engine();
            let Some(first) = engine.contents.number(at, wanted.first) else {
                return Ok(());
            };
            let pieces: Vec<u32> = (first..first + wanted.count).collect();
            let (keys, now) = ((self.key, link.key), Instant::now());
            if !engine.picker.adopt(keys, &pieces, expected, now) {
                return Ok(());
            }
            ClaimGuard {
                swarm: &self.swarm,
                key: link.key,
                epoch: engine.epoch(),
                pieces: Mutex::new(pieces),
            }
        };
        let claim = Claim {
            wanted: vec![wanted],
            positions: vec![at],
        };
        let taking = async {
            let Some(fetch) = asked.answered().await else {
                return Ok(());
            };
            if lane > 0 {
                self.until_proven().await;
            }
            self.take_in(fetch, &claim, (&held, true)).await
        };
        tokio::select! {
            ended = taking => ended,
            () = self.look_on(connection) => Ok(()),
        }
    }

    /// Waits until there is something to fetch: what lines and sources show before says nothing.
    async fn until_open(&self) {
        let is_open =
            |engine: &Engine<_>| engine.contents.n_pieces() > 0 || engine.contents.need_nobody();
        self.swarm.until(self.peer(), is_open).await;
    }

    /// Waits for the first good piece of the source, or until no source can bring anything.
    async fn until_proven(&self) {
        let peer = self.peer();
        self.swarm
            .until(peer, |engine| {
                let stats = engine.sources.stats_of(peer);
                engine.contents.need_nobody() || stats.is_some_and(|stats| stats.is_proven)
            })
            .await;
    }

    /// Waits for the first news of the source: whether others fetch from it, too. What looks like a long line may be a short
    /// one that is full of their bytes.
    async fn until_told(&self) {
        let peer = self.peer();
        let told = self
            .swarm
            .until(peer, |engine| engine.sources.has_told(peer));
        // One that says nothing is not waited for.
        let _ = timeout(LOOK, told).await;
    }

    /// Pieces of a lane's next claim. Over several connections the last claims get shorter, in proportion to what each of them
    /// carries, so that all end together: what one is left with, the others fetch a second time.
    fn claim_pieces(&self, lane: usize, link: &Link, piece_len: u32) -> u32 {
        let (pieces, goodput) = {
            let pace = link.pace();
            (pace.claim_pieces(), pace.goodput())
        };
        let connections = self.source.connections();
        let (has_told, all, remaining) = {
            let engine = self.swarm.engine();
            let all = engine.sources.stats_of(self.peer());
            let all = all.map_or(0, |stats| stats.goodput);
            (
                engine.sources.has_told(self.peer()),
                all,
                engine.picker.remaining(),
            )
        };
        if connections == 1 || self.swarm.in_company() || !has_told {
            let taste = (FIRST_TASTE / piece_len).max(1);
            return if goodput.is_none() {
                pieces.min(taste)
            } else {
                pieces
            };
        }
        let Some(goodput) = goodput else {
            return if lane < connections {
                pieces.saturating_mul(APART)
            } else {
                pieces
            };
        };
        let round_trips = self.source.round_trip() * ROUND_TRIPS;
        let on_the_way = u128::from(goodput) * round_trips.as_micros() / 1_000_000;
        let all = all.max(goodput).max(1);
        let part =
            u128::from(remaining) * u128::from(goodput) / u128::from(all.saturating_mul(LAST_PART));
        let most = part.min(on_the_way / u128::from(piece_len));
        pieces.min(u32::try_from(most).unwrap_or(u32::MAX)).max(1)
    }

    /// Turns the promised pieces into ranges of contents, and gives back what would be too long for one request.
    fn claim(&self, held: &ClaimGuard<'_>) -> Claim {
        let mut pieces = lock(&held.pieces);
        let mut engine = self.swarm.engine();
        let (wanted, positions, taken) = match engine.epoch() == held.epoch {
            true => engine.ranges(&pieces),
            false => (vec![], vec![], 0),
        };
        let rest = pieces.split_off(taken);
        if !rest.is_empty() && engine.epoch() == held.epoch {
            engine.picker.release(held.key, &rest);
            drop(engine);
            self.swarm.changed.notify_waiters();
        }
        Claim { wanted, positions }
    }

    async fn fetch(
        &self,
        (lane, n_lies): (usize, u32),
        held: &ClaimGuard<'_>,
        first_copies: bool,
        link: &Link,
    ) -> Result<(), SourceError> {
        let claim = self.claim(held);
        if claim.wanted.is_empty() {
            // What was claimed is let go meanwhile.
            sleep(PAUSE).await;
            return Ok(());
        }
        let fetch = self
            .source
            .fetch(lane, claim.wanted.clone(), first_copies, &link.pace)
            .await?;
        if lane > 0 && !self.is_proven_before_another_lie(n_lies).await {
            return Ok(());
        }
        self.take_in(fetch, &claim, (held, first_copies)).await
    }

    fn n_lies(&self) -> u32 {
        let engine = self.swarm.engine();
        let stats = engine.sources.stats_of(self.peer());
        stats.map_or(0, |stats| stats.lies)
    }

    /// Waits for a good piece of the source; false if a wrong one comes first: then what this lane holds is of more use to
    /// the one that reads alone.
    async fn is_proven_before_another_lie(&self, n_lies: u32) -> bool {
        let peer = self.peer();
        let is_settled = |engine: &Engine<_>| {
            let stats = engine.sources.stats_of(peer);
            engine.contents.need_nobody()
                || stats.is_some_and(|stats| stats.is_proven || stats.lies > n_lies)
        };
        self.swarm.until(peer, is_settled).await;
        self.n_lies() == n_lies
    }

    /// Takes in what was asked for. The first wrong piece ends it, after the good ones before and after it that had come
    /// have been written.
    async fn take_in(
        &self,
        mut fetch: Fetch,
        claim: &Claim,
        (held, first_copies): (&ClaimGuard<'_>, bool),
    ) -> Result<(), SourceError> {
        let (swarm, peer) = (&self.swarm, self.peer());
        let mut landing = Landing::new(swarm, (held.key, peer), swarm.is_proven(peer));
        let mut ended = None;
        loop {
            let waiting = Instant::now();
            let stage = if landing.has_room() {
                Stage::Network
            } else {
                Stage::Full
            };
            let event = tokio::select! {
                biased;
                Some(landed) = landing.next() => {
                    swarm.stage_times.add(stage, waiting.elapsed());
                    for piece in landed {
                        match self.landed(held, piece).await {
                            Ok(true) => landing.is_proven = true,
                            Ok(false) => ended = Some(ended.unwrap_or(Ok(()))),
                            Err(error) => ended = Some(Err(error)),
                        }
                    }
                    if ended.is_none() && !held.is_wanted() {
                        ended = Some(Ok(()));
                    }
                    continue;
                }
                event = fetch.next(), if ended.is_none() && landing.has_room() => event,
                () = std::future::ready(()), if landing.has_waiting() => {
                    landing.start();
                    continue;
                }
                else => break,
            };
            swarm.stage_times.add(stage, waiting.elapsed());
            match event {
                Ok(Some(Event::Piece(piece))) => {
                    let (at, index) = (claim.positions[piece.range], piece.piece());
                    match self.file_of(held, at, index, landing.is_proven) {
                        Some(file) => landing.add(Parcel { at, file, piece }),
                        None => swarm.waste(peer, piece.size() as u64),
                    }
                }
                Ok(Some(Event::Missing(range, done, why))) => {
                    let wanted = &claim.wanted[range];
                    let first = wanted.first.get();
                    let rest = first + done..first + wanted.count;
                    // Who was not asked for first copies has no reason to keep one.
                    let why = match why {
                        Code::Promised if !first_copies => Code::NotFound,
                        why => why,
                    };
                    self.missing(held, claim.positions[range], rest, why);
                }
                Ok(None) => ended = Some(Ok(())),
                Err(error) => ended = Some(Err(error)),
            }
        }
        let [disk, limit, network] = fetch.at_source().map(Duration::from_micros);
        let stages = [
            (Stage::SourceDisk, disk),
            (Stage::SourceLimit, limit),
            (Stage::SourceNetwork, network),
            (Stage::Tls, self.source.take_tls_time()),
        ];
        for (stage, time) in stages {
            swarm.stage_times.add(stage, time);
        }
        ended.unwrap_or(Ok(()))
    }

    /// The file that a piece which came belongs to; none if the piece is of no use. What a source that is not proven sends is
    /// looked at in any case: it is what proves it.
    fn file_of(
        &self,
        held: &ClaimGuard<'_>,
        at: Position,
        index: PieceIndex,
        is_proven: bool,
    ) -> Option<Arc<OpenFile>> {
        let engine = self.swarm.engine();
        let number = engine.contents.number(at, index)?;
        if engine.epoch() != held.epoch {
            return None;
        }
        if is_proven && engine.picker.has(number) {
            drop(engine);
            held.settle(number);
            return None;
        }
        Some(engine.contents.opened(at)?.handle.clone())
    }

    /// What became of a piece: true if it was good, false if the rest of the claim is not to be read.
    async fn landed(&self, held: &ClaimGuard<'_>, landed: Landed) -> Result<bool, SourceError> {
        let (at, index) = (landed.at, landed.index);
        let number = self.swarm.engine().contents.number(at, index);
        match landed.outcome {
            Outcome::Written => {
                number.map(|number| held.settle(number));
                Ok(true)
            }
            Outcome::Failed => Ok(false),
            Outcome::Wrong(error) => {
                number.map(|number| held.settle(number));
                self.report_piece(at, index);
                match self.is_wrong(at, &error) {
                    Some(error) => Err(error),
                    None => Ok(false),
                }
            }
            Outcome::Unwritten(file, error, piece) => {
                let is_full = error.is_no_space();
                self.swarm.disk_failed(at, &file, error);
                if !is_full {
                    return Ok(true);
                }
                self.swarm.wait_for_room(&file).await;
                let len = piece.bytes().len() as u64;
                let write = move |storage: &Storage| storage.write(&piece).map(|()| true);
                if self.swarm.with_room(at, &file, write).await {
                    let from = (held.key, self.peer());
                    received(&self.swarm, from, (at, &file), index, len);
                    number.map(|number| held.settle(number));
                }
                Ok(true)
            }
        }
    }

    /// The source does not serve these pieces of a content now.
    fn missing(&self, held: &ClaimGuard<'_>, at: Position, pieces: Range<u32>, code: Code) {
        let (peer, now) = (self.peer(), Instant::now());
        let mut engine = self.swarm.engine();
        if engine.epoch() != held.epoch {
            return;
        }
        let numbers: Vec<u32> = {
            let open = engine.contents.opened(at);
            open.map_or_else(Vec::new, |open| {
                pieces.clone().map(|piece| open.first + piece).collect()
            })
        };
        let is_disputed = code == Code::OutOfRange && engine.contents.dispute(at);
        for (piece, number) in pieces.zip(numbers) {
            if !held.settle(number) {
                continue;
            }
            engine.picker.release(held.key, &[number]);
            // A second time it is a refusal: who was told once knows.
            if code == Code::Promised && !engine.picker.is_promised(number) {
                // Of the others in the range nothing is known; they are given back with the claim.
                engine.picker.promised([number], now);
                break;
            }
            let layout = engine.contents.opened(at).map(|open| open.layout);
            if let Some(piece) = layout.and_then(|layout| layout.piece(piece)) {
                let why = if is_disputed {
                    Refusal::Gone
                } else {
                    refusal(code)
                };
                engine.refuses_piece(peer, (at, piece), why, now);
            }
        }
        drop(engine);
        self.swarm.changed.notify_waiters();
    }

    /// Tells the source of a piece that is wrong at its side, beside everything else.
    fn report_piece(&self, at: Position, piece: PieceIndex) {
        let (source, id) = (self.source.clone(), self.swarm.engine().contents.id(at));
        let telling = async move { source.report_piece(id, piece).await };
        self.swarm.tasks.spawn(carried(telling));
    }
}
