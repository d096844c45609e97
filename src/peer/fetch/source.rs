//! One remote peer that offers what we want: connecting to it, its manifests, and the bytes of a claim.
//!
//! Invariant: whatever comes is taken as a stranger's word. Bytes leave this file only as `VerifiedPiece`s, sizes only
//! as [`Manifest`]s.

use std::time::Duration;

use bytes::Bytes;
use tokio::time::timeout;
use tonic::Status;

mod begun;
mod fetch;
mod have;
mod links;

use self::links::Links;
pub use self::{
    begun::{Asked, Begun, Opening},
    fetch::{Arrived, Event, Fetch, Wanted},
    have::{HaveWatch, News},
    links::CONNECTIONS,
};
use crate::peer::member::membership::Membership;
use crate::{
    content::{ContentId, Hash32, Manifest},
    identity::PeerId,
    net::{self, Connection, DialError},
    proto::{
        self, GetManifestRequest, chunk_service_client::ChunkServiceClient, get_manifest_response,
    },
    tls::{self, Expect},
};

const FIRST_ANSWER: Duration = Duration::from_secs(10);
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
    /// Ours: the network's rules could not be set up.
    #[error("{0}")]
    Setup(String),
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

    /// The manifests of these contents, at most 1,024; `None` for those that it does not hold.
    ///
    /// # Errors
    /// [`SourceError::Lied`] if one does not prove itself.
    pub async fn manifests(&self, ids: &[ContentId]) -> Result<Vec<Option<Manifest>>, SourceError> {
        let content_ids = ids
            .iter()
            .map(|id| Bytes::copy_from_slice(id.as_bytes()))
            .collect();
        let call = self.client();
        let stream = timeout(
            FIRST_ANSWER,
            { call }.get_manifest(GetManifestRequest { content_ids }),
        )
        .await;
        let mut stream = stream.map_err(|_| SourceError::Stalled)??.into_inner();
        let mut found: Vec<Option<Manifest>> = vec![None; ids.len()];
        let mut draft: Option<Draft> = None;
        loop {
            let message = timeout(FIRST_ANSWER, stream.message())
                .await
                .map_err(|_| SourceError::Stalled)??;
            let next = message.as_ref().map(|message| message.index);
            if let Some(ready) = draft.take_if(|draft| Some(draft.index) != next) {
                let index = ready.index as usize;
                found[index] = Some(ready.prove(ids[index])?);
            }
            let Some(message) = message else {
                return Ok(found);
            };
            let unasked = || SourceError::Lied("a manifest that nobody asked for".into());
            if message.index as usize >= ids.len() || found[message.index as usize].is_some() {
                return Err(unasked());
            }
            match (message.part, &mut draft) {
                (Some(get_manifest_response::Part::Header(header)), None) => {
                    draft = Some(Draft {
                        index: message.index,
                        header,
                        hashes: vec![],
                    });
                }
                (Some(get_manifest_response::Part::PieceHashes(run)), Some(draft)) => {
                    draft.extend(&run)?
                }
                (Some(get_manifest_response::Part::Error(_)), None) => {}
                _ => return Err(unasked()),
            }
        }
    }
}

/// A manifest that is still arriving.
struct Draft {
    index: u32,
    header: proto::ManifestHeader,
    hashes: Vec<Hash32>,
}

impl Draft {
    fn extend(&mut self, run: &[u8]) -> Result<(), SourceError> {
        let (hashes, rest) = run.as_chunks::<32>();
        let most = crate::content::MAX_PIECES as usize;
        if !rest.is_empty() || self.hashes.len() + hashes.len() > most {
            return Err(SourceError::Lied("a malformed manifest".into()));
        }
        self.hashes.extend_from_slice(hashes);
        Ok(())
    }

    fn prove(self, id: ContentId) -> Result<Manifest, SourceError> {
        let (edge, rest) = self.header.right_edge.as_chunks::<32>();
        if !rest.is_empty() {
            return Err(SourceError::Lied("a malformed manifest".into()));
        }
        let proved = Manifest::accept(
            id,
            self.header.size,
            self.hashes,
            &self.header.last_chunk,
            edge,
        );
        proved.map_err(|e| SourceError::Lied(e.to_string()))
    }
}
