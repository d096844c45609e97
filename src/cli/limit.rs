//! `sprat limit`: what the running peer may send and fetch a second.
//!
//! Invariant: what is not named stays as it is; the answer is what holds now.

use anyhow::Result;
use serde::Serialize;

use super::{
    commands::{LimitArgs, Rate},
    output::{json, line},
    session::Session,
    signals::Stop,
};
use crate::{
    client::ControlClient,
    config::Service,
    exit::{Exit, Failed},
    peer,
    proto::{LimitRequest, Limits},
    units::human_rate,
};

pub(super) async fn run(session: &Session, args: &LimitArgs) -> Result<()> {
    let state_dir = session.state_dir(Service::Peer)?;
    let stop = Stop::listen()?;
    let Some(connection) = stop.unless(peer::attach(&state_dir)).await? else {
        let text = format!(
            "no peer runs in {}; start one with `sprat peer --upload-limit RATE`, or set `peer.upload_limit` for every \
             command",
            state_dir.display()
        );
        return Err(Failed::new(Exit::NotFound, text).into());
    };
    let said = |rate: Option<Rate>| rate.map(Option::unwrap_or_default);
    let request = LimitRequest {
        upload: said(args.upload),
        download: said(args.download),
        upload_per_peer: said(args.upload_per_peer),
        download_per_peer: said(args.download_per_peer),
    };
    let mut control = ControlClient::new(connection);
    let limits = stop
        .unless(async { Ok(control.limit(request).await?) })
        .await?;
    if session.json {
        return json(&LimitsLine::from(&limits));
    }
    named(&limits)
        .iter()
        .try_for_each(|(name, rate)| line(&format!("{name:17}  {}", human_rate(*rate))))
}

/// The limits in one line; none if there are none.
pub(super) fn summary(limits: &Limits) -> Option<String> {
    let set = named(limits).into_iter().filter(|(_, rate)| rate.is_some());
    let parts: Vec<_> = set
        .map(|(name, rate)| format!("{name} {}", human_rate(rate)))
        .collect();
    (!parts.is_empty()).then(|| parts.join(", "))
}

fn named(limits: &Limits) -> [(&'static str, Rate); 4] {
    [
        ("upload", limits.upload),
        ("download", limits.download),
        ("upload per peer", limits.upload_per_peer),
        ("download per peer", limits.download_per_peer),
    ]
}

/// Limits for programs; null: none.
#[derive(Serialize)]
pub(super) struct LimitsLine {
    upload: Rate,
    download: Rate,
    upload_per_peer: Rate,
    download_per_peer: Rate,
}

impl From<&Limits> for LimitsLine {
    fn from(limits: &Limits) -> Self {
        Self {
            upload: limits.upload,
            download: limits.download,
            upload_per_peer: limits.upload_per_peer,
            download_per_peer: limits.download_per_peer,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_limits_that_are_set_are_told() {
        assert_eq!(summary(&Limits::default()), None);
        let limits = Limits {
            upload: Some(20_000_000),
            download_per_peer: Some(1 << 30),
            ..Limits::default()
        };
        assert_eq!(
            summary(&limits).unwrap(),
            "upload 19.1 MiB/s, download per peer 1.0 GiB/s"
        );
    }
}
