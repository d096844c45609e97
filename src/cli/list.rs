//! `sprat ls` and `sprat search`: what the tracker lists, read with the identity alone, no Node and no lock.
//!
//! Invariant: one row is one name over one content; what is cut or summed for people is whole in JSON; a listing that
//! is not whole is shown, and the command fails.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use anyhow::{Context, Result};
use serde::Serialize;

use super::{
    commands::{Filters, ListArgs, SearchArgs},
    output::{count, json, line, table},
    session::Session,
    signals::Stop,
    whole::{not_whole, patiently, scanning},
};
use crate::{
    catalog::Row,
    config::Service,
    exit::{Exit, Failed},
    identity::PeerId,
    peer::member::tracker_client::{FileListing, TrackerClient},
    proto::ListFilesRequest,
    safe_path::escape,
    units::human_size,
};

/// Digits of a content id that people are shown.
pub(super) const SHORT_ID: usize = 16;
/// How long a listing that is not whole is waited for.
const PATIENCE: Duration = Duration::from_secs(10);
/// Characters that make a name a glob.
const GLOB: [char; 4] = ['*', '?', '[', '{'];

pub(super) async fn ls(session: &Session, args: &ListArgs) -> Result<()> {
    let glob = args.glob.clone().unwrap_or_default();
    let request = ListFilesRequest {
        glob: glob.clone(),
        ..request(&args.filters)?
    };
    let listing = Stop::listen()?.unless(list(session, request)).await?;
    show(session, &args.filters, listing)
}

pub(super) async fn search(session: &Session, args: &SearchArgs) -> Result<()> {
    let request = ListFilesRequest {
        text: args.text.clone(),
        ..request(&args.filters)?
    };
    let listing = Stop::listen()?.unless(list(session, request)).await?;
    show(session, &args.filters, listing)
}

/// All rows that the tracker has for a question; a folder may be named without its slash. If they are not whole they
/// are waited for, but not for ever.
///
/// # Errors
/// If this machine is no member, or the tracker cannot be reached or refuses the question.
pub async fn list(session: &Session, request: ListFilesRequest) -> Result<FileListing> {
    let tracker = session.config.peer.tracker.clone();
    let tracker = TrackerClient::open(&session.state_dir(Service::Peer)?, tracker).await?;
    let (rows, completeness) = patiently(session, &tracker, PATIENCE, async |round| {
        let rows = round.list(request.clone()).await?;
        let glob = &request.glob;
        if !rows.is_empty() || glob.is_empty() || is_pattern(glob) {
            return Ok(rows);
        }
        let glob = format!("{glob}/");
        round
            .list(ListFilesRequest {
                glob,
                ..request.clone()
            })
            .await
    })
    .await?;
    Ok(FileListing { rows, completeness })
}

/// Is it more than one name?
pub(super) fn is_pattern(text: &str) -> bool {
    text.contains(GLOB) || text.ends_with('/')
}

fn request(filters: &Filters) -> Result<ListFilesRequest> {
    let peer_id = filters.peer.clone().unwrap_or_default();
    if !peer_id.is_empty() {
        peer_id
            .parse::<PeerId>()
            .context("--peer")
            .map_err(|error| Failed::new(Exit::Usage, format!("{error:#}")))?;
    }
    // 0 means no bound there; `show` applies it.
    let max_size = filters.max_size.unwrap_or_default();
    Ok(ListFilesRequest {
        min_size: filters.min_size.unwrap_or_default(),
        max_size,
        peer_id,
        ..Default::default()
    })
}

fn show(session: &Session, filters: &Filters, listing: FileListing) -> Result<()> {
    let told = listing.completeness;
    show_rows(session, filters, listing.rows)?;
    if let Some(text) = scanning(&told) {
        session.hint(&format!("{text}; more may be listed soon"));
    }
    if told.is_whole {
        Ok(())
    } else {
        Err(not_whole(&told))
    }
}

fn show_rows(session: &Session, filters: &Filters, mut rows: Vec<Row>) -> Result<()> {
    rows.retain(|row| filters.max_size.is_none_or(|max| row.size <= max));
    if filters.peers {
        return show_peers(session, &rows);
    }
    if session.json {
        return rows.iter().try_for_each(|row| json(&FileLine::from(row)));
    }
    if rows.is_empty() {
        session.hint("nothing is listed that fits; `sprat share DIR` offers a folder");
        return Ok(());
    }
    let cells: Vec<_> = rows.iter().map(cells).collect();
    table(&["SIZE", "SOURCES", "<CONTENT ID", "<NAME"], &cells)
        .iter()
        .try_for_each(|text| line(text))?;
    session.hint(&total(&rows));
    Ok(())
}

/// `3 files, 1.2 GiB`
#[must_use]
pub fn total(rows: &[Row]) -> String {
    let bytes = rows
        .iter()
        .fold(0u64, |sum, row| sum.saturating_add(row.size));
    format!(
        "{}, {}",
        count(rows.len() as u64, "file"),
        human_size(bytes)
    )
}

fn cells(row: &Row) -> Vec<String> {
    let id = row.content_id.to_string();
    vec![
        human_size(row.size),
        row.source_count.to_string(),
        id[..SHORT_ID].to_owned(),
        escape(row.name.as_str()),
    ]
}

/// Who offers the rows: each peer with its addresses and how many of the rows it holds.
fn peers(rows: &[Row]) -> BTreeMap<PeerId, (BTreeSet<String>, u64)> {
    let mut peers: BTreeMap<PeerId, (BTreeSet<String>, u64)> = BTreeMap::new();
    for source in rows.iter().flat_map(|row| &row.sources) {
        let (addresses, n_files) = peers.entry(source.peer).or_default();
        addresses.extend(source.addresses.iter().cloned());
        *n_files += 1;
    }
    peers
}

fn show_peers(session: &Session, rows: &[Row]) -> Result<()> {
    let peers = peers(rows);
    if session.json {
        let row = |(peer, (addresses, files)): (&PeerId, &(BTreeSet<String>, u64))| {
            json(&PeerLine {
                peer: peer.to_string(),
                addresses,
                files: *files,
            })
        };
        return peers.iter().try_for_each(row);
    }
    if peers.is_empty() {
        session.hint("nobody offers such a file now");
        return Ok(());
    }
    let cells = |(peer, (addresses, files)): (&PeerId, &(BTreeSet<String>, u64))| {
        let addresses = addresses
            .iter()
            .map(|address| escape(address))
            .collect::<Vec<_>>()
            .join(", ");
        vec![peer.to_string(), count(*files, "file"), addresses]
    };
    let rows: Vec<_> = peers.iter().map(cells).collect();
    table(&["<PEER", "OFFERS", "<ADDRESSES"], &rows)
        .iter()
        .try_for_each(|text| line(text))
}

#[derive(Serialize)]
struct FileLine<'a> {
    name: &'a str,
    size: u64,
    content_id: String,
    sources: u32,
    peers: Vec<String>,
}

impl<'a> From<&'a Row> for FileLine<'a> {
    fn from(row: &'a Row) -> Self {
        Self {
            name: row.name.as_str(),
            size: row.size,
            content_id: row.content_id.to_string(),
            sources: row.source_count,
            peers: row
                .sources
                .iter()
                .map(|source| source.peer.to_string())
                .collect(),
        }
    }
}

#[derive(Serialize)]
struct PeerLine<'a> {
    peer: String,
    addresses: &'a BTreeSet<String>,
    files: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{catalog::SourceInfo, content::ContentId, safe_path::SafeName};

    fn row(name: &str, peer: &[u8]) -> Row {
        let peer = PeerId::from_spki(peer);
        let source = SourceInfo {
            peer,
            addresses: vec!["10.0.0.1:7701".into()],
            partial: false,
        };
        let name = SafeName::parse(name).unwrap();
        Row {
            name,
            size: 7,
            content_id: ContentId::EMPTY,
            sources: vec![source.into()],
            source_count: 3,
        }
    }

    #[test]
    fn a_file_is_one_json_object() {
        let text = serde_json::to_string(&FileLine::from(&row("movies/a.mkv", b"a"))).unwrap();
        let (id, peer) = (ContentId::EMPTY, PeerId::from_spki(b"a"));
        let expected =
            r#"{"name":"movies/a.mkv","size":7,"content_id":"ID","sources":3,"peers":["PEER"]}"#;
        assert_eq!(
            text,
            expected
                .replace("ID", &id.to_string())
                .replace("PEER", &peer.to_string())
        );
    }

    #[test]
    fn peers_are_counted_once_with_all_their_files() {
        let peers = peers(&[row("a", b"a"), row("b", b"a"), row("c", b"b")]);
        let counts: Vec<u64> = [b"a", b"b"]
            .map(|key| peers[&PeerId::from_spki(key)].1)
            .to_vec();
        assert_eq!((peers.len(), counts), (2, vec![2, 1]));
    }

    #[test]
    fn names_are_told_from_patterns() {
        for (text, pattern) in [
            ("a.mkv", false),
            ("a/b", false),
            ("a/", true),
            ("*.mkv", true),
            ("a?", true),
        ] {
            assert_eq!(is_pattern(text), pattern, "{text}");
        }
    }

    #[test]
    fn a_peer_that_is_no_id_is_wrong_usage() {
        let filters = Filters {
            peer: Some("bob".into()),
            ..Filters::default()
        };
        assert_eq!(crate::cli::exit_code(&request(&filters).unwrap_err()), 2);
    }
}
