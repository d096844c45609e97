//! The frames of a GetChunks stream, written and read without copying what they carry.
//!
//! On the wire it is plain gRPC: five bytes of prefix, then a `GetChunksResponse`. A chunk's payload is the last field of
//! its message, so a sender puts a short head before bytes that it hands on as they are, and a receiver that knows the
//! head takes the payload as it comes. Whatever is encoded in another order is collected and left to prost.
//!
//! Invariant: the same bytes mean the same here as in prost, however they are cut; nothing longer than
//! [`MAX_CHUNK_MESSAGE`] is collected; nothing panics.

use bytes::{Buf, BufMut, Bytes};
use prost::{
    Message,
    encoding::{encode_varint, encoded_len_varint},
};

use super::{GetChunksResponse, MAX_CHUNK_MESSAGE};

const PREFIX: usize = 5;
const CHUNK: u8 = 0x0A;
const RANGE: u8 = 0x08;
const OFFSET: u8 = 0x10;
const DATA: u8 = 0x1A;
/// A chunk's fields before its payload are never longer, written once each.
const MAX_HEAD: usize = 48;

/// What is wrong with a stream of frames.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum FrameError {
    /// Compressed, which nobody asked for.
    #[error("a compressed message")]
    Compressed,
    /// Longer than [`MAX_CHUNK_MESSAGE`].
    #[error("a message of {0} bytes")]
    TooLong(u32),
    /// Not a `GetChunksResponse`.
    #[error("a malformed message")]
    Malformed,
}

/// A part of what came.
#[derive(Clone, Debug, PartialEq)]
pub enum Part {
    /// A chunk begins: its range, its offset in the file, and how many bytes follow as [`Part::Data`].
    Head(u32, u64, usize),
    /// The next bytes of the chunk that has begun.
    Data(Bytes),
    /// A whole message, a chunk as well if it is not in the usual order.
    Message(GetChunksResponse),
}

/// What goes before a chunk's `len` bytes; at most 1 MiB.
#[must_use]
pub fn chunk_head(range: u32, offset: u64, len: u32) -> Bytes {
    let field = |value: u64| {
        if value == 0 {
            0
        } else {
            1 + encoded_len_varint(value)
        }
    };
    let data = if len == 0 {
        0
    } else {
        1 + encoded_len_varint(len.into()) + len as usize
    };
    let body = field(range.into()) + field(offset) + data;
    let message = 1 + encoded_len_varint(body as u64) + body;
    let mut head = Vec::with_capacity(PREFIX + MAX_HEAD);
    prefix(message, &mut head);
    head.put_u8(CHUNK);
    encode_varint(body as u64, &mut head);
    for (tag, value) in [(RANGE, range.into()), (OFFSET, offset), (DATA, len.into())] {
        if value > 0 {
            head.put_u8(tag);
            encode_varint(value, &mut head);
        }
    }
    head.into()
}

/// A message with its prefix.
#[must_use]
pub fn framed(message: &impl Message) -> Bytes {
    let len = message.encoded_len();
    let mut bytes = Vec::with_capacity(PREFIX + len);
    prefix(len, &mut bytes);
    message.encode_raw(&mut bytes);
    bytes.into()
}

fn prefix(len: usize, to: &mut Vec<u8>) {
    to.put_u8(0);
    to.put_u32(u32::try_from(len).unwrap_or(u32::MAX));
}

/// Reads frames from bytes that come in pieces of any length.
#[derive(Debug, Default)]
pub struct Frames {
    /// Prefix and beginning of a message, or all of one that is to be decoded as a whole.
    buffer: Vec<u8>,
    /// Bytes of the chunk's payload that are still to come.
    payload: usize,
    /// The message is no chunk in the usual order.
    is_other: bool,
}

enum Scan {
    More,
    Chunk(u32, u64, usize),
    Other,
}

impl Frames {
    /// The next part of `input`, which loses what was read; `None` if it takes more.
    ///
    /// # Errors
    /// If no further byte of this stream can be made sense of.
    pub fn next(&mut self, input: &mut Bytes) -> Result<Option<Part>, FrameError> {
        if self.payload > 0 && !input.is_empty() {
            let data = input.split_to(self.payload.min(input.len()));
            self.payload -= data.len();
            return Ok(Some(Part::Data(data)));
        }
        while !input.is_empty() {
            if self.buffer.len() < PREFIX {
                self.buffer.push(input.get_u8());
                if self.buffer.len() < PREFIX {
                    continue;
                }
            }
            let len = self.length()?;
            if !self.is_other && self.buffer.len() < PREFIX + len && !input.is_empty() {
                self.buffer.push(input.get_u8());
                match scan(&self.buffer[PREFIX..], len) {
                    Scan::More => continue,
                    Scan::Chunk(range, offset, payload) => {
                        self.buffer.clear();
                        self.payload = payload;
                        return Ok(Some(Part::Head(range, offset, payload)));
                    }
                    Scan::Other => self.is_other = true,
                }
            }
            let more = (PREFIX + len - self.buffer.len()).min(input.len());
            self.buffer.extend_from_slice(&input.split_to(more));
            if self.buffer.len() == PREFIX + len {
                let message = GetChunksResponse::decode(&self.buffer[PREFIX..])
                    .map_err(|_| FrameError::Malformed)?;
                (self.buffer, self.is_other) = (vec![], false);
                return Ok(Some(Part::Message(message)));
            }
        }
        Ok(None)
    }

    /// May the stream end here?
    #[must_use]
    pub const fn is_between(&self) -> bool {
        self.payload == 0 && self.buffer.is_empty()
    }

    fn length(&self) -> Result<usize, FrameError> {
        let &[flag, a, b, c, d, ..] = self.buffer.as_slice() else {
            return Err(FrameError::Malformed);
        };
        let len = u32::from_be_bytes([a, b, c, d]);
        match usize::try_from(len) {
            _ if flag != 0 => Err(FrameError::Compressed),
            Ok(fits) if fits <= MAX_CHUNK_MESSAGE => Ok(fits),
            _ => Err(FrameError::TooLong(len)),
        }
    }
}

/// What the beginning of a message of `len` bytes says.
fn scan(begun: &[u8], len: usize) -> Scan {
    if begun.len() == len || begun.len() > MAX_HEAD {
        return match head(begun, len) {
            Some(Some((range, offset, payload))) => Scan::Chunk(range, offset, payload),
            _ => Scan::Other,
        };
    }
    match head(begun, len) {
        None => Scan::More,
        Some(None) => Scan::Other,
        Some(Some((range, offset, payload))) => Scan::Chunk(range, offset, payload),
    }
}

/// A chunk's fields up to its payload: `None` if there are too few bytes, `Some(None)` if they are something else.
fn head(mut rest: &[u8], len: usize) -> Option<Option<(u32, u64, usize)>> {
    let all = rest.len();
    let (mut range, mut offset) = (0, 0);
    let (&tag, after) = rest.split_first()?;
    rest = after;
    if tag != CHUNK {
        return Some(None);
    }
    let body = varint(&mut rest)?;
    if usize::try_from(body)
        .ok()
        .and_then(|body| body.checked_add(all - rest.len()))
        != Some(len)
    {
        return Some(None);
    }
    loop {
        let (&tag, after) = rest.split_first()?;
        rest = after;
        let value = match tag {
            RANGE | OFFSET | DATA => varint(&mut rest)?,
            _ => return Some(None),
        };
        match tag {
            RANGE => match u32::try_from(value) {
                Ok(value) => range = value,
                Err(_) => return Some(None),
            },
            OFFSET => offset = value,
            _ => {
                let payload = usize::try_from(value).ok();
                let ends =
                    payload.and_then(|payload| payload.checked_add(all - rest.len())) == Some(len);
                return Some(
                    payload
                        .filter(|_| ends)
                        .map(|payload| (range, offset, payload)),
                );
            }
        }
    }
}

/// A variable-length integer of at most nine bytes; a longer one counts as one that never ends.
fn varint(rest: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for (i, &byte) in rest.iter().enumerate().take(9) {
        value |= u64::from(byte & 0x7F) << (7 * i);
        if byte < 0x80 {
            *rest = &rest[i + 1..];
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{
        super::{Chunk, RangeError, Spent, get_chunks_response},
        *,
    };

    /// Everything in `bytes`, which arrive cut into pieces of these lengths.
    fn read(bytes: &[u8], cuts: &[usize]) -> Result<(Vec<GetChunksResponse>, bool), FrameError> {
        let (mut frames, mut found, mut open) = (Frames::default(), vec![], None::<(Chunk, usize)>);
        let (mut rest, mut cuts) = (Bytes::copy_from_slice(bytes), cuts.iter().copied().cycle());
        while !rest.is_empty() {
            let mut input = rest.split_to(cuts.next().unwrap_or(usize::MAX).clamp(1, rest.len()));
            while let Some(part) = frames.next(&mut input)? {
                match part {
                    Part::Head(range, offset, len) => {
                        open = Some((
                            Chunk {
                                range,
                                offset,
                                data: Bytes::new(),
                            },
                            len,
                        ));
                    }
                    Part::Data(data) => {
                        let (chunk, _) = open.as_mut().unwrap();
                        chunk.data = [&chunk.data[..], &data].concat().into();
                    }
                    Part::Message(message) => found.push(message),
                }
                if let Some((chunk, _)) = open.take_if(|(chunk, len)| chunk.data.len() == *len) {
                    found.push(GetChunksResponse {
                        part: Some(get_chunks_response::Part::Chunk(chunk)),
                    });
                }
            }
        }
        Ok((found, frames.is_between()))
    }

    fn message() -> impl Strategy<Value = GetChunksResponse> {
        let chunk = (
            any::<u32>(),
            any::<u64>(),
            prop::collection::vec(any::<u8>(), 0..3000),
        )
            .prop_map(|(range, offset, data)| {
                get_chunks_response::Part::Chunk(Chunk {
                    range,
                    offset,
                    data: data.into(),
                })
            });
        let small = (0..3_u32, 0..3_u64).prop_map(|(range, offset)| {
            get_chunks_response::Part::Chunk(Chunk {
                range,
                offset,
                data: Bytes::from_static(&[0x1A; 5]),
            })
        });
        let error = any::<u32>().prop_map(|range| {
            get_chunks_response::Part::Error(RangeError {
                range,
                ..Default::default()
            })
        });
        let spent = any::<u64>().prop_map(|disk| {
            get_chunks_response::Part::Spent(Spent {
                disk,
                ..Default::default()
            })
        });
        prop_oneof![chunk, small, error, spent]
            .prop_map(|part| GetChunksResponse { part: Some(part) })
    }

    proptest! {
        #[test]
        fn what_prost_writes_is_read_however_it_is_cut(
            messages in prop::collection::vec(message(), 0..6), cuts in prop::collection::vec(1_usize..4000, 1..8),
        ) {
            let bytes: Vec<u8> = messages.iter().flat_map(framed).collect();
            prop_assert_eq!(read(&bytes, &cuts), Ok((messages, true)));
        }

        #[test]
        fn a_head_and_its_payload_are_what_prost_writes(range: u32, offset: u64, len in 0_u32..5000) {
            let data = Bytes::from(vec![7; len as usize]);
            let whole = [&chunk_head(range, offset, len)[..], &data].concat();
            let chunk = get_chunks_response::Part::Chunk(Chunk { range, offset, data });
            prop_assert_eq!(whole, framed(&GetChunksResponse { part: Some(chunk) }).to_vec());
        }

        #[test]
        fn any_bytes_mean_what_they_mean_to_prost(
            body in prop::collection::vec(prop_oneof![
                any::<u8>(), Just(0x0A), Just(0x08), Just(0x10), Just(0x1A), 0_u8..40,
            ], 0..60),
            cut in 1_usize..70,
        ) {
            let mut bytes = Vec::new();
            prefix(body.len(), &mut bytes);
            bytes.extend_from_slice(&body);
            match GetChunksResponse::decode(&body[..]) {
                Ok(message) => prop_assert_eq!(read(&bytes, &[cut]), Ok((vec![message], true))),
                Err(_) => prop_assert_eq!(read(&bytes, &[cut]), Err(FrameError::Malformed)),
            }
        }

        #[test]
        fn arbitrary_streams_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), cut in 1_usize..300) {
            let _ = read(&bytes, &[cut]);
            let mut plain = vec![0, 0, 0];
            plain.extend(bytes);
            let _ = read(&plain, &[cut]);
        }
    }

    #[test]
    fn compressed_and_overlong_messages_are_refused_at_their_prefix() {
        assert_eq!(read(&[1, 0, 0, 0, 1, 9], &[1]), Err(FrameError::Compressed));
        assert_eq!(
            read(&[0, 1, 0, 0, 0, 9], &[6]),
            Err(FrameError::TooLong(1 << 24))
        );
    }
}
