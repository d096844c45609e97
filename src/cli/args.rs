//! The command line as a whole: flags of every command, general help, and what flags mean to the configuration.
//!
//! Invariant: a flag that is also a setting becomes an override of that setting and is read nowhere else. Help, man page
//! and completions are made from these definitions alone.

use std::path::PathBuf;

use anyhow::Result;
use clap::{ArgAction, CommandFactory, Parser, builder::FalseyValueParser};
use serde_json::{Value, json};

use super::commands::{Action, Command, NodeArgs, TrackerCommand};
use crate::exit::{Exit, Failed};

/// What people type first, for `--help` and the man page.
pub(super) const EXAMPLES: [(&str, &str); 7] = [
    ("sprat", "menu: start or join a network, browse, download"),
    (
        "sprat tracker run",
        "start a network here; prints a line for each other machine to paste",
    ),
    ("sprat join sprat://HOST:7700/…", "join it from there"),
    (
        "sprat share ~/models",
        "let the others fetch what is in a folder",
    ),
    ("sprat ls", "what there is"),
    (
        "sprat get 'models/*.gguf' -o ~/models",
        "fetch it, from every machine that has it",
    ),
    ("sprat demo", "see it all work on this machine, in a minute"),
];

/// Variables of the environment beside the settings, for `--help` and the man page.
pub(super) const VARIABLES: [(&str, &str); 7] = [
    ("SPRAT_STATE_DIR", "as --state-dir"),
    ("SPRAT_CONFIG", "as --config"),
    ("SPRAT_NO_INPUT", "as --no-input"),
    ("SPRAT_TOKEN", "the link for `sprat join` without one"),
    (
        "SPRAT_KEY_PASSPHRASE",
        "opens the key that tracker.certificate_key names",
    ),
    ("SPRAT_LOG", "log filter, such as sprat=debug"),
    (
        "SPRAT_SECTION_KEY",
        "any setting of `sprat config show`, such as SPRAT_PEER_LISTEN",
    ),
];

/// The command line.
#[derive(Debug, Parser)]
#[command(
    name = "sprat",
    version,
    about = "Private swarms for big files",
    long_about = "Private swarms for big files: a tracker knows who is a member and who holds what; peers move verified \
                  pieces straight to one another, many sources at once, over TLS 1.3.\n\nWithout a command, on a \
                  terminal, sprat opens its menu.",
    after_help = "`sprat help` shows examples, variables and exit codes; `sprat help COMMAND` more on one command.",
    after_long_help = after_long_help(),
    subcommand_value_name = "COMMAND",
    infer_long_args = false
)]
pub struct Args {
    #[command(subcommand)]
    pub(super) command: Option<Command>,
    #[command(flatten)]
    pub(super) global: Global,
}

/// Flags that mean the same everywhere.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Options of every command")]
pub(super) struct Global {
    /// Where identity and records are kept, one directory for each tracker or peer
    #[arg(
        long,
        global = true,
        env = "SPRAT_STATE_DIR",
        hide_env_values = true,
        value_name = "DIR"
    )]
    pub(super) state_dir: Option<String>,
    /// Configuration file to read instead of ./config.json
    #[arg(
        long,
        global = true,
        env = "SPRAT_CONFIG",
        hide_env_values = true,
        value_name = "FILE"
    )]
    pub(super) config: Option<PathBuf>,
    /// Results as JSON, one object a line
    #[arg(long, global = true)]
    pub(super) json: bool,
    /// Say more
    #[arg(long, short, global = true, action = ArgAction::Count)]
    pub(super) verbose: u8,
    /// Results and errors only
    #[arg(long, short, global = true, conflicts_with = "verbose")]
    pub(super) quiet: bool,
    /// Never ask, even on a terminal
    #[arg(long, global = true, env = "SPRAT_NO_INPUT", hide_env_values = true, value_parser = FalseyValueParser::new())]
    pub(super) no_input: bool,
}

impl Args {
    /// What to do; nothing was typed: the menu.
    #[must_use]
    pub fn wanted(&self) -> Option<Command> {
        self.command.clone()
    }

    /// The definitions, for man page and completions.
    pub(super) fn definitions() -> clap::Command {
        Self::command()
    }

    /// Flags that are settings.
    pub(super) fn overrides(&self) -> Vec<(String, Value)> {
        let mut list = Overrides::default();
        for key in ["tracker.state_dir", "peer.state_dir"] {
            list.text(key, self.global.state_dir.as_ref());
        }
        if self.global.verbose > 0 || self.global.quiet {
            let level = [
                if self.global.quiet { "error" } else { "info" },
                "debug",
                "trace",
            ];
            list.0.push((
                "log.level".into(),
                json!(level[usize::from(self.global.verbose.min(2))]),
            ));
        }
        match &self.command {
            Some(Command::Action(Action::Tracker(TrackerCommand::Run(args)))) => {
                list.text("tracker.listen", args.listen.as_ref());
                list.text("tracker.operator", args.operator.as_ref());
                list.texts("tracker.advertise", &args.advertise);
                list.text("tracker.certificate", args.certificate.as_ref());
                list.text("tracker.certificate_key", args.certificate_key.as_ref());
                list.text(
                    "tracker.key_passphrase_file",
                    args.key_passphrase_file.as_ref(),
                );
            }
            Some(Command::Action(Action::Peer(args))) => {
                list.texts("peer.shares", &args.share);
                list.node(&args.node);
            }
            Some(Command::Action(Action::Share(args))) => list.node(&args.node),
            _ => {}
        }
        list.0
    }
}

#[derive(Default)]
struct Overrides(Vec<(String, Value)>);

impl Overrides {
    fn text(&mut self, key: &str, value: Option<&String>) {
        self.0.extend(value.map(|value| (key.into(), json!(value))));
    }

    fn texts(&mut self, key: &str, values: &[String]) {
        self.0
            .extend((!values.is_empty()).then(|| (key.into(), json!(values))));
    }

    fn node(&mut self, args: &NodeArgs) {
        self.text("peer.downloads", args.downloads.as_ref());
        self.text("peer.listen", args.listen.as_ref());
        self.text("peer.operator", args.operator.as_ref());
        self.texts("peer.advertise", &args.advertise);
        self.text("peer.tracker", args.tracker.as_ref());
        self.text("peer.upload_limit", args.upload_limit.as_ref());
        self.text("peer.download_limit", args.download_limit.as_ref());
        self.text(
            "peer.upload_limit_per_peer",
            args.upload_limit_per_peer.as_ref(),
        );
        self.text(
            "peer.download_limit_per_peer",
            args.download_limit_per_peer.as_ref(),
        );
    }
}

fn after_long_help() -> String {
    let table = |rows: &[(&str, &str)]| -> String {
        let width = rows
            .iter()
            .map(|row| row.0.chars().count())
            .max()
            .unwrap_or_default();
        rows.iter()
            .map(|(word, meaning)| format!("  {word:width$}  {meaning}\n"))
            .collect()
    };
    let codes: String = Exit::TABLE
        .iter()
        .map(|(exit, meaning)| format!("  {:3}  {meaning}\n", *exit as u8))
        .collect();
    format!(
        "Examples:\n{}\nEnvironment:\n{}\nExit codes:\n    0  done\n{codes}  130  ended by Ctrl-C, 143 by SIGTERM",
        table(&EXAMPLES),
        table(&VARIABLES),
    )
}

impl Action {
    /// Reads the words that would follow `sprat`.
    ///
    /// # Errors
    /// If they are no action.
    pub fn from_words(words: &[String]) -> Result<Self> {
        match Args::try_parse_from([&"sprat".to_owned()].into_iter().chain(words))?.command {
            Some(Command::Action(action)) => Ok(action),
            _ => Err(Failed::new(Exit::Usage, "not an action").into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::commands::{OperatorCommand, TokenCommand};

    fn parse(line: &str) -> Result<Args, clap::Error> {
        Args::try_parse_from(line.split(' '))
    }

    fn action(line: &str) -> Action {
        match parse(line)
            .unwrap_or_else(|error| panic!("{line}: {error}"))
            .command
        {
            Some(Command::Action(action)) => action,
            other => panic!("{line}: {other:?}"),
        }
    }

    fn overrides(line: &str) -> Value {
        Value::Object(parse(line).unwrap().overrides().into_iter().collect())
    }

    #[test]
    fn definitions_are_sound() {
        Args::definitions().debug_assert();
    }

    #[test]
    fn tracker_forms() {
        let line = "sprat tracker run --state-dir T --listen 127.0.0.1:7700 --advertise a:1 --advertise b:2";
        assert!(matches!(
            action(line),
            Action::Tracker(TrackerCommand::Run(_))
        ));
        let expected = json!({ "tracker.state_dir": "T", "peer.state_dir": "T", "tracker.listen": "127.0.0.1:7700",
            "tracker.advertise": ["a:1", "b:2"] });
        assert_eq!(overrides(line), expected);
        let Action::Tracker(TrackerCommand::Token(TokenCommand::Create { uses, ttl })) =
            action("sprat tracker token create --state-dir T --uses 3 --ttl 24h")
        else {
            panic!("not a token")
        };
        assert_eq!((uses, ttl.as_secs()), (3, 86_400));
        for line in ["init", "members", "token list", "approve x", "revoke x"] {
            assert!(matches!(
                action(&format!("sprat tracker {line}")),
                Action::Tracker(_)
            ));
        }
        let Action::Operator(OperatorCommand::Cert { out, .. }) =
            action("sprat operator cert --state-dir T --out DIR")
        else {
            panic!("not a certificate")
        };
        assert_eq!(out, PathBuf::from("DIR"));
    }

    #[test]
    fn join_forms() {
        for (line, link, file, folder) in [
            (
                "sprat join sprat://h:1/a.b.c.d --state-dir A",
                Some("sprat://h:1/a.b.c.d"),
                None,
                None,
            ),
            ("sprat join - --state-dir A", Some("-"), None, None),
            ("sprat join --token-file F", None, Some("F"), None),
            (
                "sprat join - --identity-only DIR",
                Some("-"),
                None,
                Some("DIR"),
            ),
            ("sprat join", None, None, None),
        ] {
            let Action::Join(args) = action(line) else {
                panic!("{line}")
            };
            assert_eq!(args.link.as_deref(), link, "{line}");
            assert_eq!(args.token_file, file.map(PathBuf::from), "{line}");
            assert_eq!(args.identity_only, folder.map(PathBuf::from), "{line}");
        }
        assert!(parse("sprat join LINK --token-file F").is_err());
    }

    #[test]
    fn peer_forms() {
        let line = "sprat peer --state-dir A --share x --share n=y --downloads D --listen 127.0.0.1:0 --advertise h:1";
        let expected = json!({ "tracker.state_dir": "A", "peer.state_dir": "A", "peer.shares": ["x", "n=y"],
            "peer.downloads": "D", "peer.listen": "127.0.0.1:0", "peer.advertise": ["h:1"] });
        assert_eq!(overrides(line), expected);
        let limits = "--upload-limit 20MB --download-limit none --upload-limit-per-peer 1M --download-limit-per-peer 2M";
        let expected = json!({ "peer.upload_limit": "20MB", "peer.download_limit": "none",
            "peer.upload_limit_per_peer": "1M", "peer.download_limit_per_peer": "2M" });
        assert_eq!(overrides(&format!("sprat peer {limits}")), expected);
        let Action::Share(args) = action("sprat share DIR --name N") else {
            panic!("not a share")
        };
        assert_eq!(
            (args.dir, args.name.as_deref()),
            (PathBuf::from("DIR"), Some("N"))
        );
        assert_eq!(overrides("sprat -q peer"), json!({ "log.level": "error" }));
        assert_eq!(overrides("sprat peer -v"), json!({ "log.level": "debug" }));
        assert_eq!(
            overrides("sprat peer -vvv"),
            json!({ "log.level": "trace" })
        );
    }

    #[test]
    fn reading_forms() {
        let Action::Get(args) = action("sprat get movies/*.mkv other -o OUT --json --rename")
        else {
            panic!("not a get")
        };
        assert_eq!(
            (args.what, args.output),
            (
                vec!["movies/*.mkv".into(), "other".into()],
                Some("OUT".into())
            )
        );
        assert!(args.rename && !args.skip);
        assert!(parse("sprat get x --rename --skip").is_err() && parse("sprat get").is_err());
        assert!(
            parse("sprat get x --overwrite --skip").is_err()
                && parse("sprat get x --overwrite --rename").is_err()
        );
        let Action::Ls(args) = action("sprat ls shots/ --min-size 1GiB --max-size 20MB --peer P")
        else {
            panic!("no ls")
        };
        assert_eq!(
            (args.filters.min_size, args.filters.max_size),
            (Some(1 << 30), Some(20_000_000))
        );
        assert_eq!(
            (args.glob.as_deref(), args.filters.peer.as_deref()),
            (Some("shots/"), Some("P"))
        );
        let Action::Limit(args) = action("sprat limit --upload 20MB --download none") else {
            panic!("no limit")
        };
        assert_eq!(
            (args.upload, args.download, args.upload_per_peer),
            (Some(Some(20_000_000)), Some(None), None)
        );
        for line in [
            "ls",
            "search TEXT",
            "status --check",
            "config show --origin",
            "completions fish",
            "version",
            "man",
        ] {
            action(&format!("sprat {line}"));
        }
        assert!(
            matches!(parse("sprat demo").unwrap().command, Some(Command::Demo(options)) if options.size == 256 << 20)
        );
        assert!(parse("sprat").unwrap().command.is_none());
    }

    #[test]
    fn general_flags_stand_before_or_after() {
        for line in [
            "sprat --state-dir B --json ls",
            "sprat ls --state-dir B --json",
            "sprat --json ls --state-dir B",
        ] {
            let global = parse(line).unwrap().global;
            assert_eq!(
                (global.state_dir.as_deref(), global.json),
                (Some("B"), true),
                "{line}"
            );
        }
        assert!(
            parse("sprat tracker token list --no-input --config F")
                .unwrap()
                .global
                .no_input
        );
        assert!(parse("sprat ls -q -v").is_err() && parse("sprat ls --loud").is_err());
    }

    #[test]
    fn help_tells_every_exit_code() {
        let help = Args::definitions().render_long_help().to_string();
        for (exit, meaning) in Exit::TABLE {
            assert!(
                help.contains(&format!("{:3}  {meaning}", exit as u8)),
                "{meaning}"
            );
        }
        assert!(!help.contains("The man page"));
    }
}
