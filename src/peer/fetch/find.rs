//! Who holds what we want: the tracker's word, kept up to date, and the manifests that sources prove.
//!
//! Invariant: what the tracker says only decides whom to ask; a manifest is believed because it proves itself.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use anyhow::Result;
use futures_util::{StreamExt, stream::FuturesUnordered};
use tokio::{sync::mpsc, time::timeout};
use tokio_util::task::AbortOnDropHandle;

use super::{
    source::{Begun, Opening, Source, SourceError},
    source_stats::{Accounts, State},
};
use crate::peer::member::{membership::Membership, tracker_client::TrackerClient};
use crate::{
    catalog::{Row, SourceInfo},
    content::{ContentId, Manifest},
    exit::{Exit, Failed},
    identity::PeerId,
    proto::{MAX_CONTENTS, watch_files_response::Change},
    request::carried,
};

/// Sources asked for manifests at the same time.
const ASKED: usize = 3;
/// How long the tracker has to tell the current sources.
const CURRENT: Duration = Duration::from_secs(10);
const QUEUE: usize = 1024;
/// Between two questions to a tracker that does not answer.
const PAUSE: Duration = Duration::from_secs(1);

/// All sources that are known, with what they hold.
#[derive(Default)]
pub struct Found {
    sources: BTreeMap<PeerId, Candidate>,
}

/// A peer that may be a source.
#[derive(Clone, Debug, Default)]
pub struct Candidate {
    /// "HOST:PORT", best first.
    pub addresses: Vec<String>,
    /// What it holds whole.
    pub complete: HashSet<ContentId>,
    /// What it is fetching itself.
    pub partial: HashSet<ContentId>,
}

impl Found {
    /// Everybody.
    pub fn peers(&self) -> impl Iterator<Item = PeerId> {
        self.sources.keys().copied()
    }

    /// One of them.
    #[must_use]
    pub fn of(&self, peer: PeerId) -> Option<&Candidate> {
        self.sources.get(&peer)
    }

    /// Takes over a row; returns whom it told something new about.
    fn learn(&mut self, row: Row, me: PeerId) -> Vec<PeerId> {
        let others = row.sources.iter().filter(|source| source.peer != me);
        others
            .filter(|source| self.told(source, row.content_id))
            .map(|source| source.peer)
            .collect()
    }

    /// Takes over that a source holds a content; true if that is news.
    pub fn told(&mut self, source: &SourceInfo, id: ContentId) -> bool {
        if source.addresses.is_empty() {
            return false;
        }
        let known = self.sources.entry(source.peer).or_default();
        let moved = known.addresses != source.addresses;
        if moved {
            known.addresses.clone_from(&source.addresses);
        }
        known.add(id, source.partial) || moved
    }

    /// Is there somebody for each of these contents?
    pub fn covers<'a>(&self, mut contents: impl Iterator<Item = &'a ContentId>) -> bool {
        contents.all(|id| {
            self.sources
                .values()
                .any(|known| known.complete.contains(id) || known.partial.contains(id))
        })
    }

    /// Takes over what a source said of another peer; true if that is news.
    pub fn hint(&mut self, peer: PeerId, addresses: Vec<String>, id: ContentId) -> bool {
        let known = self.sources.entry(peer).or_default();
        if known.addresses.is_empty() {
            known.addresses = addresses;
        }
        !known.addresses.is_empty() && known.add(id, true)
    }
}

impl Candidate {
    /// True if that is new.
    fn add(&mut self, id: ContentId, partial: bool) -> bool {
        if !partial {
            self.partial.remove(&id);
            return self.complete.insert(id);
        }
        !self.complete.contains(&id) && self.partial.insert(id)
    }
}

/// Follows the tracker's rows of some contents for as long as it lives.
pub struct Finder {
    rows: mpsc::Receiver<Result<Option<Row>>>,
    /// Streams that have not told all current sources yet.
    n_behind: usize,
    me: PeerId,
    /// Whom something was learnt about that was not told yet.
    news: BTreeSet<PeerId>,
    _tasks: Vec<AbortOnDropHandle<()>>,
}

impl Finder {
    /// Begins to follow, after a `pause`: what is done by then need not be followed.
    #[must_use]
    pub fn start(
        tracker: Arc<TrackerClient>,
        me: PeerId,
        contents: Vec<ContentId>,
        pause: Duration,
    ) -> Self {
        let (sender, rows) = mpsc::channel(QUEUE);
        let follow = |contents: &[ContentId]| {
            let (tracker, contents, sender) = (tracker.clone(), contents.to_vec(), sender.clone());
            AbortOnDropHandle::new(tokio::spawn(carried(async move {
                tokio::time::sleep(pause).await;
                while !sender.is_closed() {
                    if let Err(error) = follow(&tracker, &contents, &sender).await {
                        tracing::debug!("following the tracker: {error:#}");
                        if sender.send(Err(error)).await.is_err() {
                            return;
                        }
                    }
                    tokio::time::sleep(PAUSE).await;
                }
            })))
        };
        let tasks: Vec<_> = contents.chunks(MAX_CONTENTS).map(follow).collect();
        Self {
            rows,
            n_behind: tasks.len(),
            me,
            news: BTreeSet::new(),
            _tasks: tasks,
        }
    }

    /// Learns the current sources. If the tracker does not answer, those known from before will do.
    ///
    /// # Errors
    /// The tracker's, if nobody is known.
    pub async fn current(&mut self, found: &mut Found) -> Result<()> {
        let learn = async {
            loop {
                match self.rows.recv().await {
                    Some(Ok(Some(row))) => _ = found.learn(row, self.me),
                    Some(Ok(None)) if self.n_behind > 1 => self.n_behind -= 1,
                    Some(Ok(None)) | None => return Ok(()),
                    Some(Err(error)) => return Err(error),
                }
            }
        };
        let late = || {
            Failed::new(
                Exit::Tracker,
                "the tracker does not tell who holds the files",
            )
            .into()
        };
        match timeout(CURRENT, learn)
            .await
            .unwrap_or_else(|_| Err(late()))
        {
            Err(error) if found.sources.is_empty() => Err(error),
            _ => Ok(()),
        }
    }

    /// Waits for news and says whom they are about; what came together is told together. Dropping the future loses nothing.
    pub async fn next(&mut self, found: &mut Found) -> Vec<PeerId> {
        loop {
            match self.rows.recv().await {
                Some(Ok(Some(row))) => self.news.extend(found.learn(row, self.me)),
                Some(Ok(None) | Err(_)) => {}
                None => std::future::pending().await,
            }
            if self.rows.is_empty() && !self.news.is_empty() {
                return std::mem::take(&mut self.news).into_iter().collect();
            }
        }
    }
}

async fn follow(
    tracker: &TrackerClient,
    contents: &[ContentId],
    rows: &mpsc::Sender<Result<Option<Row>>>,
) -> Result<()> {
    let mut stream = tracker.watch(contents).await?;
    while let Some(message) = stream.message().await? {
        let told = match message.change {
            Some(Change::Changed(row)) => Ok(Some(row.try_into()?)),
            Some(Change::Current(_)) => Ok(None),
            Some(Change::Resync(_)) => return Ok(()),
            Some(Change::Removed(_)) | None => continue,
        };
        if rows.send(told).await.is_err() {
            return Ok(());
        }
    }
    Ok(())
}

/// What comes of [`learn`] besides.
pub struct Learning<'a> {
    /// Connections, old and new.
    pub connected: &'a mut HashMap<PeerId, Source>,
    /// What the sources are known for.
    pub accounts: &'a Accounts,
    /// Those that sent a wrong manifest, with what was wrong: they are given up, and not asked again.
    pub liars: Vec<(PeerId, String)>,
    /// What the first one asked that holds it all may be asked for as well, and then was.
    pub opening: Option<Opening>,
    /// See `opening`.
    pub begun: Option<Begun>,
    /// What was learnt.
    pub manifests: HashMap<ContentId, Manifest>,
}

/// Learns the manifests of all `contents` that are not known yet, asking a few sources side by side.
///
/// # Errors
/// [`Exit::NoSource`] or [`Exit::Integrity`] if there is a content whose manifest nobody can prove.
pub async fn learn(
    membership: &Arc<Membership>,
    contents: &[ContentId],
    found: &Found,
    learning: &mut Learning<'_>,
) -> Result<()> {
    let is_liar = |peer: &PeerId| learning.liars.iter().any(|(liar, _)| liar == peer);
    let mut waiting: Vec<PeerId> = found.peers().filter(|peer| !is_liar(peer)).collect();
    // Not everybody asks the same one first.
    let first = rand::random_range(0..waiting.len().max(1));
    waiting.rotate_left(first);
    let mut asked = FuturesUnordered::new();
    let (mut trouble, mut n_without) = (Vec::new(), 0);
    loop {
        if learning.manifests.len() == contents.len() {
            return Ok(());
        }
        while asked.len() < ASKED
            && let Some(peer) = waiting.pop()
        {
            let Some(Candidate {
                addresses,
                complete,
                partial,
            }) = found.of(peer)
            else {
                continue;
            };
            let held = |id: &&ContentId| complete.contains(*id) || partial.contains(*id);
            let missing = contents
                .iter()
                .filter(held)
                .filter(|id| !learning.manifests.contains_key(*id));
            let missing: Vec<_> = missing.take(MAX_CONTENTS).copied().collect();
            if !missing.is_empty() {
                let connected = learning
                    .connected
                    .remove(&peer)
                    .filter(|source| !source.is_closed());
                let opening = learning
                    .opening
                    .take_if(|opening| complete.contains(&opening.id));
                asked.push(ask(
                    membership,
                    peer,
                    addresses,
                    connected,
                    (missing, opening),
                ));
            }
        }
        let Some((peer, outcome)) = asked.next().await else {
            break;
        };
        match outcome {
            Ok((source, learnt, begun)) => {
                learning.connected.insert(peer, source);
                learning.begun = begun.or_else(|| learning.begun.take());
                n_without += usize::from(learnt.iter().any(Option::is_none));
                learning.manifests.extend(
                    learnt
                        .into_iter()
                        .flatten()
                        .map(|manifest| (manifest.id(), manifest)),
                );
            }
            Err(error) => {
                tracing::debug!(%peer, "asking for manifests: {error}");
                let mut accounts = learning
                    .accounts
                    .lock()
                    .expect("no panic while the lock is held");
                let account = accounts.entry(peer).or_default();
                account.trouble = error.to_string();
                if matches!(error, SourceError::Lied(_)) {
                    (account.lies, account.state) = (account.lies + 1, State::Gone);
                    learning.liars.push((peer, error.to_string()));
                } else {
                    trouble.push((peer, error));
                }
            }
        }
    }
    Err(nobody(
        contents.len() - learning.manifests.len(),
        &trouble,
        n_without,
        learning.liars.len(),
    ))
}

/// Why: some are in trouble, some do not have it now, or all there are lied.
fn nobody(
    n: usize,
    trouble: &[(PeerId, SourceError)],
    n_without: usize,
    lied: usize,
) -> anyhow::Error {
    let files = if n == 1 {
        "the file".to_owned()
    } else {
        format!("{n} files")
    };
    if lied > 0 && n_without == 0 && trouble.is_empty() {
        return Failed::new(
            Exit::Integrity,
            format!("{files}: every source ({lied}) sent a wrong manifest"),
        )
        .into();
    }
    let text = match trouble.first() {
        Some((peer, error)) => format!(
            "no source of {files} can be reached; source {}: {error}",
            peer.short()
        ),
        None if n_without > 0 => format!("no source has {files} any more"),
        None => format!("no source of {files} can be reached"),
    };
    Failed::new(Exit::NoSource, text).into()
}

async fn ask(
    membership: &Arc<Membership>,
    peer: PeerId,
    addresses: &[String],
    connected: Option<Source>,
    (ids, opening): (Vec<ContentId>, Option<Opening>),
) -> (
    PeerId,
    Result<(Source, Vec<Option<Manifest>>, Option<Begun>), SourceError>,
) {
    let answer = async {
        let source = match connected {
            Some(source) => source,
            None => {
                let is_far = opening.as_ref().is_some_and(|opening| opening.is_far);
                Source::connect(membership, peer, addresses, is_far).await?
            }
        };
        let begun = opening.and_then(|opening| source.begin(&opening));
        let manifests = source.manifests(&ids).await?;
        Ok((source, manifests, begun))
    };
    (peer, answer.await)
}
