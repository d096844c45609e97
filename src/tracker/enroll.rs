//! EnrollmentService: a token and a key in, a certificate out.
//!
//! Invariant: from outside every refusal looks the same ("join refused"), but for clocks that differ; the reason is in
//! the log. One attempt per
//! address runs at a time; up to 64 others of the same address wait five seconds, so a fleet behind one NAT can join.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, Weak},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use tokio::{sync::Semaphore, time::timeout};
use tonic::{Request, Response, Status};

use super::{
    authority::{Applicant, Authority},
    registry::{JoinRefusal, Registry},
};
use crate::{
    identity::{IdentityError, renew_message, signed_by},
    net::Caller,
    proto::{self, JoinRequest, JoinResponse, RenewRequest},
    token::Secret,
};

const WAITING: usize = 64;
const WAIT: Duration = Duration::from_secs(5);
/// How far a Renew request's clock may be off.
const SKEW_SECONDS: u64 = 600;

/// Issues certificates.
pub struct Enrollment {
    /// Signs.
    pub authority: Arc<Authority>,
    /// Remembers.
    pub registry: Arc<Registry>,
    /// How long a certificate lives.
    pub leaf_life: Duration,
    turns: Mutex<HashMap<IpAddr, Weak<Turns>>>,
}

struct Turns {
    running: Semaphore,
    waiting: Semaphore,
}

impl Enrollment {
    /// A service that signs with `authority`.
    #[must_use]
    pub fn new(authority: Arc<Authority>, registry: Arc<Registry>, leaf_life: Duration) -> Self {
        Self {
            authority,
            registry,
            leaf_life,
            turns: Mutex::default(),
        }
    }

    fn turns(&self, address: IpAddr) -> Arc<Turns> {
        let mut map = self.turns.lock().expect("no panic while the lock is held");
        map.retain(|_, turns| turns.strong_count() > 0);
        if let Some(turns) = map.get(&address).and_then(Weak::upgrade) {
            return turns;
        }
        let turns = Arc::new(Turns {
            running: Semaphore::new(1),
            waiting: Semaphore::new(WAITING),
        });
        map.insert(address, Arc::downgrade(&turns));
        turns
    }

    /// Runs `attempt` when it is this address's turn.
    async fn in_turn(
        &self,
        caller: Option<&Caller>,
        attempt: impl FnOnce() -> Result<JoinResponse, Status>,
    ) -> Result<Response<JoinResponse>, Status> {
        let Some(remote) = caller.and_then(|caller| caller.remote) else {
            return Err(Status::internal("a connection without an address"));
        };
        let turns = self.turns(remote.ip());
        let busy =
            || Status::resource_exhausted("too many attempts from this address at once: try again");
        let _waiting = turns.waiting.try_acquire().map_err(|_| busy())?;
        let _turn = timeout(WAIT, turns.running.acquire())
            .await
            .map_err(|_| busy())?
            .map_err(|_| busy())?;
        // Signing and committing take a few milliseconds of this address's own turn.
        tokio::task::block_in_place(attempt).map(Response::new)
    }

    fn certify(&self, applicant: &Applicant) -> Result<JoinResponse, Status> {
        let failed = |e: &dyn std::fmt::Display| {
            tracing::error!("issuing a certificate: {e}");
            Status::internal("the tracker cannot issue certificates now; see its log")
        };
        let certificate = self
            .authority
            .certify_peer(applicant, self.leaf_life)
            .map_err(|e| failed(&e))?;
        let list = self.registry.trust_list().map_err(|e| failed(&e))?;
        Ok(JoinResponse {
            certificate: certificate.to_vec().into(),
            authority: self.authority.certificate().to_vec().into(),
            tracker_addresses: self.registry.advertised().map_err(|e| failed(&e))?,
            trust_list: Some(self.authority.sign(&list).map_err(|e| failed(&e))?),
            peer_id: applicant.id.to_string(),
        })
    }

    fn decide(
        &self,
        applicant: &Applicant,
        verdict: anyhow::Result<Result<(), JoinRefusal>>,
        what: &str,
    ) -> Result<JoinResponse, Status> {
        match verdict {
            Ok(Ok(())) => {
                tracing::info!(peer = %applicant.id, "{what}: certificate issued");
                self.certify(applicant)
            }
            Ok(Err(refusal)) => {
                tracing::warn!(peer = %applicant.id, "{what} refused: {refusal}");
                Err(refused())
            }
            Err(error) => {
                tracing::error!("{what}: {error:#}");
                Err(Status::internal(
                    "the tracker cannot use its database, perhaps for want of room on its disk; see its log",
                ))
            }
        }
    }
}

fn refused() -> Status {
    Status::permission_denied("join refused")
}

fn malformed(error: &IdentityError) -> Status {
    Status::invalid_argument(error.to_string())
}

#[tonic::async_trait]
impl proto::enrollment_service_server::EnrollmentService for Enrollment {
    async fn join(&self, request: Request<JoinRequest>) -> Result<Response<JoinResponse>, Status> {
        let caller = request.extensions().get::<Caller>().cloned();
        let request = request.into_inner();
        self.in_turn(caller.as_ref(), || {
            let applicant = Applicant::read(&request.csr).map_err(|e| malformed(&e))?;
            let digest = Secret::parse(&request.secret).map(|secret| secret.digest());
            let verdict = self.registry.redeem(
                &request.token_id,
                digest.unwrap_or_default(),
                applicant.id,
                self.leaf_life,
            );
            self.decide(&applicant, verdict, "join")
        })
        .await
    }

    async fn renew(
        &self,
        request: Request<RenewRequest>,
    ) -> Result<Response<JoinResponse>, Status> {
        let caller = request.extensions().get::<Caller>().cloned();
        let request = request.into_inner();
        self.in_turn(caller.as_ref(), || {
            let applicant = Applicant::read(&request.csr).map_err(|e| malformed(&e))?;
            let now = SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .unwrap_or_default()
                .as_secs();
            let message = renew_message(request.signed_at, &request.csr);
            let skew = now.abs_diff(request.signed_at);
            if skew > SKEW_SECONDS {
                tracing::warn!(peer = %applicant.id, "renew refused: clocks differ by {skew} s");
                let text = format!(
                    "the clocks of this machine and the tracker differ by {skew} s: set them right"
                );
                return Err(Status::failed_precondition(text));
            }
            if !signed_by(&applicant.public_key, &message, &request.signature) {
                tracing::warn!(peer = %applicant.id, "renew refused: not signed by the key");
                return Err(refused());
            }
            self.decide(
                &applicant,
                self.registry.renew(applicant.id, self.leaf_life),
                "renew",
            )
        })
        .await
    }
}
