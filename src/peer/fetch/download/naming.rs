//! Giving whole files their names, a group at a time: durable first, then named, then told.
//!
//! Invariant: a file is told of only when its name is durable; one that could not be named is tried again, or set aside with
//! the reason.

use std::{path::PathBuf, sync::Arc, time::Instant};

use anyhow::Result;
use tokio::task::spawn_blocking;

use super::{DiskDone, FINISHING, GROUP_FILES, Get, Job, REMEMBERED, Run, internal, outcome};
use crate::peer::fetch::{
    contents::Position,
    destination::{Finishing, Hashes, explain},
    progress::{Happening, Progress},
    stage_times::Stage,
    storage::StorageError,
    swarm::{OpenFile, Swarm},
};

impl Run {
    /// Gives names to complete contents, a group at a time: what came while one group is synced is the next.
    pub(super) fn finish_more(&mut self) {
        while self.n_finishing < FINISHING {
            let group: Vec<(Position, Arc<OpenFile>)> = {
                let mut engine = self.swarm.engine();
                let taken = engine.contents.take_complete(GROUP_FILES);
                let file = |at: Position| Some((at, engine.contents.opened(at)?.handle.clone()));
                taken.into_iter().filter_map(file).collect()
            };
            if group.is_empty() {
                return;
            }
            self.n_finishing += 1;
            let (get, jobs, swarm) = (self.get.clone(), self.jobs.clone(), self.swarm.clone());
            self.disk.spawn(finish(get, jobs, swarm, group));
        }
    }

    pub(super) fn named(
        &mut self,
        named: Vec<(Position, Arc<OpenFile>, Result<PathBuf>)>,
        hashes: Hashes,
    ) {
        self.n_finishing -= 1;
        self.hashes.extend(hashes);
        if self.hashes.len() >= REMEMBERED {
            self.remember();
        }
        for (at, file, path) in named {
            match path {
                Ok(path) => {
                    {
                        let mut engine = self.swarm.engine();
                        for copy in engine.contents.named(at) {
                            engine.learn(copy, file.storage.manifest().clone());
                        }
                    }
                    Progress::add(&self.progress.files_done, 1);
                    self.untold.push_back(Happening::FileDone {
                        want: self.jobs[at].want.clone(),
                        path,
                        already_there: false,
                    });
                }
                Err(error) => match error.downcast::<StorageError>() {
                    Ok(error @ (StorageError::Lost { .. } | StorageError::Incomplete { .. })) => {
                        self.swarm.engine().contents.step_back(at);
                        self.swarm.disk_failed(at, &file, error);
                    }
                    Ok(error) => {
                        let error = explain(error);
                        self.set_aside(at, outcome::why(&error), format!("{error}"));
                    }
                    Err(error) => self.set_aside(at, outcome::why(&error), format!("{error}")),
                },
            }
        }
        self.swarm.changed.notify_waiters();
    }
}

/// Makes these files durable and gives them their names. While the disk is full, what has no name waits for room.
async fn finish(
    get: Arc<Get>,
    jobs: Arc<[Job]>,
    swarm: Arc<Swarm>,
    mut group: Vec<(Position, Arc<OpenFile>)>,
) -> DiskDone {
    let (mut named, mut hashes) = (vec![], vec![]);
    loop {
        let (get, jobs, files) = (get.clone(), jobs.clone(), group.clone());
        let began = Instant::now();
        let finished = spawn_blocking(move || {
            let files = files.iter().map(|(at, file)| Finishing {
                storage: &file.storage,
                want: &jobs[*at].want,
                target: &jobs[*at].target,
            });
            let files: Vec<_> = files.collect();
            get.disk.finish(&files, get.existing)
        });
        let (paths, learnt) = match finished.await {
            Ok(finished) => finished,
            Err(error) => {
                swarm.fail(internal(error));
                return DiskDone::Other;
            }
        };
        swarm.stage_times.add(Stage::Disk, began.elapsed());
        hashes.extend(learnt);
        let mut full = vec![];
        for ((at, file), path) in group.into_iter().zip(paths) {
            match path {
                Err(error) if outcome::is_full(&error) => full.push((at, file)),
                path => named.push((at, file, path)),
            }
        }
        let Some((_, first)) = full.first() else {
            return DiskDone::Named(named, hashes);
        };
        swarm.wait_for_room(first).await;
        group = full;
    }
}
