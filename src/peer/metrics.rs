//! What a peer tells its operator: transfers, pieces, sources, its library and its disk.
//!
//! Invariant: a look costs the same however many files there are.

use std::{collections::BTreeMap, sync::atomic::Ordering};

use super::{control::Control, serve::STREAMS};
use crate::peer::{fetch::source_stats::Standing, member::standing::TrackerState};
use crate::{
    metrics::{self as counted, Exposition},
    operator::Operated,
    tls::seconds_left,
};

const STATES: [(&str, Standing); 5] = [
    ("connecting", Standing::Connecting),
    ("active", Standing::Active),
    ("resting", Standing::Resting),
    ("banned", Standing::Banned),
    ("gone", Standing::Gone),
];

impl Operated for Control {
    fn ready(&self) -> Result<(), String> {
        let standing = self.standing.borrow();
        match standing.state {
            TrackerState::Online => Ok(()),
            TrackerState::Connecting => Err("connecting".into()),
            _ => Err(format!("tracker: {}", standing.error)),
        }
    }

    async fn measure(&self, page: &mut Exposition) {
        page.process("peer", self.ready().is_ok());
        page.connections();
        page.certificates(
            self.membership.seconds_left(),
            seconds_left(self.membership.trust().authority()),
        );
        transfers(self, page);
        sources(self, page);
        library(self, page);
    }
}

fn transfers(control: &Control, page: &mut Exposition) {
    let active = control
        .running
        .lock()
        .expect("no panic while the lock is held")
        .len();
    page.gauge("sprat_transfers_active", "Downloads under way.")
        .is(active);
    let mut ended = page.counter("sprat_transfers_total", "Downloads that ended.");
    ended.counts(&[("result", "done")], &counted::TRANSFERS_DONE);
    ended.counts(&[("result", "failed")], &counted::TRANSFERS_FAILED);
    ended.counts(&[("result", "stopped")], &counted::TRANSFERS_STOPPED);
    let mut bytes = page.counter(
        "sprat_transfer_bytes_total",
        "Bytes of files: received and verified, or sent.",
    );
    bytes.counts(&[("direction", "received")], &counted::BYTES_RECEIVED);
    bytes.with(
        &[("direction", "sent")],
        control.served.bytes.load(Ordering::Relaxed),
    );
    let help = "Bytes received in vain: wrong, or brought by another source first.";
    page.counter("sprat_wasted_bytes_total", help)
        .counts(&[], &counted::BYTES_WASTED);
    let mut pieces = page.counter(
        "sprat_pieces_total",
        "Pieces received, and what they were good for.",
    );
    pieces.counts(&[("outcome", "verified")], &counted::PIECES_VERIFIED);
    pieces.counts(&[("outcome", "wasted")], &counted::PIECES_WASTED);
    pieces.counts(&[("outcome", "bad")], &counted::PIECES_BAD);
    let help = "Reports by receivers that a piece sent by this peer was wrong.";
    let mut reports = page.counter("sprat_piece_reports_total", help);
    reports.counts(&[("outcome", "true")], &counted::REPORTS_TRUE);
    reports.counts(&[("outcome", "false")], &counted::REPORTS_FALSE);
    reports.counts(&[("outcome", "ignored")], &counted::REPORTS_IGNORED);
    let mut chunks = page.histogram(
        "sprat_chunk_length_bytes",
        "Chunk lengths asked for, once a claim of pieces.",
    );
    chunks.spread(&[("direction", "received")], &counted::CHUNKS_RECEIVED, 1.0);
    chunks.spread(&[("direction", "sent")], &counted::CHUNKS_SENT, 1.0);
    let uploads = control.served.streams.load(Ordering::Relaxed);
    page.gauge("sprat_uploads_active", "Streams of chunks being sent.")
        .is(uploads);
    page.gauge(
        "sprat_uploads_limit",
        "Most streams of chunks that are sent at once.",
    )
    .is(STREAMS);
}

fn sources(control: &Control, page: &mut Exposition) {
    let running = control
        .running
        .lock()
        .expect("no panic while the lock is held")
        .clone();
    let mut states = BTreeMap::new();
    for progress in running.values() {
        for source in progress.sources().values() {
            *states.entry(source.standing as usize).or_insert(0_u64) += 1;
        }
    }
    let mut sources = page.gauge(
        "sprat_sources",
        "Sources of the downloads under way, by how they stand.",
    );
    for (name, state) in STATES {
        sources.with(
            &[("state", name)],
            states.get(&(state as usize)).copied().unwrap_or_default(),
        );
    }
    page.counter(
        "sprat_bans_total",
        "Times that a source was banned for wrong bytes.",
    )
    .counts(&[], &counted::BANS);
}

fn library(control: &Control, page: &mut Exposition) {
    let (files, bytes) = control.library.totals();
    let to_do = control.shares.progress();
    page.gauge("sprat_library_files", "Files that are shared.")
        .is(files);
    page.gauge("sprat_library_bytes", "Bytes of the files that are shared.")
        .is(bytes);
    page.gauge("sprat_index_queue_files", "Files that wait to be hashed.")
        .is(to_do.files_to_hash);
    page.gauge(
        "sprat_index_queue_bytes",
        "Bytes of the files that wait to be hashed.",
    )
    .is(to_do.bytes_to_hash);
    page.gauge("sprat_index_skipped_files", "Files that cannot be shared.")
        .is(to_do.skipped.total());
    let mut errors = page.counter(
        "sprat_disk_errors_total",
        "Times that the disk failed, or was full.",
    );
    errors.counts(&[("operation", "read")], &counted::DISK_READ_ERRORS);
    errors.counts(&[("operation", "write")], &counted::DISK_WRITE_ERRORS);
    errors.counts(&[("operation", "full")], &counted::DISK_FULL);
}
