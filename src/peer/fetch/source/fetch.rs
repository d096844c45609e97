//! GetChunks, the receiving end: a claim is asked for, and its chunks become pieces.
//!
//! The answer's body is read frame by frame, and each frame's bytes are copied once, into the piece they belong to; one
//! that is a whole piece is not copied at all. (A generated client copies everything into a buffer of its own first.)
//!
//! Invariant: only the bytes asked for, in the order asked for, become pieces, and their bytes can be had only by
//! verifying them.

use std::{
    future::poll_fn,
    pin::{Pin, pin},
    sync::{Arc, Mutex, MutexGuard},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, Request};
use http_body::{Body as _, Frame};
use tokio::time::timeout;
use tonic::{Status, body::Body};
use tower::{Service, ServiceExt};

use super::{
    super::pace::{Flight, Pace},
    Source, SourceError,
};
use crate::{
    content::{ContentId, Layout, Manifest, PieceIndex, VerifiedPiece},
    identity::PeerId,
    metrics,
    net::{Connection, Incoming},
    proto::{
        GetChunksRequest, GetChunksResponse, PieceRange,
        content_error::Code as Reason,
        framing::{self, FrameError, Frames, Part},
        get_chunks_response,
    },
};

const PATH: &str = "/sprat.v1.ChunkService/GetChunks";
/// How often a silent stream is looked at.
const TICK: Duration = Duration::from_secs(1);

/// What is asked for: consecutive pieces of one content.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// Of which content.
    pub id: ContentId,
    /// Its size and pieces, as far as the caller knows: a source that knows better says so.
    pub layout: Layout,
    /// The first one.
    pub first: PieceIndex,
    /// How many.
    pub count: u32,
}

/// What became of a piece, or of a range.
#[derive(Debug)]
pub enum Event {
    /// The bytes of a piece.
    Piece(Arrived),
    /// The source does not serve the rest of this range, of which so many pieces came, for this reason; it is not to
    /// blame.
    Missing(usize, u32, Reason),
}

/// All bytes of a piece, as yet only claimed to be that.
#[derive(Debug)]
pub struct Arrived {
    /// Position of the range in the claim.
    pub range: usize,
    piece: PieceIndex,
    bytes: Bytes,
}

impl Arrived {
    /// Which piece of its content.
    #[must_use]
    pub const fn piece(&self) -> PieceIndex {
        self.piece
    }

    /// Bytes.
    #[must_use]
    pub const fn size(&self) -> usize {
        self.bytes.len()
    }

    /// Hashes it, which takes a twentieth of a millisecond for 64 KiB.
    ///
    /// # Errors
    /// [`SourceError::BadPiece`] if these are not the bytes of that piece of the content that `manifest` describes.
    pub fn verify(self, manifest: &Manifest) -> Result<VerifiedPiece, SourceError> {
        let len = self.bytes.len() as u64;
        manifest
            .verify(self.piece, self.bytes)
            .map_err(|e| SourceError::BadPiece(e.to_string(), len))
    }
}

impl From<FrameError> for SourceError {
    fn from(error: FrameError) -> Self {
        Self::Lied(error.to_string())
    }
}

impl Source {
    /// Asks for a claim of a lane; its pieces come from [`Fetch::next`]. With `first_copies` the source passes over what it
    /// promised to others.
    ///
    /// # Errors
    /// If the source does not take the request.
    pub async fn fetch(
        &self,
        lane: usize,
        claim: Vec<Wanted>,
        first_copies: bool,
        pace: &Arc<Mutex<Pace>>,
    ) -> Result<Fetch, SourceError> {
        let ranges = claim.iter().map(|wanted| PieceRange {
            content_id: Bytes::copy_from_slice(wanted.id.as_bytes()),
            size: wanted.layout.size(),
            first_piece: wanted.first.get(),
            piece_count: wanted.count,
        });
        let mut connection = self.links.of(lane).await;
        let chunk_length = lock(pace).chunk_length();
        metrics::CHUNKS_RECEIVED.observe(chunk_length.into());
        // Until the first answer, what connecting took; a busy core may have been in that.
        let round_trip = self.links.first().round_trip().min(lock(pace).round_trip());
        let round_trip_us = u32::try_from(round_trip.as_micros()).unwrap_or(u32::MAX);
        let request = GetChunksRequest {
            ranges: ranges.collect(),
            chunk_length,
            first_copies,
            round_trip_us,
        };
        let mut flight = InFlight::begin(pace);
        let answer = async {
            let (answer, first) = (
                self.call(connection.clone(), &request).await,
                self.links.first(),
            );
            match answer {
                // One too many: the source said so only after the handshake.
                Err(SourceError::Broken(_)) if connection.is_closed() && !first.is_closed() => {
                    connection = first.clone();
                    self.call(first.clone(), &request).await
                }
                answer => answer,
            }
        };
        let body = Some(flight.wait_for(answer).await??);
        let (input, frames, assembly) = (Bytes::new(), Frames::default(), Assembly::new(claim));
        Ok(Fetch {
            id: self.id,
            flight,
            body,
            _connection: connection,
            input,
            frames,
            assembly,
            at_source: [0; 3],
            has_told_spent: false,
        })
    }

    async fn call(
        &self,
        mut connection: Connection,
        request: &GetChunksRequest,
    ) -> Result<Incoming, SourceError> {
        let broken = |error: &dyn std::fmt::Display| SourceError::Broken(error.to_string());
        let call = Request::post(format!(
            "{}{PATH}",
            self.links
                .first()
                .origin()
                .to_string()
                .trim_end_matches('/')
        ))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(Body::new(Once(Some(framing::framed(request)))))
        .map_err(|e| broken(&e))?;
        let answer = connection
            .ready()
            .await
            .map_err(|e| broken(&e))?
            .call(call)
            .await
            .map_err(|e| broken(&e))?;
        if let Some(status) = Status::from_header_map(answer.headers()) {
            return Err(status.into());
        }
        let kind = answer
            .headers()
            .get("content-type")
            .map(http::HeaderValue::as_bytes);
        if answer.status() != http::StatusCode::OK
            || !kind.is_some_and(|kind| kind.starts_with(b"application/grpc"))
        {
            return Err(SourceError::Broken(format!(
                "answered {} and not as gRPC does",
                answer.status()
            )));
        }
        Ok(answer.into_body())
    }
}

/// A body of one frame.
struct Once(Option<Bytes>);

impl http_body::Body for Once {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        Poll::Ready(self.0.take().map(|bytes| Ok(Frame::data(bytes))))
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_none()
    }
}

fn lock(pace: &Mutex<Pace>) -> MutexGuard<'_, Pace> {
    pace.lock().expect("no panic while the lock is held")
}

/// A request under way, which its pace counts from the first moment to the last.
struct InFlight {
    pace: Arc<Mutex<Pace>>,
    flight: Option<Flight>,
}

impl InFlight {
    fn begin(pace: &Arc<Mutex<Pace>>) -> Self {
        let flight = Some(lock(pace).begin(Instant::now()));
        Self {
            pace: pace.clone(),
            flight,
        }
    }

    /// Bytes came.
    fn on_chunk(&mut self, bytes: usize) -> Result<(), SourceError> {
        let Some(flight) = &mut self.flight else {
            return Ok(());
        };
        let (now, mut pace) = (Instant::now(), lock(&self.pace));
        pace.on_chunk(flight, bytes as u64, now);
        if pace.stalled(flight, now) {
            Err(SourceError::Stalled)
        } else {
            Ok(())
        }
    }

    /// Waits for something that the source is to send, as long as it is not stalled.
    async fn wait_for<T>(&mut self, what: impl Future<Output = T>) -> Result<T, SourceError> {
        let mut what = pin!(what);
        loop {
            if let Ok(found) = timeout(TICK, &mut what).await {
                return Ok(found);
            }
            let stalled = |flight: &mut Flight| lock(&self.pace).stalled(flight, Instant::now());
            if self.flight.as_mut().is_some_and(stalled) {
                return Err(SourceError::Stalled);
            }
        }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        if let Some(flight) = self.flight.take() {
            lock(&self.pace).end(flight, Instant::now());
        }
    }
}

/// A claim that is being answered. Dropping it ends the stream.
pub struct Fetch {
    id: PeerId,
    flight: InFlight,
    body: Option<Incoming>,
    /// What the body comes over ends with its last owner.
    _connection: Connection,
    /// What came and was not looked at yet.
    input: Bytes,
    frames: Frames,
    assembly: Assembly,
    /// Microseconds that the source says it spent on its disk, its limit and the network.
    at_source: [u64; 3],
    has_told_spent: bool,
}

impl Fetch {
    /// Microseconds that the source says it spent on its disk, its limit and the network; none before the end.
    #[must_use]
    pub const fn at_source(&self) -> [u64; 3] {
        self.at_source
    }

    /// The next piece, or range that is not served; `None` when everything has come. Ranges come in order. Dropping the
    /// future loses nothing.
    ///
    /// # Errors
    /// How the stream ended before everything was there.
    pub async fn next(&mut self) -> Result<Option<Event>, SourceError> {
        loop {
            while let Some(part) = self.frames.next(&mut self.input)? {
                if let Some(event) = self.part(part)? {
                    return Ok(Some(event));
                }
            }
            let Some(body) = &mut self.body else {
                return Ok(None);
            };
            let frame = self
                .flight
                .wait_for(poll_fn(|cx| Pin::new(&mut *body).poll_frame(cx)))
                .await?;
            let frame = frame
                .transpose()
                .map_err(|e| SourceError::Broken(e.to_string()))?;
            match frame.map(Frame::into_data) {
                Some(Ok(data)) if data.is_empty() => self.flight.on_chunk(0)?,
                Some(Ok(data)) => self.input = data,
                Some(Err(other)) => return self.ended(other.trailers_ref()),
                None => return self.ended(None),
            }
        }
    }

    fn ended(&mut self, trailers: Option<&HeaderMap>) -> Result<Option<Event>, SourceError> {
        self.body = None;
        match trailers.and_then(Status::from_header_map) {
            Some(status) if status.code() != tonic::Code::Ok => Err(status.into()),
            Some(_) if self.assembly.is_complete() && self.frames.is_between() => Ok(None),
            _ => Err(SourceError::Broken("the stream ended early".into())),
        }
    }

    fn part(&mut self, part: Part) -> Result<Option<Event>, SourceError> {
        match part {
            Part::Head(range, offset, len) => {
                self.assembly.begin(range, offset, len)?;
                Ok(None)
            }
            Part::Data(data) => self.data(data),
            Part::Message(GetChunksResponse { part: Some(part) }) => match part {
                get_chunks_response::Part::Chunk(chunk) => {
                    self.assembly
                        .begin(chunk.range, chunk.offset, chunk.data.len())?;
                    self.data(chunk.data)
                }
                get_chunks_response::Part::Error(error) => {
                    let reason = error
                        .error
                        .map_or(Reason::Unspecified, |error| error.code());
                    tracing::debug!(peer = %self.id, range = error.range, ?reason, "range not served");
                    let (range, done) = self.assembly.skip(error.range)?;
                    Ok(Some(Event::Missing(range, done, reason)))
                }
                get_chunks_response::Part::Spent(_) if self.has_told_spent => {
                    Err(SourceError::Lied("its times twice".into()))
                }
                get_chunks_response::Part::Spent(spent) => {
                    self.has_told_spent = true;
                    // Nobody waits longer than a day, whatever it says.
                    self.at_source = [spent.disk, spent.limit, spent.network]
                        .map(|micros| micros.min(86_400_000_000));
                    Ok(None)
                }
            },
            Part::Message(_) => Err(SourceError::Lied("an empty message".into())),
        }
    }

    fn data(&mut self, data: Bytes) -> Result<Option<Event>, SourceError> {
        self.flight.on_chunk(data.len())?;
        Ok(self.assembly.data(data)?.map(Event::Piece))
    }
}

/// Puts chunks together into pieces, in exactly the order asked for.
struct Assembly {
    claim: Vec<Wanted>,
    range: usize,
    /// Pieces of the range that are through.
    done: u32,
    buffer: BytesMut,
}

impl Assembly {
    fn new(claim: Vec<Wanted>) -> Self {
        Self {
            claim,
            range: 0,
            done: 0,
            buffer: BytesMut::new(),
        }
    }

    fn is_complete(&self) -> bool {
        self.range == self.claim.len()
    }

    fn expected(&self) -> Result<(Wanted, PieceIndex), SourceError> {
        let next = || {
            let wanted = *self.claim.get(self.range)?;
            Some((wanted, wanted.layout.piece(wanted.first.get() + self.done)?))
        };
        next().ok_or_else(|| SourceError::Lied("more than was asked for".into()))
    }

    /// A chunk of `len` bytes is about to come.
    fn begin(&self, range: u32, offset: u64, len: usize) -> Result<(), SourceError> {
        let (wanted, piece) = self.expected()?;
        let layout = wanted.layout;
        if len == 0 {
            return Err(SourceError::Lied("an empty chunk".into()));
        }
        if range as usize != self.range || offset != layout.offset(piece) + self.buffer.len() as u64
        {
            return Err(SourceError::Lied("bytes out of order".into()));
        }
        if self.buffer.len() + len > layout.len_of(piece) as usize {
            return Err(SourceError::Lied("a chunk across a piece's end".into()));
        }
        Ok(())
    }

    /// Bytes of the chunk that began last.
    fn data(&mut self, data: Bytes) -> Result<Option<Arrived>, SourceError> {
        let (wanted, piece) = self.expected()?;
        let len = wanted.layout.len_of(piece) as usize;
        let bytes = if self.buffer.is_empty() && data.len() == len {
            data
        } else {
            if self.buffer.is_empty() {
                self.buffer.reserve(len);
            }
            self.buffer.extend_from_slice(&data);
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
        Ok(Some(Arrived {
            range,
            piece,
            bytes,
        }))
    }

    fn skip(&mut self, range: u32) -> Result<(usize, u32), SourceError> {
        if range as usize != self.range || self.is_complete() {
            return Err(SourceError::Lied("an error for another range".into()));
        }
        self.buffer.clear();
        let done = self.done;
        (self.range, self.done) = (self.range + 1, 0);
        Ok((range as usize, done))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::content::{assemble, hash_piece};

    fn manifest(bytes: &[u8]) -> Manifest {
        let layout = Layout::new(bytes.len() as u64).unwrap();
        let hashes = layout.pieces().map(|piece| {
            let from = usize::try_from(layout.offset(piece)).unwrap();
            hash_piece(
                layout,
                piece,
                &bytes[from..from + layout.len_of(piece) as usize],
            )
            .unwrap()
        });
        assemble(layout, hashes.collect()).unwrap()
    }

    fn chunk(
        assembly: &mut Assembly,
        range: u32,
        offset: u64,
        data: &[u8],
    ) -> Result<Option<Arrived>, SourceError> {
        assembly.begin(range, offset, data.len())?;
        assembly.data(Bytes::copy_from_slice(data))
    }

    #[test]
    fn only_the_asked_bytes_in_the_asked_order_become_pieces() {
        let bytes = vec![7; 300_000];
        let manifest = manifest(&bytes);
        let first = manifest.layout().piece(3).unwrap();
        let claim = vec![Wanted {
            id: manifest.id(),
            layout: manifest.layout(),
            first,
            count: 2,
        }];
        let p = u64::from(manifest.layout().piece_len());
        let mut good = Assembly::new(claim.clone());
        assert!(
            chunk(&mut good, 0, 3 * p, &bytes[..1000])
                .unwrap()
                .is_none()
        );
        let rest = &bytes[..usize::try_from(p).unwrap() - 1000];
        let piece = chunk(&mut good, 0, 3 * p + 1000, rest).unwrap().unwrap();
        assert_eq!(
            (piece.range, piece.piece(), piece.size()),
            (0, first, 65_536)
        );
        assert!(piece.verify(&manifest).is_ok());
        let last = &bytes[..300_000 - 4 * usize::try_from(p).unwrap()];
        let mut wrong = last.to_vec();
        wrong[9] ^= 1;
        let piece = chunk(&mut good, 0, 4 * p, &wrong).unwrap().unwrap();
        assert!(matches!(
            piece.verify(&manifest),
            Err(SourceError::BadPiece(_, 37_856))
        ));
        assert!(
            good.is_complete() && chunk(&mut good, 0, 0, &[1]).is_err() && good.skip(1).is_err()
        );
        for (range, offset, data) in [
            (1, 3 * p, 1),
            (0, 0, 1),
            (0, 3 * p + 1, 1),
            (0, 3 * p, 65_537),
        ] {
            assert!(
                chunk(
                    &mut Assembly::new(claim.clone()),
                    range,
                    offset,
                    &vec![7; data]
                )
                .is_err()
            );
        }
        let mut skipping = Assembly::new(claim.clone());
        assert!(skipping.skip(1).is_err());
        assert_eq!(skipping.skip(0).unwrap(), (0, 0));
        assert!(skipping.is_complete());
    }
}
