//! Files that a running tracker keeps fresh for others: a join link for machines that are still to come, and an
//! operator's certificate for what collects the metrics.
//!
//! Invariant: a file is replaced whole, 0600, while what it holds is still good: when half of its time or its uses is
//! over, or when it is missing, damaged or of another network. The operator's key stays, so that it always belongs to
//! the certificate beside it.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result};
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::{admin::Admin, authority::Applicant};
use crate::{
    identity::{CertificateFacts, Identity, Key, OPERATOR_FILES, Role, base32},
    safe_path,
    token::JoinToken,
};

/// What a kept link is good for.
const USES: u32 = 100;
const LINK_LIFE: Duration = Duration::from_secs(86_400);
const OPERATOR_LIFE: Duration = Duration::from_secs(86_400 / 2);
const LOOK: Duration = Duration::from_secs(2);

/// Which files to keep.
#[derive(Clone, Debug, Default)]
pub struct Keep {
    /// File with a join link.
    pub token_file: Option<PathBuf>,
    /// Folder with `ca.crt`, `operator.crt` and `operator.key`.
    pub operator: Option<PathBuf>,
}

/// Keeps them.
pub struct Keeper {
    keep: Keep,
    admin: Arc<Admin>,
    link: Option<JoinToken>,
}

impl Keeper {
    /// Writes what is missing.
    ///
    /// # Errors
    /// As the file system or the database answers.
    pub fn start(keep: Keep, admin: Arc<Admin>) -> Result<Self> {
        let mut keeper = Self {
            keep,
            admin,
            link: None,
        };
        keeper.refresh()?;
        Ok(keeper)
    }

    /// Looks after the files until cancelled. A failure is said once and tried again.
    pub async fn run(mut self, cancel: CancellationToken) {
        let mut ticks = interval(LOOK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut said = String::new();
        while cancel.run_until_cancelled(ticks.tick()).await.is_some() {
            let trouble = self
                .refresh()
                .err()
                .map(|error| format!("{error:#}"))
                .unwrap_or_default();
            if trouble != said && !trouble.is_empty() {
                tracing::error!("{trouble}");
            }
            said = trouble;
        }
    }

    fn refresh(&mut self) -> Result<()> {
        if let Some(path) = self.keep.token_file.clone() {
            self.refresh_link(&path).context("keeping the token file")?;
        }
        if let Some(folder) = &self.keep.operator {
            self.refresh_operator(folder)
                .context("keeping the operator's certificate")?;
        }
        Ok(())
    }

    fn refresh_link(&mut self, path: &Path) -> Result<()> {
        let written = safe_path::read_private(path).unwrap_or_default();
        let written = String::from_utf8_lossy(&written);
        let held = self.link.take().or_else(|| written.parse().ok());
        let link = match held {
            Some(link) if self.is_fresh(&link)? => link,
            _ => self.admin.create_token(USES, LINK_LIFE)?,
        };
        let text = format!("{link}\n");
        // Held before it is written: as long as writing fails, no more are made.
        self.link = Some(link);
        if written != text {
            safe_path::write_private(path, text.as_bytes())?;
        }
        Ok(())
    }

    fn is_fresh(&self, link: &JoinToken) -> Result<bool> {
        let (admin, id) = (&self.admin, base32(&link.id));
        let known = admin
            .registry
            .tokens()?
            .into_iter()
            .find(|(token_id, _)| *token_id == id);
        Ok(known.is_some_and(|(_, token)| {
            let is_ours = (&link.address, link.pin) == (&admin.address, admin.pin);
            let has_uses = token.redeemed_by.len() <= token.uses as usize / 2;
            is_ours && has_uses && token.expires_at > now() + LINK_LIFE.as_secs() / 2
        }))
    }

    fn refresh_operator(&self, folder: &Path) -> Result<()> {
        let authority = &self.admin.authority;
        let kept = Identity::load(folder, OPERATOR_FILES).ok().flatten();
        let half = i64::try_from(now() + OPERATOR_LIFE.as_secs() / 2)?;
        let is_fresh = |kept: &Identity| {
            kept.authority == *authority.certificate()
                && kept
                    .subject()
                    .is_ok_and(|subject| subject.role == Role::Operator)
                && CertificateFacts::read(&kept.certificate)
                    .is_ok_and(|facts| facts.not_after > half)
        };
        if kept.as_ref().is_some_and(is_fresh) {
            return Ok(());
        }
        let key = kept.map_or_else(Key::generate, |kept| Ok(kept.key))?;
        let certificate =
            authority.certify_operator(&Applicant::read(&key.request()?)?, OPERATOR_LIFE)?;
        Identity {
            key,
            certificate,
            authority: authority.certificate().clone(),
        }
        .save(folder, OPERATOR_FILES)?;
        tracing::info!(folder = %folder.display(), "operator certificate written");
        Ok(())
    }
}

fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        identity::PeerId,
        token::Pin,
        tracker::{authority::Authority, registry::Registry},
    };

    fn keeper(state: &Path) -> Keeper {
        let authority = match Authority::load(&state.join("authority")).unwrap() {
            Some(authority) => authority,
            None => Authority::create(&state.join("authority")).unwrap(),
        };
        let pin = Pin::Authority(
            CertificateFacts::read(authority.certificate())
                .unwrap()
                .pin(),
        );
        let registry = Arc::new(Registry::open(&state.join("tracker.redb")).unwrap());
        let (authority, address) = (Arc::new(authority), "tracker:7700".into());
        let admin = Admin {
            authority,
            registry,
            pin,
            address,
            live: None,
            _lock: None,
        };
        let keep = Keep {
            token_file: Some(state.join("link")),
            operator: Some(state.join("operator")),
        };
        Keeper::start(keep, Arc::new(admin)).unwrap()
    }

    fn link(state: &Path) -> JoinToken {
        String::from_utf8(safe_path::read_private(&state.join("link")).unwrap())
            .unwrap()
            .parse()
            .unwrap()
    }

    #[test]
    fn a_link_is_replaced_before_it_is_used_up_or_ends_and_when_it_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let mut keeper = keeper(dir.path());
        let registry = keeper.admin.registry.clone();
        let first = link(dir.path());
        let join = |n: u8| {
            let (digest, peer) = (first.secret.digest(), PeerId::from_bytes([n; 32]));
            registry
                .redeem(&base32(&first.id), digest, peer, LINK_LIFE)
                .unwrap()
                .unwrap();
        };
        (0..50).for_each(join);
        assert!(keeper.is_fresh(&first).unwrap());
        join(50);
        keeper.refresh().unwrap();
        let second = link(dir.path());
        assert_ne!(first, second);

        std::fs::remove_file(dir.path().join("link")).unwrap();
        keeper.refresh().unwrap();
        assert_eq!(link(dir.path()), second);
        let old = keeper.admin.create_token(USES, LINK_LIFE / 2).unwrap();
        assert!(!keeper.is_fresh(&old).unwrap());
        assert!(
            !keeper
                .is_fresh(&JoinToken {
                    address: "elsewhere:1".into(),
                    ..second
                })
                .unwrap()
        );
    }

    #[test]
    fn a_restart_makes_nothing_new() {
        let dir = tempfile::tempdir().unwrap();
        let names = ["link", "operator/operator.crt", "operator/operator.key"];
        let read = || names.map(|name| std::fs::read(dir.path().join(name)).unwrap());
        drop(keeper(dir.path()));
        let before = read();
        drop(keeper(dir.path()));
        assert_eq!(read(), before);

        // What is of another network is replaced, the key is not.
        std::fs::remove_dir_all(dir.path().join("authority")).unwrap();
        drop(keeper(dir.path()));
        let after = read();
        assert!(after[0] != before[0] && after[1] != before[1]);
        assert_eq!(after[2], before[2]);
    }

    #[test]
    fn a_link_that_cannot_be_written_is_made_once() {
        let dir = tempfile::tempdir().unwrap();
        let mut keeper = keeper(dir.path());
        std::fs::remove_file(dir.path().join("link")).unwrap();
        std::fs::create_dir(dir.path().join("link")).unwrap();
        (0..3).for_each(|_| assert!(keeper.refresh().is_err()));
        assert_eq!(keeper.admin.registry.tokens().unwrap().len(), 1);
    }
}
