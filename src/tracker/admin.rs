//! AdminService: what an operator asks of a tracker, over its Unix socket or, when none runs, straight on the store.
//!
//! Invariant: a change of membership is durable, signed and in force (connections closed, listing cleared) before it is
//! answered.

use std::{collections::HashMap, fs::File, sync::Arc, time::Duration};

use tonic::{Request, Response, Status};

use super::{
    authority::{Applicant, Authority},
    registry::Registry,
    store::Store,
};
use crate::{
    catalog::PeerRecord,
    identity::PeerId,
    proto::*,
    telemetry,
    token::{JoinToken, Pin},
    trust::Trust,
};

const DAY: u64 = 86_400;
const OPERATOR_LIFE: (u64, u64) = (DAY / 2, 7 * DAY);
const MAX_TOKEN_LIFE: u64 = 365 * DAY;
const MAX_USES: u32 = 10_000;

/// The operator's side of a tracker.
pub struct Admin {
    /// Signs.
    pub authority: Arc<Authority>,
    /// Remembers.
    pub registry: Arc<Registry>,
    /// Whose key a joiner is told to expect.
    pub pin: Pin,
    /// Where a joiner is told to go.
    pub address: String,
    /// The listing of the running tracker; none when the store is opened by itself.
    pub live: Option<(Arc<dyn Store>, Arc<Trust>)>,
    /// The state directory's lock, where no running tracker holds it.
    pub _lock: Option<File>,
}

impl Admin {
    /// Makes a token and remembers it.
    ///
    /// # Errors
    /// If there is no randomness or the database fails.
    pub fn create_token(&self, uses: u32, ttl: Duration) -> anyhow::Result<JoinToken> {
        let token = JoinToken::generate(self.address.clone(), self.pin)?;
        self.registry
            .add_token(&token.id, token.secret.digest(), uses, ttl)?;
        tracing::info!(token = %crate::identity::base32(&token.id), uses, ttl_seconds = ttl.as_secs(), "join token made");
        Ok(token)
    }

    async fn set_revoked(&self, peer: &str, revoked: bool) -> Result<(), Status> {
        let peer = peer_id(peer)?;
        if !self.registry.set_revoked(peer, revoked).map_err(failed)? {
            let text = if revoked {
                "no such member, or revoked already"
            } else {
                "not revoked"
            };
            return Err(Status::not_found(format!("{peer}: {text}")));
        }
        tracing::warn!(%peer, "{}", if revoked { "member revoked" } else { "member let in again" });
        if let Some((store, trust)) = &self.live {
            trust.adopt(self.registry.trust_list().map_err(failed)?);
            if revoked {
                store.evict(peer).await.map_err(failed)?;
            }
        }
        Ok(())
    }
}

fn failed(error: impl std::fmt::Display) -> Status {
    tracing::error!("admin: {error:#}");
    Status::internal(format!("{error:#}"))
}

#[tonic::async_trait]
impl admin_service_server::AdminService for Admin {
    async fn create_token(
        &self,
        request: Request<CreateTokenRequest>,
    ) -> Result<Response<CreateTokenResponse>, Status> {
        let request = request.into_inner();
        let uses = request.uses.max(1);
        let ttl = if request.ttl_seconds == 0 {
            DAY
        } else {
            request.ttl_seconds
        };
        if uses > MAX_USES || ttl > MAX_TOKEN_LIFE {
            return Err(Status::invalid_argument(
                "a token has at most 10,000 uses and lives at most 365 days",
            ));
        }
        let token = self
            .create_token(uses, Duration::from_secs(ttl))
            .map_err(failed)?;
        let token_id = crate::identity::base32(&token.id);
        Ok(Response::new(CreateTokenResponse {
            link: token.to_string(),
            token_id,
        }))
    }

    async fn list_tokens(
        &self,
        _: Request<ListTokensRequest>,
    ) -> Result<Response<ListTokensResponse>, Status> {
        let tokens =
            self.registry
                .tokens()
                .map_err(failed)?
                .into_iter()
                .map(|(token_id, record)| TokenRow {
                    token_id,
                    uses: record.uses,
                    uses_left: record.uses.saturating_sub(
                        u32::try_from(record.redeemed_by.len()).unwrap_or(u32::MAX),
                    ),
                    expires_at: record.expires_at,
                });
        Ok(Response::new(ListTokensResponse {
            tokens: tokens.collect(),
        }))
    }

    async fn list_members(
        &self,
        _: Request<ListMembersRequest>,
    ) -> Result<Response<ListMembersResponse>, Status> {
        let online = match &self.live {
            Some((store, _)) => store.peers().await.map_err(failed)?,
            None => Vec::new(),
        };
        let online: HashMap<PeerId, PeerRecord> = online
            .into_iter()
            .map(|record| (record.announcement.peer, record))
            .collect();
        let mut members = Vec::new();
        for (peer, record) in self.registry.members().map_err(failed)? {
            let online = online.get(&peer).cloned();
            members.push(MemberRow {
                peer_id: peer.to_string(),
                joined_at: record.joined_at,
                revoked: record.revoked,
                online: online.is_some(),
                files: online.as_ref().map_or(0, |online| online.n_files as u64),
                addresses: online
                    .map(|online| online.announcement.addresses)
                    .unwrap_or_default(),
            });
        }
        Ok(Response::new(ListMembersResponse { members }))
    }

    async fn revoke(
        &self,
        request: Request<RevokeRequest>,
    ) -> Result<Response<RevokeResponse>, Status> {
        self.set_revoked(&request.into_inner().peer_id, true)
            .await?;
        Ok(Response::new(RevokeResponse {}))
    }

    async fn approve(
        &self,
        request: Request<ApproveRequest>,
    ) -> Result<Response<ApproveResponse>, Status> {
        self.set_revoked(&request.into_inner().peer_id, false)
            .await?;
        Ok(Response::new(ApproveResponse {}))
    }

    async fn log_level(
        &self,
        request: Request<LogLevelRequest>,
    ) -> Result<Response<LogLevelResponse>, Status> {
        if self.live.is_none() {
            return Err(Status::failed_precondition("no tracker runs here"));
        }
        let level = telemetry::level(&request.into_inner().level);
        Ok(Response::new(LogLevelResponse {
            level: level.map_err(|e| Status::invalid_argument(e.to_string()))?,
        }))
    }

    async fn issue_operator(
        &self,
        request: Request<IssueOperatorRequest>,
    ) -> Result<Response<IssueOperatorResponse>, Status> {
        let request = request.into_inner();
        let life = if request.ttl_seconds == 0 {
            OPERATOR_LIFE.0
        } else {
            request.ttl_seconds
        };
        if life > OPERATOR_LIFE.1 {
            return Err(Status::invalid_argument(
                "an operator certificate lives at most 7 days",
            ));
        }
        let applicant =
            Applicant::read(&request.csr).map_err(|e| Status::invalid_argument(e.to_string()))?;
        let certificate = self
            .authority
            .certify_operator(&applicant, Duration::from_secs(life))
            .map_err(failed)?;
        tracing::info!(operator = %applicant.id, life_seconds = life, "operator certificate issued");
        Ok(Response::new(IssueOperatorResponse {
            certificate: certificate.to_vec().into(),
            authority: self.authority.certificate().to_vec().into(),
        }))
    }
}
