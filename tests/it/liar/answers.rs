//! What a member answers that is honest but for its lies: each of the three calls, for one content.
//!
//! Invariant: an answer is made while it is read, so that what was sent is what somebody took; without a lie that concerns
//! a call its answer is the one of an honest peer that holds all.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::{Stream, StreamExt as _, stream};
use sprat::{
    content::{Hash32, Manifest},
    proto::{
        self, Chunk, ContentError, GetChunksResponse, GetManifestResponse, HaveDelta, HaveMap,
        ManifestHeader, PeerHint, PieceRange, RangeError, Spent, WatchHaveResponse,
        content_error::Code, get_chunks_response, get_manifest_response,
        watch_have_response::Change,
    },
};
use tonic::Status;

use super::{Lie, Truth};

pub type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Between two messages of no use: often enough for somebody who only looks whether anything comes.
const NAG: Duration = Duration::from_millis(10);

/// What a liar did so far.
#[derive(Default)]
pub struct Counts {
    /// Calls of any kind; of one without a service, connections.
    pub calls: AtomicUsize,
    /// Calls for bytes.
    pub asked: AtomicUsize,
    /// Calls for a manifest, by content.
    pub described: AtomicUsize,
    /// Answers that were lies; of hints, each.
    pub lied: AtomicUsize,
    /// Bytes that were taken.
    pub sent: AtomicU64,
}

/// A content as it is served.
pub struct Served {
    pub truth: Truth,
    pub lies: Vec<Lie>,
    pub counts: Arc<Counts>,
}

/// The same message for ever, so often.
fn every<T: Send + 'static>(
    pause: Duration,
    make: impl Fn(u64) -> T + Send + 'static,
) -> impl Stream<Item = T> + Send {
    stream::unfold((0, make), move |(n, make)| async move {
        tokio::time::sleep(pause).await;
        Some((make(n), (n + 1, make)))
    })
}

fn error(code: Code) -> ContentError {
    ContentError {
        code: code.into(),
        ..<_>::default()
    }
}

/// A range that is not served.
fn refused(range: u32, code: Code) -> GetChunksResponse {
    GetChunksResponse {
        part: Some(get_chunks_response::Part::Error(RangeError {
            range,
            error: Some(error(code)),
        })),
    }
}

/// A content that is not held.
pub fn no_manifest(index: u32) -> GetManifestResponse {
    GetManifestResponse {
        index,
        part: Some(get_manifest_response::Part::Error(error(Code::NotFound))),
    }
}

/// The chaining value of a tree's node over those of its two halves.
fn merge(left: Hash32, right: Hash32) -> Hash32 {
    blake3::hazmat::merge_subtrees_non_root(&left, &right, blake3::hazmat::Mode::Hash)
}

fn boxed<T: 'static>(
    messages: impl IntoIterator<Item = T, IntoIter: Send + 'static>,
) -> Answers<T> {
    Box::pin(stream::iter(messages.into_iter().map(Ok)))
}

impl Served {
    /// The lie that concerns a call, if there is one.
    fn lie(&self, about: &[Lie]) -> Option<Lie> {
        let lie = self.lies.iter().find(|lie| about.contains(lie)).copied();
        self.counts
            .lied
            .fetch_add(usize::from(lie.is_some()), Ordering::Relaxed);
        lie
    }

    /// The piece hashes, and the size that they are said to be of.
    fn hashes(&self, lie: Option<Lie>) -> (u64, Vec<Hash32>) {
        let manifest: &Manifest = &self.truth.manifest;
        let (size, mut hashes) = (manifest.layout().size(), manifest.hashes().to_vec());
        match lie {
            Some(Lie::Hash) => hashes[0][0] ^= 1,
            Some(Lie::Size) => {
                let halves = hashes.chunks(2).map(|pair| merge(pair[0], pair[1]));
                return (size / 2, halves.collect());
            }
            _ => {}
        }
        (size, hashes)
    }

    /// Answers for the content at a position of the request for manifests.
    pub fn manifest(&self, index: u32) -> Answers<GetManifestResponse> {
        use get_manifest_response::Part;
        let n_before = self.counts.described.fetch_add(1, Ordering::Relaxed);
        let lie = self.lie(Lie::ABOUT_MANIFESTS);
        let (size, hashes) = self.hashes(lie);
        let header = ManifestHeader {
            size,
            last_chunk: Bytes::copy_from_slice(self.truth.manifest.last_chunk()),
            right_edge: self.truth.manifest.right_edge().concat().into(),
        };
        let say = move |part| GetManifestResponse {
            index,
            part: Some(part),
        };
        let header = say(Part::Header(header));
        let hashes: Vec<_> = hashes
            .chunks(proto::HASHES_PER_MESSAGE)
            .map(|some| say(Part::PieceHashes(some.concat().into())))
            .collect();
        let one = self.truth.manifest.hashes().first().copied();
        let one = move || say(Part::PieceHashes(one.unwrap_or_default().to_vec().into()));
        let head = |header| stream::iter([Ok(header)]);
        let honest = std::iter::once(header.clone()).chain(hashes.clone());
        match lie {
            Some(Lie::Unknown) => boxed([no_manifest(index)]),
            Some(Lie::Delay) if n_before < 2 => boxed([no_manifest(index)]),
            Some(Lie::ManifestNever) => Box::pin(stream::pending()),
            Some(Lie::ManifestEnds) => boxed([header]),
            Some(Lie::ManifestTrickle) => {
                Box::pin(head(header).chain(every(Duration::from_millis(500), move |_| Ok(one()))))
            }
            Some(Lie::ManifestFlood) => {
                Box::pin(head(header).chain(stream::repeat_with(move || Ok(one()))))
            }
            Some(Lie::ManifestEmpty) => Box::pin(every(NAG, move |_| {
                Ok(GetManifestResponse { index, part: None })
            })),
            Some(Lie::HeaderTwice) => boxed(std::iter::once(header).chain(honest)),
            Some(Lie::HashesFirst) => boxed(hashes.into_iter().chain([header])),
            Some(Lie::ManifestTwice) => boxed(honest.clone().chain(honest)),
            Some(Lie::ManifestOfOther) => boxed(honest.map(move |mut message| {
                message.index = index + 7;
                message
            })),
            _ => boxed(honest),
        }
    }

    /// Answers for the content at a position of the request for news.
    pub fn have(&self, index: u32) -> Answers<WatchHaveResponse> {
        let layout = self.truth.manifest.layout();
        let say = move |change| WatchHaveResponse {
            index,
            change: Some(change),
        };
        let map = HaveMap {
            size: layout.size(),
            complete: true,
            ..<_>::default()
        };
        let all = say(Change::Have(map.clone()));
        let gone = say(Change::Error(error(Code::NotFound)));
        let pieces = |pieces: std::ops::Range<u32>| HaveDelta {
            pieces: pieces.collect(),
        };
        let promised = say(Change::Promised(pieces(0..layout.n_pieces())));
        let news = match self.lie(Lie::ABOUT_NEWS) {
            Some(Lie::Unknown) => vec![gone],
            Some(Lie::Have) => vec![all, promised],
            Some(Lie::NewsNever) => vec![],
            Some(Lie::NewsEnd) => return boxed([all]),
            Some(Lie::NewsRefused) => {
                return Box::pin(stream::iter([Err(Status::resource_exhausted("too many"))]));
            }
            Some(Lie::NewsOfOther) => vec![WatchHaveResponse {
                index: index + 1000,
                ..all
            }],
            Some(Lie::NewsOfNoPiece) => {
                let n = layout.n_pieces();
                vec![all, say(Change::Added(pieces(n..n + 3)))]
            }
            Some(Lie::NewsTwice) => vec![all.clone(), all],
            Some(Lie::NewsOfOtherSize) => {
                let map = HaveMap {
                    size: layout.size() + 1,
                    complete: false,
                    bits: vec![0xff; 3].into(),
                };
                vec![say(Change::Have(map))]
            }
            Some(Lie::GoneAfterAll) => vec![all, gone],
            Some(Lie::Promises) => {
                let promises = every(NAG, move |_| Ok(promised.clone()));
                return Box::pin(stream::iter([Ok(all)]).chain(promises));
            }
            Some(Lie::Hints) => {
                let counts = self.counts.clone();
                let hints = stream::repeat_with(move || {
                    counts.lied.fetch_add(1, Ordering::Relaxed);
                    Ok(say(Change::Peer(hint())))
                });
                return Box::pin(stream::iter([Ok(all)]).chain(hints));
            }
            _ => vec![all],
        };
        Box::pin(boxed(news).chain(stream::pending()))
    }

    /// The chunks of a range, which is the one at this position of the request.
    fn truly(
        &self,
        range: &PieceRange,
        at: u32,
        chunk_length: usize,
    ) -> impl Iterator<Item = Chunk> + Send + Clone + use<> {
        let (layout, bytes) = (self.truth.manifest.layout(), self.truth.bytes.clone());
        let pieces = range.first_piece..range.first_piece.saturating_add(range.piece_count);
        let pieces = pieces.filter_map(move |piece| layout.piece(piece));
        pieces.flat_map(move |piece| {
            let start = usize::try_from(layout.offset(piece)).unwrap();
            let end = start + layout.len_of(piece) as usize;
            let bytes = bytes.clone();
            (start..end).step_by(chunk_length).map(move |from| Chunk {
                range: at,
                offset: from as u64,
                data: bytes.slice(from..end.min(from + chunk_length)),
            })
        })
    }

    /// Answers for a range at a position of the request for bytes.
    pub fn chunks(
        &self,
        range: &PieceRange,
        at: u32,
        chunk_length: usize,
    ) -> Answers<GetChunksResponse> {
        let layout = self.truth.manifest.layout();
        let honest = self.truly(range, at, chunk_length);
        let start = u64::from(range.first_piece) * u64::from(layout.piece_len());
        let empty = Chunk {
            range: at,
            offset: start,
            data: Bytes::new(),
        };
        let counts = self.counts.clone();
        let say = move |chunk: Chunk| {
            counts
                .sent
                .fetch_add(chunk.data.len() as u64, Ordering::Relaxed);
            GetChunksResponse {
                part: Some(get_chunks_response::Part::Chunk(chunk)),
            }
        };
        match self.lie(Lie::ABOUT_BYTES) {
            Some(Lie::Bytes | Lie::Hash | Lie::Size) => boxed(honest.map(move |chunk| {
                let data = vec![0x5a; chunk.data.len()].into();
                say(Chunk { data, ..chunk })
            })),
            Some(Lie::Denial | Lie::Unknown) => boxed([refused(at, Code::NotFound)]),
            Some(Lie::Delay) if self.counts.asked.load(Ordering::Relaxed) <= 2 => {
                boxed([refused(at, Code::NotFound)])
            }
            Some(Lie::OutOfRange) => boxed([refused(at, Code::OutOfRange)]),
            Some(Lie::Promised) => boxed([refused(at, Code::Promised)]),
            Some(Lie::RefusedTwice) => boxed([Code::NotFound; 2].map(|code| refused(at, code))),
            Some(Lie::RefusedOther) => boxed([refused(at + 99, Code::NotFound)]),
            Some(Lie::Have) => boxed(
                honest
                    // Half a piece; nothing of the last one, which is shorter.
                    .take(
                        match start + u64::from(layout.piece_len()) <= layout.size() {
                            true => layout.piece_len() as usize / 2 / chunk_length,
                            false => 0,
                        },
                    )
                    .map(say),
            ),
            Some(Lie::Trickle) => {
                let bytes = self.truth.bytes.slice(usize::try_from(start).unwrap()..);
                Box::pin(every(Duration::from_secs(1), move |n| {
                    let at_byte = usize::try_from(n).unwrap() % bytes.len();
                    Ok(say(Chunk {
                        offset: start + n,
                        data: bytes.slice(at_byte..=at_byte),
                        ..empty
                    }))
                }))
            }
            Some(Lie::Silence) => Box::pin(stream::pending()),
            Some(Lie::Busy) => Box::pin(stream::iter([Err(Status::resource_exhausted("busy"))])),
            Some(Lie::Failure) => Box::pin(stream::iter([Err(Status::internal("failed"))])),
            Some(Lie::EmptyChunks) => Box::pin(every(NAG, move |_| Ok(say(empty.clone())))),
            Some(Lie::EmptyMessages) => {
                Box::pin(every(NAG, |_| Ok(GetChunksResponse { part: None })))
            }
            Some(Lie::EndlessSpent) => Box::pin(every(NAG, |_| {
                let spent = get_chunks_response::Part::Spent(Spent::default());
                Ok(GetChunksResponse { part: Some(spent) })
            })),
            Some(Lie::EmptyFirst) => boxed(std::iter::once(empty).chain(honest).map(say)),
            Some(Lie::Backwards) => {
                let mut chunks: Vec<_> = honest.collect();
                chunks.reverse();
                boxed(chunks.into_iter().map(say))
            }
            Some(Lie::HalfOfIt) => {
                let n = honest.clone().count().div_ceil(2);
                boxed(honest.take(n).map(say))
            }
            Some(Lie::TooMuch) => boxed(honest.clone().chain(honest).map(say)),
            Some(Lie::OtherRange) => boxed(honest.map(move |chunk| {
                say(Chunk {
                    range: at + 7,
                    ..chunk
                })
            })),
            Some(Lie::LongChunk) => boxed(honest.map(move |chunk| {
                let data = [&chunk.data[..], &[0x5a; 1000]].concat().into();
                say(Chunk { data, ..chunk })
            })),
            _ => boxed(honest.map(say)),
        }
    }
}

/// Somebody who does not exist, at ports where nobody is.
fn hint() -> PeerHint {
    const DIGITS: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
    // 256 bits are 51 digits of five and one of one, which comes first in the bits of the last.
    let digit = |_| char::from(DIGITS[rand::random_range(0..32)]);
    let last = DIGITS[rand::random_range(0..2) * 16];
    PeerHint {
        peer_id: (0..51).map(digit).chain([last.into()]).collect(),
        addresses: (1..=proto::MAX_ADDRESSES)
            .map(|port| format!("127.0.0.1:{port}"))
            .collect(),
    }
}
