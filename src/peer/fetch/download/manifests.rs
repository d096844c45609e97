//! The manifests of a batch: which contents need one, and whom to ask.
//!
//! Invariant: a content has a manifest before its `.part` is opened; one from a stranger has proved itself.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use anyhow::Result;
use tokio::time::timeout;

use super::{Job, Run, batch::GRACE};
use crate::{
    content::{ContentId, Layout, MAX_SINGLE, Manifest},
    exit::{Exit, Failed},
    peer::{
        fetch::{
            destination::Want,
            find::{Finder, Learning, learn},
            pace::Fixed,
            progress::Happening,
            source::Opening,
        },
        limit::Rates,
    },
};

/// Between two questions for manifests that nobody had.
const AGAIN: Duration = Duration::from_millis(250);

impl Job {
    /// The manifest of a small file, as far as the listing is right.
    pub(super) fn unproven(&self) -> Option<Manifest> {
        let Want { id, size, .. } = self.want;
        match id == ContentId::EMPTY {
            true => Manifest::single(id, 0).ok(),
            false if self.is_disputed || size > MAX_SINGLE.into() => None,
            false => Manifest::single(id, size).ok(),
        }
    }
}

impl Run {
    /// The manifests of all contents that need one. A small file does not: its id proves its bytes, and a source that knows
    /// another size than the listing says so.
    pub(super) async fn manifests(
        &mut self,
        jobs: &[Job],
        finder: &mut Finder,
    ) -> Result<HashMap<ContentId, Manifest>> {
        let mut manifests = HashMap::new();
        let mut unknown = vec![];
        for job in jobs {
            let id = job.want.id;
            match self.get.disk.library.manifest(&id) {
                Some(manifest) => _ = manifests.insert(id, manifest),
                None if job.unproven().is_none() => unknown.push(id),
                None => {}
            }
        }
        if !unknown.is_empty() {
            manifests.extend(self.learn(jobs, &unknown, finder).await?);
        }
        Ok(manifests)
    }

    /// The manifests that only sources can tell. One that nobody has now may be away for a moment, because its file was
    /// touched and is hashed anew.
    async fn learn(
        &mut self,
        jobs: &[Job],
        unknown: &[ContentId],
        finder: &mut Finder,
    ) -> Result<HashMap<ContentId, Manifest>> {
        let opening = self.opening(jobs, unknown);
        let (connected, accounts) = (&mut self.connected, &self.progress.accounts);
        let manifests = HashMap::new();
        let mut learning = Learning {
            connected,
            accounts,
            liars: vec![],
            opening,
            begun: None,
            manifests,
        };
        let until = Instant::now() + GRACE;
        // Those that the caller named will do, if they answer.
        let mut is_current = !self.found.covers(unknown.iter());
        if is_current {
            finder.current(&mut self.found).await?;
        }
        let learnt = loop {
            match learn(&self.get.membership, unknown, &self.found, &mut learning).await {
                Err(_) if !std::mem::replace(&mut is_current, true) => {
                    finder.current(&mut self.found).await?
                }
                Err(error) if is_no_source(&error) && Instant::now() < until => {
                    let _ = timeout(AGAIN, finder.next(&mut self.found)).await;
                }
                learnt => break learnt,
            }
        };
        let Learning {
            liars,
            begun,
            manifests,
            ..
        } = learning;
        self.begun = begun;
        for (peer, why) in liars {
            let text = format!("source {}: given up: {why}", peer.short());
            self.tell(Happening::Note(Some(peer), text)).await;
        }
        learnt.map(|()| manifests)
    }

    /// What a far source may be asked for together with the manifest: the first long content, unless a limit has a say in
    /// when it comes, or sizes are given that this would not have.
    fn opening(&self, jobs: &[Job], unknown: &[ContentId]) -> Option<Opening> {
        let job = jobs
            .iter()
            .find(|job| unknown.contains(&job.want.id) && job.want.size > MAX_SINGLE.into())?;
        let is_free =
            self.get.limit.rates() == Rates::default() && self.get.fixed == Fixed::default();
        let layout = Layout::new(job.want.size).ok().filter(|_| is_free)?;
        let here = (self.get.here.addresses.clone(), self.get.here.port);
        // Those who hold it are where the tracker is, or on the way there, and if not, little is lost.
        let is_far = self.get.tracker.is_far();
        Some(Opening {
            id: job.want.id,
            layout,
            here,
            is_far,
        })
    }
}

fn is_no_source(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<Failed>()
        .is_some_and(|failed| failed.exit == Exit::NoSource)
}
