//! The command line: what each command does, and how the process ends.
//!
//! Invariant: [`run`] performs every [`Action`], whether typed or built by the menu; results go to standard output and
//! nothing else does; an error becomes one line and one exit code, in [`finish`] alone.

mod about;
mod args;
mod commands;
mod get;
mod host;
mod limit;
mod list;
mod log_level;
pub mod output;
mod peer;
pub mod progress;
mod signals;
mod status;
mod tracker;
mod unattended;
mod words;

use std::{
    fmt,
    io::{self, IsTerminal},
    net::{SocketAddr, ToSocketAddrs},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, Result};
use clap::Parser;

pub use self::{
    args::Args,
    commands::{Action, Command, DemoOptions, Filters},
    host::Host,
    list::{list, total},
    output::{note, shell, show_cursor},
    signals::Stop,
};
use crate::{
    config::{self, Config, ConfigError, Environment, LogLevel, Origins, Service},
    exit::{Exit, Failed},
    net,
    safe_path::escape,
    token::TokenError,
};

/// Reads the command line; help, version and wrong usage end the process.
#[must_use]
pub fn parse() -> Args {
    Args::parse()
}

impl Args {
    /// What to do; nothing was typed: the menu.
    #[must_use]
    pub fn wanted(&self) -> Option<Command> {
        self.command.clone()
    }
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

/// Asks a person for the passphrase of the named file.
pub type AskPassphrase = fn(&Path) -> Result<String>;

/// What holds for this process: settings, and how it talks.
pub struct Session {
    /// The settings, flags included.
    pub config: Config,
    /// `SPRAT_LOG`
    pub log_filter: Option<String>,
    /// Results as JSON.
    pub json: bool,
    /// Results and errors only.
    pub quiet: bool,
    /// Says more.
    pub verbose: bool,
    /// A person is there and may be asked.
    pub interactive: bool,
    origins: Origins,
    environment: Environment,
    state_dir: Option<String>,
    cwd: PathBuf,
    ask_passphrase: AskPassphrase,
}

impl Session {
    /// Layers the configuration under the flags.
    ///
    /// # Errors
    /// [`ConfigError`]
    pub fn load(args: &Args, ask_passphrase: AskPassphrase) -> Result<Self> {
        let mut options = config::Options::from_process().context("reading the current folder")?;
        options.config.clone_from(&args.global.config);
        options.overrides = args.overrides();
        let mut loaded = config::load(&options)?;
        let by_variable = loaded
            .origins
            .get("log.level")
            .is_some_and(|(_, origin)| origin.starts_with("SPRAT_"));
        let by_hand = by_variable || args.global.verbose > 0 || args.global.quiet;
        if !by_hand && !args.command.as_ref().is_some_and(Command::serves) {
            // Beside a prompt, a table or a bar, only what needs attention.
            loaded.config.log.level = loaded.config.log.level.min(LogLevel::Warn);
        }
        let notes = if args.global.verbose > 0 {
            loaded.notes
        } else {
            Vec::new()
        };
        notes
            .iter()
            .chain(&loaded.warnings)
            .for_each(|text| note(&format!("sprat: {text}")));
        let log_filter = options
            .environment
            .get("SPRAT_LOG".as_ref() as &std::ffi::OsStr);
        Ok(Self {
            config: loaded.config,
            log_filter: log_filter.map(|text| text.to_string_lossy().into_owned()),
            json: args.global.json,
            quiet: args.global.quiet,
            verbose: args.global.verbose > 0,
            interactive: !args.global.no_input
                && io::stdin().is_terminal()
                && io::stderr().is_terminal(),
            origins: loaded.origins,
            environment: options.environment,
            state_dir: args.global.state_dir.clone(),
            cwd: options.cwd,
            ask_passphrase,
        })
    }

    /// Where a service keeps its state.
    ///
    /// # Errors
    /// [`ConfigError::NoHome`]
    pub fn state_dir(&self, service: Service) -> Result<PathBuf, ConfigError> {
        let configured = match service {
            Service::Tracker => &self.config.tracker.state_dir,
            Service::Peer => &self.config.peer.state_dir,
        };
        configured
            .clone()
            .map_or_else(|| config::state_dir_default(service, &self.environment), Ok)
    }

    /// The same session with another place for the tracker's state.
    #[must_use]
    pub fn with_tracker_at(mut self, state_dir: PathBuf) -> Self {
        self.config.tracker.state_dir = Some(state_dir);
        self
    }

    /// `--state-dir`, as it was given.
    #[must_use]
    pub fn state_dir_flag(&self) -> Option<&str> {
        self.state_dir.as_deref()
    }

    /// Where the command runs.
    #[must_use]
    pub fn cwd(&self) -> &Path {
        &self.cwd
    }

    /// Says something on the side, unless asked to be quiet.
    pub fn hint(&self, text: &str) {
        if !self.quiet {
            note(text);
        }
    }

    fn variable(&self, name: &str) -> Option<String> {
        let value = self.environment.get(name.as_ref() as &std::ffi::OsStr)?;
        Some(value.to_string_lossy().into_owned()).filter(|value| !value.is_empty())
    }

    /// Tells the service manager, where one started this process, how it is.
    fn tell_manager(&self, state: &str) {
        if let Some(socket) = self.variable("NOTIFY_SOCKET") {
            net::tell_manager(&socket, state);
        }
    }

    /// ` --state-dir DIR` for a command that we tell people to run.
    fn state_dir_words(&self) -> String {
        let words = |dir: &String| format!(" --state-dir {}", shell(std::slice::from_ref(dir)));
        self.state_dir.as_ref().map(words).unwrap_or_default()
    }
}

impl Command {
    /// Does it run on and on, so that its log is its output?
    fn serves(&self) -> bool {
        use commands::TrackerCommand::Run;
        matches!(
            self,
            Self::Action(Action::Tracker(Run(_)) | Action::Peer(_) | Action::Share(_))
        )
    }
}

/// Performs an action to its end.
///
/// # Errors
/// What [`finish`] turns into a line and an exit code.
pub async fn run(session: &Session, action: &Action) -> Result<()> {
    match action {
        Action::Tracker(command) => tracker::run(session, command).await,
        Action::Operator(command) => tracker::operator(session, command).await,
        Action::Join(args) => peer::join(session, args).await,
        Action::Peer(args) => peer::run(session, args).await,
        Action::Share(args) => peer::share(session, args).await,
        Action::Ls(args) => list::ls(session, args).await,
        Action::Search(args) => list::search(session, args).await,
        Action::Get(args) => get::run(session, args).await,
        Action::Status(args) => status::run(session, args).await,
        Action::Limit(args) => limit::run(session, args).await,
        Action::LogLevel(args) => log_level::run(session, args).await,
        Action::Config(command) => about::config(session, command),
        Action::Completions { shell } => about::completions(*shell),
        Action::Version => about::version(session),
        Action::Man => output::print(&about::man_page()?),
    }
}

/// The end of a process that is no failure of its work: a signal, or a reader that has gone.
#[derive(Clone, Debug)]
pub struct Ended {
    /// Exit code.
    pub code: u8,
    /// What a person reads; may be empty.
    pub message: String,
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Ended {}

/// The one place where an error is shown, in one line, and becomes an exit code.
pub fn finish(result: Result<()>) -> ExitCode {
    let Err(error) = result else {
        return ExitCode::SUCCESS;
    };
    let text = message(&error);
    if !text.is_empty() {
        note(&format!("sprat: {text}"));
    }
    ExitCode::from(exit_code(&error))
}

/// The exit code that an error stands for.
#[must_use]
pub fn exit_code(error: &anyhow::Error) -> u8 {
    let of = |cause: &(dyn std::error::Error + 'static)| {
        let usage =
            cause.is::<ConfigError>() || cause.is::<TokenError>() || cause.is::<clap::Error>();
        let full = cause
            .downcast_ref::<io::Error>()
            .is_some_and(|error| error.kind() == io::ErrorKind::StorageFull);
        if let Some(ended) = cause.downcast_ref::<Ended>() {
            return Some(ended.code);
        }
        let exit = match cause.downcast_ref::<Failed>() {
            Some(failed) => failed.exit,
            None if usage => Exit::Usage,
            None if full => Exit::NoSpace,
            None => return None,
        };
        Some(exit as u8)
    };
    // The first looks at what was attached with `context`, the second at what lies below the root.
    let attached = error
        .downcast_ref::<Failed>()
        .map(|failed| failed.exit as u8);
    attached
        .or_else(|| error.chain().find_map(of))
        .unwrap_or(Exit::Failure as u8)
}

/// An error and its causes on one line. A cause that the text above it tells already is left out, and what lies below
/// a [`Failed`], whose text says it all.
#[must_use]
pub fn message(error: &anyhow::Error) -> String {
    let last = error.downcast_ref::<Failed>().map(ToString::to_string);
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        let is_last = last.as_ref() == Some(&cause);
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
        if is_last {
            break;
        }
    }
    escape(text.replace('\n', " ").trim())
}

/// The operator page's address, unless it is switched off.
fn to_operate(text: &str) -> Result<Option<SocketAddr>> {
    if config::is_none(text) {
        Ok(None)
    } else {
        to_listen(text).map(Some)
    }
}

/// The address that `HOST:PORT` stands for on this machine.
fn to_listen(text: &str) -> Result<SocketAddr> {
    let wrong = |why: String| Failed::new(Exit::Usage, format!("cannot listen on {text}: {why}"));
    let (host, port) =
        config::split_host_port(text).ok_or_else(|| wrong("not HOST:PORT".into()))?;
    let mut addresses = (host, port)
        .to_socket_addrs()
        .map_err(|error| wrong(error.to_string()))?;
    Ok(addresses
        .next()
        .ok_or_else(|| wrong("the name has no address".into()))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_one_line_and_one_code() {
        let status = anyhow::anyhow!("status: 'not found', details: []");
        let failed = status
            .context(Failed::new(Exit::Tracker, "tracker t:1: gone\nfor good"))
            .context("listing");
        assert_eq!(
            (exit_code(&failed), message(&failed).as_str()),
            (10, "listing: tracker t:1: gone for good")
        );

        let twice = anyhow::Error::from(io::Error::other("x: no"))
            .context("opening x: no")
            .context("reading");
        assert_eq!(
            (exit_code(&twice), message(&twice).as_str()),
            (1, "reading: opening x: no")
        );

        let below = anyhow::Error::from(ConfigError::NoHome).context("\u{1b}[2J");
        assert_eq!(exit_code(&below), 2);
        assert!(message(&below).starts_with(r"\u{1b}[2J: no home"));

        let full =
            anyhow::Error::from(io::Error::from(io::ErrorKind::StorageFull)).context("writing x");
        assert_eq!(exit_code(&full), 8);
        let ended = anyhow::Error::from(Ended {
            code: 143,
            message: "stopped".into(),
        });
        assert_eq!(
            (exit_code(&ended), message(&ended).as_str()),
            (143, "stopped")
        );
    }

    #[test]
    fn addresses_to_listen_on() {
        assert_eq!(
            to_listen("[::]:7700").unwrap(),
            "[::]:7700".parse().unwrap()
        );
        assert_eq!(
            to_listen("127.0.0.1:0").unwrap(),
            "127.0.0.1:0".parse().unwrap()
        );
        assert!(to_listen("localhost:1").unwrap().ip().is_loopback());
        assert_eq!(exit_code(&to_listen("7700").unwrap_err()), 2);
    }
}
