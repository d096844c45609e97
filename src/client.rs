//! The control and the admin client: typed calls over a connection that somebody else made, a Unix socket or a pipe.
//!
//! Invariant: it resolves nothing, repeats nothing and prints nothing; every unary call has a deadline, and every failure
//! is a [`Failed`] that says how the process ends.

use std::time::Duration;

use tonic::{Code, Response, Status, Streaming};

use crate::{
    exit::{Exit, Failed},
    net::Connection,
    proto::{
        ApproveRequest, CreateTokenRequest, CreateTokenResponse, GetEvent, GetRequest,
        IssueOperatorRequest, IssueOperatorResponse, LimitRequest, Limits, ListMembersRequest,
        ListTokensRequest, LogLevelRequest, MemberRow, RevokeRequest, ShareRequest, ShareResponse,
        StatusRequest, StatusResponse, TokenRow, admin_service_client::AdminServiceClient,
        control_service_client::ControlServiceClient, get_event::Event,
    },
};

/// A call that only looks or notes something down.
const DEADLINE: Duration = Duration::from_secs(30);
/// Sharing walks a folder first.
const SHARE_DEADLINE: Duration = Duration::from_secs(600);
/// Longest answer in bytes: ten thousand members, or a status with many downloads. Both ends are this user's.
const MAX_MESSAGE: usize = 64 << 20;

/// What a running peer can be asked.
#[derive(Clone, Debug)]
pub struct ControlClient(ControlServiceClient<Connection>);

impl ControlClient {
    /// Over a connection to a ControlService.
    #[must_use]
    pub fn new(connection: Connection) -> Self {
        let origin = connection.origin();
        Self(
            ControlServiceClient::with_origin(connection, origin)
                .max_decoding_message_size(MAX_MESSAGE),
        )
    }

    /// Begins a download; dropping the events stops it.
    ///
    /// # Errors
    /// If the request is refused or the peer has gone.
    pub async fn get(&mut self, request: GetRequest) -> Result<GetEvents, Failed> {
        self.0
            .get(request)
            .await
            .map(|events| GetEvents(events.into_inner()))
            .map_err(|status| failed(PEER, &status))
    }

    /// What the peer is doing.
    ///
    /// # Errors
    /// If the peer does not answer.
    pub async fn status(&mut self) -> Result<StatusResponse, Failed> {
        unary(PEER, DEADLINE, self.0.status(StatusRequest {})).await
    }

    /// Changes the limits, and gives those that hold then.
    ///
    /// # Errors
    /// [`Exit::Usage`] if a limit is out of bounds.
    pub async fn limit(&mut self, request: LimitRequest) -> Result<Limits, Failed> {
        Ok(unary(PEER, DEADLINE, self.0.limit(request))
            .await?
            .limits
            .unwrap_or_default())
    }

    /// Changes how much the peer logs, unless `level` is empty; gives what holds then.
    ///
    /// # Errors
    /// [`Exit::Usage`] for an unknown level.
    pub async fn log_level(&mut self, level: String) -> Result<String, Failed> {
        Ok(
            unary(PEER, DEADLINE, self.0.log_level(LogLevelRequest { level }))
                .await?
                .level,
        )
    }

    /// Shares one more folder, given by its absolute path; `name` may be empty.
    ///
    /// # Errors
    /// If the folder cannot be shared or the peer does not answer.
    pub async fn share(&mut self, path: String, name: String) -> Result<ShareResponse, Failed> {
        unary(
            PEER,
            SHARE_DEADLINE,
            self.0.share(ShareRequest { path, name }),
        )
        .await
    }
}

/// The events of one download.
#[derive(Debug)]
pub struct GetEvents(Streaming<GetEvent>);

impl GetEvents {
    /// The next event; the last ones are [`Event::Done`] and [`Event::Failed`].
    ///
    /// # Errors
    /// [`Exit::Incomplete`] if the peer went away in the middle; otherwise what it answered.
    pub async fn next(&mut self) -> Result<Event, Failed> {
        loop {
            match self.0.message().await {
                Ok(Some(GetEvent { event: Some(event) })) => return Ok(event),
                // Kinds of events that only later versions know.
                Ok(Some(GetEvent { event: None })) => {}
                Ok(None) => return Err(ended()),
                Err(status) if is_ours(&status) => return Err(ended()),
                Err(status) => return Err(failed(PEER, &status)),
            }
        }
    }
}

/// What a tracker can be asked by its operator.
#[derive(Clone, Debug)]
pub struct AdminClient(AdminServiceClient<Connection>);

impl AdminClient {
    /// Over a connection to an AdminService.
    #[must_use]
    pub fn new(connection: Connection) -> Self {
        let origin = connection.origin();
        Self(
            AdminServiceClient::with_origin(connection, origin)
                .max_decoding_message_size(MAX_MESSAGE),
        )
    }

    /// Makes a join token for `uses` machines.
    ///
    /// # Errors
    /// If the values are out of bounds or the tracker does not answer.
    pub async fn create_token(
        &mut self,
        uses: u32,
        ttl: Duration,
    ) -> Result<CreateTokenResponse, Failed> {
        let request = CreateTokenRequest {
            uses,
            ttl_seconds: ttl.as_secs(),
        };
        unary(TRACKER, DEADLINE, self.0.create_token(request)).await
    }

    /// Tokens that still exist.
    ///
    /// # Errors
    /// If the tracker does not answer.
    pub async fn tokens(&mut self) -> Result<Vec<TokenRow>, Failed> {
        Ok(
            unary(TRACKER, DEADLINE, self.0.list_tokens(ListTokensRequest {}))
                .await?
                .tokens,
        )
    }

    /// Everybody who ever joined.
    ///
    /// # Errors
    /// If the tracker does not answer.
    pub async fn members(&mut self) -> Result<Vec<MemberRow>, Failed> {
        Ok(unary(
            TRACKER,
            DEADLINE,
            self.0.list_members(ListMembersRequest {}),
        )
        .await?
        .members)
    }

    /// Throws a member out.
    ///
    /// # Errors
    /// [`Exit::NotFound`] if there is no such member.
    pub async fn revoke(&mut self, peer_id: String) -> Result<(), Failed> {
        unary(TRACKER, DEADLINE, self.0.revoke(RevokeRequest { peer_id }))
            .await
            .map(drop)
    }

    /// Lets a revoked member in again.
    ///
    /// # Errors
    /// [`Exit::NotFound`] if it was not revoked.
    pub async fn approve(&mut self, peer_id: String) -> Result<(), Failed> {
        unary(
            TRACKER,
            DEADLINE,
            self.0.approve(ApproveRequest { peer_id }),
        )
        .await
        .map(drop)
    }

    /// Changes how much the tracker logs, unless `level` is empty; gives what holds then.
    ///
    /// # Errors
    /// [`Exit::Usage`] for an unknown level.
    pub async fn log_level(&mut self, level: String) -> Result<String, Failed> {
        Ok(unary(
            TRACKER,
            DEADLINE,
            self.0.log_level(LogLevelRequest { level }),
        )
        .await?
        .level)
    }

    /// Certifies the key behind a PKCS #10 request (DER) as an operator's.
    ///
    /// # Errors
    /// If the request or the time is not acceptable, or the tracker does not answer.
    pub async fn issue_operator(
        &mut self,
        csr: Vec<u8>,
        ttl: Duration,
    ) -> Result<IssueOperatorResponse, Failed> {
        let request = IssueOperatorRequest {
            csr: csr.into(),
            ttl_seconds: ttl.as_secs(),
        };
        unary(TRACKER, DEADLINE, self.0.issue_operator(request)).await
    }
}

const PEER: &str = "the running peer";
const TRACKER: &str = "the tracker";

async fn unary<T>(
    who: &str,
    deadline: Duration,
    call: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, Failed> {
    match tokio::time::timeout(deadline, call).await {
        Ok(answer) => answer
            .map(Response::into_inner)
            .map_err(|status| failed(who, &status)),
        Err(_) => Err(Failed::new(
            Exit::Timeout,
            format!("{who} did not answer within {} s", deadline.as_secs()),
        )),
    }
}

fn failed(who: &str, status: &Status) -> Failed {
    if is_ours(status) {
        return Failed::new(Exit::Failure, format!("{who} went away before it answered"));
    }
    let exit = match status.code() {
        Code::InvalidArgument => Exit::Usage,
        Code::NotFound => Exit::NotFound,
        Code::AlreadyExists => Exit::Exists,
        Code::DeadlineExceeded => Exit::Timeout,
        Code::PermissionDenied | Code::Unauthenticated => Exit::Auth,
        _ => Exit::Failure,
    };
    let text = match status.message() {
        "" => format!("{who} answered only: {}", status.code()),
        message => message.to_owned(),
    };
    Failed::new(exit, text)
}

/// Was the status made at this end, because the connection broke?
fn is_ours(status: &Status) -> bool {
    std::error::Error::source(status).is_some()
}

fn ended() -> Failed {
    let text = format!(
        "{PEER} went away before the download was complete; run the same command again to continue"
    );
    Failed::new(Exit::Incomplete, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_carry_exit_codes_and_their_own_words() {
        let of = |status: Status| {
            let failed = failed(PEER, &status);
            (failed.exit, failed.message)
        };
        assert_eq!(
            of(Status::not_found("no such member")),
            (Exit::NotFound, "no such member".into())
        );
        assert_eq!(of(Status::invalid_argument("not absolute")).0, Exit::Usage);
        assert!(
            of(Status::internal(""))
                .1
                .starts_with("the running peer answered only")
        );
        let broken = of(Status::from_error(Box::new(std::io::Error::other("reset"))));
        assert_eq!(
            broken,
            (
                Exit::Failure,
                "the running peer went away before it answered".into()
            )
        );
    }

    #[tokio::test]
    async fn nobody_is_waited_for_forever() {
        let silence = std::future::pending::<Result<Response<()>, Status>>();
        let failed = unary(TRACKER, Duration::ZERO, silence).await.unwrap_err();
        assert_eq!(
            (failed.exit, failed.message.as_str()),
            (Exit::Timeout, "the tracker did not answer within 0 s")
        );
    }
}
