//! One remote peer that offers what we want: connecting to it, its manifests, and the bytes of a claim.
//!
//! Invariant: whatever comes is taken as a stranger's word. Bytes leave this file only as [`VerifiedPiece`]s, sizes only
//! as [`Manifest`]s.

use std::{
    sync::{Mutex, MutexGuard},
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};
use tokio::time::timeout;
use tonic::{Status, Streaming};

use super::{
    membership::Membership,
    pace::{Flight, Pace},
};
use crate::{
    content::{ContentId, Hash32, Manifest, PieceIndex, VerifiedPiece},
    identity::PeerId,
    net::{self, Connection, DialError},
    proto::{
        self, Chunk, GetChunksRequest, GetChunksResponse, GetManifestRequest, PieceRange,
        chunk_service_client::ChunkServiceClient, content_error::Code as Reason, get_chunks_response,
        get_manifest_response,
    },
    tls::{self, Expect},
};

const FIRST_ANSWER: Duration = Duration::from_secs(10);
/// How often a silent stream is looked at.
const TICK: Duration = Duration::from_secs(1);
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
    connection: Connection,
}

/// What is asked for: consecutive pieces of one content.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Of which content.
    pub manifest: Manifest,
    /// The first one.
    pub first: PieceIndex,
    /// How many.
    pub count: u32,
}

/// What became of a piece, or of a range.
#[derive(Debug)]
pub enum Event {
    /// Position of the range in the claim, and a good piece of it.
    Piece(usize, VerifiedPiece),
    /// The source does not serve the rest of this range; it is not to blame.
    Missing(usize),
}

impl Source {
    /// Connects to the peer `id` at one of `addresses`.
    ///
    /// # Errors
    /// [`SourceError::Dial`] with the most telling reason.
    pub async fn connect(membership: &Membership, id: PeerId, addresses: &[String]) -> Result<Self, SourceError> {
        let config = tls::member_client(membership.trust(), membership.certificate(), Expect::Peer(id))
            .map_err(|e| SourceError::Setup(e.to_string()))?;
        let connection = net::dial(addresses, config, UNSENT_NAME, net::DATA).await?;
        Ok(Self { id, connection })
    }

    /// The address in use.
    #[must_use]
    pub fn address(&self) -> String {
        self.connection.remote().map(|address| address.to_string()).unwrap_or_default()
    }

    /// Is the connection gone?
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.connection.is_closed()
    }

    fn client(&self) -> ChunkServiceClient<Connection> {
        ChunkServiceClient::with_origin(self.connection.clone(), self.connection.origin())
            .max_decoding_message_size(proto::MAX_CHUNK_MESSAGE)
    }

    /// The manifests of these contents, at most 1,024; `None` for those that it does not hold.
    ///
    /// # Errors
    /// [`SourceError::Lied`] if one does not prove itself.
    pub async fn manifests(&self, ids: &[ContentId]) -> Result<Vec<Option<Manifest>>, SourceError> {
        let content_ids = ids.iter().map(|id| Bytes::copy_from_slice(id.as_bytes())).collect();
        let call = self.client();
        let stream = timeout(FIRST_ANSWER, { call }.get_manifest(GetManifestRequest { content_ids })).await;
        let mut stream = stream.map_err(|_| SourceError::Stalled)??.into_inner();
        let mut found: Vec<Option<Manifest>> = vec![None; ids.len()];
        let mut draft: Option<Draft> = None;
        loop {
            let message = timeout(FIRST_ANSWER, stream.message()).await.map_err(|_| SourceError::Stalled)??;
            let next = message.as_ref().map(|message| message.index);
            if let Some(ready) = draft.take_if(|draft| Some(draft.index) != next) {
                let index = ready.index as usize;
                found[index] = Some(ready.prove(ids[index])?);
            }
            let Some(message) = message else { return Ok(found) };
            let unasked = || SourceError::Lied("a manifest that nobody asked for".into());
            if message.index as usize >= ids.len() || found[message.index as usize].is_some() {
                return Err(unasked());
            }
            match (message.part, &mut draft) {
                (Some(get_manifest_response::Part::Header(header)), None) => {
                    draft = Some(Draft { index: message.index, header, hashes: vec![] });
                }
                (Some(get_manifest_response::Part::PieceHashes(run)), Some(draft)) => draft.extend(&run)?,
                (Some(get_manifest_response::Part::Error(_)), None) => {}
                _ => return Err(unasked()),
            }
        }
    }

    /// Asks for a claim; its pieces come from [`Fetch::next`].
    ///
    /// # Errors
    /// If the source does not take the request.
    pub async fn fetch<'a>(&self, claim: &'a [Wanted], pace: &'a Mutex<Pace>) -> Result<Fetch<'a>, SourceError> {
        let ranges = claim.iter().map(|wanted| PieceRange {
            content_id: Bytes::copy_from_slice(wanted.manifest.id().as_bytes()),
            size: wanted.manifest.layout().size(),
            first_piece: wanted.first.get(),
            piece_count: wanted.count,
        });
        let chunk_length = lock(pace).chunk_length();
        let request = GetChunksRequest { ranges: ranges.collect(), chunk_length };
        let flight = Some(lock(pace).begin(Instant::now()));
        let mut fetch = Fetch { id: self.id, pace, flight, stream: None, assembly: Assembly::new(claim) };
        let stream = timeout(FIRST_ANSWER, self.client().get_chunks(request)).await;
        fetch.stream = Some(stream.map_err(|_| SourceError::Stalled)??.into_inner());
        Ok(fetch)
    }
}

fn lock(pace: &Mutex<Pace>) -> MutexGuard<'_, Pace> {
    pace.lock().expect("no panic while the lock is held")
}

/// A claim that is being answered. Dropping it ends the stream.
pub struct Fetch<'a> {
    id: PeerId,
    pace: &'a Mutex<Pace>,
    flight: Option<Flight>,
    stream: Option<Streaming<GetChunksResponse>>,
    assembly: Assembly<'a>,
}

impl Fetch<'_> {
    /// The next verified piece, or range that is not served; `None` when everything has come. Ranges come in order.
    ///
    /// # Errors
    /// How the stream ended before everything was there.
    pub async fn next(&mut self) -> Result<Option<Event>, SourceError> {
        loop {
            let (Some(stream), Some(flight)) = (&mut self.stream, &mut self.flight) else { return Ok(None) };
            let Ok(message) = timeout(TICK, stream.message()).await else {
                if lock(self.pace).stalled(flight, Instant::now()) {
                    return Err(SourceError::Stalled);
                }
                continue;
            };
            let Some(message) = message? else {
                let whole = self.assembly.is_complete();
                return if whole { Ok(None) } else { Err(SourceError::Broken("the stream ended early".into())) };
            };
            let step = match message.part {
                Some(get_chunks_response::Part::Chunk(chunk)) => {
                    let now = Instant::now();
                    lock(self.pace).on_chunk(flight, chunk.data.len() as u64, now);
                    if lock(self.pace).stalled(flight, now) {
                        return Err(SourceError::Stalled);
                    }
                    self.assembly.chunk(chunk)?
                }
                Some(get_chunks_response::Part::Error(error)) => {
                    let reason = error.error.map_or(Reason::Unspecified, |error| error.code());
                    tracing::debug!(peer = %self.id, range = error.range, ?reason, "range not served");
                    Some(self.assembly.skip(error.range)?)
                }
                None => return Err(SourceError::Lied("an empty message".into())),
            };
            match step {
                None => {}
                Some(Step::Missing(range)) => return Ok(Some(Event::Missing(range))),
                Some(Step::Full(range, piece, bytes)) => {
                    let piece = verify(&self.assembly.claim[range].manifest, piece, bytes).await?;
                    return Ok(Some(Event::Piece(range, piece)));
                }
            }
        }
    }
}

impl Drop for Fetch<'_> {
    fn drop(&mut self) {
        if let Some(flight) = self.flight.take() {
            lock(self.pace).end(flight, Instant::now());
        }
    }
}

/// Hashes off the reactor's threads: while one piece is hashed, the next is decrypted.
async fn verify(manifest: &Manifest, piece: PieceIndex, bytes: Bytes) -> Result<VerifiedPiece, SourceError> {
    let (manifest, len) = (manifest.clone(), bytes.len() as u64);
    let verified = tokio::task::spawn_blocking(move || manifest.verify(piece, bytes)).await;
    verified.map_err(|e| SourceError::Setup(e.to_string()))?.map_err(|e| SourceError::BadPiece(e.to_string(), len))
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
        let proved = Manifest::accept(id, self.header.size, self.hashes, &self.header.last_chunk, edge);
        proved.map_err(|e| SourceError::Lied(e.to_string()))
    }
}

enum Step {
    Full(usize, PieceIndex, Bytes),
    Missing(usize),
}

/// Puts chunks together into pieces, in exactly the order asked for.
struct Assembly<'a> {
    claim: &'a [Wanted],
    range: usize,
    /// Pieces of the range that are through.
    done: u32,
    buffer: BytesMut,
}

impl<'a> Assembly<'a> {
    fn new(claim: &'a [Wanted]) -> Self {
        Self { claim, range: 0, done: 0, buffer: BytesMut::new() }
    }

    const fn is_complete(&self) -> bool {
        self.range == self.claim.len()
    }

    fn chunk(&mut self, chunk: Chunk) -> Result<Option<Step>, SourceError> {
        let lied = |what: &str| SourceError::Lied(what.into());
        let wanted = self.claim.get(self.range).ok_or_else(|| lied("more than was asked for"))?;
        let layout = wanted.manifest.layout();
        let piece = layout.piece(wanted.first.get() + self.done).ok_or_else(|| lied("more than was asked for"))?;
        let expected = layout.offset(piece) + self.buffer.len() as u64;
        if chunk.range as usize != self.range || chunk.offset != expected {
            return Err(lied("bytes out of order"));
        }
        let len = layout.len_of(piece) as usize;
        if self.buffer.len() + chunk.data.len() > len {
            return Err(lied("a chunk across a piece's end"));
        }
        let full = if self.buffer.is_empty() && chunk.data.len() == len {
            chunk.data
        } else {
            self.buffer.reserve(if self.buffer.is_empty() { len } else { 0 });
            self.buffer.extend_from_slice(&chunk.data);
            if self.buffer.len() < len {
                return Ok(None);
            }
            self.buffer.split().freeze()
        };
        let range = self.range;
        self.done += 1;
        if self.done == wanted.count {
            (self.range, self.done) = (self.range + 1, 0);
        }
        Ok(Some(Step::Full(range, piece, full)))
    }

    fn skip(&mut self, range: u32) -> Result<Step, SourceError> {
        if range as usize != self.range || self.is_complete() {
            return Err(SourceError::Lied("an error for another range".into()));
        }
        self.buffer.clear();
        (self.range, self.done) = (self.range + 1, 0);
        Ok(Step::Missing(range as usize))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::content::{Layout, assemble, hash_piece};

    fn manifest(bytes: &[u8]) -> Manifest {
        let layout = Layout::new(bytes.len() as u64).unwrap();
        let hashes = layout.pieces().map(|piece| {
            let from = usize::try_from(layout.offset(piece)).unwrap();
            hash_piece(layout, piece, &bytes[from..from + layout.len_of(piece) as usize]).unwrap()
        });
        assemble(layout, hashes.collect()).unwrap()
    }

    fn chunk(range: u32, offset: u64, data: &[u8]) -> Chunk {
        Chunk { range, offset, data: Bytes::copy_from_slice(data) }
    }

    #[test]
    fn only_the_asked_bytes_in_the_asked_order_become_pieces() {
        let bytes = vec![7; 600_000];
        let manifest = manifest(&bytes);
        let first = manifest.layout().piece(1).unwrap();
        let claim = [Wanted { manifest: manifest.clone(), first, count: 2 }];
        let p = u64::from(manifest.layout().piece_len());
        let mut good = Assembly::new(&claim);
        assert!(good.chunk(chunk(0, p, &bytes[..1000])).unwrap().is_none());
        let rest = &bytes[..usize::try_from(p).unwrap() - 1000];
        assert!(matches!(good.chunk(chunk(0, p + 1000, rest)).unwrap(), Some(Step::Full(0, ..))));
        let last = &bytes[..600_000 - 2 * usize::try_from(p).unwrap()];
        assert!(matches!(good.chunk(chunk(0, 2 * p, last)).unwrap(), Some(Step::Full(0, ..))));
        assert!(good.is_complete() && good.chunk(chunk(0, 0, &[1])).is_err() && good.skip(1).is_err());
        for bad in [chunk(1, p, &[7]), chunk(0, 0, &[7]), chunk(0, p + 1, &[7]), chunk(0, p, &vec![7; 262_145])] {
            assert!(Assembly::new(&claim).chunk(bad).is_err());
        }
        let mut skipping = Assembly::new(&claim);
        assert!(skipping.skip(1).is_err());
        assert!(matches!(skipping.skip(0).unwrap(), Step::Missing(0)) && skipping.is_complete());
    }
}
