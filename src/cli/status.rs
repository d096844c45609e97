//! `sprat status`: what runs on these state directories.
//!
//! Invariant: it starts nothing and takes no lock; `--check` succeeds only if something runs and all of it is healthy.
//! A member whose peer does not run is told how it stands with the network all the same.

use std::path::Path;

use anyhow::Result;
use serde::Serialize;

use super::{
    Session, Stop,
    commands::StatusArgs,
    output::{count, json, line, span},
};
use crate::{
    client::{Admin, Control},
    config::Service,
    content::ContentId,
    exit::{Exit, Failed},
    net,
    peer::{self, membership::Membership, tracker_client::TrackerClient},
    proto::{ListFilesRequest, StatusResponse},
    safe_path::escape,
    tracker,
    units::human_size,
};

const ONLINE: &str = "online";

pub(super) async fn run(session: &Session, args: &StatusArgs) -> Result<()> {
    let (peer_dir, tracker_dir) = (session.state_dir(Service::Peer)?, session.state_dir(Service::Tracker)?);
    let stop = Stop::listen()?;
    let peer = stop.unless(peer_status(&peer_dir)).await?;
    let tracker = stop.unless(tracker_status(&tracker_dir)).await?;
    if peer.is_none() && tracker.is_none() && !args.check && Membership::is_in(&peer_dir) {
        return stop.unless(idle(session, &peer_dir)).await;
    }
    if peer.is_none() && tracker.is_none() {
        let mut dirs = vec![peer_dir.display().to_string(), tracker_dir.display().to_string()];
        dirs.dedup();
        let text = format!("nothing runs in {}; start `sprat peer` or `sprat tracker run`", dirs.join(" or "));
        return Err(Failed::new(Exit::NotFound, text).into());
    }
    if let Some(tracker) = &tracker {
        match session.json {
            true => json(tracker)?,
            false => line(&format!("tracker      {} of {} online", tracker.online, count(tracker.members, "member")))?,
        }
    }
    if let Some(peer) = &peer {
        if session.json {
            json(&PeerLine::from(peer))?
        } else {
            describe(peer).iter().try_for_each(|text| line(text))?
        }
    }
    match peer.as_ref().and_then(ailment) {
        Some(text) if args.check => Err(Failed::new(Exit::Failure, text).into()),
        _ => Ok(()),
    }
}

/// A member that does not run: who it is, and whether the tracker answers it.
async fn idle(session: &Session, state_dir: &Path) -> Result<()> {
    let asked = session.config.peer.tracker.clone();
    let membership = Membership::load(state_dir, asked.clone())?;
    let client = TrackerClient::open(state_dir, asked).await?;
    let question = ListFilesRequest { content_id: ContentId::EMPTY.to_string(), ..Default::default() };
    let state = client.list(question).await.map_or_else(|error| format!("{error:#}"), |_| "reachable".into());
    let (peer_id, left) = (membership.id().to_string(), membership.seconds_left());
    if session.json {
        return json(&IdleLine {
            service: "peer",
            running: false,
            peer_id,
            tracker: client.address(),
            tracker_state: state,
            certificate_seconds_left: left,
        });
    }
    line(&format!("peer         {peer_id}"))?;
    line("running      no; start it with `sprat peer`")?;
    line(&format!("tracker      {}", escape(&tracker_line(&client.address(), &state))))?;
    line(&format!("certificate  good for {}", span(u64::try_from(left).unwrap_or_default())))
}

async fn peer_status(state_dir: &Path) -> Result<Option<StatusResponse>> {
    match peer::attach(state_dir).await? {
        Some(connection) => Ok(Some(Control::new(connection).status().await?)),
        None => Ok(None),
    }
}

pub(super) async fn tracker_status(state_dir: &Path) -> Result<Option<TrackerLine>> {
    let Ok(connection) = net::dial_unix(state_dir, tracker::SOCKET, net::CONTROL).await else { return Ok(None) };
    let members = Admin::new(connection).members().await?;
    let n = |keep: fn(&crate::proto::MemberRow) -> bool| members.iter().filter(|member| keep(member)).count() as u64;
    Ok(Some(TrackerLine {
        service: "tracker",
        members: n(|member| !member.revoked),
        online: n(|member| member.online),
    }))
}

/// Why a peer is not healthy.
fn ailment(status: &StatusResponse) -> Option<String> {
    if status.certificate_seconds_left <= 0 {
        return Some("the certificate of this peer has ended".into());
    }
    (status.tracker_state != ONLINE)
        .then(|| format!("tracker {}", tracker_line(&status.tracker, &status.tracker_state)))
}

/// Address and state; an error names the address itself.
fn tracker_line(tracker: &str, state: &str) -> String {
    if state.contains(tracker) { state.to_owned() } else { format!("{tracker}, {state}") }
}

fn describe(status: &StatusResponse) -> Vec<String> {
    let shown = |text: &str| escape(text);
    let left = u64::try_from(status.certificate_seconds_left).unwrap_or_default();
    let hashing = match status.files_to_hash {
        0 => String::new(),
        n => format!(", hashing {} more ({})", count(n, "file"), human_size(status.bytes_to_hash)),
    };
    let mut lines = vec![
        format!("peer         {}", shown(&status.peer_id)),
        format!(
            "running      {}, version {}, process {}",
            span(status.uptime_seconds),
            shown(&status.version),
            status.pid
        ),
        format!("tracker      {}", shown(&tracker_line(&status.tracker, &status.tracker_state))),
        format!("addresses    {}", shown(&status.addresses.join(", "))),
        format!("certificate  good for {}", span(left)),
        format!("offers       {}, {}{hashing}", count(status.files, "file"), human_size(status.bytes)),
    ];
    for share in &status.shares {
        let name = if share.name.is_empty() { String::new() } else { format!(" as {}/", share.name) };
        let text = format!("  {}{name}, {}, {}", share.path, count(share.files, "file"), share.mode);
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
    let (down, up) = (human_size(status.bytes_downloaded), human_size(status.bytes_uploaded));
    lines.push(format!("moved        {down} in, {up} out, {} now", count(status.uploads_running.into(), "upload")));
    for download in &status.downloads_running {
        let progress = download.progress.clone().unwrap_or_default();
        let (done, total) = (human_size(progress.bytes_done), human_size(progress.bytes_total));
        let speed = human_size(progress.bytes_per_second);
        lines.push(format!("  download {}: {done} of {total}, {speed}/s", download.id));
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
    tracker_state: String,
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
    tracker_state: &'a str,
    shares: Vec<ShareLine<'a>>,
    downloads: &'a str,
    files: u64,
    bytes: u64,
    files_to_hash: u64,
    bytes_to_hash: u64,
    files_skipped: u64,
    bytes_uploaded: u64,
    bytes_downloaded: u64,
    downloads_running: Vec<DownloadLine>,
    certificate_seconds_left: i64,
    uptime_seconds: u64,
    uploads_running: u32,
}

#[derive(Serialize)]
struct ShareLine<'a> {
    name: &'a str,
    path: &'a str,
    mode: &'a str,
    files: u64,
}

#[derive(Serialize)]
struct DownloadLine {
    id: u64,
    bytes_done: u64,
    bytes_total: u64,
    files_done: u64,
    files_total: u64,
    bytes_per_second: u64,
}

impl<'a> From<&'a StatusResponse> for PeerLine<'a> {
    fn from(status: &'a StatusResponse) -> Self {
        let shares = status.shares.iter();
        let shares = shares.map(|s| ShareLine { name: &s.name, path: &s.path, mode: &s.mode, files: s.files });
        let downloads = status.downloads_running.iter().map(|download| {
            let progress = download.progress.clone().unwrap_or_default();
            DownloadLine {
                id: download.id,
                bytes_done: progress.bytes_done,
                bytes_total: progress.bytes_total,
                files_done: progress.files_done,
                files_total: progress.files_total,
                bytes_per_second: progress.bytes_per_second,
            }
        });
        Self {
            service: "peer",
            running: true,
            peer_id: &status.peer_id,
            version: &status.version,
            pid: status.pid,
            addresses: &status.addresses,
            tracker: &status.tracker,
            tracker_state: &status.tracker_state,
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
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::ShareStatus;

    fn status() -> StatusResponse {
        StatusResponse {
            peer_id: "p".into(),
            tracker: "t:7700".into(),
            tracker_state: ONLINE.into(),
            certificate_seconds_left: 90_000,
            files: 2,
            files_to_hash: 1,
            bytes_to_hash: 1 << 20,
            shares: vec![ShareStatus { name: "n".into(), path: "/x\u{1b}".into(), mode: "events".into(), files: 2 }],
            ..Default::default()
        }
    }

    #[test]
    fn health_is_a_tracker_and_a_certificate() {
        assert_eq!(ailment(&status()), None);
        let offline = StatusResponse { tracker_state: "cannot reach t:7700".into(), ..status() };
        assert_eq!(ailment(&offline).unwrap(), "tracker cannot reach t:7700");
        let expired = StatusResponse { certificate_seconds_left: 0, ..status() };
        assert!(ailment(&expired).unwrap().contains("certificate"));
    }

    #[test]
    fn both_readers_are_served() {
        let text = describe(&status()).join("\n");
        assert!(text.contains("offers       2 files, 0 B, hashing 1 file more (1.0 MiB)"), "{text}");
        assert!(text.contains(r"  /x\u{1b} as n/, 2 files, events"), "{text}");
        let value = serde_json::to_value(PeerLine::from(&status())).unwrap();
        assert_eq!((&value["service"], &value["shares"][0]["files"]), (&"peer".into(), &2.into()));
        assert_eq!(value["tracker_state"], "online");
    }
}
