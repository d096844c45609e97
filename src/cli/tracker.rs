//! `sprat tracker …` and `sprat operator …`: a network from its operator's side.
//!
//! Invariant: a secret is printed once, where it was asked for: a link by `token create` and `tracker run`, on standard
//! output. A passphrase is never taken from the command line.

use std::{
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result};
use serde::Serialize;

use super::{
    Session, Stop,
    commands::{OperatorCommand, TokenCommand, TrackerCommand},
    output::{count, json, line, span, table},
    to_listen,
};
use crate::{
    client::Admin,
    config::Service,
    exit::{Exit, Failed},
    identity::{Identity, Key, OPERATOR_FILES},
    proto::{MemberRow, TokenRow},
    tracker::{
        self, Tracker, TrackerOptions,
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
            session.hint(&format!("next: sprat tracker run{}", session.state_dir_words()));
            if session.json { json(&Made { fingerprint }) } else { line(&format!("authority {fingerprint}")) }
        }
        TrackerCommand::Run(_) => serve(session).await,
        TrackerCommand::Token(TokenCommand::Create { uses, ttl }) => {
            let token = Admin::new(tracker::attach(&state_dir).await?).create_token(*uses, *ttl).await?;
            let made = Token { link: &token.link, token_id: &token.token_id, uses: *uses, ttl_seconds: ttl.as_secs() };
            if session.json { json(&made) } else { line(&token.link) }
        }
        TrackerCommand::Token(TokenCommand::List) => {
            tokens(session, &Admin::new(tracker::attach(&state_dir).await?).tokens().await?)
        }
        TrackerCommand::Members => members(session, &Admin::new(tracker::attach(&state_dir).await?).members().await?),
        TrackerCommand::Approve { peer } => {
            Admin::new(tracker::attach(&state_dir).await?).approve(peer.clone()).await?;
            session.hint(&format!("{peer} may come in again"));
            Ok(())
        }
        TrackerCommand::Revoke { peer } => {
            Admin::new(tracker::attach(&state_dir).await?).revoke(peer.clone()).await?;
            session.hint(&format!("{peer} is out; `sprat tracker approve` undoes it"));
            Ok(())
        }
    }
}

/// Starts a tracker as the settings say.
///
/// # Errors
/// A bad address, a wrong passphrase, and what [`Tracker::start`] says.
pub(super) async fn start(session: &Session) -> Result<Tracker> {
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
        advertise: config.advertise.clone(),
        own,
        leaf_life: Duration::from_secs(config.leaf_lifetime_seconds),
        heartbeat: Duration::from_secs(config.heartbeat_seconds),
        lease: Duration::from_secs(config.lease_seconds),
        memory_budget: config.memory_budget,
    };
    Tracker::start(options).await
}

async fn serve(session: &Session) -> Result<()> {
    let stop = Stop::listen()?;
    let tracker = stop.unless(start(session)).await?;
    let said = announce(session, &tracker);
    if said.is_ok() {
        stop.requested().await;
        session.hint("stopping");
    }
    tracker.stop().await;
    said
}

fn announce(session: &Session, tracker: &Tracker) -> Result<()> {
    let link = tracker.join_link(RUN_USES, RUN_TTL)?;
    let advertised = tracker.advertised();
    let started = Started {
        address: tracker.address().to_string(),
        advertised,
        fingerprint: tracker.fingerprint(),
        join_link: &link,
        uses: RUN_USES,
        ttl_seconds: RUN_TTL.as_secs(),
    };
    if session.json {
        return json(&started);
    }
    line(&format!("listening {}, reached at {}", started.address, advertised.join(", ")))?;
    line(&format!("authority {}", started.fingerprint))?;
    line(&format!("sprat join {link}"))?;
    let more = format!("sprat tracker token create --uses N --ttl 24h{}", session.state_dir_words());
    session.hint(&format!("the line above lets {RUN_USES} machines join within 24 hours; for more: {more}"));
    Ok(())
}

fn passphrase(session: &Session, key: &Path) -> Result<Option<String>> {
    if !needs_passphrase(key)? {
        return Ok(None);
    }
    if let Some(file) = &session.config.tracker.key_passphrase_file {
        let text = std::fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?;
        return Ok(Some(text.trim_end_matches(['\r', '\n']).to_owned()));
    }
    if let Some(passphrase) = session.variable("SPRAT_KEY_PASSPHRASE") {
        return Ok(Some(passphrase));
    }
    if session.interactive {
        return (session.ask_passphrase)(key).map(Some);
    }
    let text = format!("{} is encrypted: give --key-passphrase-file or SPRAT_KEY_PASSPHRASE", key.display());
    Err(Failed::new(Exit::Usage, text).into())
}

fn tokens(session: &Session, tokens: &[TokenRow]) -> Result<()> {
    if session.json {
        let row = |token: &TokenRow| {
            let TokenRow { token_id, uses, uses_left, expires_at } = token.clone();
            json(&TokenLine { token_id, uses, uses_left, expires_at })
        };
        return tokens.iter().try_for_each(row);
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let cells = |token: &TokenRow| {
        let left = match token.expires_at.checked_sub(now) {
            Some(seconds) if seconds > 0 => span(seconds),
            _ => "expired".into(),
        };
        vec![token.token_id.clone(), format!("{} of {}", token.uses_left, token.uses), left]
    };
    let rows: Vec<_> = tokens.iter().map(cells).collect();
    table(&["<TOKEN", "USES LEFT", "TIME LEFT"], &rows).iter().try_for_each(|text| line(text))
}

fn members(session: &Session, members: &[MemberRow]) -> Result<()> {
    if session.json {
        let row = |member: &MemberRow| {
            let MemberRow { peer_id, joined_at, revoked, online, addresses, files } = member.clone();
            json(&MemberLine { peer_id, joined_at, revoked, online, addresses, files })
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
        vec![member.peer_id.clone(), state.into(), count(member.files, "file"), addresses]
    };
    let rows: Vec<_> = members.iter().map(cells).collect();
    table(&["<MEMBER", "<STATE", "OFFERS", "<ADDRESSES"], &rows).iter().try_for_each(|text| line(text))
}

pub(super) async fn operator(session: &Session, command: &OperatorCommand) -> Result<()> {
    let OperatorCommand::Cert { out, ttl } = command;
    let out = session.cwd.join(out);
    if let Some(there) = OPERATOR_FILES.map(|name| out.join(name)).iter().find(|path| path.exists()) {
        let text = format!("{} exists; nothing is overwritten: name another folder", there.display());
        return Err(Failed::new(Exit::Exists, text).into());
    }
    let mut admin = Admin::new(tracker::attach(&session.state_dir(Service::Tracker)?).await?);
    let key = Key::generate()?;
    let issued = admin.issue_operator(key.request()?, *ttl).await?;
    let identity =
        Identity { key, certificate: issued.certificate.to_vec().into(), authority: issued.authority.to_vec().into() };
    identity.save(&out, OPERATOR_FILES).with_context(|| format!("writing to {}", out.display()))?;
    for name in OPERATOR_FILES {
        line(&out.join(name).display().to_string())?;
    }
    session.hint(&format!("good for {}; as grpcurl's -cacert, -cert and -key, in this order", span(ttl.as_secs())));
    Ok(())
}

#[derive(Serialize)]
struct Made {
    fingerprint: String,
}

#[derive(Serialize)]
struct Started<'a> {
    address: String,
    advertised: &'a [String],
    fingerprint: &'a str,
    join_link: &'a str,
    uses: u32,
    ttl_seconds: u64,
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
