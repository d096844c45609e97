//! The identity of a content, and its one spelling.

use std::{fmt, str::FromStr};

use data_encoding::HEXLOWER;

/// The identity of a file: the BLAKE3 hash of its bytes. Written as exactly 64 lower-case hex digits.
#[derive(Clone, Copy, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct ContentId(pub(super) [u8; 32]);

/// The text or the bytes are not a [`ContentId`].
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("a content id is 64 lower-case hex digits (32 bytes)")]
pub struct NotAContentId;

impl ContentId {
    /// The id of the file of zero bytes.
    pub const EMPTY: Self = Self([
        0xaf, 0x13, 0x49, 0xb9, 0xf5, 0xf9, 0xa1, 0xa6, 0xa0, 0x40, 0x4d, 0xea, 0x36, 0xdc, 0xc9,
        0x49, 0x9b, 0xcb, 0x25, 0xc9, 0xad, 0xc1, 0x12, 0xb7, 0xcc, 0x9a, 0x93, 0xca, 0xe4, 0x1f,
        0x32, 0x62,
    ]);

    /// The id with these bytes.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The 32 bytes of the hash.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for ContentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&blake3::Hash::from_bytes(self.0).to_hex())
    }
}

impl fmt::Debug for ContentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ContentId({self:.8})")
    }
}

impl FromStr for ContentId {
    type Err = NotAContentId;

    fn from_str(text: &str) -> Result<Self, NotAContentId> {
        let mut id = [0; 32];
        if text.len() != 2 * id.len() {
            return Err(NotAContentId);
        }
        HEXLOWER
            .decode_mut(text.as_bytes(), &mut id)
            .map(|_| Self(id))
            .map_err(|_| NotAContentId)
    }
}

impl TryFrom<&[u8]> for ContentId {
    type Error = NotAContentId;

    fn try_from(bytes: &[u8]) -> Result<Self, NotAContentId> {
        bytes.try_into().map(Self).map_err(|_| NotAContentId)
    }
}
