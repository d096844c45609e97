//! `sprat status`: what runs on these state directories.
//!
//! Invariant: it starts nothing and takes no lock; `--check` succeeds only if something runs and all of it is healthy,
//! and its exit code says what is wrong.
//! A member whose peer does not run is told how it stands with the network all the same.

use std::path::Path;

use anyhow::Result;
use serde::Serialize;

use super::{
    commands::StatusArgs,
    limit::{LimitsLine, summary},
    output::{count, json, line, span},
    progress::SourceLine,
    session::Session,
    signals::Stop,
    unattended::{trouble, why_not_running},
    words,
};
use crate::{
    client::{AdminClient, ControlClient},
    config::Service,
    content::ContentId,
    exit::{Exit, Failed},
    net,
    peer::{
        self,
        member::{
            membership::Membership,
            standing::{TrackerStanding, TrackerState, advice, exit_of},
            tracker_client::TrackerClient,
        },
    },
    proto::{ListFilesRequest, StatusResponse},
    safe_path::escape,
    tracker,
    units::human_size,
};

/// How the tracker is for a member that does not run.
const REACHABLE: &str = "reachable";

pub(super) async fn run(session: &Session, args: &StatusArgs) -> Result<()> {
    let (peer_dir, tracker_dir) = (
        session.state_dir(Service::Peer)?,
        session.state_dir(Service::Tracker)?,
    );
    let stop = Stop::listen()?;
    let tracker = stop.unless(tracker_status(&tracker_dir)).await?;
    // One directory holds one service.
    let is_tracker = tracker.is_some() && peer_dir == tracker_dir;
    let peer = if is_tracker {
        None
    } else {
        stop.unless(peer_status(&peer_dir)).await?
    };
    if peer.is_none() && tracker.is_none() && !args.check && Membership::is_in(&peer_dir) {
        return stop.unless(idle(session, &peer_dir)).await;
    }
    if peer.is_none() && tracker.is_none() {
        return Err(Failed::new(Exit::NotFound, nothing_runs(&peer_dir, &tracker_dir)).into());
    }
    if let Some(tracker) = &tracker {
        match session.json {
            true => json(tracker)?,
            false => line(&format!(
                "tracker      {} of {} online",
                tracker.online,
                count(tracker.members, "member")
            ))?,
        }
    }
    if let Some(peer) = &peer {
        if session.json {
            json(&PeerLine::from(peer))?
        } else {
            describe(peer).iter().try_for_each(|text| line(text))?
        }
    }
    if !args.check {
        return Ok(());
    }
    let written = [
        (tracker.is_some(), &tracker_dir),
        (peer.is_some(), &peer_dir),
    ];
    let full = written
        .iter()
        .filter(|(runs, _)| *runs)
        .find_map(|(_, folder)| full(folder));
    match full.or_else(|| peer.as_ref().and_then(ailment)) {
        Some(failed) => Err(failed.into()),
        None => Ok(()),
    }
}

/// Why a folder of a running service cannot be written to.
fn full(folder: &Path) -> Option<Failed> {
    trouble(folder).map(|text| Failed::new(Exit::NoSpace, text))
}

/// Why nothing does, where it can be told.
fn nothing_runs(peer_dir: &Path, tracker_dir: &Path) -> String {
    let mut dirs = vec![peer_dir, tracker_dir];
    dirs.dedup();
    let here: Vec<_> = dirs.iter().map(|dir| dir.display().to_string()).collect();
    match dirs
        .iter()
        .filter(|dir| dir.exists())
        .find_map(|dir| why_not_running(dir))
    {
        Some(why) => why,
        None => format!(
            "nothing runs in {}; start `sprat peer` or `sprat tracker run`",
            here.join(" or ")
        ),
    }
}

/// A member that does not run: who it is, and whether the tracker answers it.
async fn idle(session: &Session, state_dir: &Path) -> Result<()> {
    let asked = session.config.peer.tracker.clone();
    let membership = Membership::load(state_dir, asked.clone())?;
    let client = TrackerClient::open(state_dir, asked).await?;
    let question = ListFilesRequest {
        content_id: ContentId::EMPTY.to_string(),
        ..Default::default()
    };
    let trouble = client.list(question).await.err();
    let trouble = trouble.map(|error| TrackerStanding::after(&error));
    let (peer_id, left) = (membership.id().to_string(), membership.seconds_left());
    if session.json {
        return json(&IdleLine {
            service: "peer",
            running: false,
            peer_id,
            tracker: client.address(),
            tracker_state: trouble.as_ref().map_or(REACHABLE, |it| word(it.state)),
            tracker_error: trouble.map(|it| it.error).unwrap_or_default(),
            certificate_seconds_left: left,
        });
    }
    line(&format!("peer         {peer_id}"))?;
    line("running      no; start it with `sprat peer`")?;
    let tracker = client.address();
    let tracker = trouble.map_or_else(
        || format!("{tracker}, {REACHABLE}"),
        |it| tracker_line(&tracker, &it),
    );
    line(&format!("tracker      {}", escape(&tracker)))?;
    line(&format!(
        "certificate  good for {}",
        span(u64::try_from(left).unwrap_or_default())
    ))
}

async fn peer_status(state_dir: &Path) -> Result<Option<StatusResponse>> {
    match peer::attach(state_dir).await {
        Ok(Some(connection)) => Ok(Some(ControlClient::new(connection).status().await?)),
        Ok(None) => Ok(None),
        // What is wrong with the folder says more.
        Err(_) if trouble(state_dir).is_some() => Ok(None),
        Err(error) => Err(error),
    }
}

pub(super) async fn tracker_status(state_dir: &Path) -> Result<Option<TrackerLine>> {
    let Ok(connection) = net::dial_unix(state_dir, tracker::SOCKET, net::CONTROL).await else {
        return Ok(None);
    };
    let members = AdminClient::new(connection).members().await?;
    let n = |keep: fn(&crate::proto::MemberRow) -> bool| {
        members.iter().filter(|member| keep(member)).count() as u64
    };
    Ok(Some(TrackerLine {
        service: "tracker",
        members: n(|member| !member.revoked),
        online: n(|member| member.online),
    }))
}

/// Why a peer is not healthy.
fn ailment(status: &StatusResponse) -> Option<Failed> {
    let standing = standing(status);
    let offline = || format!("tracker {}", tracker_line(&status.tracker, &standing));
    if status.certificate_seconds_left <= 0 {
        let text = format!(
            "the certificate of this peer has ended, and cannot be renewed: {}",
            offline()
        );
        return Some(Failed::new(Exit::Auth, text));
    }
    if let Some(failed) = Some(&status.downloads)
        .filter(|folder| !folder.is_empty())
        .and_then(|f| full(Path::new(f)))
    {
        return Some(failed);
    }
    (standing.state != TrackerState::Online)
        .then(|| Failed::new(exit_of(standing.state), offline()))
}

fn standing(status: &StatusResponse) -> TrackerStanding {
    TrackerStanding {
        state: status.tracker_state(),
        error: status.tracker_error.clone(),
    }
}

/// A tracker's address and how a peer stands with it, for people.
fn tracker_line(tracker: &str, TrackerStanding { state, error }: &TrackerStanding) -> String {
    match state {
        TrackerState::Unspecified | TrackerState::Connecting | TrackerState::Online => {
            format!("{tracker}, {}", word(*state))
        }
        TrackerState::Failing => format!("{tracker}, {error}"),
        // An error of dialling names the address that was dialled.
        _ => format!("{error}{}", advice(*state)),
    }
}

/// For programs.
const fn word(state: TrackerState) -> &'static str {
    match state {
        TrackerState::Unspecified | TrackerState::Connecting => "connecting",
        TrackerState::Online => "online",
        TrackerState::Unreachable => "unreachable",
        TrackerState::NoTracker => "no_tracker",
        TrackerState::OtherNetwork => "other_network",
        TrackerState::Clock => "clock",
        TrackerState::NotAMember => "not_a_member",
        TrackerState::Failing => "failing",
    }
}

fn describe(status: &StatusResponse) -> Vec<String> {
    let shown = |text: &str| escape(text);
    let left = u64::try_from(status.certificate_seconds_left).unwrap_or_default();
    let hashing = match status.files_to_hash {
        0 => String::new(),
        n => format!(
            ", hashing {} more ({})",
            count(n, "file"),
            human_size(status.bytes_to_hash)
        ),
    };
    let mut lines = vec![
        format!("peer         {}", shown(&status.peer_id)),
        format!(
            "running      {}, version {}, process {}",
            span(status.uptime_seconds),
            shown(&status.version),
            status.pid
        ),
        format!(
            "tracker      {}",
            shown(&tracker_line(&status.tracker, &standing(status)))
        ),
        format!("addresses    {}", shown(&status.addresses.join(", "))),
        format!("certificate  good for {}", span(left)),
        format!(
            "offers       {}, {}{hashing}",
            count(status.files, "file"),
            human_size(status.bytes)
        ),
    ];
    for share in &status.shares {
        let name = if share.name.is_empty() {
            String::new()
        } else {
            format!(" as {}/", share.name)
        };
        let text = format!(
            "  {}{name}, {}, {}",
            share.path,
            count(share.files, "file"),
            share.mode
        );
        lines.push(shown(&text));
    }
    if status.files_skipped > 0 {
        lines.push(format!(
            "  {} skipped: links, devices, unreadable or odd names, names taken already",
            count(status.files_skipped, "file")
        ));
    }
    if !status.downloads.is_empty() {
        lines.push(format!("downloads    {}", shown(&status.downloads)));
    }
    let (down, up) = (
        human_size(status.bytes_downloaded),
        human_size(status.bytes_uploaded),
    );
    lines.push(format!(
        "moved        {down} in, {up} out, {} now",
        count(status.uploads_running.into(), "upload")
    ));
    if let Some(limits) = status.limits.as_ref().and_then(summary) {
        lines.push(format!("limits       {limits}"));
    }
    for download in &status.downloads_running {
        let progress = download.progress.clone().unwrap_or_default();
        let (done, total) = (
            human_size(progress.bytes_done),
            human_size(progress.bytes_total),
        );
        let speed = human_size(progress.bytes_per_second);
        let held_up = words::in_words(&progress.bottleneck);
        let held_up = held_up
            .map(|what| format!(", held up by {what}"))
            .unwrap_or_default();
        lines.push(format!(
            "  download {}: {done} of {total}, {speed}/s{held_up}",
            download.id
        ));
        let active = progress
            .sources
            .iter()
            .filter(|source| source.state == "active");
        lines.extend(active.map(|source| format!("    from {}", words::describe(source))));
    }
    lines
}

#[derive(Serialize)]
pub(super) struct TrackerLine {
    service: &'static str,
    members: u64,
    online: u64,
}

#[derive(Serialize)]
struct IdleLine {
    service: &'static str,
    running: bool,
    peer_id: String,
    tracker: String,
    tracker_state: &'static str,
    tracker_error: String,
    certificate_seconds_left: i64,
}

#[derive(Serialize)]
struct PeerLine<'a> {
    service: &'static str,
    running: bool,
    peer_id: &'a str,
    version: &'a str,
    pid: u32,
    addresses: &'a [String],
    tracker: &'a str,
    tracker_state: &'static str,
    tracker_error: &'a str,
    shares: Vec<ShareLine<'a>>,
    downloads: &'a str,
    files: u64,
    bytes: u64,
    files_to_hash: u64,
    bytes_to_hash: u64,
    files_skipped: u64,
    bytes_uploaded: u64,
    bytes_downloaded: u64,
    downloads_running: Vec<DownloadLine<'a>>,
    certificate_seconds_left: i64,
    uptime_seconds: u64,
    uploads_running: u32,
    limits: LimitsLine,
}

#[derive(Serialize)]
struct ShareLine<'a> {
    name: &'a str,
    path: &'a str,
    mode: &'a str,
    files: u64,
}

#[derive(Serialize)]
struct DownloadLine<'a> {
    id: u64,
    bytes_done: u64,
    bytes_total: u64,
    files_done: u64,
    files_total: u64,
    bytes_per_second: u64,
    sources: Vec<SourceLine<'a>>,
}

impl<'a> From<&'a StatusResponse> for PeerLine<'a> {
    fn from(status: &'a StatusResponse) -> Self {
        let shares = status.shares.iter();
        let shares = shares.map(|s| ShareLine {
            name: &s.name,
            path: &s.path,
            mode: &s.mode,
            files: s.files,
        });
        let downloads = status.downloads_running.iter().filter_map(|download| {
            let progress = download.progress.as_ref()?;
            Some(DownloadLine {
                id: download.id,
                bytes_done: progress.bytes_done,
                bytes_total: progress.bytes_total,
                files_done: progress.files_done,
                files_total: progress.files_total,
                bytes_per_second: progress.bytes_per_second,
                sources: progress.sources.iter().map(SourceLine::from).collect(),
            })
        });
        Self {
            service: "peer",
            running: true,
            peer_id: &status.peer_id,
            version: &status.version,
            pid: status.pid,
            addresses: &status.addresses,
            tracker: &status.tracker,
            tracker_state: word(status.tracker_state()),
            tracker_error: &status.tracker_error,
            shares: shares.collect(),
            downloads: &status.downloads,
            files: status.files,
            bytes: status.bytes,
            files_to_hash: status.files_to_hash,
            bytes_to_hash: status.bytes_to_hash,
            files_skipped: status.files_skipped,
            bytes_uploaded: status.bytes_uploaded,
            bytes_downloaded: status.bytes_downloaded,
            downloads_running: downloads.collect(),
            certificate_seconds_left: status.certificate_seconds_left,
            uptime_seconds: status.uptime_seconds,
            uploads_running: status.uploads_running,
            limits: LimitsLine::from(&status.limits.unwrap_or_default()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::{DownloadStatus, Limits, Progress, ShareStatus, SourceProgress};

    fn status() -> StatusResponse {
        let (peer_id, state) = ("ab".repeat(26), "active".into());
        let source = SourceProgress {
            peer_id,
            state,
            chunk_length: 32 << 10,
            claim_pieces: 1,
            ..Default::default()
        };
        let progress = Progress {
            sources: vec![source],
            ..Default::default()
        };
        StatusResponse {
            peer_id: "p".into(),
            tracker: "t:7700".into(),
            tracker_state: TrackerState::Online.into(),
            certificate_seconds_left: 90_000,
            files: 2,
            files_to_hash: 1,
            bytes_to_hash: 1 << 20,
            limits: Some(Limits {
                upload: Some(1 << 20),
                ..Default::default()
            }),
            downloads_running: vec![DownloadStatus {
                id: 7,
                progress: Some(progress),
            }],
            shares: vec![ShareStatus {
                name: "n".into(),
                path: "/x\u{1b}".into(),
                mode: "events".into(),
                files: 2,
            }],
            ..Default::default()
        }
    }

    #[test]
    fn health_is_a_tracker_and_a_certificate() {
        assert!(ailment(&status()).is_none());
        let offline = StatusResponse {
            tracker_state: TrackerState::Unreachable.into(),
            tracker_error: "cannot reach t:7700".into(),
            ..status()
        };
        let failed = ailment(&offline).unwrap();
        assert_eq!(
            (failed.exit, failed.message.as_str()),
            (
                Exit::Tracker,
                "tracker cannot reach t:7700; is the tracker running, and its port open?"
            )
        );
        let refused = StatusResponse {
            tracker_state: TrackerState::NotAMember.into(),
            tracker_error: "t:7700 answers, but no".into(),
            ..status()
        };
        assert_eq!(ailment(&refused).unwrap().exit, Exit::Auth);
        let expired = StatusResponse {
            certificate_seconds_left: 0,
            ..status()
        };
        let failed = ailment(&expired).unwrap();
        assert!(
            failed.exit == Exit::Auth && failed.message.contains("has ended"),
            "{failed}"
        );
    }

    #[test]
    fn both_readers_are_served() {
        let text = describe(&status()).join("\n");
        assert!(
            text.contains("offers       2 files, 0 B, hashing 1 file more (1.0 MiB)"),
            "{text}"
        );
        assert!(
            text.contains(r"  /x\u{1b} as n/, 2 files, events"),
            "{text}"
        );
        assert!(text.contains("limits       upload 1.0 MiB/s"), "{text}");
        assert!(
            text.contains("    from abababab at 0 B/s in chunks of 32.0 KiB and claims of 1 piece"),
            "{text}"
        );
        let value = serde_json::to_value(PeerLine::from(&status())).unwrap();
        assert_eq!(
            value["downloads_running"][0]["sources"][0]["chunk_length"],
            32 << 10
        );
        assert_eq!(
            (&value["service"], &value["shares"][0]["files"]),
            (&"peer".into(), &2.into())
        );
        assert_eq!(value["tracker_state"], "online");
        assert_eq!(
            (&value["limits"]["upload"], &value["limits"]["download"]),
            (&(1 << 20).into(), &().into())
        );
    }
}
