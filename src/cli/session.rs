//! What holds for one process of the command line: its settings, where they come from, and how it talks.
//!
//! Invariant: nothing below reads flags or variables again.

use std::{
    io::{self, IsTerminal},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

use super::{
    args::Args,
    commands::{Action, Command, TrackerCommand},
    output::{note, shell},
};
use crate::{
    config::{self, Config, ConfigError, Environment, LogLevel, Origins, Service},
    net,
};

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
    pub(super) origins: Origins,
    pub(super) environment: Environment,
    state_dir: Option<String>,
    cwd: PathBuf,
    pub(super) ask_passphrase: AskPassphrase,
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

    pub(super) fn variable(&self, name: &str) -> Option<String> {
        let value = self.environment.get(name.as_ref() as &std::ffi::OsStr)?;
        Some(value.to_string_lossy().into_owned()).filter(|value| !value.is_empty())
    }

    /// Tells the service manager, where one started this process, how it is.
    pub(super) fn tell_manager(&self, state: &str) {
        if let Some(socket) = self.variable("NOTIFY_SOCKET") {
            net::tell_manager(&socket, state);
        }
    }

    /// ` --state-dir DIR` for a command that we tell people to run.
    pub(super) fn state_dir_words(&self) -> String {
        let words = |dir: &String| format!(" --state-dir {}", shell(std::slice::from_ref(dir)));
        self.state_dir.as_ref().map(words).unwrap_or_default()
    }
}

impl Command {
    /// Does it run on and on, so that its log is its output?
    fn serves(&self) -> bool {
        matches!(
            self,
            Self::Action(
                Action::Tracker(TrackerCommand::Run(_)) | Action::Peer(_) | Action::Share(_)
            )
        )
    }
}
