//! `sprat tracker …` and `sprat operator …`: a network from its operator's side.
//!
//! Invariant: a secret is printed once, where it was asked for: a link by `token create` and by a `tracker run` that is
//! to keep none in a file, on standard output. A passphrase is never taken from the command line.

use std::{
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result};
use serde::Serialize;

use super::{
    commands::{OperatorCommand, TokenCommand, TrackerCommand, TrackerRunArgs},
    listen::{to_listen, to_operate},
    output::{count, json, line, span, table},
    session::Session,
    signals::Stop,
    unattended,
};
use crate::{
    client::AdminClient,
    config::Service,
    exit::{Exit, Failed},
    identity::{Identity, Key, OPERATOR_FILES},
    proto::{MemberRow, TokenRow},
    tracker::{
        self, Keep, Tracker, TrackerOptions,
        certificate::{OwnCertificate, needs_passphrase},
    },
};

/// What the link of `tracker run` is good for.
const RUN_USES: u32 = 10;
const RUN_TTL: Duration = Duration::from_secs(86_400);

pub(super) async fn run(session: &Session, command: &TrackerCommand) -> Result<()> {
    let state_dir = session.state_dir(Service::Tracker)?;
    match command {
        TrackerCommand::Init => {
            let fingerprint = Tracker::init(&state_dir)?;
            session.hint(&format!(
                "next: sprat tracker run{}",
                session.state_dir_words()
            ));
            if session.json {
                json(&Made { fingerprint })
            } else {
                line(&format!("authority {fingerprint}"))
            }
        }
        TrackerCommand::Run(args) => serve(session, args).await,
        TrackerCommand::Token(TokenCommand::Create { uses, ttl }) => {
            let token = AdminClient::new(tracker::attach(&state_dir).await?)
                .create_token(*uses, *ttl)
                .await?;
            let made = Token {
                link: &token.link,
                token_id: &token.token_id,
                uses: *uses,
                ttl_seconds: ttl.as_secs(),
            };
            if session.json {
                json(&made)
            } else {
                line(&token.link)
            }
        }
        TrackerCommand::Token(TokenCommand::List) => tokens(
            session,
            &AdminClient::new(tracker::attach(&state_dir).await?)
                .tokens()
                .await?,
        ),
        TrackerCommand::Members => members(
            session,
            &AdminClient::new(tracker::attach(&state_dir).await?)
                .members()
                .await?,
        ),
        TrackerCommand::Approve { peer } => {
            AdminClient::new(tracker::attach(&state_dir).await?)
                .approve(peer.clone())
                .await?;
            session.hint(&format!("{peer} may come in again"));
            Ok(())
        }
        TrackerCommand::Revoke { peer } => {
            AdminClient::new(tracker::attach(&state_dir).await?)
                .revoke(peer.clone())
                .await?;
            session.hint(&format!("{peer} is out; `sprat tracker approve` undoes it"));
            Ok(())
        }
    }
}

/// Starts a tracker as the settings say.
///
/// # Errors
/// A bad address, a wrong passphrase, and what [`Tracker::start`] says.
pub(super) async fn start(session: &Session, keep: Keep) -> Result<Tracker> {
    let config = &session.config.tracker;
    let own = match (&config.certificate, &config.certificate_key) {
        (Some(certificate), Some(key)) => Some(OwnCertificate {
            certificate: certificate.clone(),
            key: key.clone(),
            passphrase: passphrase(session, key)?,
        }),
        _ => None,
    };
    let options = TrackerOptions {
        state_dir: session.state_dir(Service::Tracker)?,
        listen: to_listen(&config.listen)?,
        operator: to_operate(&config.operator)?,
        advertise: config.advertise.clone(),
        own,
        leaf_life: Duration::from_secs(config.leaf_lifetime_seconds),
        heartbeat: Duration::from_secs(config.heartbeat_seconds),
        lease: Duration::from_secs(config.lease_seconds),
        memory_budget: config.memory_budget,
        keep,
    };
    Tracker::start(options).await
}

async fn serve(session: &Session, args: &TrackerRunArgs) -> Result<()> {
    let (stop, state_dir) = (Stop::listen()?, session.state_dir(Service::Tracker)?);
    let at = |path: &PathBuf| session.cwd().join(path);
    let keep = Keep {
        token_file: args.keep_token_file.as_ref().map(at),
        operator: args.keep_operator_certificate.as_ref().map(at),
    };
    let attempt = async || start(session, keep.clone()).await;
    let tracker = stop
        .unless(unattended::start(args.keep_trying, &state_dir, attempt))
        .await?;
    let said = announce(session, &tracker, keep.token_file.as_deref());
    if said.is_ok() {
        session.tell_manager("READY=1");
        tokio::select! {
            _ = stop.requested() => {}
            () = unattended::watch(vec![state_dir]) => {}
        }
        session.tell_manager("STOPPING=1");
        session.hint("stopping");
    }
    tracker.stop().await;
    said
}

fn announce(session: &Session, tracker: &Tracker, token_file: Option<&Path>) -> Result<()> {
    let advertised = tracker.advertised();
    let link = token_file
        .is_none()
        .then(|| tracker.join_link(RUN_USES, RUN_TTL))
        .transpose()?;
    let started = Started {
        address: tracker.address().to_string(),
        operator: tracker.operator().map(|address| address.to_string()),
        advertised,
        fingerprint: tracker.fingerprint(),
        token_file,
        join_link: link.as_deref(),
        uses: link.is_some().then_some(RUN_USES),
        ttl_seconds: link.is_some().then_some(RUN_TTL.as_secs()),
    };
    if session.json {
        return json(&started);
    }
    line(&format!(
        "listening {}, reached at {}",
        started.address,
        advertised.join(", ")
    ))?;
    if let Some(operator) = &started.operator {
        line(&format!("operator page http://{operator}/"))?;
    }
    line(&format!("authority {}", started.fingerprint))?;
    if let Some(path) = token_file {
        return line(&format!("join link in {}", path.display()));
    }
    line(&format!("sprat join {}", link.unwrap_or_default()))?;
    let more = format!(
        "sprat tracker token create --uses N --ttl 24h{}",
        session.state_dir_words()
    );
    session.hint(&format!(
        "the line above lets {RUN_USES} machines join within 24 hours; for more: {more}"
    ));
    Ok(())
}

fn passphrase(session: &Session, key: &Path) -> Result<Option<String>> {
    if !needs_passphrase(key)? {
        return Ok(None);
    }
    if let Some(file) = &session.config.tracker.key_passphrase_file {
        let text =
            std::fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?;
        return Ok(Some(text.trim_end_matches(['\r', '\n']).to_owned()));
    }
    if let Some(passphrase) = session.variable("SPRAT_KEY_PASSPHRASE") {
        return Ok(Some(passphrase));
    }
    if session.interactive {
        return (session.ask_passphrase)(key).map(Some);
    }
    let text = format!(
        "{} is encrypted: give --key-passphrase-file or SPRAT_KEY_PASSPHRASE",
        key.display()
    );
    Err(Failed::new(Exit::Usage, text).into())
}

fn tokens(session: &Session, tokens: &[TokenRow]) -> Result<()> {
    if session.json {
        let row = |token: &TokenRow| {
            let TokenRow {
                token_id,
                uses,
                uses_left,
                expires_at,
            } = token.clone();
            json(&TokenLine {
                token_id,
                uses,
                uses_left,
                expires_at,
            })
        };
        return tokens.iter().try_for_each(row);
    }
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs();
    let cells = |token: &TokenRow| {
        let left = match token.expires_at.checked_sub(now) {
            Some(seconds) if seconds > 0 => span(seconds),
            _ => "expired".into(),
        };
        vec![
            token.token_id.clone(),
            format!("{} of {}", token.uses_left, token.uses),
            left,
        ]
    };
    let rows: Vec<_> = tokens.iter().map(cells).collect();
    table(&["<TOKEN", "USES LEFT", "TIME LEFT"], &rows)
        .iter()
        .try_for_each(|text| line(text))
}

fn members(session: &Session, members: &[MemberRow]) -> Result<()> {
    if session.json {
        let row = |member: &MemberRow| {
            let MemberRow {
                peer_id,
                joined_at,
                revoked,
                online,
                addresses,
                files,
            } = member.clone();
            json(&MemberLine {
                peer_id,
                joined_at,
                revoked,
                online,
                addresses,
                files,
            })
        };
        return members.iter().try_for_each(row);
    }
    let cells = |member: &MemberRow| {
        let state = match (member.revoked, member.online) {
            (true, _) => "revoked",
            (false, true) => "online",
            (false, false) => "away",
        };
        let addresses = member.addresses.join(", ");
        vec![
            member.peer_id.clone(),
            state.into(),
            count(member.files, "file"),
            addresses,
        ]
    };
    let rows: Vec<_> = members.iter().map(cells).collect();
    table(&["<MEMBER", "<STATE", "OFFERS", "<ADDRESSES"], &rows)
        .iter()
        .try_for_each(|text| line(text))
}

pub(super) async fn operator(session: &Session, command: &OperatorCommand) -> Result<()> {
    let OperatorCommand::Cert { out, ttl } = command;
    let out = session.cwd().join(out);
    if let Some(there) = OPERATOR_FILES
        .map(|name| out.join(name))
        .iter()
        .find(|path| path.exists())
    {
        let text = format!(
            "{} exists; nothing is overwritten: name another folder",
            there.display()
        );
        return Err(Failed::new(Exit::Exists, text).into());
    }
    let mut admin = AdminClient::new(tracker::attach(&session.state_dir(Service::Tracker)?).await?);
    let key = Key::generate()?;
    let issued = admin.issue_operator(key.request()?, *ttl).await?;
    let identity = Identity {
        key,
        certificate: issued.certificate.to_vec().into(),
        authority: issued.authority.to_vec().into(),
    };
    identity
        .save(&out, OPERATOR_FILES)
        .with_context(|| format!("writing to {}", out.display()))?;
    for name in OPERATOR_FILES {
        line(&out.join(name).display().to_string())?;
    }
    session.hint(&format!(
        "good for {}; as grpcurl's -cacert, -cert and -key, in this order",
        span(ttl.as_secs())
    ));
    Ok(())
}

#[derive(Serialize)]
struct Made {
    fingerprint: String,
}

#[derive(Serialize)]
struct Started<'a> {
    address: String,
    operator: Option<String>,
    advertised: &'a [String],
    fingerprint: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_file: Option<&'a Path>,
    #[serde(skip_serializing_if = "Option::is_none")]
    join_link: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    uses: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ttl_seconds: Option<u64>,
}

#[derive(Serialize)]
struct Token<'a> {
    link: &'a str,
    token_id: &'a str,
    uses: u32,
    ttl_seconds: u64,
}

#[derive(Serialize)]
struct TokenLine {
    token_id: String,
    uses: u32,
    uses_left: u32,
    expires_at: u64,
}

#[derive(Serialize)]
struct MemberLine {
    peer_id: String,
    joined_at: u64,
    revoked: bool,
    online: bool,
    addresses: Vec<String>,
    files: u64,
}
