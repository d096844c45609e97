//! What tracker and peers tell each other about files: announcements, rows of the listing, and the questions asked of it.
//!
//! Invariant: the listing is ordered by [`FileKey`] and nothing else, so that a key alone says where a reader stands. The
//! content id is the identity, the name a label: the same name over two contents is two rows.

use std::{net::SocketAddr, str::FromStr, sync::Arc};

use globset::{GlobBuilder, GlobSet, GlobSetBuilder};
use thiserror::Error;
use unicode_normalization::UnicodeNormalization;

use crate::{
    content::ContentId,
    identity::PeerId,
    safe_path::{NameError, SafeName},
};

/// Most sources in one row; a random choice if there are more.
pub const MAX_SOURCES: usize = 64;
/// Longest glob or text of a query in bytes.
pub const MAX_PATTERN_LEN: usize = 1024;
/// Fewest hex digits in the prefix of a content id.
pub const MIN_PREFIX_LEN: usize = 8;

/// One file that a peer offers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileInfo {
    /// What the peer calls it.
    pub name: SafeName,
    /// Bytes.
    pub size: u64,
    /// Identity of the bytes.
    pub content_id: ContentId,
    /// True while the peer holds only some of the pieces.
    pub partial: bool,
}

impl FileInfo {
    /// The row this file belongs to.
    pub fn key(&self) -> FileKey {
        FileKey {
            name: self.name.clone(),
            content_id: self.content_id,
        }
    }
}

/// The key of a row: ordered by name, then by content id.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileKey {
    /// The row's name.
    pub name: SafeName,
    /// The row's content.
    pub content_id: ContentId,
}

impl FileKey {
    /// The token of the page that follows this row. It names a place in the order, so it stays good when rows come and go
    /// and when the tracker restarts.
    pub fn page_token(&self) -> String {
        format!("{}/{}", self.content_id, self.name)
    }

    /// Reads [`page_token`](Self::page_token); `None` if no tracker can have written it.
    pub fn from_page_token(token: &str) -> Option<Self> {
        let (content_id, name) = token.split_once('/')?;
        let key = Self {
            name: SafeName::parse(name).ok()?,
            content_id: content_id.parse().ok()?,
        };
        (key.name.as_str() == name).then_some(key)
    }
}

/// Who announces, and where it can be reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Announcement {
    /// From the caller's certificate.
    pub peer: PeerId,
    /// The generation that the library has once the announcement is complete; never 0.
    pub generation: u64,
    /// `HOST:PORT`, the best first.
    pub addresses: Vec<String>,
    /// Whether the caller came over loopback; only then are its loopback addresses ever listed.
    pub seen_over_loopback: bool,
}

impl Announcement {
    /// The addresses that a caller may be told: loopback only if both came over loopback.
    pub fn addresses_for(&self, caller_is_loopback: bool) -> Vec<String> {
        let loopback = caller_is_loopback && self.seen_over_loopback;
        self.addresses
            .iter()
            .filter(|address| loopback || !is_loopback(address))
            .cloned()
            .collect()
    }
}

/// A peer that is here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerRecord {
    /// What it last announced.
    pub announcement: Announcement,
    /// How many files it offers.
    pub n_files: usize,
}

/// A peer that holds a content, complete or in part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceInfo {
    /// The id that its certificate must prove.
    pub peer: PeerId,
    /// `HOST:PORT`; empty if it cannot be reached by whoever asked.
    pub addresses: Vec<String>,
    /// True while it holds only some of the pieces.
    pub partial: bool,
}

/// One row of the listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// What its peers call the content.
    pub name: SafeName,
    /// Bytes, as announced; only a manifest proves it.
    pub size: u64,
    /// Identity of the bytes.
    pub content_id: ContentId,
    /// Everybody who holds the content under whatever name; at most [`MAX_SOURCES`].
    pub sources: Vec<Arc<SourceInfo>>,
    /// How many hold it.
    pub source_count: u32,
}

impl Row {
    /// The row's place in the order.
    pub fn key(&self) -> FileKey {
        FileKey {
            name: self.name.clone(),
            content_id: self.content_id,
        }
    }
}

/// Some rows in order, and where to go on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Page {
    /// In the order of their keys.
    pub rows: Vec<Row>,
    /// The key after which the next page begins; `None` on the last one.
    pub next: Option<FileKey>,
}

/// A change of the listing. It says which row to look at again; two quick changes may show as the second one twice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// The row appeared, or its sources changed.
    Changed(FileKey),
    /// The row disappeared.
    Removed(FileKey),
    /// More changed than is worth telling one by one: list again.
    Resync,
}

/// Which rows are wanted; every part that is set must hold. The default wants all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Query {
    /// Shell glob over the whole name: `*` and `?` stay within a component, `**` crosses; `shots/` means `shots/**`.
    pub glob: Option<String>,
    /// Text that the name contains, whatever its case.
    pub text: Option<String>,
    /// Smallest size in bytes.
    pub min_size: u64,
    /// Largest size in bytes.
    pub max_size: Option<u64>,
    /// Only names that this peer offers.
    pub peer: Option<PeerId>,
    /// Only these contents.
    pub content: Option<ContentPrefix>,
    /// Exactly this name.
    pub name: Option<SafeName>,
}

/// Why a query makes no sense.
#[derive(Debug, Error)]
pub enum QueryError {
    /// Not a glob.
    #[error("bad glob: {0}")]
    Glob(#[from] globset::Error),
    /// Beyond [`MAX_PATTERN_LEN`].
    #[error("the glob or text is longer than {MAX_PATTERN_LEN} bytes")]
    TooLong,
    /// Not a [`ContentPrefix`].
    #[error(
        "a content id is 64 lower-case hex digits, or at least the first {MIN_PREFIX_LEN} of them"
    )]
    ContentPrefix,
    /// Not a name.
    #[error("bad name: {0}")]
    Name(#[from] NameError),
}

impl Query {
    /// Checks the query and makes it fit for many rows.
    pub fn compile(self) -> Result<Matcher, QueryError> {
        if [&self.glob, &self.text]
            .into_iter()
            .flatten()
            .any(|pattern| pattern.len() > MAX_PATTERN_LEN)
        {
            return Err(QueryError::TooLong);
        }
        let glob = self
            .glob
            .as_deref()
            .map(|glob| nfc(glob) + if glob.ends_with('/') { "**" } else { "" });
        let literal = glob
            .as_deref()
            .and_then(|glob| glob.split(['*', '?', '[', '{', '\\']).next())
            .unwrap_or_default();
        Ok(Matcher {
            start: self
                .name
                .clone()
                .or_else(|| SafeName::parse(literal.trim_end_matches('/')).ok()),
            literal: literal.to_owned(),
            glob: glob.as_deref().map(compile_glob).transpose()?,
            text: self.text.as_deref().map(|text| nfc(text).to_lowercase()),
            query: self,
        })
    }
}

/// A [`Query`] ready to be asked of many rows. Whose files they are (`query.peer`) only a store can tell.
#[derive(Clone, Debug)]
pub struct Matcher {
    query: Query,
    glob: Option<GlobSet>,
    text: Option<String>,
    /// What every name that the glob matches begins with.
    literal: String,
    start: Option<SafeName>,
}

impl Matcher {
    /// The peer whose files are wanted.
    pub fn peer(&self) -> Option<PeerId> {
        self.query.peer
    }

    /// The contents wanted.
    pub fn content(&self) -> Option<ContentPrefix> {
        self.query.content
    }

    /// No name below this one matches.
    pub fn start(&self) -> Option<&SafeName> {
        self.start.as_ref()
    }

    /// Whether neither this name nor any above it matches.
    pub fn is_past(&self, name: &SafeName) -> bool {
        match &self.query.name {
            Some(wanted) => name > wanted,
            None => {
                name.as_str() > self.literal.as_str() && !name.as_str().starts_with(&self.literal)
            }
        }
    }

    /// Whether a row with this key is wanted, if its size is.
    pub fn matches_key(&self, key: &FileKey) -> bool {
        self.query
            .name
            .as_ref()
            .is_none_or(|name| *name == key.name)
            && self
                .query
                .content
                .is_none_or(|prefix| prefix.contains(key.content_id))
            && self
                .glob
                .as_ref()
                .is_none_or(|glob| glob.is_match(key.name.as_str()))
            && self
                .text
                .as_ref()
                .is_none_or(|text| key.name.as_str().to_lowercase().contains(text))
    }

    /// Whether a file of this size is wanted.
    pub fn matches_size(&self, size: u64) -> bool {
        size >= self.query.min_size && self.query.max_size.is_none_or(|max| size <= max)
    }
}

/// The first hex digits of a content id, [`MIN_PREFIX_LEN`] to all 64.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ContentPrefix {
    first: ContentId,
    last: ContentId,
}

impl ContentPrefix {
    /// The smallest and the largest id with this prefix.
    pub fn bounds(self) -> (ContentId, ContentId) {
        (self.first, self.last)
    }

    /// Whether an id has this prefix.
    pub fn contains(self, id: ContentId) -> bool {
        self.first <= id && id <= self.last
    }
}

impl From<ContentId> for ContentPrefix {
    fn from(id: ContentId) -> Self {
        Self {
            first: id,
            last: id,
        }
    }
}

impl FromStr for ContentPrefix {
    type Err = QueryError;

    fn from_str(text: &str) -> Result<Self, QueryError> {
        if !(MIN_PREFIX_LEN..=64).contains(&text.len()) || !text.is_ascii() {
            return Err(QueryError::ContentPrefix);
        }
        let id = |digits: String| digits.parse().map_err(|_| QueryError::ContentPrefix);
        Ok(Self {
            first: id(format!("{text:0<64}"))?,
            last: id(format!("{text:f<64}"))?,
        })
    }
}

/// Unlike `Glob::compile_matcher`, a set reports a pattern that its regex engine refuses instead of panicking.
fn compile_glob(glob: &str) -> Result<GlobSet, globset::Error> {
    GlobSetBuilder::new()
        .add(GlobBuilder::new(glob).literal_separator(true).build()?)
        .build()
}

/// Names are kept in NFC, so what they are compared with must be too.
fn nfc(text: &str) -> String {
    text.nfc().collect()
}

fn is_loopback(address: &str) -> bool {
    match address.parse::<SocketAddr>() {
        Ok(address) => address.ip().to_canonical().is_loopback(),
        Err(_) => address
            .rsplit_once(':')
            .is_some_and(|(host, _)| host.eq_ignore_ascii_case("localhost")),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn key(name: &str) -> FileKey {
        FileKey {
            name: SafeName::parse(name).unwrap(),
            content_id: ContentId::EMPTY,
        }
    }

    fn glob(pattern: &str, name: &str) -> bool {
        let query = Query {
            glob: Some(pattern.to_owned()),
            ..Query::default()
        };
        query.compile().unwrap().matches_key(&key(name))
    }

    #[test]
    fn globs_respect_components() {
        assert!(glob("*.mkv", "a.mkv") && !glob("*.mkv", "movies/a.mkv"));
        assert!(glob("movies/?.mkv", "movies/a.mkv") && !glob("movies?a.mkv", "movies/a.mkv"));
        assert!(glob("**", "a/b/c") && glob("**/c", "a/b/c") && glob("**/c", "c"));
        for shots in ["shots/", "shots/**"] {
            assert!(glob(shots, "shots/a") && glob(shots, "shots/a/b"));
            assert!(!glob(shots, "shots") && !glob(shots, "shots-2/a"));
        }
        assert!(glob("*.{mkv,mp4}", "a.mp4") && glob("[ab].x", "b.x") && !glob("[ab].x", "c.x"));
        assert!(
            glob("caf\u{65}\u{301}*", "caf\u{e9}.txt"),
            "a pattern in NFD finds a name in NFC"
        );
    }

    #[test]
    fn hostile_globs_are_errors() {
        for pattern in [
            "[",
            "{a",
            "a**{",
            &format!("{}a{}", "{".repeat(400), "}".repeat(400)),
            &"a".repeat(1025),
        ] {
            let query = Query {
                glob: Some(pattern.to_owned()),
                ..Query::default()
            };
            assert!(query.compile().is_err(), "{pattern}");
        }
    }

    #[test]
    fn text_ignores_case() {
        let matcher = Query {
            text: Some("ÜBER".to_owned()),
            ..Query::default()
        }
        .compile()
        .unwrap();
        assert!(matcher.matches_key(&key("x/die über.txt")) && !matcher.matches_key(&key("uber")));
    }

    #[test]
    fn sizes_are_inclusive() {
        let matcher = Query {
            min_size: 2,
            max_size: Some(4),
            ..Query::default()
        }
        .compile()
        .unwrap();
        assert_eq!(
            (1..6)
                .filter(|size| matcher.matches_size(*size))
                .collect::<Vec<_>>(),
            [2, 3, 4]
        );
        assert!(Query::default().compile().unwrap().matches_size(u64::MAX));
    }

    #[test]
    fn prefixes_have_eight_digits_or_more() {
        let prefix: ContentPrefix = "af1349b9".parse().unwrap();
        assert!(prefix.contains(ContentId::EMPTY));
        assert!(
            !"af1349ba"
                .parse::<ContentPrefix>()
                .unwrap()
                .contains(ContentId::EMPTY)
        );
        assert_eq!(
            ContentId::EMPTY
                .to_string()
                .parse::<ContentPrefix>()
                .unwrap(),
            ContentId::EMPTY.into()
        );
        for bad in [
            "",
            "af1349b",
            "AF1349B9",
            "af1349bx",
            "ééééééééé",
            &"a".repeat(65),
        ] {
            assert!(bad.parse::<ContentPrefix>().is_err(), "{bad}");
        }
    }

    #[test]
    fn loopback_is_told_to_loopback_only() {
        let addresses = [
            "127.0.0.1:1",
            "[::1]:1",
            "[::ffff:127.0.0.2]:1",
            "localhost:1",
            "10.0.0.1:1",
            "host:1",
        ];
        let announcement = |seen_over_loopback| Announcement {
            peer: PeerId::from_spki(b"a"),
            generation: 1,
            addresses: addresses.map(str::to_owned).to_vec(),
            seen_over_loopback,
        };
        assert_eq!(announcement(true).addresses_for(true), addresses);
        for (peer, caller) in [(true, false), (false, true), (false, false)] {
            assert_eq!(
                announcement(peer).addresses_for(caller),
                ["10.0.0.1:1", "host:1"]
            );
        }
    }

    proptest! {
        #[test]
        fn tokens_come_back(name in "[a-z/\u{e9} .]{1,20}", junk in ".{0,90}") {
            if let Ok(name) = SafeName::parse(&name) {
                let key = FileKey { name, content_id: ContentId::EMPTY };
                prop_assert_eq!(FileKey::from_page_token(&key.page_token()), Some(key));
            }
            if let Some(key) = FileKey::from_page_token(&junk) {
                prop_assert_eq!(key.page_token(), junk);
            }
        }

        /// Skipping names outside the literal part of a glob never skips a match.
        #[test]
        fn bounds_hold(pattern in "[abc/*?.-]{0,6}", name in "[abc/.-]{1,6}") {
            let query = Query { glob: Some(pattern), ..Query::default() };
            if let (Ok(name), Ok(matcher)) = (SafeName::parse(&name), query.compile()) {
                let key = FileKey { name, content_id: ContentId::EMPTY };
                if matcher.matches_key(&key) {
                    prop_assert!(matcher.start().is_none_or(|start| *start <= key.name));
                    prop_assert!(!matcher.is_past(&key.name));
                }
            }
        }
    }
}
