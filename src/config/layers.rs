//! The layers: gathers every source of settings, brings each to one form, and lets the `config` crate lay one over the
//! other.
//!
//! Invariant: every [`Leaf`] in a [`Layer`] is settled.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::{env, io};

use ::config::{Map, Source, Value};
use serde_json::{Value as Json, json};

use super::file::{self, LocalFile};
use super::leaf::{Known, Leaf, nearest};
use super::{BadValue, Config, ConfigError, Environment, xdg};

/// `SPRAT_…` variables that are read elsewhere and are no settings of this tree.
const OTHER_VARIABLES: [&str; 6] = [
    "SPRAT_STATE_DIR",
    "SPRAT_CONFIG",
    "SPRAT_KEY_PASSPHRASE",
    "SPRAT_LOG",
    "SPRAT_NO_INPUT",
    "SPRAT_TOKEN",
];

/// Everything that [`load`] depends on.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Those that begin with `SPRAT_`, and the directories of XDG.
    pub environment: Environment,
    /// Absolute; where `./config.json` is looked for and what paths in variables and flags are relative to.
    pub cwd: PathBuf,
    /// The caller, who must own `./config.json` unless root does.
    pub uid: u32,
    /// The system's file, which need not exist.
    pub system_file: PathBuf,
    /// `--config FILE`: replaces `./config.json` and must exist.
    pub config: Option<PathBuf>,
    /// Flags: settings such as `tracker.listen` with their values.
    pub overrides: Vec<(String, Json)>,
}

impl Options {
    /// The environment, folder and user of this process. Fails if its current folder is gone.
    pub fn from_process() -> io::Result<Self> {
        Ok(Self {
            environment: env::vars_os().collect(),
            cwd: env::current_dir()?,
            uid: rustix::process::geteuid().as_raw(),
            system_file: "/etc/sprat/config.json".into(),
            config: None,
            overrides: Vec::new(),
        })
    }
}

/// Each setting (`tracker.listen`) with its value and the file, variable or other origin that gave it.
pub type Origins = BTreeMap<String, (Json, String)>;

/// A checked configuration and where it comes from.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// The settings.
    pub config: Config,
    /// Where each value comes from.
    pub origins: Origins,
    /// Lines for `--verbose`.
    pub notes: Vec<String>,
    /// Lines that are always shown.
    pub warnings: Vec<String>,
}

/// Layers and checks the configuration.
pub fn load(options: &Options) -> Result<Loaded, ConfigError> {
    let known = settings(&Config::default());
    let (mut notes, mut warnings) = (Vec::new(), Vec::new());
    let defaults = known
        .iter()
        .map(|(key, value)| Leaf::new(key.as_str(), value.clone(), "default"));
    let mut layers = vec![Layer(defaults.collect())];
    let user_file = xdg(&options.environment, "XDG_CONFIG_HOME", ".config")
        .map(|dir| dir.join("sprat/config.json"));
    for path in [Some(options.system_file.clone()), user_file]
        .into_iter()
        .flatten()
    {
        let place = path.display().to_string();
        match file::read(&path) {
            Ok(text) => layers.push(file_layer(&known, &place, &path, &text)?),
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
                ) => {}
            Err(error) => return Err(ConfigError::Read { place, error }),
        }
    }
    if let Some(path) = &options.config {
        let place = path.display().to_string();
        let path = options.cwd.join(path);
        let text = file::read(&path).map_err(|error| ConfigError::Read {
            place: place.clone(),
            error,
        })?;
        layers.push(file_layer(&known, &place, &path, &text)?);
    } else {
        let path = options.cwd.join("config.json");
        match file::read_local(&path, options.uid) {
            LocalFile::Absent => {}
            LocalFile::Ignored(why) => notes.push(format!("./config.json is ignored: {why}")),
            LocalFile::Counts(text) => {
                layers.push(file_layer(&known, "./config.json", &path, &text)?)
            }
        }
    }
    let variables = environment(&known, &options.environment, &mut warnings)?;
    layers.push(Layer::settle(&known, &options.cwd, variables)?);
    let flags = options
        .overrides
        .iter()
        .map(|(key, value)| Leaf::new(key.as_str(), value.clone(), "command line"));
    layers.push(Layer::settle(&known, &options.cwd, flags.collect())?);

    let (config, origins) = merge(layers)?;
    if let Err(BadValue { key, why }) = config.check() {
        return Err(ConfigError::Value {
            place: origins[key].1.clone(),
            key: key.into(),
            why,
        });
    }
    Ok(Loaded {
        config,
        origins,
        notes,
        warnings,
    })
}

/// All settings of one source.
#[derive(Debug, Clone)]
struct Layer(Vec<Leaf>);

impl Layer {
    fn settle(known: &Known, base: &Path, leaves: Vec<Leaf>) -> Result<Self, ConfigError> {
        leaves
            .into_iter()
            .map(|leaf| leaf.settle(known, base))
            .collect::<Result<_, _>>()
            .map(Self)
    }
}

impl Source for Layer {
    fn clone_into_box(&self) -> Box<dyn Source + Send + Sync> {
        Box::new(self.clone())
    }

    fn collect(&self) -> Result<Map<String, Value>, ::config::ConfigError> {
        let value = |leaf: &Leaf| {
            let bare: Value = serde_json::from_value(leaf.value.clone())
                .map_err(|error| ::config::ConfigError::Message(error.to_string()))?;
            Ok((leaf.key.clone(), Value::new(Some(&leaf.origin), bare.kind)))
        };
        self.0.iter().map(value).collect()
    }
}

fn file_layer(known: &Known, place: &str, path: &Path, text: &str) -> Result<Layer, ConfigError> {
    let leaves = file::parse(known, place, text)?;
    Layer::settle(known, path.parent().unwrap_or(path), leaves)
}

fn environment(
    known: &Known,
    variables: &Environment,
    warnings: &mut Vec<String>,
) -> Result<Vec<Leaf>, ConfigError> {
    let names: BTreeMap<String, &String> = known
        .keys()
        .map(|key| {
            (
                format!("SPRAT_{}", key.replace('.', "_").to_uppercase()),
                key,
            )
        })
        .collect();
    let mut leaves = Vec::new();
    for (name, text) in variables {
        let name = name.to_string_lossy();
        if !name.starts_with("SPRAT_") || OTHER_VARIABLES.contains(&&*name) || text.is_empty() {
            continue;
        }
        let Some(key) = names.get(&*name) else {
            let candidates: Vec<_> = names
                .keys()
                .map(String::as_str)
                .chain(OTHER_VARIABLES)
                .collect();
            let nearest = nearest(&name, &candidates);
            warnings.push(format!(
                "unknown variable {}, did you mean {nearest}?",
                name.escape_debug()
            ));
            continue;
        };
        let Some(text) = text.to_str() else {
            return Err(ConfigError::Value {
                place: name.into(),
                key: (*key).clone(),
                why: "not UTF-8".into(),
            });
        };
        leaves.push(Leaf::new(
            key.as_str(),
            from_text(&known[*key], text),
            &name,
        ));
    }
    Ok(leaves)
}

/// A variable's text as the kind of `default`, or as the text it is, to be refused where that kind is checked.
fn from_text(default: &Json, text: &str) -> Json {
    let text = text.trim();
    let typed = match default {
        Json::Number(_) => text.parse::<u64>().ok().map(Json::from),
        Json::Bool(_) => match text {
            "1" => Some(json!(true)),
            "0" => Some(json!(false)),
            _ => text.parse::<bool>().ok().map(Json::from),
        },
        Json::Array(_) if text.starts_with('[') => serde_json::from_str(text).ok(),
        Json::Array(_) => Some(
            text.split(',')
                .map(str::trim)
                .filter(|item| !item.is_empty())
                .collect(),
        ),
        _ => None,
    };
    typed.unwrap_or_else(|| json!(text))
}

/// Lays the layers over one another.
fn merge(layers: Vec<Layer>) -> Result<(Config, Origins), ConfigError> {
    let builder = layers
        .into_iter()
        .fold(::config::Config::builder(), |builder, layer| {
            builder.add_source(layer)
        });
    let merged = builder
        .build()
        .map_err(|error| explain(error, &BTreeMap::new()))?;
    let mut origins = BTreeMap::new();
    for section in ["tracker", "peer", "log"] {
        for (key, value) in merged
            .get_table(section)
            .map_err(|error| explain(error, &origins))?
        {
            origins.insert(
                format!("{section}.{key}"),
                value.origin().unwrap_or_default().to_owned(),
            );
        }
    }
    let config: Config = merged
        .try_deserialize()
        .map_err(|error| explain(error, &origins))?;
    let mut values = settings(&config);
    let take = |(key, origin): (String, String)| {
        (
            key.clone(),
            (values.remove(&key).unwrap_or_default(), origin),
        )
    };
    Ok((config, origins.into_iter().map(take).collect()))
}

fn explain(error: ::config::ConfigError, origins: &BTreeMap<String, String>) -> ConfigError {
    use ::config::ConfigError as E;
    let (key, why) = match error {
        E::At { error, key, .. } => (key.unwrap_or_default(), error.to_string()),
        E::Type {
            unexpected,
            expected,
            key,
            ..
        } => (
            key.unwrap_or_default(),
            format!("{unexpected} is not {expected}"),
        ),
        other => (String::new(), other.to_string()),
    };
    let place = origins.get(&key).map_or("configuration", String::as_str);
    ConfigError::Value {
        place: place.into(),
        key,
        why,
    }
}

/// The tree as a flat list.
fn settings(config: &Config) -> Known {
    let tree =
        serde_json::to_value(config).expect("the tree has text keys, and paths made from text");
    let sections = tree.as_object().into_iter().flatten();
    sections
        .flat_map(|(section, keys)| {
            keys.as_object()
                .into_iter()
                .flatten()
                .map(move |(key, value)| (section, key, value))
        })
        .map(|(section, key, value)| (format!("{section}.{key}"), value.clone()))
        .collect()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use proptest::prelude::*;

    use super::super::LogLevel;
    use super::*;

    fn options(variables: &[(&str, &str)]) -> Options {
        let environment = variables
            .iter()
            .map(|(name, value)| (name.into(), value.into()))
            .collect();
        Options {
            environment,
            cwd: "/home/me".into(),
            ..Options::default()
        }
    }

    #[test]
    fn nothing_given_gives_the_defaults() {
        let loaded = load(&options(&[])).unwrap();
        assert_eq!(loaded.config, Config::default());
        assert_eq!(loaded.origins.len(), settings(&Config::default()).len());
        assert!(
            loaded
                .origins
                .values()
                .all(|(_, origin)| origin == "default")
        );
        assert_eq!(loaded.origins["tracker.listen"].0, json!("[::]:7700"));
    }

    #[test]
    fn each_layer_covers_those_before() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        // Of six settings, each layer sets one less, so that each layer has one that nobody covers.
        let keys = [
            "tracker.listen",
            "tracker.state_dir",
            "tracker.certificate",
            "peer.listen",
            "peer.tracker",
            "peer.downloads",
        ];
        let value = |host: &str| format!("{host}:1");
        let file = |host: &str, n: usize| {
            let mut tree = json!({});
            for key in &keys[n..] {
                let (section, key) = key.split_once('.').unwrap();
                tree[section][key] = json!(value(host));
            }
            tree["tracker"]["certificate_key"] = json!("k");
            tree.to_string()
        };
        fs::create_dir_all(path("xdg/sprat")).unwrap();
        fs::write(path("system.json"), file("system", 0)).unwrap();
        fs::write(path("xdg/sprat/config.json"), file("user", 1)).unwrap();
        fs::write(path("given.json"), file("given", 3)).unwrap();
        let variables = [
            ("SPRAT_PEER_TRACKER", "variable:1"),
            ("SPRAT_PEER_DOWNLOADS", "variable:1"),
        ];
        let mut options = options(&variables);
        options
            .environment
            .insert("XDG_CONFIG_HOME".into(), path("xdg").into());
        options.cwd = dir.path().into();
        options.system_file = path("system.json");
        options.config = Some("given.json".into());
        options.overrides = vec![("peer.downloads".into(), json!("flag:1"))];

        let Loaded {
            config: Config { tracker, peer, .. },
            origins,
            ..
        } = load(&options).unwrap();
        assert_eq!(tracker.listen, "system:1");
        assert_eq!(tracker.state_dir, Some(path("xdg/sprat/user:1")));
        assert_eq!(tracker.certificate, Some(path("xdg/sprat/user:1")));
        assert_eq!(peer.listen, "given:1");
        assert_eq!(peer.tracker, Some("variable:1".into()));
        assert_eq!(peer.downloads, Some(path("flag:1")));
        let found = keys.map(|key| origins[key].1.clone());
        let user = path("xdg/sprat/config.json").display().to_string();
        let system = path("system.json").display().to_string();
        assert_eq!(
            found,
            [
                system,
                user.clone(),
                user,
                "given.json".into(),
                "SPRAT_PEER_TRACKER".into(),
                "command line".into()
            ]
        );
        assert_eq!(origins["peer.downloads"].0, json!(path("flag:1")));
    }

    #[test]
    fn variables_have_the_kind_of_their_setting() {
        let loaded = load(&options(&[
            ("SPRAT_TRACKER_HEARTBEAT_SECONDS", " 7 "),
            ("SPRAT_TRACKER_MEMORY_BUDGET", "1G"),
            ("SPRAT_TRACKER_ADVERTISE", "a:1, b:2,"),
            ("SPRAT_PEER_SHARES", r#"["x,y", "n=z"]"#),
            ("SPRAT_LOG_JSON", "1"),
            ("SPRAT_LOG_LEVEL", "trace"),
            ("SPRAT_PEER_LISTEN", ""),
            ("PATH", "/bin"),
        ]))
        .unwrap();
        let Config { tracker, peer, log } = loaded.config;
        assert_eq!(
            (tracker.heartbeat_seconds, tracker.memory_budget),
            (7, 1 << 30)
        );
        assert_eq!(tracker.advertise, ["a:1", "b:2"]);
        assert_eq!(
            peer.shares
                .into_iter()
                .map(String::from)
                .collect::<Vec<_>>(),
            ["/home/me/x,y", "n=/home/me/z"]
        );
        assert_eq!((log.json, log.level), (true, LogLevel::Trace));
        assert!(loaded.warnings.is_empty());
        for (name, value, message) in [
            (
                "SPRAT_TRACKER_HEARTBEAT_SECONDS",
                "soon",
                "`tracker.heartbeat_seconds`: expected a whole number",
            ),
            (
                "SPRAT_LOG_JSON",
                "perhaps",
                "`log.json`: expected true or false",
            ),
            (
                "SPRAT_PEER_LISTEN",
                "7701",
                "`peer.listen`: \"7701\" is not HOST:PORT",
            ),
            ("SPRAT_PEER_SHARES", "[", "`peer.shares`: expected a list"),
        ] {
            let error = load(&options(&[(name, value)])).unwrap_err().to_string();
            assert!(error.starts_with(&format!("{name}: {message}")), "{error}");
        }
    }

    #[test]
    fn unknown_variables_warn_and_known_ones_do_not() {
        let known = OTHER_VARIABLES.map(|name| (name, "x"));
        assert!(load(&options(&known)).unwrap().warnings.is_empty());
        let warnings = load(&options(&[
            ("SPRAT_TRACKER_LISEN", "x"),
            ("SPRAT_STATEDIR", "x"),
        ]))
        .unwrap()
        .warnings;
        assert_eq!(
            warnings,
            [
                "unknown variable SPRAT_STATEDIR, did you mean SPRAT_STATE_DIR?",
                "unknown variable SPRAT_TRACKER_LISEN, did you mean SPRAT_TRACKER_LISTEN?"
            ]
        );
    }

    #[test]
    fn a_named_file_must_exist_and_flags_are_checked_too() {
        let missing = Options {
            config: Some("nowhere.json".into()),
            ..options(&[])
        };
        let error = load(&missing).unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("nowhere.json: cannot read: No such file"),
            "{error}"
        );
        let flag = |key: &str, value| {
            load(&Options {
                overrides: vec![(key.into(), value)],
                ..options(&[])
            })
        };
        assert_eq!(
            flag("peer.listen", json!("x")).unwrap_err().to_string(),
            "command line: `peer.listen`: \"x\" is not HOST:PORT, with an IPv6 address in brackets"
        );
        assert_eq!(
            flag("peer.lisen", json!("x")).unwrap_err().to_string(),
            "command line: unknown key `peer.lisen`, did you mean `peer.listen`?"
        );
        assert_eq!(
            flag("tracker.state_dir", json!("a/../b"))
                .unwrap()
                .config
                .tracker
                .state_dir,
            Some("/home/me/a/../b".into())
        );
    }

    proptest! {
        #[test]
        fn any_text_loads_or_fails_in_one_line(text in "\\PC{0,40}", key in 0..19usize) {
            let (name, _) = settings(&Config::default()).into_iter().nth(key).unwrap();
            let mut found = options(&[]);
            found.environment.insert(format!("SPRAT_{}", name.replace('.', "_").to_uppercase()).into(), (&text).into());
            match load(&found) {
                Ok(loaded) => prop_assert!(loaded.config.check().is_ok()),
                Err(error) => {
                    let error = error.to_string();
                    prop_assert!(error.contains(&name) && !error.contains('\n'), "{error}");
                }
            }
        }
    }
}
