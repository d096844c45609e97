//! A Node's state in the words of the control protocol.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, HashMap},
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use crate::peer::{
    fetch::{
        contents::Aside,
        progress::{Happening, Progress},
        source_stats::{SourceStats, Standing},
    },
    limit,
    sharing::share_task::ShareState,
};
use crate::{
    exit::{Exit, Failed},
    identity::PeerId,
    proto::{
        self, FileDone, FileFailed, FileProgress, Note, ShareStatus, SourceProgress,
        file_failed::Reason, get_event::Event,
    },
    safe_path::escape,
};

/// A smoothed rate over the progress of one Get.
#[derive(Default)]
pub struct Speed {
    last: Option<(Instant, u64)>,
    rate: f64,
}

impl Speed {
    /// Bytes a second, with a time constant of about two seconds.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "a rate for people"
    )]
    fn at(&mut self, bytes: u64, now: Instant) -> u64 {
        if let Some((before, had)) = self.last {
            let seconds = now
                .saturating_duration_since(before)
                .as_secs_f64()
                .max(0.001);
            let rate = bytes.saturating_sub(had) as f64 / seconds;
            let weight = if self.rate == 0.0 {
                1.0
            } else {
                1.0 - (-seconds / 2.0).exp()
            };
            self.rate += (rate - self.rate) * weight;
        }
        self.last = Some((now, bytes));
        self.rate as u64
    }
}

/// What the tracker is told of transfers: counters of this Node, made into rates from one report to the next.
#[derive(Default)]
pub struct Meter {
    sent: Option<(Instant, u64)>,
    sources: HashMap<(u64, PeerId), Speed>,
}

impl Meter {
    /// What moves now, of these Gets and these totals.
    pub fn activity(
        &mut self,
        running: &BTreeMap<u64, Arc<Progress>>,
        sent: u64,
        received: u64,
    ) -> proto::Activity {
        let now = Instant::now();
        let mut sources = HashMap::new();
        let mut transfers: Vec<_> = running
            .iter()
            .map(|(id, progress)| self.transfer(*id, progress, now, &mut sources))
            .collect();
        self.sources = sources;
        let receive_rate = transfers
            .iter()
            .map(|transfer| transfer.bytes_per_second)
            .sum();
        transfers.sort_by_key(|transfer| Reverse(transfer.bytes_per_second));
        transfers.truncate(proto::MAX_TRANSFERS);
        let mut room = proto::MAX_TRANSFER_SOURCES;
        for transfer in &mut transfers {
            transfer.sources.truncate(room);
            room -= transfer.sources.len();
        }
        let send_rate = self.send_rate(sent, now);
        proto::Activity {
            bytes_sent: sent,
            bytes_received: received,
            send_rate,
            receive_rate,
            transfers,
        }
    }

    fn send_rate(&mut self, sent: u64, now: Instant) -> u64 {
        let Some((before, had)) = self.sent.replace((now, sent)) else {
            return 0;
        };
        let millis =
            u64::try_from(now.saturating_duration_since(before).as_millis()).unwrap_or(u64::MAX);
        sent.saturating_sub(had).saturating_mul(1000) / millis.max(1)
    }

    /// One Get; its sources' speeds go on in `kept`.
    fn transfer(
        &mut self,
        id: u64,
        progress: &Progress,
        now: Instant,
        kept: &mut HashMap<(u64, PeerId), Speed>,
    ) -> proto::Transfer {
        let mut sources = vec![];
        for (peer, stats) in progress.sources() {
            let mut speed = self.sources.remove(&(id, peer)).unwrap_or_default();
            let bytes_per_second = speed.at(stats.bytes, now);
            kept.insert((id, peer), speed);
            if stats.standing == Standing::Active {
                sources.push(proto::TransferSource {
                    peer_id: peer.to_string(),
                    bytes_per_second,
                });
            }
        }
        sources.sort_by_key(|source| Reverse(source.bytes_per_second));
        let in_work = progress
            .in_work
            .lock()
            .expect("no panic while the lock is held");
        let largest = in_work.iter().max_by_key(|(_, _, bytes)| *bytes);
        proto::Transfer {
            content_id: largest
                .map(|(file, ..)| file.content_id.to_string())
                .unwrap_or_default(),
            bytes_total: progress.bytes_total.load(Ordering::Relaxed),
            bytes_done: progress.bytes_done.load(Ordering::Relaxed),
            files_total: progress.files_total.load(Ordering::Relaxed),
            files_done: progress.files_done.load(Ordering::Relaxed),
            bytes_per_second: sources.iter().map(|source| source.bytes_per_second).sum(),
            sources,
        }
    }
}

/// The limits in force.
pub fn limits(limits: &limit::Limits) -> proto::Limits {
    let (upload, download) = (limits.upload.rates(), limits.download.rates());
    proto::Limits {
        upload: upload.total,
        download: download.total,
        upload_per_peer: upload.per_peer,
        download_per_peer: download.per_peer,
    }
}

/// What happened, as an event.
pub fn event(happening: Happening) -> Event {
    match happening {
        Happening::FileDone {
            want,
            path,
            already_there,
        } => Event::FileDone(FileDone {
            name: want.name.to_string(),
            content_id: want.id.to_string(),
            size: want.size,
            path: path.to_string_lossy().into_owned(),
            already_there,
        }),
        Happening::FileFailed { want, why, text } => Event::FileFailed(FileFailed {
            name: want.name.to_string(),
            content_id: want.id.to_string(),
            reason: reason(why).into(),
            text,
        }),
        Happening::Note(peer, text) => Event::Note(Note {
            text,
            peer_id: peer.map(|peer| peer.to_string()).unwrap_or_default(),
        }),
    }
}

const fn reason(why: Aside) -> Reason {
    match why {
        Aside::Unreachable => Reason::Unreachable,
        Aside::Gone => Reason::Gone,
        Aside::Changed => Reason::Changed,
        Aside::Unreadable => Reason::Unreadable,
        Aside::Bad => Reason::Bad,
        Aside::Disk => Reason::Disk,
        Aside::Exists => Reason::Exists,
        Aside::Name => Reason::Name,
        Aside::Denied => Reason::Denied,
    }
}

fn source((peer, stats): (&PeerId, &SourceStats)) -> SourceProgress {
    let state = match stats.standing {
        Standing::Connecting => "connecting",
        Standing::Active => "active",
        Standing::Resting => "resting",
        Standing::Banned => "banned",
        Standing::Gone => "gone",
    };
    SourceProgress {
        peer_id: peer.to_string(),
        bytes: stats.bytes,
        bytes_per_second: stats.goodput,
        chunk_length: stats.sizes.0,
        claim_pieces: stats.sizes.1,
        state: state.into(),
        address: stats.address.clone(),
    }
}

fn sources(progress: &Progress) -> Vec<SourceProgress> {
    let mut sources: Vec<_> = progress.sources().iter().map(source).collect();
    sources.sort_by(|a, b| {
        b.bytes
            .cmp(&a.bytes)
            .then_with(|| a.peer_id.cmp(&b.peer_id))
    });
    sources
}

/// Bytes of a Get that came over the network and were good.
pub fn fetched(progress: &Progress) -> u64 {
    let sources = progress.sources();
    sources.values().map(|stats| stats.bytes).sum()
}

/// Where a Get stands.
pub fn progress(progress: &Progress, speed: &mut Speed) -> proto::Progress {
    let bytes_per_second = speed.at(fetched(progress), Instant::now());
    progress.rate.store(bytes_per_second, Ordering::Relaxed);
    running(progress, bytes_per_second)
}

/// Where a Get stands, for somebody who looks once.
pub fn running(progress: &Progress, bytes_per_second: u64) -> proto::Progress {
    let files = progress
        .in_work
        .lock()
        .expect("no panic while the lock is held");
    let files = files
        .iter()
        .map(|(file, bytes_done, bytes_total)| FileProgress {
            name: file.name.to_string(),
            bytes_done: *bytes_done,
            bytes_total: *bytes_total,
        });
    proto::Progress {
        bytes_done: progress.bytes_done.load(Ordering::Relaxed),
        bytes_total: progress.bytes_total.load(Ordering::Relaxed),
        files_done: progress.files_done.load(Ordering::Relaxed),
        files_total: progress.files_total.load(Ordering::Relaxed),
        bytes_per_second,
        sources: sources(progress),
        files: files.collect(),
        bottleneck: bottleneck(progress, progress.began.0.elapsed()),
    }
}

/// What holds a Get up, in one word; empty if nothing came over the network.
fn bottleneck(progress: &Progress, wall: Duration) -> String {
    let n_sources = progress
        .sources()
        .values()
        .filter(|stats| stats.bytes > 0)
        .count();
    let found = progress
        .stage_times
        .bottleneck(wall, u32::try_from(n_sources).unwrap_or(u32::MAX));
    found
        .filter(|_| n_sources > 0)
        .map(|found| found.to_string())
        .unwrap_or_default()
}

/// How a Get ended.
pub fn summary(progress: &Progress, duration: Duration) -> proto::Done {
    let wasted = progress.sources().values().map(|stats| stats.wasted).sum();
    proto::Done {
        bytes_total: progress.bytes_total.load(Ordering::Relaxed),
        bytes_fetched: fetched(progress),
        bytes_resumed: progress.bytes_resumed.load(Ordering::Relaxed),
        files: progress.files_done.load(Ordering::Relaxed),
        duration_ms: u64::try_from(duration.as_millis()).unwrap_or(u64::MAX),
        sources: sources(progress),
        bytes_wasted: wasted,
        files_skipped: progress.files_skipped.load(Ordering::Relaxed),
        files_failed: progress.files_failed.load(Ordering::Relaxed),
        bottleneck: bottleneck(progress, duration),
    }
}

/// Why a Get failed, with its exit code.
pub fn failure(error: &anyhow::Error, so_far: proto::Done) -> proto::Failed {
    let (exit, message) = match error.downcast_ref::<Failed>() {
        Some(failed) => (failed.exit, failed.message.clone()),
        None => (Exit::Failure, escape(&format!("{error:#}"))),
    };
    proto::Failed {
        exit_code: exit as u32,
        message,
        so_far: Some(so_far),
    }
}

/// A share, as `status` shows it.
pub fn share(state: &ShareState) -> ShareStatus {
    ShareStatus {
        name: state.name.clone().unwrap_or_default(),
        path: state.path.to_string_lossy().into_owned(),
        mode: state.mode.to_string(),
        files: state.files,
    }
}
