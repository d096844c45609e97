//! Opening the files of contents whose manifests are known, a group at a time.
//!
//! Invariant: a file that is open has a permit, or is one of the few that each get may have without.

use std::{sync::Arc, time::Instant};

use super::{
    DiskDone, GROUP_FILES, Job, OPEN_AT_LEAST, OPEN_LONG, OPEN_PIECES, OpenedFile, Run, SLOW_TICK,
    outcome,
};
use crate::{
    content::Manifest,
    have::HaveMap,
    peer::fetch::{
        contents::Position,
        destination::{Opened, explain},
        engine::LOCAL,
        progress::Progress,
        reuse::LocalPiece,
        storage::{Storage, StorageError},
        swarm::OpenFile,
    },
};

impl Run {
    /// Opens files, as many as there are permits for.
    pub(super) fn open_more(&mut self) {
        let now = Instant::now();
        if self.is_opening || self.open_from.is_some_and(|from| now < from) {
            return;
        }
        let (files, permits) = {
            let mut engine = self.swarm.engine();
            if engine.contents.known().next().is_none() {
                return;
            }
            engine.renumber();
            let n_in_hand = engine.contents.n_busy();
            let is_full = !engine.has_room() || engine.picker.remaining() >= OPEN_PIECES;
            if n_in_hand > 0 && is_full {
                return;
            }
            let permits = self.get.open_files.available_permits().min(GROUP_FILES);
            let room = permits.max(OPEN_AT_LEAST.saturating_sub(n_in_hand));
            let mut long_room = OPEN_LONG.saturating_sub(engine.contents.n_long());
            let mut pieces_room = OPEN_PIECES.saturating_sub(engine.picker.remaining());
            let mut chosen = vec![];
            for (at, manifest) in engine.contents.known() {
                let layout = manifest.layout();
                let is_long = !layout.is_single();
                let is_first = n_in_hand == 0 && chosen.is_empty();
                if is_long && long_room == 0 {
                    continue;
                }
                if chosen.len() == room || layout.n_pieces() > pieces_room && !is_first {
                    break;
                }
                long_room -= usize::from(is_long);
                pieces_room = pieces_room.saturating_sub(layout.n_pieces());
                chosen.push(at);
            }
            let begin = |at| Some((at, engine.contents.begin_opening(at)?));
            let files: Vec<(Position, Manifest)> = chosen.into_iter().filter_map(begin).collect();
            (files, permits)
        };
        if files.is_empty() {
            return;
        }
        self.is_opening = true;
        let (disk, jobs) = (self.get.disk.clone(), self.jobs.clone());
        let permits: Vec<_> = (0..files.len().min(permits))
            .map_while(|_| self.get.open_files.clone().try_acquire_owned().ok())
            .collect();
        self.disk.spawn_blocking(move || {
            let wanted: Vec<_> = files
                .iter()
                .map(|(at, manifest)| {
                    let Job { want, target } = &jobs[*at];
                    (want, target, manifest.clone())
                })
                .collect();
            let mut permits = permits.into_iter();
            let opened = disk.open(&wanted);
            let opened = files.iter().zip(opened).map(|((at, _), opened)| {
                let permit = permits.next();
                (*at, opened.map(|opened| Opened { permit, ..opened }))
            });
            DiskDone::Opened(opened.collect())
        });
    }

    pub(super) fn opened(&mut self, files: Vec<(Position, OpenedFile)>) {
        self.is_opening = false;
        let (mut open, mut local) = (vec![], vec![]);
        for (at, opened) in files {
            let Job { want, target } = &self.jobs[at];
            match opened {
                Ok(Opened {
                    storage,
                    local: pieces,
                    permit,
                }) => {
                    let have = storage.have();
                    let bytes = bytes_of(&storage, &have);
                    Progress::add(&self.progress.bytes_done, bytes);
                    Progress::add(&self.progress.bytes_resumed, bytes);
                    let partial = self.get.disk.offer_partial(&storage, want, target);
                    let file = Arc::new(OpenFile {
                        name: want.name.clone(),
                        storage,
                        partial,
                        _permit: permit,
                    });
                    if !pieces.is_empty() {
                        local.push((at, file.clone(), pieces));
                    }
                    open.push((at, file, have));
                }
                Err(error) => self.not_opened(at, error),
            }
        }
        {
            let mut engine = self.swarm.engine();
            engine.open(open);
            // Before anybody else may claim them.
            for (at, _, pieces) in &local {
                let pieces = pieces.iter().map(LocalPiece::index);
                let numbers = pieces.filter_map(|piece| engine.contents.number(*at, piece));
                let numbers: Vec<u32> = numbers.collect();
                engine.picker.claim_local(LOCAL, numbers);
            }
        }
        for (at, file, mut pieces) in local {
            let other_half = pieces.split_off(pieces.len() / 2);
            for pieces in [pieces, other_half] {
                let (swarm, file) = (self.swarm.clone(), file.clone());
                self.disk.spawn(async move {
                    swarm.bring(at, file, pieces).await;
                    DiskDone::Other
                });
            }
        }
        self.swarm.changed.notify_waiters();
    }

    fn not_opened(&mut self, at: Position, error: StorageError) {
        if error.is_no_descriptor() {
            self.swarm.engine().contents.step_back(at);
            self.open_from = Some(Instant::now() + SLOW_TICK);
            return;
        }
        let error = explain(error);
        self.set_aside(at, outcome::why(&error), format!("{error}"));
    }
}

/// Bytes of these pieces.
fn bytes_of(storage: &Storage, have: &HaveMap) -> u64 {
    let layout = storage.manifest().layout();
    let pieces = have.iter().filter_map(|piece| layout.piece(piece));
    pieces.map(|piece| u64::from(layout.len_of(piece))).sum()
}
