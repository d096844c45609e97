//! The wire: generated messages, and the only place where they become domain types and back.
//!
//! Invariant: a generated message is checked here, once, where it arrives; nothing deeper sees an unchecked name, id,
//! size, address or length.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use tonic::service::Routes;

use crate::{
    catalog::{self, ContentPrefix, FileInfo, Query, QueryError, Row, SourceInfo},
    content::{ContentId, Layout, MAX_SIZE},
    have,
    identity::PeerId,
    net,
    safe_path::SafeName,
    trust::{Trust, TrustList as Trusted},
};

#[allow(missing_docs, clippy::all, clippy::pedantic, unused_qualifications)]
mod generated {
    tonic::include_proto!("sprat.v1");
}
pub use generated::*;

pub mod framing;

/// Every message and service, for reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/sprat.v1.bin"));

/// Longest message a tracker reads, bytes.
pub const MAX_TRACKER_MESSAGE: usize = 256 << 10;
/// Longest message of enrollment, bytes.
pub const MAX_JOIN_MESSAGE: usize = 16 << 10;
/// Longest message between peers, bytes: a chunk and its frame.
pub const MAX_CHUNK_MESSAGE: usize = (1 << 20) + (64 << 10);
/// Chunk lengths, bytes.
pub const CHUNK_LENGTHS: std::ops::RangeInclusive<u32> = 16 << 10..=1 << 20;
/// Contents in one GetManifest or WatchHave.
pub const MAX_CONTENTS: usize = 1024;
/// Ranges in one GetChunks.
pub const MAX_RANGES: usize = 1024;
/// Bytes in one GetChunks.
pub const MAX_CLAIM: u64 = 256 << 20;
/// Piece hashes in one message.
pub const HASHES_PER_MESSAGE: usize = 4096;
/// Downloads in one report of what a peer moves.
pub const MAX_TRANSFERS: usize = 64;
/// Sources of all of them together.
pub const MAX_TRANSFER_SOURCES: usize = 256;
/// Addresses a peer may offer.
pub const MAX_ADDRESSES: usize = 16;
/// Host name and port.
const MAX_ADDRESS_LEN: usize = 262;

/// Adds reflection, v1 and v1alpha, that lists `service`, health and itself; all of [`DESCRIPTORS`] can be described.
///
/// # Errors
/// Never, unless the build wrote unreadable descriptors.
pub fn with_reflection(
    routes: Routes,
    service: &str,
) -> Result<Routes, tonic_reflection::server::Error> {
    let builder = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .with_service_name(service)
            .with_service_name("grpc.health.v1.Health")
    };
    Ok(routes
        .add_service(builder().build_v1()?)
        .add_service(builder().build_v1alpha()?))
}

/// What is wrong with a message.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// A part that must be there is not.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// Not a name that may cross the wire.
    #[error("name {0}: {1}")]
    Name(String, crate::safe_path::NameError),
    /// Not an id.
    #[error("{0} is not a content id (64 lower-case hex digits, or 32 bytes)")]
    ContentId(String),
    /// Not an id.
    #[error("{0} is not a peer id: give all 52 characters, as `sprat tracker members` prints them")]
    PeerId(String),
    /// Beyond what a file may have.
    #[error("size {0} is above 1 TiB")]
    Size(u64),
    /// Too many of something.
    #[error("more than {0} {1}")]
    TooMany(usize, &'static str),
    /// A question that makes no sense.
    #[error("{0}")]
    Query(#[from] QueryError),
    /// A page token of nobody's making.
    #[error("not a page token of this listing")]
    PageToken,
    /// A HaveMap that does not fit its content.
    #[error("a map of pieces that does not fit its content")]
    HaveMap,
    /// A trust list that the authority did not sign.
    #[error("a trust list that the authority did not sign")]
    TrustList,
}

impl From<WireError> for tonic::Status {
    fn from(error: WireError) -> Self {
        Self::invalid_argument(error.to_string())
    }
}

/// Reads a name.
///
/// # Errors
/// [`WireError::Name`], escaped.
pub fn name(text: &str) -> Result<SafeName, WireError> {
    SafeName::parse(text).map_err(|e| {
        WireError::Name(
            crate::safe_path::escape(&text.chars().take(80).collect::<String>()),
            e,
        )
    })
}

/// Reads a content id from text.
///
/// # Errors
/// [`WireError::ContentId`]
pub fn content_id(text: &str) -> Result<ContentId, WireError> {
    text.parse().map_err(|_| {
        WireError::ContentId(crate::safe_path::escape(
            &text.chars().take(80).collect::<String>(),
        ))
    })
}

/// Reads a content id from 32 bytes.
///
/// # Errors
/// [`WireError::ContentId`]
pub fn content_id_bytes(bytes: &[u8]) -> Result<ContentId, WireError> {
    ContentId::try_from(bytes)
        .map_err(|_| WireError::ContentId(format!("a field of {} bytes", bytes.len())))
}

/// Reads a peer id.
///
/// # Errors
/// [`WireError::PeerId`]
pub fn peer_id(text: &str) -> Result<PeerId, WireError> {
    text.parse().map_err(|_| {
        WireError::PeerId(crate::safe_path::escape(
            &text.chars().take(80).collect::<String>(),
        ))
    })
}

impl TryFrom<FileEntry> for FileInfo {
    type Error = WireError;

    fn try_from(entry: FileEntry) -> Result<Self, WireError> {
        if entry.size > MAX_SIZE {
            return Err(WireError::Size(entry.size));
        }
        Ok(Self {
            name: name(&entry.name)?,
            size: entry.size,
            content_id: content_id(&entry.content_id)?,
            partial: entry.partial,
        })
    }
}

impl From<&FileInfo> for FileEntry {
    fn from(info: &FileInfo) -> Self {
        Self {
            name: info.name.to_string(),
            size: info.size,
            content_id: info.content_id.to_string(),
            partial: info.partial,
        }
    }
}

impl TryFrom<FileKey> for catalog::FileKey {
    type Error = WireError;

    fn try_from(key: FileKey) -> Result<Self, WireError> {
        Ok(Self {
            name: name(&key.name)?,
            content_id: content_id(&key.content_id)?,
        })
    }
}

impl From<&catalog::FileKey> for FileKey {
    fn from(key: &catalog::FileKey) -> Self {
        Self {
            name: key.name.to_string(),
            content_id: key.content_id.to_string(),
        }
    }
}

impl From<Row> for FileRow {
    fn from(row: Row) -> Self {
        Self {
            name: row.name.to_string(),
            size: row.size,
            content_id: row.content_id.to_string(),
            sources: row
                .sources
                .iter()
                .map(|source| (&**source).into())
                .collect(),
            source_count: row.source_count,
        }
    }
}

impl TryFrom<FileRow> for Row {
    type Error = WireError;

    fn try_from(row: FileRow) -> Result<Self, WireError> {
        RowReader::default().row(row)
    }
}

/// Reads many rows, in which the same sources come again and again.
#[derive(Default)]
pub struct RowReader {
    known: HashMap<Source, Arc<SourceInfo>>,
}

impl RowReader {
    /// Reads one of them.
    ///
    /// # Errors
    /// If the row is malformed.
    pub fn row(&mut self, row: FileRow) -> Result<Row, WireError> {
        if row.size > MAX_SIZE {
            return Err(WireError::Size(row.size));
        }
        Ok(Row {
            name: name(&row.name)?,
            size: row.size,
            content_id: content_id(&row.content_id)?,
            sources: row
                .sources
                .into_iter()
                .map(|source| self.source(source))
                .collect::<Result<_, _>>()?,
            source_count: row.source_count,
        })
    }

    fn source(&mut self, source: Source) -> Result<Arc<SourceInfo>, WireError> {
        if let Some(known) = self.known.get(&source) {
            return Ok(known.clone());
        }
        let read = Arc::new(SourceInfo::try_from(source.clone())?);
        Ok(self.known.entry(source).or_insert(read).clone())
    }
}

impl From<&SourceInfo> for Source {
    fn from(source: &SourceInfo) -> Self {
        Self {
            peer_id: source.peer.to_string(),
            addresses: source.addresses.clone(),
            partial: source.partial,
        }
    }
}

impl TryFrom<Source> for SourceInfo {
    type Error = WireError;

    fn try_from(source: Source) -> Result<Self, WireError> {
        Ok(Self {
            peer: peer_id(&source.peer_id)?,
            addresses: source.addresses.into_iter().take(MAX_ADDRESSES).collect(),
            partial: source.partial,
        })
    }
}

impl TryFrom<&ListFilesRequest> for Query {
    type Error = WireError;

    fn try_from(request: &ListFilesRequest) -> Result<Self, WireError> {
        let given = |text: &String| (!text.is_empty()).then(|| text.clone());
        Ok(Self {
            glob: given(&request.glob),
            text: given(&request.text),
            min_size: request.min_size,
            max_size: (request.max_size > 0).then_some(request.max_size),
            peer: given(&request.peer_id).map(|id| peer_id(&id)).transpose()?,
            content: given(&request.content_id)
                .map(|id| id.parse::<ContentPrefix>())
                .transpose()?,
            name: given(&request.name).map(|text| name(&text)).transpose()?,
        })
    }
}

/// Keeps the addresses that may be listed, in canonical form; a host name is kept as it is.
#[must_use]
pub fn offered_addresses(addresses: &[String]) -> Vec<String> {
    addresses
        .iter()
        .take(MAX_ADDRESSES)
        .filter_map(|address| offered_address(address))
        .collect()
}

/// Where a caller can be reached: what it says, and where it was seen if it names a port.
#[must_use]
pub fn announcement(
    peer: PeerId,
    addresses: &[String],
    port: u16,
    caller: &net::Caller,
) -> catalog::Announcement {
    let mut addresses = offered_addresses(addresses);
    if let Some(remote) = caller.remote
        && port != 0
    {
        let seen = SocketAddr::new(remote.ip().to_canonical(), port).to_string();
        if !addresses.contains(&seen) {
            addresses.push(seen);
        }
    }
    catalog::Announcement {
        peer,
        generation: 0,
        addresses,
        seen_over_loopback: caller.is_loopback(),
    }
}

fn offered_address(text: &str) -> Option<String> {
    if text.len() > MAX_ADDRESS_LEN {
        return None;
    }
    if let Ok(address) = text.parse::<SocketAddr>() {
        let address = SocketAddr::new(address.ip().to_canonical(), address.port());
        return (address.port() != 0 && net::offerable(address.ip())).then(|| address.to_string());
    }
    let (host, port) = text.rsplit_once(':')?;
    let plain = host
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'.');
    let is_name = !host.is_empty()
        && plain
        && !host.starts_with(['-', '.'])
        && host.parse::<IpAddr>().is_err();
    // Digits and dots alone would be read by a resolver as an address that the rules above never saw.
    let is_name = is_name && host.bytes().any(|b| b.is_ascii_alphabetic());
    (is_name && port.parse::<u16>().is_ok_and(|port| port != 0)).then(|| text.to_owned())
}

impl From<&Trusted> for TrustList {
    fn from(list: &Trusted) -> Self {
        let mut denied: Vec<String> = list.denied.iter().map(ToString::to_string).collect();
        denied.sort();
        let mut pins: Vec<_> = list
            .tracker_pins
            .iter()
            .map(|pin| bytes::Bytes::copy_from_slice(pin))
            .collect();
        pins.sort();
        Self {
            epoch: list.epoch,
            tracker_pins: pins,
            denied_peer_ids: denied,
        }
    }
}

impl SignedTrustList {
    /// Reads the list if the authority signed it.
    ///
    /// # Errors
    /// [`WireError::TrustList`]
    pub fn open(&self, trust: &Trust) -> Result<Trusted, WireError> {
        if !trust.signed(&self.body, &self.signature) {
            return Err(WireError::TrustList);
        }
        let list = <TrustList as prost::Message>::decode(self.body.clone())
            .map_err(|_| WireError::TrustList)?;
        let pin =
            |pin: &bytes::Bytes| <[u8; 32]>::try_from(&pin[..]).map_err(|_| WireError::TrustList);
        Ok(Trusted {
            epoch: list.epoch,
            tracker_pins: list
                .tracker_pins
                .iter()
                .map(pin)
                .collect::<Result<_, _>>()?,
            denied: list
                .denied_peer_ids
                .iter()
                .map(|id| peer_id(id))
                .collect::<Result<_, _>>()?,
        })
    }
}

impl From<&have::HaveMap> for HaveMap {
    fn from(have: &have::HaveMap) -> Self {
        let complete = have.is_complete();
        Self {
            size: 0,
            complete,
            bits: if complete {
                bytes::Bytes::new()
            } else {
                have.to_bytes().into()
            },
        }
    }
}

impl HaveMap {
    /// Reads a map for a content of this layout.
    ///
    /// # Errors
    /// [`WireError::HaveMap`]
    pub fn read(&self, layout: Layout) -> Result<have::HaveMap, WireError> {
        if self.complete {
            return Ok(have::HaveMap::full(layout.n_pieces()));
        }
        have::HaveMap::from_bytes(layout.n_pieces(), &self.bits).map_err(|_| WireError::HaveMap)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_addresses_that_mean_something_elsewhere_are_offered() {
        let offered = |text: &str| offered_address(text);
        assert_eq!(offered("10.0.0.1:7701").as_deref(), Some("10.0.0.1:7701"));
        assert_eq!(
            offered("[::ffff:10.0.0.1]:7701").as_deref(),
            Some("10.0.0.1:7701")
        );
        assert_eq!(offered("[fd00::1]:7701").as_deref(), Some("[fd00::1]:7701"));
        assert_eq!(
            offered("peer-1.lab.example:7701").as_deref(),
            Some("peer-1.lab.example:7701")
        );
        let long = format!("{}:1", "a".repeat(1024));
        for bad in [
            "0.0.0.0:1",
            "[::]:1",
            "169.254.169.254:80",
            "224.0.0.1:1",
            "255.255.255.255:1",
            "10.0.0.1:0",
            "10.0.0.1",
            "[fe80::1]:1",
            "[fe80::1%eth0]:1",
            ":1",
            "-x:1",
            "a b:1",
            "a:99999",
            "0x7f.1:1x",
            "2130706433:80",
            "",
            &long,
            "[::ffff:169.254.169.254]:80",
        ] {
            assert_eq!(offered(bad), None, "{bad}");
        }
    }

    #[test]
    fn entries_are_checked_where_they_arrive() {
        let id = ContentId::from_bytes([1; 32]).to_string();
        let entry = |name: &str, size, id: &str| FileEntry {
            name: name.into(),
            size,
            content_id: id.into(),
            partial: false,
        };
        assert!(FileInfo::try_from(entry("a/b.mkv", 5, &id)).is_ok());
        assert!(matches!(
            FileInfo::try_from(entry("../b", 5, &id)),
            Err(WireError::Name(..))
        ));
        assert!(matches!(
            FileInfo::try_from(entry("b", MAX_SIZE + 1, &id)),
            Err(WireError::Size(_))
        ));
        assert!(matches!(
            FileInfo::try_from(entry("b", 5, &id.to_uppercase())),
            Ok(_) | Err(WireError::ContentId(_))
        ));
        assert!(matches!(
            FileInfo::try_from(entry("b", 5, "")),
            Err(WireError::ContentId(_))
        ));
        assert!(content_id_bytes(&[0; 31]).is_err() && content_id_bytes(&[0; 33]).is_err());
    }

    #[test]
    fn a_trust_list_is_believed_only_from_the_authority() {
        use prost::Message;
        let key = crate::identity::Key::generate().unwrap();
        let certificate = rcgen::CertificateParams::default()
            .self_signed(key.pair())
            .unwrap()
            .der()
            .clone();
        let trust = Trust::new(certificate).unwrap();
        let list = Trusted {
            epoch: 3,
            denied: [PeerId::from_bytes([1; 32])].into(),
            ..Trusted::default()
        };
        let body = TrustList::from(&list).encode_to_vec();
        let signed = |signature: Vec<u8>, body: Vec<u8>| SignedTrustList {
            body: body.into(),
            signature: signature.into(),
        };
        let good = signed(key.sign(&body).unwrap(), body.clone());
        assert_eq!(good.open(&trust).unwrap(), list);
        let other = crate::identity::Key::generate().unwrap();
        assert!(
            signed(other.sign(&body).unwrap(), body.clone())
                .open(&trust)
                .is_err()
        );
        assert!(
            signed(key.sign(&body).unwrap(), body[1..].to_vec())
                .open(&trust)
                .is_err()
        );
        assert!(trust.adopt(good.open(&trust).unwrap()));
        assert!(
            !trust.adopt(Trusted {
                epoch: 2,
                ..Trusted::default()
            }),
            "an older list never replaces a newer one"
        );
    }
}
