//! The configuration: one tree of settings with its defaults and its checks. [`load`] fills it, once, before any port
//! is bound.
//!
//! Layers, later ones win: defaults, `/etc/sprat/config.json`, `$XDG_CONFIG_HOME/sprat/config.json`, `./config.json` or
//! `--config FILE`, `SPRAT_SECTION_KEY` variables, flags. A list replaces the list below it; an empty text means "not
//! set". In a variable a list is comma-separated, or JSON when it begins with `[`.
//!
//! Invariants: loading reads nothing but its arguments and the files they lead to; every path in a loaded [`Config`] is
//! absolute; nothing in a file that counts goes unread.

mod file;
mod layers;
mod leaf;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::net::Ipv6Addr;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, Serialize};
use thiserror::Error;

pub use self::layers::{Loaded, Options, Origins, load};
use crate::units::{parse_rate, parse_size};

/// All settings. Each part of the program is handed its own section.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// Settings of `sprat tracker`.
    pub tracker: TrackerConfig,
    /// Settings of every command that acts as a peer.
    pub peer: PeerConfig,
    /// Settings of the log.
    pub log: LogConfig,
}

/// Settings of a tracker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrackerConfig {
    /// Where authority, members and tokens are kept; none: [`state_dir_default`].
    pub state_dir: Option<PathBuf>,
    /// `HOST:PORT` to listen on.
    pub listen: String,
    /// Loopback `HOST:PORT` of the operator page; empty or `none`: no page.
    pub operator: String,
    /// `HOST:PORT` values put into join links; none: found out.
    pub advertise: Vec<String>,
    /// PEM file with a certificate of the operator's own; none: the authority's.
    pub certificate: Option<PathBuf>,
    /// PEM file with the key of `certificate`.
    pub certificate_key: Option<PathBuf>,
    /// File with the passphrase of `certificate_key`.
    pub key_passphrase_file: Option<PathBuf>,
    /// Life of a member's certificate.
    pub leaf_lifetime_seconds: u64,
    /// How often peers renew their lease.
    pub heartbeat_seconds: u64,
    /// How long a registration lives without a heartbeat.
    pub lease_seconds: u64,
    /// Bytes that listings may take in memory; a number, or a text such as `2GiB`.
    #[serde(deserialize_with = "size")]
    pub memory_budget: u64,
}

/// Settings of a peer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerConfig {
    /// Where identity, index and journals are kept; none: [`state_dir_default`].
    pub state_dir: Option<PathBuf>,
    /// `HOST:PORT` to listen on.
    pub listen: String,
    /// Loopback `HOST:PORT` of the operator page; empty or `none`: no page.
    pub operator: String,
    /// `HOST:PORT` values offered to other peers; none: every address of this machine.
    pub advertise: Vec<String>,
    /// `HOST:PORT` of the tracker; none: the one it joined.
    pub tracker: Option<String>,
    /// Folders to share.
    pub shares: Vec<Share>,
    /// Folder for downloads that name no other.
    pub downloads: Option<PathBuf>,
    /// How often the shared folders are walked where, or in case, no event tells of a change.
    pub rescan_seconds: u64,
    /// Bytes of files a second that may be sent; a number, or a text such as `20MB` or `none`.
    #[serde(deserialize_with = "rate")]
    pub upload_limit: Option<u64>,
    /// The same of what may be fetched.
    #[serde(deserialize_with = "rate")]
    pub download_limit: Option<u64>,
    /// What may be sent to each other peer.
    #[serde(deserialize_with = "rate")]
    pub upload_limit_per_peer: Option<u64>,
    /// What may be fetched from each other peer.
    #[serde(deserialize_with = "rate")]
    pub download_limit_per_peer: Option<u64>,
}

/// Settings of the log.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogConfig {
    /// The least important line shown.
    pub level: LogLevel,
    /// One JSON object a line.
    pub json: bool,
}

/// Importance of a log line; the smaller, the quieter.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", try_from = "String")]
#[expect(missing_docs, reason = "the names say it")]
pub enum LogLevel {
    Off,
    Error,
    Warn,
    #[default]
    Info,
    Debug,
    Trace,
}

/// A folder to share: `DIR`, or `NAME=DIR` to put `NAME/` before its files' names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Share {
    /// Prefix of the names, one component, not yet checked as a name.
    pub name: Option<String>,
    /// The folder.
    pub dir: PathBuf,
}

impl Default for TrackerConfig {
    fn default() -> Self {
        Self {
            state_dir: None,
            listen: "[::]:7700".into(),
            operator: "127.0.0.1:7790".into(),
            advertise: Vec::new(),
            certificate: None,
            certificate_key: None,
            key_passphrase_file: None,
            leaf_lifetime_seconds: 7 * DAY_SECONDS,
            heartbeat_seconds: 10,
            lease_seconds: 30,
            memory_budget: 2 << 30,
        }
    }
}

impl Default for PeerConfig {
    fn default() -> Self {
        Self {
            state_dir: None,
            listen: "[::]:7701".into(),
            operator: "127.0.0.1:7791".into(),
            advertise: Vec::new(),
            tracker: None,
            shares: Vec::new(),
            downloads: None,
            rescan_seconds: 60,
            upload_limit: None,
            download_limit: None,
            upload_limit_per_peer: None,
            download_limit_per_peer: None,
        }
    }
}

const DAY_SECONDS: u64 = 86_400;

impl Config {
    /// Checks everything that can be known without the disk or the network. [`load`] has done so.
    pub fn check(&self) -> Result<(), BadValue> {
        let Self {
            tracker,
            peer,
            log: _,
        } = self;
        address("tracker.listen", &tracker.listen, true)?;
        address("peer.listen", &peer.listen, true)?;
        for (key, text) in [
            ("tracker.operator", &tracker.operator),
            ("peer.operator", &peer.operator),
        ] {
            if !is_none(text) {
                address(key, text, true)?;
            }
        }
        tracker
            .advertise
            .iter()
            .try_for_each(|text| address("tracker.advertise", text, false))?;
        peer.advertise
            .iter()
            .try_for_each(|text| address("peer.advertise", text, false))?;
        peer.tracker
            .iter()
            .try_for_each(|text| address("peer.tracker", text, false))?;
        within(
            "tracker.leaf_lifetime_seconds",
            tracker.leaf_lifetime_seconds,
            60..=90 * DAY_SECONDS,
        )?;
        within(
            "tracker.heartbeat_seconds",
            tracker.heartbeat_seconds,
            1..=3_600,
        )?;
        // Two missed heartbeats must not cost the lease.
        within(
            "tracker.lease_seconds",
            tracker.lease_seconds,
            2 * tracker.heartbeat_seconds..=DAY_SECONDS,
        )?;
        within(
            "tracker.memory_budget",
            tracker.memory_budget,
            1 << 20..=1 << 50,
        )?;
        within("peer.rescan_seconds", peer.rescan_seconds, 1..=DAY_SECONDS)?;
        let missing = |key, other| {
            Err(BadValue {
                key,
                why: format!("must be set, because `{other}` is"),
            })
        };
        match (
            &tracker.certificate,
            &tracker.certificate_key,
            &tracker.key_passphrase_file,
        ) {
            (Some(_), None, _) => missing("tracker.certificate_key", "tracker.certificate"),
            (None, Some(_), _) => missing("tracker.certificate", "tracker.certificate_key"),
            (None, None, Some(_)) => {
                missing("tracker.certificate_key", "tracker.key_passphrase_file")
            }
            _ => Ok(()),
        }
    }
}

impl LogLevel {
    /// The level as it is written.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }
}

impl TryFrom<String> for LogLevel {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        [
            Self::Off,
            Self::Error,
            Self::Warn,
            Self::Info,
            Self::Debug,
            Self::Trace,
        ]
        .into_iter()
        .find(|level| level.as_str().eq_ignore_ascii_case(&text))
        .ok_or_else(|| format!("{text:?} is not one of off, error, warn, info, debug and trace"))
    }
}

impl Share {
    /// Reads `DIR` or `NAME=DIR`. What stands before the first `=` is a name unless it contains a `/`, so `./a=b` is a
    /// folder.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (name, dir) = match text.split_once('=') {
            Some((name, dir)) if !name.contains('/') => (Some(name), dir),
            _ => (None, text),
        };
        if name == Some("") || dir.is_empty() {
            return Err(format!("{text:?} is neither DIR nor NAME=DIR"));
        }
        Ok(Self {
            name: name.map(Into::into),
            dir: dir.into(),
        })
    }
}

impl TryFrom<String> for Share {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        Self::parse(&text)
    }
}

impl From<Share> for String {
    fn from(share: Share) -> Self {
        let dir = share.dir.to_string_lossy();
        share
            .name
            .map_or_else(|| dir.to_string(), |name| format!("{name}={dir}"))
    }
}

/// Variables of the environment.
pub type Environment = BTreeMap<OsString, OsString>;

/// Why there is no configuration. Every message is one line that names the file, variable or flag and the key.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum ConfigError {
    #[error("{place}: cannot read: {error}")]
    Read { place: String, error: io::Error },
    #[error("{place}: not a configuration: {why}")]
    Syntax { place: String, why: String },
    #[error("{place}: unknown key `{key}`, did you mean `{nearest}`?")]
    UnknownKey {
        place: String,
        key: String,
        nearest: String,
    },
    #[error("{place}: `{key}` is written twice, keep one")]
    Repeated { place: String, key: String },
    #[error("{place}: `{old}` and `{new}` are the same setting, keep one")]
    BothShapes {
        place: String,
        old: String,
        new: String,
    },
    #[error("{place}: `{key}`: {why}")]
    Value {
        place: String,
        key: String,
        why: String,
    },
    #[error("no home folder: set HOME or XDG_STATE_HOME, or give --state-dir")]
    NoHome,
}

/// A setting whose value cannot work.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("`{key}`: {why}")]
pub struct BadValue {
    /// The setting, such as `tracker.listen`.
    pub key: &'static str,
    /// What it must be instead.
    pub why: String,
}

/// Whose state a directory holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Service {
    Tracker,
    Peer,
}

/// `$XDG_STATE_HOME/sprat/tracker` or `/peer`, in `~/.local/state` if that variable is not set.
pub fn state_dir_default(
    service: Service,
    environment: &Environment,
) -> Result<PathBuf, ConfigError> {
    let name = match service {
        Service::Tracker => "sprat/tracker",
        Service::Peer => "sprat/peer",
    };
    Ok(xdg(environment, "XDG_STATE_HOME", ".local/state")
        .ok_or(ConfigError::NoHome)?
        .join(name))
}

/// Splits `HOST:PORT`. A host is a name, an IPv4 address, or an IPv6 address in brackets, which are taken off.
pub fn split_host_port(text: &str) -> Option<(&str, u16)> {
    let (host, port) = text.rsplit_once(':')?;
    let port = port
        .bytes()
        .all(|byte| byte.is_ascii_digit())
        .then(|| port.parse().ok())??;
    if let Some(v6) = host.strip_prefix('[') {
        let v6 = v6.strip_suffix(']')?;
        return v6
            .split('%')
            .next()?
            .parse::<Ipv6Addr>()
            .is_ok()
            .then_some((v6, port));
    }
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
    (!host.is_empty() && host.bytes().all(plain)).then_some((host, port))
}

/// Does a setting that may be switched off say so?
#[must_use]
pub fn is_none(text: &str) -> bool {
    text.is_empty() || text == "none"
}

fn address(key: &'static str, text: &str, to_listen: bool) -> Result<(), BadValue> {
    let why = match split_host_port(text) {
        None => format!("{text:?} is not HOST:PORT, with an IPv6 address in brackets"),
        Some((_, 0)) if !to_listen => format!("{text:?} needs a port that others can call"),
        Some(("::" | "0.0.0.0", _)) if !to_listen => {
            format!("{text:?} needs an address that others can call")
        }
        Some(_) => return Ok(()),
    };
    Err(BadValue { key, why })
}

fn within(key: &'static str, value: u64, range: RangeInclusive<u64>) -> Result<(), BadValue> {
    let why = || {
        format!(
            "{value} is not between {} and {}",
            range.start(),
            range.end()
        )
    };
    if range.contains(&value) {
        Ok(())
    } else {
        Err(BadValue { key, why: why() })
    }
}

/// A directory of XDG, whose variable counts only if absolute, or its place below the home folder.
fn xdg(environment: &Environment, variable: &str, below_home: &str) -> Option<PathBuf> {
    let absolute = |name: &str| {
        environment
            .get(OsString::from(name).as_os_str())
            .map(Path::new)
            .filter(|path| path.is_absolute())
    };
    absolute(variable)
        .map(Into::into)
        .or_else(|| Some(absolute("HOME")?.join(below_home)))
}

/// A number of bytes, or a text that says it.
#[derive(Deserialize)]
#[serde(untagged)]
enum Size {
    Bytes(u64),
    Text(String),
}

fn size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    match Size::deserialize(deserializer)? {
        Size::Bytes(bytes) => Ok(bytes),
        Size::Text(text) => parse_size(&text).map_err(serde::de::Error::custom),
    }
}

fn rate<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    let text = match Option::<Size>::deserialize(deserializer)? {
        None => return Ok(None),
        Some(Size::Bytes(bytes)) => bytes.to_string(),
        Some(Size::Text(text)) => text,
    };
    parse_rate(&text).map_err(serde::de::Error::custom)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn shipped_file_is_the_default() {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("config.json");
        let loaded = load(&Options {
            config: Some(file.clone()),
            cwd: "/".into(),
            ..Options::default()
        })
        .unwrap();
        assert_eq!(loaded.config, Config::default());
        let untold: Vec<_> = loaded
            .origins
            .iter()
            .filter(|(_, (_, origin))| Path::new(origin) != file)
            .collect();
        assert!(untold.is_empty(), "not in config.json: {untold:?}");
        Config::default().check().unwrap();
    }

    #[test]
    fn values_that_cannot_work_are_named() {
        type Spoil = fn(&mut Config);
        let spoilers: [(&str, Spoil); 18] = [
            ("tracker.listen", |c| c.tracker.listen = "7700".into()),
            ("tracker.listen", |c| c.tracker.listen = "::1:7700".into()),
            ("peer.listen", |c| c.peer.listen = "0.0.0.0:70000".into()),
            ("tracker.advertise", |c| {
                c.tracker.advertise = vec!["here:1".into(), "here:0".into()]
            }),
            ("peer.advertise", |c| {
                c.peer.advertise = vec!["[::]:7701".into()]
            }),
            ("peer.tracker", |c| {
                c.peer.tracker = Some("sprat://host:1/x".into())
            }),
            ("tracker.leaf_lifetime_seconds", |c| {
                c.tracker.leaf_lifetime_seconds = 59
            }),
            ("tracker.leaf_lifetime_seconds", |c| {
                c.tracker.leaf_lifetime_seconds = u64::MAX
            }),
            ("tracker.heartbeat_seconds", |c| {
                c.tracker.heartbeat_seconds = 0
            }),
            ("tracker.heartbeat_seconds", |c| {
                c.tracker.heartbeat_seconds = u64::MAX
            }),
            ("tracker.lease_seconds", |c| c.tracker.lease_seconds = 19),
            ("tracker.memory_budget", |c| c.tracker.memory_budget = 0),
            ("peer.rescan_seconds", |c| c.peer.rescan_seconds = 0),
            ("tracker.certificate_key", |c| {
                c.tracker.certificate = Some("/c".into())
            }),
            ("tracker.certificate", |c| {
                c.tracker.certificate_key = Some("/k".into())
            }),
            ("tracker.certificate_key", |c| {
                c.tracker.key_passphrase_file = Some("/p".into())
            }),
            ("peer.listen", |c| c.peer.listen = String::new()),
            ("peer.tracker", |c| c.peer.tracker = Some("host".into())),
        ];
        let known = serde_json::to_value(Config::default()).unwrap();
        for (key, spoil) in spoilers {
            let mut config = Config::default();
            spoil(&mut config);
            let bad = config.check().unwrap_err();
            assert_eq!(bad.key, key, "{bad}");
            assert!(
                known
                    .pointer(&format!("/{}", bad.key.replace('.', "/")))
                    .is_some(),
                "{bad}"
            );
            assert!(!bad.to_string().contains('\n'));
        }
    }

    #[test]
    fn hosts_and_ports() {
        for (text, expected) in [
            ("localhost:50051", Some(("localhost", 50051))),
            ("127.0.0.1:0", Some(("127.0.0.1", 0))),
            ("[::]:7700", Some(("::", 7700))),
            ("[fe80::1%eth0]:7700", Some(("fe80::1%eth0", 7700))),
            ("a-b.example_c:65535", Some(("a-b.example_c", 65535))),
            ("", None),
            (":7700", None),
            ("host:", None),
            ("host:+1", None),
            ("host:65536", None),
            ("[::1:7700", None),
            ("[host]:7700", None),
            ("user@host:1", None),
            ("a b:1", None),
        ] {
            assert_eq!(split_host_port(text), expected, "{text}");
        }
    }

    #[test]
    fn shares_with_and_without_a_name() {
        let share = |name: Option<&str>, dir: &str| {
            Ok(Share {
                name: name.map(Into::into),
                dir: dir.into(),
            })
        };
        assert_eq!(Share::parse("/films"), share(None, "/films"));
        assert_eq!(
            Share::parse("movies=/films"),
            share(Some("movies"), "/films")
        );
        assert_eq!(Share::parse("./a=b"), share(None, "./a=b"));
        assert_eq!(Share::parse("x=a=b"), share(Some("x"), "a=b"));
        for text in ["", "=", "=dir", "name="] {
            assert!(Share::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn state_goes_where_xdg_says() {
        let dir = |variables: &[(&str, &str)]| {
            let environment = variables
                .iter()
                .map(|(name, value)| (name.into(), value.into()))
                .collect();
            state_dir_default(Service::Peer, &environment).map_err(|error| error.to_string())
        };
        assert_eq!(
            dir(&[("XDG_STATE_HOME", "/s"), ("HOME", "/h")]),
            Ok("/s/sprat/peer".into())
        );
        assert_eq!(
            dir(&[("HOME", "/h")]),
            Ok("/h/.local/state/sprat/peer".into())
        );
        assert_eq!(
            dir(&[("XDG_STATE_HOME", "relative"), ("HOME", "/h")]),
            Ok("/h/.local/state/sprat/peer".into())
        );
        for homeless in [&[][..], &[("HOME", "")][..]] {
            assert!(dir(homeless).unwrap_err().contains("HOME"));
        }
    }

    proptest! {
        #[test]
        fn share_text_round_trips(name in proptest::option::of("[^=/]{1,9}"), dir in "/\\PC{0,20}") {
            let share = Share { name, dir: dir.into() };
            prop_assert_eq!(Share::parse(&String::from(share.clone())), Ok(share));
        }

        #[test]
        fn addresses_never_panic(text in "[\\[\\]:%a0.+ é]{0,12}") {
            if let Some((host, _)) = split_host_port(&text) {
                prop_assert!(!host.is_empty() && text.contains(host));
            }
        }
    }
}
