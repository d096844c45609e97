//! `sprat get`: finds out at the tracker what is meant, and has the peer of this state directory fetch it: the running
//! one, or one that lives as long as the command.
//!
//! Invariant: what is asked for is settled before anything is fetched: every name stands for one content in a listing
//! that is whole, nothing is guessed, and the target is an absolute path. A Node started here is stopped here, whatever happens in between.

use std::{
    collections::BTreeSet,
    fmt,
    os::unix::ffi::OsStrExt,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Result;
use futures_util::FutureExt;

use super::{
    commands::{GetArgs, GetTimeout},
    ending::{Ended, exit_code, message},
    list,
    peer::{one_shot, utf8},
    progress::ProgressReport,
    session::Session,
    signals::Stop,
    whole::{not_whole, patiently, scanning},
};
use crate::{
    catalog::{MIN_PREFIX_LEN, Row, SourceInfo},
    client::{ControlClient, GetEvents},
    config::Service,
    exit::{Exit, Failed},
    peer::{self, Node, member::tracker_client::TrackerClient},
    proto::{GetRequest, ListFilesRequest, Wanted, get_event::Event, get_request::Existing},
    safe_path::SafeName,
    units::human_size,
};

/// Most contents or names that an error lists.
const SHOWN: usize = 5;
/// How long a listing that is not whole is waited for: longer than a lease, unless that was set.
const PATIENCE: Duration = Duration::from_secs(60);
/// The same for a file that is not listed, while peers look through their folders; and how often it is looked for.
const SCAN: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_millis(500);

pub(super) async fn run(session: &Session, args: &GetArgs) -> Result<()> {
    let mut report = ProgressReport::new(session.json, session.quiet, session.verbose);
    let result = fetch(session, args, &mut report).await.map_err(interrupted);
    report.clear();
    if let Err(error) = &result {
        report.failed(exit_code(error), &message(error))?;
    }
    result
}

/// A get that was told to stop can be continued.
fn interrupted(error: anyhow::Error) -> anyhow::Error {
    match error.downcast::<Ended>() {
        Ok(Ended { message, .. }) if !message.is_empty() => Ended {
            code: Exit::Incomplete as u8,
            message: format!("{message}; run the same command again to continue"),
        }
        .into(),
        Ok(ended) => ended.into(),
        Err(error) => error,
    }
}

async fn fetch(session: &Session, args: &GetArgs, report: &mut ProgressReport) -> Result<()> {
    let stop = Stop::listen()?;
    let tracker = session.config.peer.tracker.clone();
    let tracker = stop
        .unless(TrackerClient::open(
            &session.state_dir(Service::Peer)?,
            tracker,
        ))
        .await?;
    let tracker = Arc::new(tracker);
    // Side by side, and over one connection.
    let (rows, holder) = tokio::join!(
        Box::pin(stop.unless(resolve(session, &tracker, args))),
        Box::pin(stop.unless(Holder::attach(session, tracker.clone())))
    );
    let (rows, mut holder) = match (rows, holder) {
        (Ok(rows), holder) => (rows, holder?),
        (Err(error), holder) => {
            if let Ok(holder) = holder {
                holder.leave(false).await;
            }
            return Err(error);
        }
    };
    let done = stop
        .unless(holder.fetch(session, args, &rows, report))
        .await;
    holder.leave(done.is_ok()).await;
    done
}

/// Who does the work.
struct Holder {
    control: ControlClient,
    /// Ours, if no peer was running.
    node: Option<Node>,
}

impl Holder {
    async fn attach(session: &Session, tracker: Arc<TrackerClient>) -> Result<Self> {
        let state_dir = session.state_dir(Service::Peer)?;
        if let Some(connection) = peer::attach(&state_dir).await? {
            return Ok(Self {
                control: ControlClient::new(connection),
                node: None,
            });
        }
        match Node::start_with(one_shot(session)?, tracker).await {
            Ok(node) => Ok(Self {
                control: ControlClient::new(node.control()),
                node: Some(node),
            }),
            // Another command may have been first.
            Err(error) => match peer::attach(&state_dir).await {
                Ok(Some(connection)) => Ok(Self {
                    control: ControlClient::new(connection),
                    node: None,
                }),
                _ => Err(error),
            },
        }
    }

    async fn fetch(
        &mut self,
        session: &Session,
        args: &GetArgs,
        rows: &[Row],
        report: &mut ProgressReport,
    ) -> Result<()> {
        let output = match &args.output {
            Some(path) => output(path, session.cwd(), rows.len())?,
            None => self.downloads(session).await?,
        };
        let to = if output.is_empty() {
            "the downloads folder"
        } else {
            &output
        };
        report.note(&format!("{} → {to}", list::total(rows)));
        let existing = match (args.overwrite, args.rename, args.skip) {
            (true, ..) => Existing::Overwrite,
            (_, true, _) => Existing::Rename,
            (.., true) => Existing::Skip,
            _ => Existing::Refuse,
        };
        let (timeout_seconds, no_timeout) = match args.timeout {
            Some(GetTimeout::Seconds(seconds)) => (seconds, false),
            Some(GetTimeout::Endless) => (0, true),
            None => (0, false),
        };
        let request = GetRequest {
            timeout_seconds,
            no_timeout,
            ..request(rows, output, existing)
        };
        let events = self.control.get(request).await?;
        let told = Self::tell(events, report).await;
        // What is on the disk is told before anything else is done, whatever ended it.
        let flushed = report.flush();
        told.and(flushed)
    }

    async fn tell(mut events: GetEvents, report: &mut ProgressReport) -> Result<()> {
        loop {
            let event = match events.next().now_or_never() {
                Some(event) => event?,
                None => {
                    report.flush()?;
                    events.next().await?
                }
            };
            report.event(&event)?;
            match event {
                Event::Done(_) => return Ok(()),
                Event::Failed(failed) => {
                    return Err(
                        Failed::new(Exit::from_code(failed.exit_code), failed.message).into(),
                    );
                }
                _ => {}
            }
        }
    }

    /// Where files go without `-o`: empty, or a folder.
    async fn downloads(&mut self, session: &Session) -> Result<String> {
        let has_folder = match &self.node {
            Some(_) => session.config.peer.downloads.is_some(),
            None => !self.control.status().await?.downloads.is_empty(),
        };
        if has_folder {
            Ok(String::new())
        } else {
            output(Path::new("./"), session.cwd(), 1)
        }
    }

    /// A Node of ours stays while other commands use it, unless we were told to stop.
    async fn leave(self, complete: bool) {
        if let Some(node) = self.node {
            if complete {
                node.drained().await;
            }
            node.stop_last().await;
        }
    }
}

/// The target as the peer is told it: absolute, and with a `/` at the end if it is a folder.
fn output(given: &Path, cwd: &Path, n_files: usize) -> Result<String> {
    let path = cwd.join(given);
    let is_folder = given.as_os_str().as_bytes().ends_with(b"/") || path.is_dir();
    if n_files > 1 && !is_folder && path.exists() {
        let text = format!(
            "{} is a file, but {n_files} files match: name a folder with -o",
            path.display()
        );
        return Err(Failed::new(Exit::Exists, text).into());
    }
    let mut text = utf8(&path)?;
    if (is_folder || n_files > 1) && !text.ends_with('/') {
        text.push('/');
    }
    Ok(text)
}

/// What the peer is asked: the rows, with their sources, each of which is named once.
fn request(rows: &[Row], output: String, existing: Existing) -> GetRequest {
    let mut sources: Vec<&Arc<SourceInfo>> = vec![];
    let mut wanted = Vec::with_capacity(rows.len());
    for row in rows {
        let mut holders = Vec::with_capacity(row.sources.len());
        for source in &row.sources {
            let is_it = |known: &&Arc<SourceInfo>| Arc::ptr_eq(known, source) || *known == source;
            let at = sources.iter().rposition(is_it).unwrap_or_else(|| {
                sources.push(source);
                sources.len() - 1
            });
            holders.extend(u32::try_from(at));
        }
        let (name, content_id) = (row.name.to_string(), row.content_id.to_string());
        wanted.push(Wanted {
            name,
            size: row.size,
            content_id,
            sources: holders,
        });
    }
    let sources = sources
        .into_iter()
        .map(|source| (&**source).into())
        .collect();
    GetRequest {
        wanted,
        output,
        existing: existing.into(),
        sources,
        ..GetRequest::default()
    }
}

/// The rows that the command means, in a listing that is whole.
async fn resolve(session: &Session, tracker: &TrackerClient, args: &GetArgs) -> Result<Vec<Row>> {
    let mut until = None;
    loop {
        let (settled, told) = patiently(session, tracker, PATIENCE, async |round| {
            let list = async |request| round.list(request).await;
            Ok(settle(&list, &args.what, args.rename).await)
        })
        .await?;
        if !told.is_whole {
            return Err(not_whole(&told));
        }
        let (Err(error), Some(why)) = (&settled, scanning(&told)) else {
            return settled;
        };
        let is_first = until.is_none();
        let until = *until.get_or_insert_with(|| Instant::now() + SCAN);
        if !error.is::<Unlisted>() || Instant::now() >= until {
            return settled;
        }
        if is_first {
            let text = format!("{error}: {why}, waiting for at most {} s", SCAN.as_secs());
            session.hint(&text);
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// What is asked for matches no row.
#[derive(Debug)]
struct Unlisted;

impl fmt::Display for Unlisted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("not listed")
    }
}

impl std::error::Error for Unlisted {}

/// The rows that all the words mean together, each once.
async fn settle<L>(list: &L, what: &[String], rename: bool) -> Result<Vec<Row>>
where
    L: AsyncFn(ListFilesRequest) -> Result<Vec<Row>>,
{
    let mut rows = vec![];
    for text in what {
        rows.extend(find(list, text).await?);
    }
    // The rows of one question come in this order.
    rows.sort_by(|a: &Row, b| (&a.name, a.content_id).cmp(&(&b.name, b.content_id)));
    rows.dedup_by(|a, b| (&a.name, a.content_id) == (&b.name, b.content_id));
    match rows.windows(2).find(|pair| pair[0].name == pair[1].name) {
        Some(pair) if !rename => {
            let same: Vec<Row> = rows
                .iter()
                .filter(|row| row.name == pair[0].name)
                .cloned()
                .collect();
            Err(ambiguous(pair[0].name.as_str(), &same))
        }
        _ => Ok(rows),
    }
}

/// A name, else a glob, else a content id.
async fn find<L>(list: &L, text: &str) -> Result<Vec<Row>>
where
    L: AsyncFn(ListFilesRequest) -> Result<Vec<Row>>,
{
    let named = async || {
        let Ok(name) = SafeName::parse(text) else {
            return Ok(vec![]);
        };
        list(ListFilesRequest {
            name: name.to_string(),
            ..Default::default()
        })
        .await
    };
    let matching = async {
        let glob = || ListFilesRequest {
            glob: text.into(),
            ..Default::default()
        };
        if list::is_pattern(text) {
            list(glob()).await
        } else {
            Ok(vec![])
        }
    };
    // Side by side: the tracker may be far.
    let (found, matching) = tokio::join!(named(), matching);
    let only = |found: Vec<Row>| match found.len() {
        0 => Ok(None),
        1 => Ok(Some(found)),
        _ => Err(ambiguous(text, &found)),
    };
    if let Some(found) = only(found?)? {
        return Ok(found);
    }
    let matching = matching?;
    if !matching.is_empty() {
        return Ok(matching);
    }
    if (MIN_PREFIX_LEN..=64).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_hexdigit())
    {
        let content_id = text.to_ascii_lowercase();
        let mut rows = list(ListFilesRequest {
            content_id,
            ..Default::default()
        })
        .await?;
        let contents: BTreeSet<_> = rows.iter().map(|row| row.content_id).collect();
        match contents.len() {
            0 => {}
            // One content, whatever its names: one file.
            1 => {
                rows.truncate(1);
                return Ok(rows);
            }
            _ => return Err(ambiguous(text, &rows)),
        }
    }
    let mut near = nearest(list, text).await;
    if near.iter().any(|name| name == text) {
        // It was away for a moment: a file that is touched is hashed anew.
        if let Some(found) = only(named().await?)? {
            return Ok(found);
        }
        near.retain(|name| name != text);
    }
    Err(nothing(text, &near))
}

fn ambiguous(text: &str, rows: &[Row]) -> anyhow::Error {
    let one = |row: &Row| {
        let id = row.content_id.to_string();
        format!(
            "{} ({}, {} sources)",
            &id[..list::SHORT_ID],
            human_size(row.size),
            row.source_count
        )
    };
    let mut shown: Vec<String> = rows.iter().take(SHOWN).map(one).collect();
    if rows.len() > SHOWN {
        shown.push("…".into());
    }
    let text = format!(
        "{text} stands for {} different files; ask by content id: {}",
        rows.len(),
        shown.join(", ")
    );
    Failed::new(Exit::NotFound, text).into()
}

fn nothing(text: &str, near: &[String]) -> anyhow::Error {
    let next = match near {
        [] => "`sprat ls` shows what there is".into(),
        names => format!("did you mean {}?", names.join(" or ")),
    };
    let text = format!("no file `{text}` is listed; {next}");
    anyhow::Error::from(Unlisted).context(Failed::new(Exit::NotFound, text))
}

/// Names that were perhaps meant. A failing question here is no news.
async fn nearest<L>(list: &L, text: &str) -> Vec<String>
where
    L: AsyncFn(ListFilesRequest) -> Result<Vec<Row>>,
{
    let folder = ListFilesRequest {
        glob: format!("{text}/"),
        ..Default::default()
    };
    if !list::is_pattern(text) && list(folder).await.is_ok_and(|rows| !rows.is_empty()) {
        return vec![format!("{text}/")];
    }
    let (parent, last) = text
        .trim_end_matches('/')
        .rsplit_once('/')
        .unwrap_or(("", text));
    let stem = last.split('.').next().unwrap_or(last);
    let beginning: String = stem.chars().take(1).collect();
    let beside = if parent.is_empty() {
        format!("{beginning}*")
    } else {
        format!("{parent}/{beginning}*")
    };
    let beside = ListFilesRequest {
        glob: beside,
        ..Default::default()
    };
    let elsewhere = ListFilesRequest {
        text: stem.into(),
        ..Default::default()
    };
    let mut found: Vec<(usize, String)> = Vec::new();
    for request in [beside, elsewhere]
        .into_iter()
        .filter(|request| request.text.len() != 1)
    {
        let rows = list(request).await.unwrap_or_default();
        found.extend(
            rows.iter()
                .filter_map(|row| Some((likeness(text, &row.name)?, row.name.to_string()))),
        );
    }
    found.sort();
    found.dedup();
    found
        .into_iter()
        .rev()
        .take(3)
        .map(|(_, name)| name)
        .collect()
}

/// Percent of a name that begins and ends like the text; `None` if it is not alike. The folder may be left out.
fn likeness(text: &str, name: &SafeName) -> Option<usize> {
    let alike = |name: &str| {
        let same = |(a, b): &(u8, u8)| a.eq_ignore_ascii_case(b);
        let begins = text.bytes().zip(name.bytes()).take_while(same).count();
        let ends = text
            .bytes()
            .rev()
            .zip(name.bytes().rev())
            .take_while(same)
            .count();
        let length = text.len().max(name.len());
        (begins + ends).min(length) * 100 / length
    };
    Some(alike(name.as_str()).max(alike(name.file_name()))).filter(|percent| *percent >= 60)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{catalog::Query, content::ContentId};

    fn row(name: &str, content: u8) -> Row {
        let content_id = ContentId::from_bytes([content; 32]);
        Row {
            name: SafeName::parse(name).unwrap(),
            size: 1 << 20,
            content_id,
            sources: vec![],
            source_count: 2,
        }
    }

    /// A tracker that lists these rows and reads questions as the real one does.
    async fn ask(what: &[&str], rename: bool) -> Result<Vec<String>> {
        let rows = [
            row("movies/alien.mkv", 1),
            row("movies/brazil.mkv", 2),
            row("movies/copy of alien.mkv", 1),
            row("notes [old].txt", 3),
            row("same.bin", 4),
            row("same.bin", 5),
            row("shots/1/a.exr", 6),
            row("shots/2/a.exr", 7),
        ];
        let list = async |request: ListFilesRequest| {
            let matcher = Query::try_from(&request)?.compile()?;
            Ok(rows
                .iter()
                .filter(|row| matcher.matches_key(&row.key()))
                .cloned()
                .collect())
        };
        let what: Vec<String> = what.iter().map(ToString::to_string).collect();
        Ok(settle(&list, &what, rename)
            .await?
            .iter()
            .map(|row| row.name.to_string())
            .collect())
    }

    #[tokio::test]
    async fn words_find_what_they_mean() {
        for (what, names) in [
            (&["movies/alien.mkv"][..], &["movies/alien.mkv"][..]),
            (&["movies/?r*.mkv"], &["movies/brazil.mkv"]),
            (&["notes [old].txt"], &["notes [old].txt"]),
            (&["shots/"], &["shots/1/a.exr", "shots/2/a.exr"]),
            (&["shots/**"], &["shots/1/a.exr", "shots/2/a.exr"]),
            (&["0202020202"], &["movies/brazil.mkv"]),
            (&["0101010101010101"], &["movies/alien.mkv"]),
            (
                &["movies/alien.mkv", "movies/al*", "shots/2/a.exr"],
                &["movies/alien.mkv", "shots/2/a.exr"],
            ),
        ] {
            assert_eq!(ask(what, false).await.unwrap(), names, "{what:?}");
        }
    }

    #[tokio::test]
    async fn nothing_is_guessed() {
        for (what, text) in [
            (
                "same.bin",
                "same.bin stands for 2 different files; ask by content id: 0404040404040404 (1.0 MiB, 2 sources)",
            ),
            ("same*", "same.bin stands for 2 different files"),
            ("shots", "did you mean shots/?"),
            ("alien.mkv", "did you mean movies/alien.mkv"),
            ("movies/a.mkv", "did you mean movies/alien.mkv?"),
            (
                "movies/aliens.mkv",
                "no file `movies/aliens.mkv` is listed; did you mean movies/alien.mkv",
            ),
            ("zzzzz", "`sprat ls` shows what there is"),
            ("ffffffffff", "no file `ffffffffff` is listed"),
        ] {
            let error = ask(&[what], false).await.unwrap_err();
            assert!(error.to_string().contains(text), "{what}: {error}");
            assert_eq!(exit_code(&error), 3);
        }
        assert_eq!(ask(&["same*"], true).await.unwrap().len(), 2);
    }

    #[tokio::test]
    async fn a_file_that_was_away_for_a_moment_is_found() {
        let n_asked = std::cell::Cell::new(0);
        let list = async |request: ListFilesRequest| {
            let matcher = Query::try_from(&request)?.compile()?;
            let film = row("movies/alien.mkv", 1);
            let is_there = n_asked.replace(n_asked.get() + 1) > 0;
            Ok(if is_there && matcher.matches_key(&film.key()) {
                vec![film]
            } else {
                vec![]
            })
        };
        let found = settle(&list, &["movies/alien.mkv".into()], false)
            .await
            .unwrap();
        assert_eq!(found.len(), 1);
    }

    #[test]
    fn output_is_a_folder_or_a_file() {
        let cwd = tempfile::tempdir().unwrap();
        std::fs::create_dir(cwd.path().join("folder")).unwrap();
        std::fs::write(cwd.path().join("file"), "").unwrap();
        let at = cwd.path().to_str().unwrap();
        for (given, n_files, expected) in [
            ("new.mkv", 1, "/new.mkv"),
            ("new/", 1, "/new/"),
            ("new", 2, "/new/"),
            ("folder", 1, "/folder/"),
            ("folder/", 2, "/folder/"),
            ("file", 1, "/file"),
            ("./", 1, "/./"),
        ] {
            assert_eq!(
                output(Path::new(given), cwd.path(), n_files).unwrap(),
                format!("{at}{expected}"),
                "{given}"
            );
        }
        assert_eq!(
            output(Path::new("/elsewhere/x"), cwd.path(), 1).unwrap(),
            "/elsewhere/x"
        );
        assert_eq!(
            exit_code(&output(Path::new("file"), cwd.path(), 2).unwrap_err()),
            9
        );
    }
}
