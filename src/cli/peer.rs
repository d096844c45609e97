//! `sprat join`, `sprat peer`, `sprat share`: becoming a member and being one.
//!
//! Invariant: one Node in a process at most; whoever starts one stops it.

use std::{
    io::{Read, stdin},
    path::{Path, PathBuf, absolute},
    time::Duration,
};

use anyhow::{Context, Result};
use serde::Serialize;

use super::{
    commands::{JoinArgs, PeerArgs, ShareArgs},
    listen::{to_listen, to_operate},
    output::{count, json, line, shell},
    session::Session,
    signals::Stop,
    unattended,
};
use crate::{
    client::ControlClient,
    config::{Service, Share},
    exit::{Exit, Failed},
    peer::{
        self, Node, NodeOptions, Rates, ShareSpec,
        member::{
            join::{Joined, join as redeem, join_identity_only, renew},
            membership::Membership,
        },
    },
    safe_path::escape,
    token::JoinToken,
    units::human_size,
};

/// Far longer than any link.
const MAX_LINK_LEN: u64 = 16 << 10;

pub(super) async fn join(session: &Session, args: &JoinArgs) -> Result<()> {
    let token = read_link(session, args)?.parse::<JoinToken>()?;
    let stop = Stop::listen()?;
    let Joined { peer_id, trackers } = match &args.identity_only {
        Some(folder) => {
            stop.unless(join_identity_only(&token, &session.cwd().join(folder)))
                .await?
        }
        None => {
            stop.unless(redeem(&token, &session.state_dir(Service::Peer)?))
                .await?
        }
    };
    if session.json {
        return json(&JoinLine {
            peer_id: peer_id.to_string(),
            tracker: trackers,
        });
    }
    line(&format!(
        "joined {} as {peer_id}",
        escape(&trackers.join(", "))
    ))?;
    if args.identity_only.is_none() {
        let dir = session.state_dir_words();
        session.hint(&format!(
            "next: `sprat ls{dir}` to see what there is, `sprat share DIR{dir}` to offer something"
        ));
    }
    Ok(())
}

fn limited(source: &mut dyn Read, name: &str) -> Result<String> {
    let mut text = String::new();
    source
        .take(MAX_LINK_LEN)
        .read_to_string(&mut text)
        .with_context(|| format!("reading the link from {name}"))?;
    Ok(text)
}

fn link_in(path: &Path) -> Result<String> {
    let name = path.display().to_string();
    let mut file = std::fs::File::open(path).with_context(|| format!("no join link in {name}"))?;
    limited(&mut file, &name)
}

fn read_link(session: &Session, args: &JoinArgs) -> Result<String> {
    match (&args.link, &args.token_file) {
        (Some(link), _) if link == "-" => limited(&mut stdin().lock(), "standard input"),
        (Some(link), _) => {
            if std::env::args().any(|word| word == *link) {
                session.hint("note: other users of this machine could see the link; `sprat join -` reads it unseen");
            }
            Ok(link.clone())
        }
        (None, Some(path)) => link_in(path),
        (None, None) => session.variable("SPRAT_TOKEN").ok_or_else(|| {
            let text = "no link: give sprat://…, --token-file FILE, or - to read it from standard input; the tracker \
                        makes one with `sprat tracker token create`";
            Failed::new(Exit::Usage, text).into()
        }),
    }
}

/// `sprat peer`
pub(super) async fn run(session: &Session, args: &PeerArgs) -> Result<()> {
    serve(session, &session.config.peer.shares, args).await
}

/// Becomes a member with the link in `file`, unless it is one already.
async fn join_by_file(session: &Session, file: &Path) -> Result<()> {
    let state_dir = session.state_dir(Service::Peer)?;
    if let Ok(member) = Membership::load(&state_dir, session.config.peer.tracker.clone())
        && (member.seconds_left() > 0 || renew(&member).await.is_ok())
    {
        return Ok(());
    }
    let token = link_in(&session.cwd().join(file))?
        .parse::<JoinToken>()
        .with_context(|| file.display().to_string())?;
    let joined = redeem(&token, &state_dir).await?;
    session.hint(&format!(
        "joined {} as {}",
        joined.trackers.join(", "),
        joined.peer_id
    ));
    Ok(())
}

pub(super) async fn share(session: &Session, args: &ShareArgs) -> Result<()> {
    let dir = absolute(session.cwd().join(&args.dir))?;
    match peer::attach(&session.state_dir(Service::Peer)?).await? {
        Some(connection) => {
            let path = utf8(&dir)?;
            let name = args.name.clone().unwrap_or_default();
            let answer = ControlClient::new(connection).share(path, name).await?;
            let share = answer.share.unwrap_or_default();
            if session.json {
                return json(&ShareLine {
                    name: share.name,
                    path: share.path,
                    mode: share.mode,
                    files: share.files,
                    files_to_hash: answer.files_to_hash,
                    bytes_to_hash: answer.bytes_to_hash,
                });
            }
            let hashing = match answer.files_to_hash {
                0 => String::new(),
                files => {
                    format!(
                        ", {} ({}) being hashed first",
                        count(files, "file"),
                        human_size(answer.bytes_to_hash)
                    )
                }
            };
            line(&format!(
                "sharing {}: {} listed{hashing}",
                escape(&share.path),
                count(share.files, "file")
            ))
        }
        None => {
            session.hint("no peer runs here, so this command becomes one; it shares until you stop it with Ctrl-C");
            let mut shares = session.config.peer.shares.clone();
            shares.push(Share {
                name: args.name.clone(),
                dir,
            });
            serve(session, &shares, &PeerArgs::default()).await
        }
    }
}

async fn serve(session: &Session, shares: &[Share], args: &PeerArgs) -> Result<()> {
    let (stop, state_dir) = (Stop::listen()?, session.state_dir(Service::Peer)?);
    let attempt = async || {
        if let Some(file) = &args.join_token_file {
            join_by_file(session, file).await?;
        }
        start(session, shares).await
    };
    let node = stop
        .unless(unattended::start(args.keep_trying, &state_dir, attempt))
        .await?;
    let said = announce(session, &node, shares);
    if said.is_ok() {
        session.tell_manager("READY=1");
        let written: Vec<PathBuf> = [Some(state_dir), session.config.peer.downloads.clone()]
            .into_iter()
            .flatten()
            .collect();
        tokio::select! {
            _ = stop.requested() => {}
            () = unattended::watch(written) => {}
        }
        session.tell_manager("STOPPING=1");
        session.hint("stopping");
    }
    node.stop().await;
    said
}

/// Starts a peer as the settings say, sharing these folders.
///
/// # Errors
/// A bad address, and what [`Node::start`] says.
pub(super) async fn start(session: &Session, shares: &[Share]) -> Result<Node> {
    let listen = to_listen(&session.config.peer.listen)?;
    let shares = shares.iter().map(|share| ShareSpec {
        name: share.name.clone(),
        path: share.dir.clone(),
    });
    let operator = to_operate(&session.config.peer.operator)?;
    Node::start(NodeOptions {
        listen: Some(listen),
        operator,
        shares: shares.collect(),
        ..one_shot(session)?
    })
    .await
}

/// A Node that only fetches, for one command.
pub(super) fn one_shot(session: &Session) -> Result<NodeOptions> {
    let config = &session.config.peer;
    Ok(NodeOptions {
        state_dir: session.state_dir(Service::Peer)?,
        shares: Vec::new(),
        downloads: config.downloads.clone(),
        listen: None,
        operator: None,
        advertise: config.advertise.clone(),
        tracker: config.tracker.clone(),
        rescan: Duration::from_secs(config.rescan_seconds),
        upload_limit: Rates {
            total: config.upload_limit,
            per_peer: config.upload_limit_per_peer,
        },
        download_limit: Rates {
            total: config.download_limit,
            per_peer: config.download_limit_per_peer,
        },
    })
}

fn announce(session: &Session, node: &Node, shares: &[Share]) -> Result<()> {
    let peer_id = node.peer_id().to_string();
    if session.json {
        let shares = shares
            .iter()
            .map(|share| String::from(share.clone()))
            .collect();
        let operator = node.operator().map(|address| address.to_string());
        return json(&PeerLine {
            peer_id,
            addresses: node.addresses(),
            operator,
            shares,
        });
    }
    line(&format!("peer      {peer_id}"))?;
    line(&format!("listening {}", node.addresses().join(", ")))?;
    if let Some(operator) = node.operator() {
        line(&format!("operator page http://{operator}/"))?;
    }
    for share in shares {
        let name = share
            .name
            .as_ref()
            .map(|name| format!(" as {name}/"))
            .unwrap_or_default();
        line(&format!(
            "sharing   {}{}",
            escape(&share.dir.to_string_lossy()),
            escape(&name)
        ))?;
    }
    if shares.is_empty() {
        let words = ["sprat".into(), "share".into(), "DIR".into()];
        session.hint(&format!(
            "next: `{}{}` offers a folder",
            shell(&words),
            session.state_dir_words()
        ));
    }
    Ok(())
}

/// A path as the peer is told it.
pub(super) fn utf8(path: &Path) -> Result<String> {
    let refuse =
        |path: PathBuf| Failed::new(Exit::Usage, format!("{}: not a UTF-8 path", path.display()));
    Ok(path
        .to_path_buf()
        .into_os_string()
        .into_string()
        .map_err(|path| refuse(path.into()))?)
}

#[derive(Serialize)]
struct JoinLine {
    peer_id: String,
    tracker: Vec<String>,
}

#[derive(Serialize)]
struct PeerLine<'a> {
    peer_id: String,
    addresses: &'a [String],
    operator: Option<String>,
    shares: Vec<String>,
}

#[derive(Serialize)]
struct ShareLine {
    name: String,
    path: String,
    mode: String,
    files: u64,
    files_to_hash: u64,
    bytes_to_hash: u64,
}
