//! One connection to one source: lanes that fetch claims, and a watch on what the source holds.
//!
//! Invariant: the first lane that fails ends the others; of a source from which no good piece came yet, or none since its
//! last lie, one lane reads alone.

use std::{
    ops::Range,
    pin::pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::{FutureExt, TryStreamExt, stream::FuturesUnordered};
use tokio::time::{sleep, timeout};

use super::{
    Report, Swarm,
    claim_guard::Held,
    connections::{Line, Link},
    source_of, work,
};
use crate::{
    identity::PeerId,
    peer::fetch::{
        pace::Pace,
        picker::{Next, SourceKey},
        source::{Asked, Begun, Source, SourceError, Wanted},
        source_stats::State,
        stage_times::Stage,
    },
    proto::content_error::Code,
};

/// Claims under way per connection: while one ends, the next is on its way.
const LANES: usize = 2;
/// Over a long line the next one is a round trip on its way, in which two may end: with two lanes each connection idled now and
/// then.
const FAR_LANES: usize = 3;
/// Over several connections a claim is for so many round trips. They take turns in being fast: with claims for a second, one
/// that had slowed down held far more than the others could wait for, and 15 of 256 MiB were fetched twice.
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
/// are sent side by side keeps all of them from having a piece to pass on: with four pieces each, 16 receivers of 64 MiB at
/// 100 Mbit/s stood nearly idle for two seconds.
const FIRST_TASTE: u32 = 256 << 10;
/// The longest that a lane stands still before it looks again.
const LOOK: Duration = Duration::from_secs(1);

const UNLOCKED: &str = "no panic while the lock is held";

/// A source that is worked with.
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

impl Swarm {
    /// Connects and works until the batch is done.
    pub(super) async fn session(
        &self,
        peer: PeerId,
        key: SourceKey,
        addresses: &[String],
        connected: Option<(Source, Option<Begun>)>,
        pace: &Arc<Mutex<Pace>>,
    ) -> Result<Source, SourceError> {
        let (source, begun) = match connected {
            Some(connected) => connected,
            None => {
                self.account(peer, |account| account.state = State::Connecting);
                (
                    Source::connect(&self.membership, peer, addresses, false).await?,
                    None,
                )
            }
        };
        let address = source.address();
        self.account(peer, |account| {
            (account.state, account.address) = (State::Active, address)
        });
        let _at_work = AtWork::begin(&self.n_at_work);
        let connections = source.connections();
        let n_lanes = connections * if connections > 1 { FAR_LANES } else { LANES };
        self.known(peer, |known| known.has_told = false);
        let begun_paces = begun
            .iter()
            .flat_map(|begun| begun.paces.iter().skip(1).cloned());
        let fresh = || Arc::new(Mutex::new(pace.lock().expect(UNLOCKED).fresh()));
        let further = begun_paces
            .chain(std::iter::repeat_with(fresh))
            .take(connections - 1);
        let line = Line::new(key, std::iter::once(pace.clone()).chain(further));
        // The watch begins before the first claim: a source promises first copies to those who watch. Only who is woken is
        // polled, which counts where pieces trickle in from many sources.
        let (watch, asked) = match begun {
            Some(begun) => begun.answered().await,
            None => (None, vec![]),
        };
        let mut asked = asked.into_iter();
        let watch = self
            .watch(&source, key, watch)
            .map(|ended| ended.map(|never| match never {}));
        let mut at_work = FuturesUnordered::from_iter([watch.boxed()]);
        at_work.extend(
            (0..n_lanes).map(|lane| self.lane((lane, asked.next()), &source, key, &line).boxed()),
        );
        for _ in 0..n_lanes {
            at_work.try_next().await?;
        }
        drop(at_work);
        Ok(source)
    }

    /// One claim after the other over one of the source's connections, each of which has its pace; the first claim may have
    /// been `asked` for already.
    async fn lane(
        &self,
        (lane, asked): (usize, Option<Asked>),
        source: &Source,
        whole: SourceKey,
        line: &Line,
    ) -> Result<(), SourceError> {
        let (limit, piece_len) = (self.limit.lane(source.id), self.mean_piece_len());
        let n_links = line.links().len();
        let connection = || if source.is_wide() { lane % n_links } else { 0 };
        if let Some(asked) = asked {
            self.take_asked((lane, asked), source, whole, (line, connection()))
                .await?;
        }
        let wake = self.known(source.id, |known| known.wake.clone());
        // Over a long line the first of each connection asks at once, and only does not read on.
        match lane {
            0 => {}
            _ if lane < source.connections() => self.until_told(source.id).await,
            _ => self.until_proven(source.id).await,
        }
        loop {
            if !self.has_use_for(lane, source) {
                sleep(LOOK).await;
                continue;
            }
            let connection = connection();
            let link = &line.links()[connection];
            if link.is_gone() {
                return Ok(());
            }
            let pieces = limit.at_once(self.claim_pieces(lane, source, link), piece_len);
            // Before the claim, so that its pieces are not kept from the others meanwhile.
            let paid = pieces.saturating_mul(piece_len);
            self.spent.add(Stage::Limit, limit.take(paid).await);
            let (mut changed, mut woken) = (pin!(self.changed.notified()), pin!(wake.notified()));
            changed.as_mut().enable();
            woken.as_mut().enable();
            let next = self.next(whole, (pieces, source), (link, line));
            limit.correct(paid, work::bytes(&self.work, next.pieces()));
            let (pieces, first_copies) = match next {
                Next::Done => return Ok(()),
                Next::Wait(_) if source.is_closed() => {
                    return Err(SourceError::Broken("it hung up".into()));
                }
                Next::Wait(until) => {
                    // A look now and then also notices a source that hung up while it had nothing to do.
                    let until =
                        until.map_or(LOOK, |at| at.saturating_duration_since(Instant::now()));
                    let until = until.clamp(Duration::from_millis(5), LOOK);
                    tokio::select! { () = changed => {}, () = woken => {}, () = sleep(until) => {} }
                    continue;
                }
                Next::Claim(pieces) => (pieces, true),
                Next::Repeat(pieces) | Next::Steal(pieces) => (pieces, false),
            };
            let held = Held {
                swarm: self,
                key: link.key,
                pieces: Mutex::new(pieces),
            };
            let ended = tokio::select! {
                ended = self.fetch(source, lane, &held, first_copies, &link.pace) => ended,
                () = self.look_on(source, line, connection) => return Ok(()),
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
    fn has_use_for(&self, lane: usize, source: &Source) -> bool {
        let is_too_much = lane > 0 && self.n_at_work.load(Ordering::Relaxed) >= MANY;
        if self.in_company() {
            source.narrow();
        }
        if (is_too_much || lane >= LANES && self.in_company()) && !self.is_done() {
            return false;
        }
        if lane > 0 && !self.in_company() {
            source.widen();
        }
        true
    }

    /// What a connection is to fetch now, up to so many pieces; its source's account tells how fast all of them are.
    fn next(
        &self,
        whole: SourceKey,
        (pieces, source): (u32, &Source),
        (link, line): (&Link, &Line),
    ) -> Next {
        let (now, key) = (Instant::now(), link.key);
        let goodput = line.goodput();
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
        let sizes = (chunk_length, pieces);
        self.account(source.id, |account| {
            (account.sizes, account.goodput) = (sizes, goodput)
        });
        let mut picker = self.picker();
        picker.set_line_busy(whole, is_line_busy && line.links().len() > 1);
        match key == whole {
            true => picker.next(key, pieces, expected, now),
            false => picker.next_beside(whole, key, (pieces, expected), now),
        }
    }

    /// Takes in what was asked for already, over a connection and at its pace, if it is of use.
    async fn take_asked(
        &self,
        (lane, asked): (usize, Asked),
        source: &Source,
        whole: SourceKey,
        (line, connection): (&Line, usize),
    ) -> Result<(), SourceError> {
        let wanted = asked.wanted;
        let Some(at) = self
            .position(&wanted.id)
            .filter(|at| self.work[*at].layout() == wanted.layout)
        else {
            return Ok(());
        };
        let first = self.work[at].first + wanted.first.get();
        let pieces: Vec<u32> = (first..first + wanted.count).collect();
        let link = &line.links()[connection];
        let (key, expected) = (
            link.key,
            link.pace()
                .expected(wanted.count)
                .max(UNKNOWN * wanted.count),
        );
        if !self
            .picker()
            .adopt((whole, key), &pieces, expected, Instant::now())
        {
            return Ok(());
        }
        let held = Held {
            swarm: self,
            key,
            pieces: Mutex::new(pieces),
        };
        let taking = async {
            let Some(fetch) = asked.answered().await else {
                return Ok(());
            };
            if lane > 0 {
                self.until_proven(source.id).await;
            }
            self.take_in(source, fetch, (&[wanted], &[at]), &held).await
        };
        tokio::select! {
            ended = taking => ended,
            () = self.look_on(source, line, connection) => Ok(()),
        }
    }

    /// Waits for the first good piece of a source, or the end of the batch.
    pub(super) async fn until_proven(&self, peer: PeerId) {
        let wake = self.known(peer, |known| known.wake.clone());
        loop {
            let (mut changed, mut woken) = (pin!(self.changed.notified()), pin!(wake.notified()));
            changed.as_mut().enable();
            woken.as_mut().enable();
            if self.is_done() || self.account(peer, |account| account.is_proven) {
                return;
            }
            tokio::select! { () = changed => {}, () = woken => {} }
        }
    }

    /// Waits for the first news of a source: whether others fetch from it, too. What looks like a long line may be a short
    /// one that is full of their bytes; with several connections and long claims over it, now this and now that one of 8
    /// receivers was 0.3 s to a second behind the rest.
    async fn until_told(&self, peer: PeerId) {
        // One that says nothing is not waited for.
        let _ = timeout(LOOK, self.until(peer, |known| known.has_told)).await;
    }

    pub(super) fn told(&self, peer: PeerId) {
        self.known(peer, |known| known.has_told = true);
        self.wake(peer);
    }

    pub(super) fn in_company(&self) -> bool {
        self.in_company.load(Ordering::Relaxed)
    }

    /// Pieces of a lane's next claim. Over several connections the last claims get shorter, in proportion to what each of them
    /// carries, so that all end together: what one is left with, the others fetch a second time.
    fn claim_pieces(&self, lane: usize, source: &Source, link: &Link) -> u32 {
        let (pieces, goodput) = {
            let pace = link.pace();
            (pace.claim_pieces(), pace.goodput())
        };
        let connections = source.connections();
        if connections == 1 || self.in_company() || !self.known(source.id, |known| known.has_told) {
            let taste = (FIRST_TASTE / self.mean_piece_len()).max(1);
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
        let on_the_way =
            u128::from(goodput) * (source.round_trip() * ROUND_TRIPS).as_micros() / 1_000_000;
        let all = self
            .account(source.id, |account| account.goodput)
            .max(goodput)
            .max(1);
        let part = u128::from(self.picker().remaining()) * u128::from(goodput)
            / u128::from(all.saturating_mul(LAST_PART));
        let most = part.min(on_the_way / u128::from(self.mean_piece_len()));
        pieces.min(u32::try_from(most).unwrap_or(u32::MAX)).max(1)
    }

    /// Turns the promised pieces into ranges of contents, and gives back what would be too long for one request.
    pub(super) fn claim(&self, held: &Held<'_>) -> (Vec<Wanted>, Vec<usize>) {
        let mut pieces = held.pieces.lock().expect("no panic while the lock is held");
        let (claim, works, taken) = work::ranges(&self.work, &pieces);
        let rest = pieces.split_off(taken);
        if !rest.is_empty() {
            self.picker().release(held.key, &rest);
            self.changed.notify_waiters();
        }
        (claim, works)
    }

    /// The source does not serve these pieces of a content now.
    pub(super) async fn missing(
        &self,
        peer: PeerId,
        held: &Held<'_>,
        at: usize,
        (pieces, why): (Range<u32>, Code),
    ) {
        let work = &self.work[at];
        if why == Code::OutOfRange && work.layout().is_single() {
            return self.report(Report::Disputed(at)).await;
        }
        let mut refused = vec![];
        {
            let mut picker = self.picker();
            for piece in pieces.map(|piece| work.first + piece) {
                if !held.settle(piece) {
                    continue;
                }
                picker.release(held.key, &[piece]);
                if why == Code::Promised {
                    // Of the others in the range nothing is known; they are given back with the claim.
                    picker.promised([piece], Instant::now());
                    break;
                }
                picker.remove_have(source_of(held.key), piece);
                refused.push(piece);
            }
        }
        self.refused(peer, refused);
        self.changed.notify_waiters();
    }
}
