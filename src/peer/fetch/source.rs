//! One remote peer that offers what we want: connecting to it, its manifests, and the bytes of a claim.
//!
//! Invariant: whatever comes is taken as a stranger's word. Bytes leave this file only as `VerifiedPiece`s, sizes only
//! as [`Manifest`]s.

use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::time::timeout;
use tonic::Status;

mod begun;
mod fetch;
mod have;
mod links;
mod report;

use self::links::Links;
pub use self::{
    begun::{Asked, Begun, Opening},
    fetch::{Arrived, Event, Fetch, Wanted},
    have::{HaveWatch, News},
    links::CONNECTIONS,
};
use crate::peer::member::membership::Membership;
use crate::{
    content::{ContentId, Hash32, Layout, Manifest},
    identity::PeerId,
    net::{self, Connection, DialError},
    proto::{
        self, GetManifestRequest, GetManifestResponse, chunk_service_client::ChunkServiceClient,
        content_error::Code, get_manifest_response,
    },
    tls::{self, Expect},
};

const FIRST_ANSWER: Duration = Duration::from_secs(10);
/// Bytes a second of manifests that an answer must have in the mean, beyond [`FIRST_ANSWER`].
const SLOWEST: u64 = 16 << 10;
/// The TLS library wants a name; with SNI off it is not sent, and the verifier looks for the peer's own.
const UNSENT_NAME: &str = "peer.sprat.internal";

/// Why a source is of no use, and what follows from it.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// Nobody we mean answers there: try later.
    #[error("{0}")]
    Dial(#[from] DialError),
    /// The connection or the stream broke: try again.
    #[error("{0}")]
    Broken(String),
    /// Too slow to be of use: try again later.
    #[error("no progress")]
    Stalled,
    /// It has too many streams: rest.
    #[error("busy")]
    Busy,
    /// It sent what no honest peer sends: ban it.
    #[error("sent wrong bytes ({0})")]
    Lied(String),
    /// It sent a whole piece that is none, so many bytes: ban it, too.
    #[error("sent wrong bytes ({0})")]
    BadPiece(String, u64),
    /// It was banned for what it sent.
    #[error("banned")]
    Banned,
    /// Ours: the network's rules could not be set up.
    #[error("{0}")]
    Setup(String),
}

impl SourceError {
    /// Bytes that came in vain.
    #[must_use]
    pub const fn bad_bytes(&self) -> u64 {
        match self {
            Self::BadPiece(_, bytes) => *bytes,
            _ => 0,
        }
    }
}

impl From<Status> for SourceError {
    fn from(status: Status) -> Self {
        match status.code() {
            tonic::Code::ResourceExhausted => Self::Busy,
            _ => Self::Broken(status.message().chars().take(200).collect()),
        }
    }
}

/// A connected source.
#[derive(Clone)]
pub struct Source {
    /// Who it is, as its certificate proved.
    pub id: PeerId,
    links: Links,
}

impl Source {
    /// Connects to the peer `id` at one of `addresses`; several times at once, if it is probably `far`, and proves to be.
    ///
    /// # Errors
    /// [`SourceError::Dial`] with the most telling reason.
    pub async fn connect(
        membership: &Membership,
        id: PeerId,
        addresses: &[String],
        far: bool,
    ) -> Result<Self, SourceError> {
        let config = tls::member_client(
            membership.trust(),
            membership.certificate(),
            Expect::Peer(id),
        )
        .map_err(|e| SourceError::Setup(e.to_string()))?;
        let dial = move |addresses: Vec<String>| {
            let config = config.clone();
            async move { net::dial(&addresses, config, UNSENT_NAME, net::DATA).await }
        };
        let n_further = if far { CONNECTIONS - 1 } else { 0 };
        let further = (0..n_further)
            .map(|_| links::begin(dial(addresses.to_vec())))
            .collect();
        let connection = dial(addresses.to_vec()).await?;
        let address: Vec<_> = connection
            .remote()
            .iter()
            .map(ToString::to_string)
            .collect();
        let source = Self {
            id,
            links: Links::new(connection, move || dial(address.clone())),
        };
        if source.connections() > 1 {
            source.links.add(further);
        }
        Ok(source)
    }

    /// Connects as many times as [`Self::connections`] says, side by side and beside the work.
    pub fn widen(&self) {
        if self.connections() > 1 {
            self.links.widen();
        }
    }

    /// Goes back to at most two connections; what is under way over others goes on.
    pub fn narrow(&self) {
        self.links.narrow();
    }

    /// Ends a connection of several, counted from the first one, which stays.
    pub fn let_go(&self, connection: usize) {
        self.links.let_go(connection);
    }

    /// Was it connected to several times?
    #[must_use]
    pub fn is_wide(&self) -> bool {
        self.links.are_wide()
    }

    /// Connections that are worth using side by side: several over a long line.
    #[must_use]
    pub fn connections(&self) -> usize {
        if self.round_trip() >= net::LONG {
            CONNECTIONS as usize
        } else {
            1
        }
    }

    /// How long the line is.
    #[must_use]
    pub const fn round_trip(&self) -> Duration {
        self.links.first().round_trip()
    }

    /// The address in use.
    #[must_use]
    pub fn address(&self) -> String {
        self.links
            .first()
            .remote()
            .map(|address| address.to_string())
            .unwrap_or_default()
    }

    /// Is the connection gone?
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.links.first().is_closed()
    }

    /// Time spent on decryption since this was last asked.
    #[must_use]
    pub fn take_tls_time(&self) -> Duration {
        self.links.take_tls_time()
    }

    fn client(&self) -> ChunkServiceClient<Connection> {
        ChunkServiceClient::with_origin(self.links.first().clone(), self.links.first().origin())
            .max_decoding_message_size(proto::MAX_CHUNK_MESSAGE)
    }

    /// Asks for the manifests of these contents, at most 1,024, and tells each answer with its position as soon as it is
    /// there, once for each content.
    ///
    /// # Errors
    /// If the source does not answer as it should, or takes longer in all than `SLOWEST` and its bytes allow. What a
    /// manifest has of wrong in it is an answer, and no error.
    pub async fn manifests(
        &self,
        ids: &[ContentId],
        mut tell: impl FnMut(usize, Described),
    ) -> Result<(), SourceError> {
        let content_ids = ids
            .iter()
            .map(|id| Bytes::copy_from_slice(id.as_bytes()))
            .collect();
        let began = Instant::now();
        let call = self.client();
        let stream = timeout(
            FIRST_ANSWER,
            { call }.get_manifest(GetManifestRequest { content_ids }),
        )
        .await;
        let mut stream = stream.map_err(|_| SourceError::Stalled)??.into_inner();
        let mut answers = Answers::of(ids.len());
        loop {
            let patience = FIRST_ANSWER + Duration::from_secs(answers.bytes / SLOWEST);
            let left = patience.saturating_sub(began.elapsed());
            let message = timeout(left.min(FIRST_ANSWER), stream.message())
                .await
                .map_err(|_| SourceError::Stalled)??;
            let next = message.as_ref().map(|message| message.index as usize);
            if let Some(ready) = answers.draft.take_if(|draft| Some(draft.index) != next) {
                tell(ready.index, ready.prove(ids));
            }
            let Some(message) = message else {
                let unanswered = answers.is_told.iter().enumerate();
                unanswered
                    .filter(|(_, is_told)| !**is_told)
                    .for_each(|(i, _)| tell(i, Described::Refused(Code::NotFound)));
                return Ok(());
            };
            if let Some(code) = answers.take(message)? {
                tell(code.0, Described::Refused(code.1));
            }
        }
    }
}

/// What a source says of a content that it was asked for the manifest of.
#[derive(Debug)]
pub enum Described {
    /// The manifest, which proved itself.
    Manifest(Manifest),
    /// It has none, for this reason.
    Refused(Code),
    /// One that is wrong, and in which way.
    Wrong(String),
}

/// The answers to one request for manifests. Invariant: each content is answered once, at its turn or never.
struct Answers {
    is_told: Vec<bool>,
    draft: Option<Draft>,
    /// Of hashes that came.
    bytes: u64,
}

impl Answers {
    fn of(n: usize) -> Self {
        Self {
            is_told: vec![false; n],
            draft: None,
            bytes: 0,
        }
    }

    /// One message; gives the content and the reason if that is refused.
    fn take(&mut self, message: GetManifestResponse) -> Result<Option<(usize, Code)>, SourceError> {
        let unasked = || SourceError::Lied("a manifest that nobody asked for".into());
        let index = message.index as usize;
        let is_told = self.is_told.get_mut(index).ok_or_else(unasked)?;
        match (message.part, &mut self.draft) {
            (Some(get_manifest_response::Part::Header(header)), None) if !*is_told => {
                *is_told = true;
                self.draft = Some(Draft {
                    index,
                    header,
                    hashes: vec![],
                });
                Ok(None)
            }
            (Some(get_manifest_response::Part::PieceHashes(run)), Some(draft)) => {
                self.bytes += run.len() as u64;
                draft.extend(&run)?;
                Ok(None)
            }
            (Some(get_manifest_response::Part::Error(error)), None) if !*is_told => {
                *is_told = true;
                Ok(Some((index, error.code())))
            }
            _ => Err(unasked()),
        }
    }
}

/// A manifest that is still arriving.
struct Draft {
    index: usize,
    header: proto::ManifestHeader,
    hashes: Vec<Hash32>,
}

impl Draft {
    fn extend(&mut self, run: &[u8]) -> Result<(), SourceError> {
        let (hashes, rest) = run.as_chunks::<32>();
        let most = Layout::new(self.header.size).map_or(0, Layout::n_pieces) as usize;
        if !rest.is_empty() || self.hashes.len() + hashes.len() > most {
            return Err(SourceError::Lied("a malformed manifest".into()));
        }
        self.hashes.extend_from_slice(hashes);
        Ok(())
    }

    fn prove(self, ids: &[ContentId]) -> Described {
        let (edge, rest) = self.header.right_edge.as_chunks::<32>();
        if !rest.is_empty() {
            return Described::Wrong("sent a malformed manifest".into());
        }
        let proved = Manifest::accept(
            ids[self.index],
            self.header.size,
            self.hashes,
            &self.header.last_chunk,
            edge,
        );
        proved.map_or_else(
            |error| Described::Wrong(error.to_string()),
            Described::Manifest,
        )
    }
}
