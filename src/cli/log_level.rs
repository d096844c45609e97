//! `sprat log-level`: how much a running peer or tracker logs.
//!
//! Invariant: without a level nothing changes; the answer is what holds now.

use anyhow::Result;
use serde::Serialize;

use super::{
    commands::LogLevelArgs,
    output::{json, line},
    session::Session,
    signals::Stop,
};
use crate::{
    client::{AdminClient, ControlClient},
    config::Service,
    exit::{Exit, Failed},
    peer, tracker,
};

pub(super) async fn run(session: &Session, args: &LogLevelArgs) -> Result<()> {
    let stop = Stop::listen()?;
    let level = stop.unless(ask(session, args)).await?;
    if session.json {
        json(&Level { level })
    } else {
        line(&level)
    }
}

async fn ask(session: &Session, args: &LogLevelArgs) -> Result<String> {
    let level = args.level.clone().unwrap_or_default();
    if args.tracker {
        let connection = tracker::attach(&session.state_dir(Service::Tracker)?).await?;
        return Ok(AdminClient::new(connection).log_level(level).await?);
    }
    let state_dir = session.state_dir(Service::Peer)?;
    let Some(connection) = peer::attach(&state_dir).await? else {
        let text = format!(
            "no peer runs in {}; --tracker means the tracker",
            state_dir.display()
        );
        return Err(Failed::new(Exit::NotFound, text).into());
    };
    Ok(ControlClient::new(connection).log_level(level).await?)
}

#[derive(Serialize)]
struct Level {
    level: String,
}
