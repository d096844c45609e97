//! One configuration file: its text, its two shapes, and whether `./config.json` counts.
//!
//! `./config.json` counts only if every section is ours and nobody but the caller or root can have written it, because
//! the current folder may be anybody's. In a file that counts, an unknown or repeated key is an error.
//!
//! A file may use the shape of the older Python tool; [`OLD_KEYS`] says what each of its keys means here. A host
//! without a port gets the default port, and the other way round.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read};
use std::marker::PhantomData;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::{Value as Json, json};

use super::ConfigError;
use super::leaf::{Known, Leaf, nearest};

const MAX_FILE_BYTES: u64 = 1 << 20;
const SECTIONS: [&str; 5] = ["tracker", "peer", "log", "server", "client"];
/// Keys of the older tool and the setting that each one is, or is half of.
const OLD_KEYS: [(&str, &str); 8] = [
    ("server.host", "tracker.listen"),
    ("server.port", "tracker.listen"),
    ("server.certificate_path", "tracker.certificate"),
    ("server.key_path", "tracker.certificate_key"),
    ("client.server_host", "peer.tracker"),
    ("client.server_port", "peer.tracker"),
    ("client.shared_files_directory", "peer.shares"),
    ("client.downloads_directory", "peer.downloads"),
];

/// What was found where `./config.json` may be.
pub(super) enum LocalFile {
    Absent,
    Ignored(String),
    Counts(String),
}

/// Reads a file that the user or the system means for us.
pub(super) fn read(path: &Path) -> io::Result<String> {
    read_open(File::open(path)?)
}

/// Reads `./config.json` if it counts. `uid` is the caller's.
pub(super) fn read_local(path: &Path, uid: u32) -> LocalFile {
    match fs::symlink_metadata(path) {
        Ok(link) => {
            read_safe(path, uid, link.uid()).map_or_else(LocalFile::Ignored, LocalFile::Counts)
        }
        Err(_) => LocalFile::Absent,
    }
}

fn read_safe(path: &Path, uid: u32, link_uid: u32) -> Result<String, String> {
    // A pipe would block when opened.
    if !fs::metadata(path)
        .map_err(|error| error.to_string())?
        .is_file()
    {
        return Err("it is not a file".into());
    }
    let file = File::open(path).map_err(|error| error.to_string())?;
    let metadata = file.metadata().map_err(|error| error.to_string())?;
    if [link_uid, metadata.uid()]
        .iter()
        .any(|owner| *owner != uid && *owner != 0)
    {
        return Err("it is not yours, --config ./config.json uses it anyway".into());
    }
    if metadata.mode() & 0o022 != 0 {
        return Err("others can write to it, chmod go-w config.json".into());
    }
    let text = read_open(file).map_err(|error| error.to_string())?;
    let Members(sections) =
        serde_json::from_str::<Members<IgnoredAny>>(&text).map_err(|error| error.to_string())?;
    match sections
        .iter()
        .find(|(name, _)| !SECTIONS.contains(&name.as_str()))
    {
        Some((name, _)) => Err(format!(
            "`{}` is not a section of ours",
            name.escape_debug()
        )),
        None => Ok(text),
    }
}

fn read_open(file: File) -> io::Result<String> {
    let mut text = String::new();
    file.take(MAX_FILE_BYTES + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            "more than 1 MiB",
        ));
    }
    Ok(text)
}

/// The settings in the text of a file. `place` is the file's name in messages.
pub(super) fn parse(known: &Known, place: &str, text: &str) -> Result<Vec<Leaf>, ConfigError> {
    let text = text.trim_start_matches('\u{feff}');
    let syntax = |error: serde_json::Error| ConfigError::Syntax {
        place: place.into(),
        why: error.to_string(),
    };
    let Members(sections) = serde_json::from_str::<Members<IgnoredAny>>(text).map_err(syntax)?;
    let names: Vec<_> = sections.iter().map(|(name, _)| name.as_str()).collect();
    refuse_strangers(place, &names, &SECTIONS)?;

    let Members(sections) = serde_json::from_str::<Members<Members<Json>>>(text).map_err(syntax)?;
    let written: Vec<(String, Json)> = sections
        .into_iter()
        .flat_map(|(section, Members(keys))| {
            keys.into_iter()
                .map(move |(key, value)| (format!("{section}.{key}"), value))
        })
        .collect();
    let names: Vec<_> = written.iter().map(|(key, _)| key.as_str()).collect();
    let keys: Vec<_> = known
        .keys()
        .map(String::as_str)
        .chain(OLD_KEYS.map(|(old, _)| old))
        .collect();
    refuse_strangers(place, &names, &keys)?;

    let (old, new): (Vec<_>, Vec<_>) = written
        .into_iter()
        .partition(|(key, _)| !known.contains_key(key));
    let mut leaves: Vec<_> = new
        .into_iter()
        .map(|(key, value)| Leaf::new(key, value, place))
        .collect();
    for key in [
        "tracker.listen",
        "tracker.certificate",
        "tracker.certificate_key",
        "peer.tracker",
        "peer.shares",
        "peer.downloads",
    ] {
        let halves: Vec<_> = old
            .iter()
            .filter(|(old, _)| OLD_KEYS.contains(&(old.as_str(), key)))
            .collect();
        let Some((first, _)) = halves.first() else {
            continue;
        };
        if leaves.iter().any(|leaf| leaf.key == key) {
            return Err(ConfigError::BothShapes {
                place: place.into(),
                old: first.clone(),
                new: key.into(),
            });
        }
        let names: Vec<_> = halves.iter().map(|(old, _)| old.as_str()).collect();
        leaves.push(Leaf::new(
            key,
            from_old(place, key, &halves)?,
            &format!("{place} ({})", names.join(", ")),
        ));
    }
    Ok(leaves)
}

fn refuse_strangers(place: &str, names: &[&str], known: &[&str]) -> Result<(), ConfigError> {
    for (i, name) in names.iter().enumerate() {
        let key = name.escape_debug().to_string();
        if names[..i].contains(name) {
            return Err(ConfigError::Repeated {
                place: place.into(),
                key,
            });
        }
        if !known.contains(name) {
            let nearest = nearest(name, known).into();
            return Err(ConfigError::UnknownKey {
                place: place.into(),
                key,
                nearest,
            });
        }
    }
    Ok(())
}

/// The value of setting `key`, of which the file has `halves`: one old key, or a host and a port, or one of these.
fn from_old(place: &str, key: &str, halves: &[&(String, Json)]) -> Result<Json, ConfigError> {
    let (default_host, default_port) = match key {
        "tracker.listen" => ("[::]", 7700),
        "peer.tracker" => ("localhost", 7700),
        "peer.shares" => {
            return Ok(if halves[0].1 == json!("") {
                json!([])
            } else {
                json!([halves[0].1])
            });
        }
        _ => return Ok(halves[0].1.clone()),
    };
    let (mut host, mut port) = (default_host.to_owned(), default_port);
    for (old, value) in halves {
        let bad = |why: &str| ConfigError::Value {
            place: place.into(),
            key: old.clone(),
            why: why.into(),
        };
        if old.ends_with("port") {
            let number = value
                .as_str()
                .map_or_else(|| value.as_u64(), |text| text.parse().ok());
            port = number
                .and_then(|number| u16::try_from(number).ok())
                .ok_or_else(|| bad("expected a port, 0 to 65535"))?;
        } else {
            match value.as_str().ok_or_else(|| bad("expected a text"))? {
                "" => {}
                text if text.contains(':') && !text.starts_with('[') => host = format!("[{text}]"),
                text => host = text.to_owned(),
            }
        }
    }
    Ok(json!(format!("{host}:{port}")))
}

/// The members of a JSON object as written, so that a repeated key is seen and not swallowed.
struct Members<T>(Vec<(String, T)>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Members<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Collect<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for Collect<T> {
            type Value = Members<T>;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members<T>, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(Collect(PhantomData))
    }
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::{PermissionsExt, chown, symlink};

    use super::super::{Config, Loaded, LogLevel, Options, Share, load};
    use super::*;

    fn load_text(text: &str) -> Result<Loaded, String> {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("given.json"), text).unwrap();
        let options = Options {
            cwd: dir.path().into(),
            config: Some("given.json".into()),
            ..Options::default()
        };
        let loaded = load(&options).map_err(|error| error.to_string());
        if let Err(message) = &loaded {
            assert!(
                message.starts_with("given.json") && !message.contains('\n'),
                "{message}"
            );
        }
        loaded
    }

    #[test]
    fn the_old_shape_means_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let text = r#"{
            "server": {"host": "localhost", "port": 50051, "certificate_path": "./cert.pem", "key_path": "./key.pem"},
            "client": {"server_host": "localhost", "server_port": "50051",
                       "shared_files_directory": "./shared", "downloads_directory": "/downloads"}
        }"#;
        fs::write(dir.path().join("config.json"), text).unwrap();
        fs::set_permissions(
            dir.path().join("config.json"),
            Permissions::from_mode(0o644),
        )
        .unwrap();
        let uid = fs::metadata(dir.path()).unwrap().uid();
        let loaded = load(&Options {
            cwd: dir.path().into(),
            uid,
            ..Options::default()
        })
        .unwrap();

        let mut expected = Config::default();
        expected.tracker.listen = "localhost:50051".into();
        expected.tracker.certificate = Some(dir.path().join("cert.pem"));
        expected.tracker.certificate_key = Some(dir.path().join("key.pem"));
        expected.peer.tracker = Some("localhost:50051".into());
        expected.peer.shares = vec![Share {
            name: None,
            dir: dir.path().join("shared"),
        }];
        expected.peer.downloads = Some("/downloads".into());
        assert_eq!(loaded.config, expected);
        assert_eq!(
            loaded.origins["tracker.listen"].1,
            "./config.json (server.host, server.port)"
        );
        assert_eq!(
            loaded.origins["peer.downloads"].1,
            "./config.json (client.downloads_directory)"
        );
        assert_eq!((loaded.notes, loaded.warnings), (vec![], vec![]));
    }

    #[test]
    fn halves_and_blanks_of_the_old_shape() {
        let listen = |text: &str| load_text(text).map(|loaded| loaded.config.tracker.listen);
        assert_eq!(listen(r#"{"server": {"port": 1}}"#).unwrap(), "[::]:1");
        assert_eq!(
            listen(r#"{"server": {"host": "0.0.0.0"}}"#).unwrap(),
            "0.0.0.0:7700"
        );
        assert_eq!(
            listen(r#"{"server": {"host": "::1", "port": "9"}}"#).unwrap(),
            "[::1]:9"
        );
        assert_eq!(
            listen(r#"{"server": {"host": ""}, "client": {"server_port": 5}}"#).unwrap(),
            "[::]:7700"
        );
        let blank = r#"{"server": {"key_path": ""}, "client": {"shared_files_directory": "", "downloads_directory": ""}}"#;
        assert_eq!(load_text(blank).unwrap().config, Config::default());
        for (text, key) in [
            (r#"{"server": {"port": 65536}}"#, "`server.port`"),
            (r#"{"server": {"port": "x"}}"#, "`server.port`"),
            (r#"{"server": {"host": 1}}"#, "`server.host`"),
            (
                r#"{"server": {"host": "a b"}}"#,
                "(server.host): `tracker.listen`",
            ),
            (
                r#"{"client": {"downloads_directory": 1}}"#,
                "(client.downloads_directory): `peer.downloads`",
            ),
            (
                r#"{"client": {"shared_files_directory": 1}}"#,
                "(client.shared_files_directory): `peer.shares`",
            ),
        ] {
            let message = load_text(text).unwrap_err();
            assert!(message.contains(key), "{message}");
        }
    }

    #[test]
    fn what_a_file_must_not_say() {
        for (text, message) in [
            (
                r#"{"tracker": {"lisen": 1}}"#,
                "unknown key `tracker.lisen`, did you mean `tracker.listen`?",
            ),
            (
                r#"{"trakcer": 1}"#,
                "unknown key `trakcer`, did you mean `tracker`?",
            ),
            (
                r#"{"tracker": {"downloads": "x"}}"#,
                "unknown key `tracker.downloads`, did you mean `peer.downloads`?",
            ),
            (
                r#"{"server": {"hots": "x"}}"#,
                "unknown key `server.hots`, did you mean `server.host`?",
            ),
            (
                r#"{"log": {"a\nb": 1}}"#,
                "unknown key `log.a\\nb`, did you mean",
            ),
            (
                r#"{"log": {}, "log": {}}"#,
                "`log` is written twice, keep one",
            ),
            (
                r#"{"log": {"json": true, "json": false}}"#,
                "`log.json` is written twice, keep one",
            ),
            (
                r#"{"server": {"port": 1}, "tracker": {"listen": "[::]:1"}}"#,
                "`server.port` and `tracker.listen` are the same setting, keep one",
            ),
            (
                r#"{"log": 3}"#,
                "not a configuration: invalid type: integer `3`, expected an object at line 1 column 9",
            ),
            (
                "[]",
                "not a configuration: invalid type: sequence, expected an object at line 1",
            ),
            (
                "{",
                "not a configuration: EOF while parsing an object at line 1 column 1",
            ),
            ("", "not a configuration: EOF"),
            (
                r#"{"log": {"level": "loud"}}"#,
                "`log.level`: \"loud\" is not one of off, error, warn",
            ),
            (r#"{"log": {"level": 1}}"#, "`log.level`: expected a text"),
            (
                r#"{"log": {"json": "true"}}"#,
                "`log.json`: expected true or false",
            ),
            (
                r#"{"tracker": {"heartbeat_seconds": true}}"#,
                "`tracker.heartbeat_seconds`: expected a whole number",
            ),
            (
                r#"{"tracker": {"heartbeat_seconds": 1.5}}"#,
                "`tracker.heartbeat_seconds`: expected a whole number",
            ),
            (
                r#"{"tracker": {"lease_seconds": -1}}"#,
                "`tracker.lease_seconds`: expected a whole number",
            ),
            (
                r#"{"tracker": {"lease_seconds": 5}}"#,
                "`tracker.lease_seconds`: 5 is not between 20 and 86400",
            ),
            (
                r#"{"tracker": {"memory_budget": "lots"}}"#,
                "`tracker.memory_budget`: \"lots\" is not a size; write 64MiB",
            ),
            (
                r#"{"tracker": {"memory_budget": null}}"#,
                "`tracker.memory_budget`: expected a size",
            ),
            (
                r#"{"peer": {"upload_limit": 0}}"#,
                "`peer.upload_limit`: \"0\" is not a limit; write none, or 500k",
            ),
            (
                r#"{"peer": {"download_limit_per_peer": true}}"#,
                "`peer.download_limit_per_peer`: expected a limit",
            ),
            (
                r#"{"peer": {"shares": "dir"}}"#,
                "`peer.shares`: expected a list of texts",
            ),
            (
                r#"{"peer": {"shares": ["dir", 1]}}"#,
                "`peer.shares`: expected a list of texts",
            ),
            (
                r#"{"peer": {"shares": ["=dir"]}}"#,
                "`peer.shares`: \"=dir\" is neither DIR nor NAME=DIR",
            ),
            (
                r#"{"peer": {"tracker": "here"}}"#,
                "`peer.tracker`: \"here\" is not HOST:PORT",
            ),
        ] {
            let found = load_text(text).unwrap_err();
            assert!(
                found.starts_with(&format!("given.json: {message}")),
                "{found}"
            );
        }
        assert!(
            load_text(&format!("{{}}{}", " ".repeat(1 << 20)))
                .unwrap_err()
                .contains("cannot read: more than 1 MiB")
        );
    }

    #[test]
    fn good_values_of_every_kind() {
        let text = r#"{
            "tracker": {"memory_budget": "64MiB", "heartbeat_seconds": 2, "advertise": ["a:1"]},
            "peer": {"shares": ["films", "b=./x/./y", "/z"], "downloads": null, "upload_limit": "20MB/s",
                     "download_limit": 65536, "upload_limit_per_peer": "none", "download_limit_per_peer": ""},
            "log": {"level": "DEBUG", "json": true}
        }"#;
        let Config { tracker, peer, log } = load_text(&format!("\u{feff}{text}")).unwrap().config;
        assert_eq!(
            (
                tracker.memory_budget,
                tracker.heartbeat_seconds,
                tracker.advertise
            ),
            (64 << 20, 2, vec!["a:1".into()])
        );
        assert_eq!((log.level, log.json), (LogLevel::Debug, true));
        assert_eq!(
            (peer.upload_limit, peer.download_limit),
            (Some(20_000_000), Some(65_536))
        );
        assert_eq!(
            (peer.upload_limit_per_peer, peer.download_limit_per_peer),
            (None, None)
        );
        let ends: Vec<_> = peer
            .shares
            .iter()
            .map(|share| (share.name.as_deref(), share.dir.to_str().unwrap()))
            .collect();
        assert!(
            ends[0].1.starts_with('/') && ends[0].1.ends_with("/films"),
            "{ends:?}"
        );
        assert!(
            ends[1].0 == Some("b") && ends[1].1.ends_with("/x/y"),
            "{ends:?}"
        );
        assert_eq!(ends[2], (None, "/z"));
    }

    #[test]
    fn a_local_file_counts_only_if_ours_and_safe() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        let uid = fs::metadata(dir.path()).unwrap().uid();
        let ignored = |uid| match read_local(&path, uid) {
            LocalFile::Ignored(why) => why,
            LocalFile::Absent => "absent".into(),
            LocalFile::Counts(_) => "counts".into(),
        };
        assert_eq!(ignored(uid), "absent");
        fs::create_dir(&path).unwrap();
        assert_eq!(ignored(uid), "it is not a file");
        fs::remove_dir(&path).unwrap();

        fs::write(&path, r#"{"peer": {}, "server": {}}"#).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        assert_eq!(ignored(uid), "counts");
        if uid == 0 {
            chown(&path, Some(12_345), None).unwrap();
            assert!(ignored(0).starts_with("it is not yours"));
            assert_eq!(ignored(12_345), "counts");
            chown(&path, Some(0), None).unwrap();
        } else {
            assert!(ignored(uid + 1).starts_with("it is not yours"));
        }
        fs::set_permissions(&path, Permissions::from_mode(0o664)).unwrap();
        assert!(ignored(uid).starts_with("others can write"));
        fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        fs::write(&path, r#"{"server": {}, "database": 1}"#).unwrap();
        assert_eq!(ignored(uid), "`database` is not a section of ours");
        fs::write(&path, "// comment").unwrap();
        assert!(ignored(uid).contains("line 1"));

        let notes = load(&Options {
            cwd: dir.path().into(),
            uid,
            ..Options::default()
        })
        .unwrap()
        .notes;
        assert!(
            notes[0].starts_with("./config.json is ignored: "),
            "{notes:?}"
        );
        fs::remove_file(&path).unwrap();
        symlink("nowhere", &path).unwrap();
        assert!(ignored(uid).contains("No such file"));
    }
}
