//! How long nothing useful has come, and what follows: a line for people, and the end of what cannot be had.
//!
//! Invariant: a verified piece, a manifest, and a full disk start the time again; bytes that trickle in hold it up only while
//! they could still become a piece.

use std::time::{Duration, Instant};

use crate::peer::fetch::{contents::Position, swarm::Swarm};

/// Waiting is worth a line after so long ...
const WORTH_A_LINE: Duration = Duration::from_secs(2);
/// ... and again after so long.
const AGAIN: Duration = Duration::from_secs(30);
/// Bytes a second that are taken for a piece on its way.
const FLOOR: u64 = 1 << 10;
/// While something came so lately nobody is given up.
const LATELY: Duration = Duration::from_secs(1);
/// Bytes that may come without becoming a piece, beside four pieces.
const ON_THE_WAY: u64 = 256 << 10;

/// The clock of one get.
pub(super) struct IdleClock {
    patience: Option<Duration>,
    /// The tracker need not be asked before.
    ask_tracker_from: Instant,
    /// The last slow tick, and the bytes that had come by then.
    last: (Instant, u64),
    /// What was useful last, and the bytes that had come by then.
    useful: (Instant, u64),
    noted: Option<Instant>,
}

impl IdleClock {
    pub(super) fn new(patience: Option<Duration>, ask_tracker_from: Instant, now: Instant) -> Self {
        Self {
            patience,
            ask_tracker_from,
            last: (now, 0),
            useful: (now, 0),
            noted: None,
        }
    }

    /// Is it time again for what is done at most so often, or for the first question to the tracker?
    pub(super) fn is_slow_tick(&mut self, now: Instant, each: Duration) -> bool {
        let is_first = self.last.0 < self.ask_tracker_from && now >= self.ask_tracker_from;
        is_first || now.saturating_duration_since(self.last.0) >= each
    }

    pub(super) fn may_ask_tracker(&self, now: Instant) -> bool {
        now >= self.ask_tracker_from
    }

    /// Gives up what cannot be had any more; gives a line for people if there is one to say. `name` names a content.
    pub(super) fn look(
        &mut self,
        swarm: &Swarm,
        now: Instant,
        name: impl Fn(Position) -> String,
    ) -> Option<String> {
        let arrived = swarm.arrived();
        let since = now.saturating_duration_since(self.last.0);
        let is_flowing = u128::from(arrived.saturating_sub(self.last.1)) * 1000
            >= since.as_millis() * u128::from(FLOOR);
        self.last = (now, arrived);
        let mut engine = swarm.engine();
        if engine.last_use > self.useful.0 {
            self.useful = (engine.last_use, arrived);
        }
        let most = ON_THE_WAY + 4 * u64::from(engine.contents.mean_piece_len());
        let may_become_a_piece = arrived.saturating_sub(self.useful.1) <= most;
        if swarm.is_waiting_for_room() {
            engine.last_use = now;
        } else if is_flowing && may_become_a_piece && engine.is_anybody_of_use() {
            engine.last_use = now;
            self.useful.0 = now;
        }
        let idle = now.saturating_duration_since(engine.last_use);
        if idle >= LATELY {
            engine.give_up(now, self.patience);
        }
        let is_due = self
            .noted
            .is_none_or(|noted| now.saturating_duration_since(noted) >= AGAIN);
        if idle < WORTH_A_LINE || engine.is_anybody_of_use() {
            self.noted = self.noted.filter(|_| idle >= WORTH_A_LINE);
            return None;
        }
        let at = engine.contents.needed().next().filter(|_| is_due)?;
        self.noted = Some(now);
        let last = match engine.sources.last_here(engine.contents.original(at)) {
            Some(at) => {
                let ago = now.saturating_duration_since(at);
                match ago.as_secs() {
                    seconds @ 0..120 => format!("last one here {seconds} s ago"),
                    seconds => format!("last one here {} min ago", seconds / 60),
                }
            }
            None => "none was here yet".into(),
        };
        Some(format!("waiting for a source of {}, {last}", name(at)))
    }
}
