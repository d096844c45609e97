//! Who holds what we want: the tracker's word, kept up to date, and the manifests that sources prove.
//!
//! Invariant: what the tracker says only decides whom to ask; a manifest is believed because it proves itself.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use anyhow::Result;
use futures_util::{StreamExt, stream::FuturesUnordered};
use tokio::{sync::mpsc, time::timeout};
use tokio_util::task::AbortOnDropHandle;

use super::{
    account::{Accounts, State},
    membership::Membership,
    source::{Source, SourceError},
    tracker_client::TrackerClient,
};
use crate::{
    catalog::Row,
    content::{ContentId, Manifest},
    exit::{Exit, Failed},
    identity::PeerId,
    proto::watch_files_response::Change,
};

/// Sources asked for manifests at the same time.
const ASKED: usize = 3;
/// How long the tracker has to tell the current sources.
const CURRENT: Duration = Duration::from_secs(10);
const QUEUE: usize = 256;
/// Between two questions to a tracker that does not answer.
const PAUSE: Duration = Duration::from_secs(1);

/// All sources that are known, with what they hold.
#[derive(Default)]
pub struct Found {
    sources: BTreeMap<PeerId, (Vec<String>, BTreeSet<ContentId>)>,
}

impl Found {
    /// Everybody.
    pub fn peers(&self) -> impl Iterator<Item = PeerId> {
        self.sources.keys().copied()
    }

    /// Addresses and contents of one.
    #[must_use]
    pub fn of(&self, peer: PeerId) -> Option<(&[String], &BTreeSet<ContentId>)> {
        self.sources.get(&peer).map(|(addresses, contents)| (&addresses[..], contents))
    }

    /// Takes over a row; returns whom it told something new about.
    fn learn(&mut self, row: Row, me: PeerId) -> Vec<PeerId> {
        let complete = row
            .sources
            .into_iter()
            .filter(|source| source.peer != me && !source.partial && !source.addresses.is_empty());
        let mut news = vec![];
        for source in complete {
            let known = self.sources.entry(source.peer).or_default();
            let moved = known.0 != source.addresses;
            known.0 = source.addresses;
            if known.1.insert(row.content_id) || moved {
                news.push(source.peer);
            }
        }
        news
    }
}

/// Follows the tracker's rows of some contents for as long as it lives.
pub struct Finder {
    rows: mpsc::Receiver<Result<Option<Row>>>,
    me: PeerId,
    _task: AbortOnDropHandle<()>,
}

impl Finder {
    /// Begins to follow.
    #[must_use]
    pub fn start(tracker: Arc<TrackerClient>, me: PeerId, contents: Vec<ContentId>) -> Self {
        let (sender, rows) = mpsc::channel(QUEUE);
        let task = tokio::spawn(async move {
            while !sender.is_closed() {
                if let Err(error) = follow(&tracker, &contents, &sender).await {
                    tracing::debug!("following the tracker: {error:#}");
                    if sender.send(Err(error)).await.is_err() {
                        return;
                    }
                }
                tokio::time::sleep(PAUSE).await;
            }
        });
        Self { rows, me, _task: AbortOnDropHandle::new(task) }
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
                    Some(Ok(None)) | None => return Ok(()),
                    Some(Err(error)) => return Err(error),
                }
            }
        };
        let late = || Failed::new(Exit::Tracker, "the tracker does not tell who holds the files").into();
        match timeout(CURRENT, learn).await.unwrap_or_else(|_| Err(late())) {
            Err(error) if found.sources.is_empty() => Err(error),
            _ => Ok(()),
        }
    }

    /// Waits for news and says whom they are about.
    pub async fn next(&mut self, found: &mut Found) -> Vec<PeerId> {
        loop {
            match self.rows.recv().await {
                Some(Ok(Some(row))) => {
                    let news = found.learn(row, self.me);
                    if !news.is_empty() {
                        return news;
                    }
                }
                Some(Ok(None) | Err(_)) => {}
                None => std::future::pending().await,
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

/// Learns the manifests of all `contents`, asking a few sources side by side; also gives the connections made.
///
/// # Errors
/// [`Exit::NoSource`] or [`Exit::Integrity`] if there is a content whose manifest nobody can prove.
pub async fn learn(
    membership: &Arc<Membership>,
    contents: &[ContentId],
    found: &Found,
    accounts: &Accounts,
) -> Result<(HashMap<ContentId, Manifest>, HashMap<PeerId, Source>)> {
    let mut manifests = HashMap::new();
    if contents.contains(&ContentId::EMPTY) {
        manifests.insert(ContentId::EMPTY, Manifest::single(ContentId::EMPTY, 0)?);
    }
    let mut connected = HashMap::new();
    let mut waiting: Vec<PeerId> = found.peers().collect();
    // Not everybody asks the same one first.
    let first = rand::random_range(0..waiting.len().max(1));
    waiting.rotate_left(first);
    let mut asked = FuturesUnordered::new();
    let mut trouble = Vec::new();
    loop {
        if manifests.len() == contents.len() {
            return Ok((manifests, connected));
        }
        while asked.len() < ASKED
            && let Some(peer) = waiting.pop()
        {
            let Some((addresses, held)) = found.of(peer) else { continue };
            let missing: Vec<_> =
                contents.iter().filter(|id| held.contains(id) && !manifests.contains_key(*id)).copied().collect();
            if !missing.is_empty() {
                asked.push(ask(membership, peer, addresses, missing));
            }
        }
        let Some((peer, outcome)) = asked.next().await else { break };
        match outcome {
            Ok((source, learnt)) => {
                connected.insert(peer, source);
                manifests.extend(learnt.into_iter().map(|manifest| (manifest.id(), manifest)));
            }
            Err(error) => {
                tracing::debug!(%peer, "asking for manifests: {error}");
                let mut accounts = accounts.lock().expect("no panic while the lock is held");
                let account = accounts.entry(peer).or_default();
                account.trouble = error.to_string();
                if matches!(error, SourceError::Lied(_)) {
                    (account.lies, account.state) = (account.lies + 1, State::Gone);
                }
                trouble.push((peer, error));
            }
        }
    }
    Err(nobody(contents.len() - manifests.len(), &trouble))
}

fn nobody(n: usize, trouble: &[(PeerId, SourceError)]) -> anyhow::Error {
    let lied = trouble.iter().filter(|(_, error)| matches!(error, SourceError::Lied(_))).count();
    let files = if n == 1 { "the file".to_owned() } else { format!("{n} files") };
    if lied > 0 && lied == trouble.len() {
        return Failed::new(Exit::Integrity, format!("{files}: every source ({lied}) sent a wrong manifest")).into();
    }
    let why = trouble.first().map(|(peer, error)| format!("; source {}: {error}", peer.short())).unwrap_or_default();
    Failed::new(Exit::NoSource, format!("no source of {files} can be reached{why}")).into()
}

async fn ask(
    membership: &Arc<Membership>,
    peer: PeerId,
    addresses: &[String],
    ids: Vec<ContentId>,
) -> (PeerId, Result<(Source, Vec<Manifest>), SourceError>) {
    let answer = async {
        let source = Source::connect(membership, peer, addresses).await?;
        let manifests = source.manifests(&ids).await?;
        Ok((source, manifests.into_iter().flatten().collect()))
    };
    (peer, answer.await)
}
