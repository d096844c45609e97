//! Becoming a member and staying one: redeeming a token, and renewing the certificate in time.
//!
//! Invariant: nothing is said before the pin of the token was met; what comes back is used only if it certifies our own
//! key under the pinned authority.

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, ensure};
use rustls::pki_types::CertificateDer;
use tokio_util::sync::CancellationToken;

use super::{
    membership::Membership,
    standing::{failed, one_line},
};
use crate::{
    backoff::Backoff,
    exit::{Exit, Failed},
    identity::{
        CertificateFacts, Identity, JOIN_NAME, Key, PEER_FILES, PeerId, Role, base32, renew_message,
    },
    net,
    proto::{
        JoinRequest, JoinResponse, RenewRequest, enrollment_service_client::EnrollmentServiceClient,
    },
    safe_path, tls,
    token::{JoinToken, Pin},
    trust::Trust,
};

/// What joining brought.
pub struct Joined {
    /// Who we are now.
    pub peer_id: PeerId,
    /// Where the tracker can be reached.
    pub trackers: Vec<String>,
}

/// Redeems `token` and keeps the identity in `state_dir`. A member of the same network keeps its certificate and learns
/// the tracker's address from the link.
///
/// # Errors
/// [`Exit::Tracker`] if the tracker cannot be reached, [`Exit::Auth`] if it is another one than the token means or
/// refuses; [`Exit::Exists`] if `state_dir` belongs to another network.
pub async fn join(token: &JoinToken, state_dir: &Path) -> Result<Joined> {
    let before = Membership::load(state_dir, None).ok();
    let another = || {
        let text = format!(
            "{} belongs to another network: choose another --state-dir",
            state_dir.display()
        );
        anyhow::Error::from(Failed::new(Exit::Exists, text))
    };
    if let Some(member) = &before {
        let known = match token.pin {
            Pin::Authority(pin)
                if CertificateFacts::read(member.trust().authority())?.pin() != pin =>
            {
                return Err(another());
            }
            Pin::Authority(_) => true,
            Pin::Tracker(pin) => member.trust().list().tracker_pins.contains(&pin),
        };
        if known && member.seconds_left() > 0 {
            let trackers = first(&token.address, member.trackers());
            Membership::save_trackers(state_dir, &trackers)?;
            return Ok(Joined {
                peer_id: member.id(),
                trackers,
            });
        }
    }
    safe_path::private_dir(state_dir).map_err(|error| Failed::state_dir(&error))?;
    let folder = Membership::identity_folder(state_dir);
    let (identity, answer) = redeem(token, &folder).await?;
    // A tracker with a new certificate of its own is told from another network by the authority behind it.
    if before.is_some_and(|member| *member.trust().authority() != identity.authority) {
        return Err(another());
    }
    let trackers = first(&token.address, &answer.tracker_addresses);
    Membership::save(
        state_dir,
        &identity,
        &trackers,
        &answer.trust_list.unwrap_or_default(),
    )?;
    Ok(Joined {
        peer_id: identity.subject()?.id,
        trackers,
    })
}

/// The address that was just named, before the others.
fn first(address: &str, others: &[String]) -> Vec<String> {
    let others = others.iter().filter(|other| *other != address).cloned();
    std::iter::once(address.to_owned()).chain(others).collect()
}

/// Redeems `token` for a client of another kind: just `ca.crt`, `peer.crt` and `peer.key` in `folder`.
///
/// # Errors
/// As [`join`].
pub async fn join_identity_only(token: &JoinToken, folder: &Path) -> Result<Joined> {
    let (identity, answer) = redeem(token, folder).await?;
    identity.save(folder, PEER_FILES)?;
    Ok(Joined {
        peer_id: identity.subject()?.id,
        trackers: answer.tracker_addresses,
    })
}

async fn redeem(token: &JoinToken, folder: &Path) -> Result<(Identity, JoinResponse)> {
    let key = Membership::key_for_join(folder)
        .with_context(|| format!("making a key in {}", folder.display()))?;
    let target = [token.address.clone()];
    let connection = net::dial(
        &target,
        tls::join_client(token.pin)?,
        JOIN_NAME,
        net::CONTROL,
    )
    .await
    .map_err(failed)?;
    let mut client = EnrollmentServiceClient::with_origin(connection.clone(), connection.origin());
    let request = JoinRequest {
        token_id: base32(&token.id),
        secret: token.secret.reveal(),
        csr: key.request()?.into(),
    };
    let answer = client
        .join(request)
        .await
        .map_err(|status| refused(&token.address, &status))?
        .into_inner();
    let identity = accept(&answer, key, Some(token.pin))?;
    Ok((identity, answer))
}

/// Checks an answer before anything of it is used.
fn accept(answer: &JoinResponse, key: Key, pin: Option<Pin>) -> Result<Identity> {
    let certificate = CertificateDer::from(answer.certificate.to_vec());
    let authority = CertificateDer::from(answer.authority.to_vec());
    if let Some(Pin::Authority(pin)) = pin {
        ensure!(
            CertificateFacts::read(&authority)?.pin() == pin,
            "the tracker sent another authority than the token names"
        );
    }
    let identity = Identity {
        key,
        certificate,
        authority,
    };
    ensure!(
        identity.subject()?.role == Role::Peer,
        "the tracker sent a certificate of another kind"
    );
    if let Some(list) = &answer.trust_list {
        let trust = Trust::new(identity.authority.clone())?;
        list.open(&trust)?;
    }
    Ok(identity)
}

fn refused(address: &str, status: &tonic::Status) -> anyhow::Error {
    let (exit, text) = match status.code() {
        tonic::Code::PermissionDenied => {
            (Exit::Auth, "the token was refused: it is used up, expired or revoked; ask for a new link (`sprat tracker token create`)".into())
        }
        tonic::Code::FailedPrecondition => (Exit::Auth, status.message().to_owned()),
        tonic::Code::ResourceExhausted => (Exit::Failure, format!("too busy: {}; try again", status.message())),
        _ => (Exit::Tracker, format!("joining failed: {}", status.message())),
    };
    Failed::new(exit, format!("tracker {address}: {text}")).into()
}

/// Asks for a new certificate for our key and takes it into use.
///
/// # Errors
/// As [`join`].
pub async fn renew(membership: &Membership) -> Result<()> {
    let config = tls::renew_client(membership.trust())?;
    let connection = net::dial(membership.trackers(), config, JOIN_NAME, net::CONTROL)
        .await
        .map_err(failed)?;
    let mut client = EnrollmentServiceClient::with_origin(connection.clone(), connection.origin());
    let csr = membership.key().request()?;
    let signed_at = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let signature = membership.key().sign(&renew_message(signed_at, &csr))?;
    let request = RenewRequest {
        csr: csr.into(),
        signed_at,
        signature: signature.into(),
    };
    let answer = client
        .renew(request)
        .await
        .map_err(|status| refused(&membership.trackers()[0], &status))?
        .into_inner();
    let identity = accept(&answer, Key::from_pem(&membership.key().to_pem())?, None)?;
    ensure!(
        identity.authority == *membership.trust().authority(),
        "the tracker now has another authority: join again"
    );
    membership.renewed(&identity.certificate)?;
    if let Some(list) = &answer.trust_list {
        membership.adopt(list)?;
    }
    Ok(())
}

/// Longest nap: after a machine slept, time has passed that no timer counted.
const NAP: Duration = Duration::from_secs(60);

/// Renews at a random point in 50–66 % of the certificate's life, then with back-off until it works.
pub async fn keep_renewed(membership: Arc<Membership>, cancel: CancellationToken) {
    let mut backoff = Backoff::new(Duration::from_secs(2), Duration::from_secs(3600));
    let mut life = membership.seconds_left();
    let mut at = life - part(life, 0.50 + 0.16 * rand::random::<f64>());
    loop {
        let wait = membership.seconds_left() - at;
        if wait > 0 {
            let nap = Duration::from_secs(u64::try_from(wait).unwrap_or(1)).min(NAP);
            if cancel
                .run_until_cancelled(tokio::time::sleep(nap))
                .await
                .is_none()
            {
                return;
            }
            continue;
        }
        match renew(&membership).await {
            Ok(()) => {
                life = membership.seconds_left();
                at = life - part(life, 0.50 + 0.16 * rand::random::<f64>());
                backoff.reset();
                tracing::info!(seconds = life, "certificate renewed");
            }
            Err(error) => {
                let left = membership.seconds_left();
                let delay = backoff.delay(rand::random()).min(Duration::from_secs(
                    u64::try_from(left / 10).unwrap_or(0).max(2),
                ));
                tracing::warn!(
                    "renewing the certificate ({left} s left): {}; trying again in {delay:?}",
                    one_line(&error)
                );
                if cancel
                    .run_until_cancelled(tokio::time::sleep(delay))
                    .await
                    .is_none()
                {
                    return;
                }
            }
        }
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    reason = "seconds of a certificate's life"
)]
fn part(seconds: i64, share: f64) -> i64 {
    (seconds as f64 * share) as i64
}
