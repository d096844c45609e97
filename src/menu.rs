//! The menu that `sprat` opens on a terminal: questions whose answers become a command.
//!
//! Invariant: it can do nothing that the command line cannot. It builds the words of an [`Action`], shows them, and has
//! [`cli::run`] perform them. However it ends, the cursor is shown again.

use std::{env, io, panic, path::Path};

use anyhow::Result;
use dialoguer::{
    Confirm, FuzzySelect, Input, MultiSelect, Password, Select,
    console::{Term, truncate_str},
    theme::ColorfulTheme,
};

use crate::{
    catalog::Row,
    cli::{self, Action, Ended, Host, Session, Stop},
    config::Service,
    exit::{Exit, Failed},
    proto::ListFilesRequest,
    safe_path::escape,
    token::JoinToken,
    units::human_size,
};

const INTERRUPTED: u8 = 130;
const COMMANDS: &str = "tracker run, join, peer, share, ls, search, get, status, demo";

/// Opens the menu, and stays until the person quits.
///
/// # Errors
/// [`Exit::Usage`] without a terminal; what a start of tracker or peer says; [`Ended`] after Ctrl-C.
pub async fn run(session: Session) -> Result<()> {
    if !session.interactive || env::var_os("TERM").is_some_and(|term| term == "dumb") {
        let text =
            format!("no terminal for the menu; the commands are {COMMANDS} (see `sprat help`)");
        return Err(Failed::new(Exit::Usage, text).into());
    }
    let shown = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        cli::show_cursor();
        shown(info);
    }));
    // From here on a signal interrupts a question instead of ending the process.
    drop(Stop::listen()?);
    let session = match session
        .state_dir_flag()
        .map(|dir| session.cwd().join(dir).join("tracker"))
    {
        Some(dir) => session.with_tracker_at(dir),
        None => session,
    };
    let mut menu = Menu {
        session,
        host: Host::default(),
    };
    let result = menu.open().await;
    cli::show_cursor();
    let stop = Stop::listen()?;
    let stopped = async {
        menu.host.stop().await;
        Ok(())
    };
    result.and(stop.unless(stopped).await)
}

/// Asks for the passphrase of a key.
///
/// # Errors
/// [`Ended`] after Ctrl-C.
pub fn passphrase(key: &Path) -> Result<String> {
    let prompt = format!("Passphrase of {}", escape(&key.to_string_lossy()));
    answer(
        Password::with_theme(&ColorfulTheme::default())
            .with_prompt(prompt)
            .allow_empty_password(true)
            .interact(),
    )
}

struct Menu {
    session: Session,
    host: Host,
}

impl Menu {
    async fn open(&mut self) -> Result<()> {
        if Host::has_idle_tracker(&self.session).await?
            && confirm("The tracker of your network is not running. Start it?")?
        {
            self.host.start_tracker(&self.session).await?;
            self.show_command(&["tracker", "run"]);
        }
        if !Host::is_member(&self.session).await? && !self.become_member().await? {
            return Ok(());
        }
        self.host.start_peer(&self.session).await?;
        loop {
            let has_tracker = Host::has_tracker(&self.session);
            let items: Vec<&str> = ITEMS
                .into_iter()
                .filter(|item| *item != INVITE || has_tracker)
                .collect();
            let Some(chosen) = select("sprat", &items)? else {
                return Ok(());
            };
            match items[chosen] {
                BROWSE => self.pick(ListFilesRequest::default()).await?,
                SEARCH => {
                    let text = input("Part of the name", "", |_| Ok(()))?;
                    self.pick(ListFilesRequest {
                        text,
                        ..Default::default()
                    })
                    .await?;
                }
                FIND => self.find().await?,
                SHARE => self.share().await?,
                ONLINE => self.perform(&["ls", "--peers"]).await,
                STATUS => self.perform(&["status"]).await,
                INVITE => {
                    self.perform(&["tracker", "token", "create", "--uses", "1", "--ttl", "24h"])
                        .await
                }
                _ => return Ok(()),
            }
        }
    }

    /// The choice of the first run; false: neither.
    async fn become_member(&mut self) -> Result<bool> {
        loop {
            match select(
                "This machine is in no network yet",
                &["Start one here", "Join one with a link", "Quit"],
            )? {
                Some(0) => {
                    self.host.start_tracker(&self.session).await?;
                    self.host.join_own(&self.session).await?;
                    cli::note(
                        "The network runs while this menu is open. Afterwards, and without the menu:",
                    );
                    self.show_command(&["tracker", "run"]);
                    self.show_command(&["peer"]);
                    cli::note("Let other machines in with `Invite a machine`.");
                    return Ok(true);
                }
                Some(1) => {
                    let link = input("Paste the link that the tracker printed", "", |text| {
                        text.trim_start_matches("sprat join ")
                            .parse::<JoinToken>()
                            .map(drop)
                            .map_err(|e| e.to_string())
                    })?;
                    self.perform(&["join", link.trim_start_matches("sprat join ")])
                        .await;
                    if Host::is_member(&self.session).await? {
                        return Ok(true);
                    }
                }
                _ => return Ok(false),
            }
        }
    }

    /// Several files out of a listing.
    async fn pick(&self, request: ListFilesRequest) -> Result<()> {
        let Some(rows) = self.rows(request).await else {
            return Ok(());
        };
        let theme = ColorfulTheme::default();
        let prompt = "Space picks, Enter goes on, Esc goes back";
        let picker = MultiSelect::with_theme(&theme)
            .with_prompt(prompt)
            .items(labels(&rows))
            .report(false);
        let picked = answer(picker.interact_opt())?.unwrap_or_default();
        self.download(&rows, &picked).await
    }

    /// One file, by typing parts of its name.
    async fn find(&self) -> Result<()> {
        let Some(rows) = self.rows(ListFilesRequest::default()).await else {
            return Ok(());
        };
        let theme = ColorfulTheme::default();
        let finder = FuzzySelect::with_theme(&theme)
            .with_prompt("Type")
            .items(labels(&rows))
            .default(0)
            .report(false);
        match answer(finder.interact_opt())? {
            Some(row) => self.download(&rows, &[row]).await,
            None => Ok(()),
        }
    }

    async fn rows(&self, request: ListFilesRequest) -> Option<Vec<Row>> {
        match cli::list(&self.session, request).await {
            Ok(listing) => {
                if !listing.completeness.is_whole {
                    cli::note(
                        "the tracker was restarted, and not everybody is back: look again soon",
                    );
                }
                if listing.rows.is_empty() {
                    cli::note("no such file is listed; `Share a folder` offers some");
                    return None;
                }
                Some(listing.rows)
            }
            Err(error) => {
                self.complain(&error);
                None
            }
        }
    }

    async fn download(&self, rows: &[Row], picked: &[usize]) -> Result<()> {
        let chosen: Vec<Row> = picked.iter().map(|row| rows[*row].clone()).collect();
        if chosen.is_empty() {
            return Ok(());
        }
        let folder = self
            .session
            .config
            .peer
            .downloads
            .as_deref()
            .unwrap_or_else(|| self.session.cwd());
        let folder = input("Into the folder", &folder.to_string_lossy(), |_| Ok(()))?;
        if !confirm(&format!(
            "Download {} into {}?",
            cli::total(&chosen),
            escape(&folder)
        ))? {
            return Ok(());
        }
        let folder = format!("{}/", folder.trim_end_matches('/'));
        let targets: Vec<String> = chosen.iter().map(|row| word(row, rows)).collect();
        let mut words = vec!["get", "-o", &folder, "--"];
        words.extend(targets.iter().map(String::as_str));
        self.perform(&words).await;
        Ok(())
    }

    async fn share(&self) -> Result<()> {
        let dir = input("Folder to share", "", |text| {
            match Path::new(text).is_dir() {
                true => Ok(()),
                false => Err("no such folder".into()),
            }
        })?;
        let name = input(
            "Name before its files' names (may be empty)",
            "",
            |_| Ok(()),
        )?;
        let mut words = vec!["share"];
        if !name.is_empty() {
            words.extend(["--name", &name]);
        }
        words.extend(["--", &dir]);
        self.perform(&words).await;
        Ok(())
    }

    /// Performs a command; a failure is shown, and the menu goes on.
    async fn perform(&self, words: &[&str]) {
        let owned: Vec<String> = words.iter().map(ToString::to_string).collect();
        let result = match Action::from_words(&owned) {
            // The futures of all commands together are large.
            Ok(action) => Box::pin(cli::run(&self.session, &action)).await,
            Err(error) => Err(error),
        };
        if let Err(error) = result {
            self.complain(&error);
        }
        self.show_command(words);
    }

    fn complain(&self, error: &anyhow::Error) {
        cli::note(&format!("sprat: {}", cli::message(error)));
    }

    /// The command for what was done; a link stays a secret.
    fn show_command(&self, words: &[&str]) {
        let mut shown = vec!["sprat".to_owned()];
        shown.extend(words.iter().map(|word| {
            if word.starts_with("sprat://") {
                "LINK"
            } else {
                word
            }
            .to_owned()
        }));
        if self.session.state_dir_flag().is_some() {
            let service = if words[0] == "tracker" {
                Service::Tracker
            } else {
                Service::Peer
            };
            if let Ok(dir) = self.session.state_dir(service) {
                let at = shown
                    .iter()
                    .position(|word| word == "--")
                    .unwrap_or(shown.len());
                shown.splice(
                    at..at,
                    ["--state-dir".to_owned(), dir.to_string_lossy().into_owned()],
                );
            }
        }
        cli::note(&format!("  $ {}", cli::shell(&shown)));
    }
}

const BROWSE: &str = "Browse and download";
const SEARCH: &str = "Search";
const FIND: &str = "Find a file by typing";
const SHARE: &str = "Share a folder";
const ONLINE: &str = "Who is online";
const STATUS: &str = "Status";
const INVITE: &str = "Invite a machine";
const QUIT: &str = "Quit";
const ITEMS: [&str; 8] = [BROWSE, SEARCH, FIND, SHARE, ONLINE, STATUS, INVITE, QUIT];

/// How `sprat get` is told a row: its name, or its content if the name has several.
fn word(row: &Row, rows: &[Row]) -> String {
    let is_unique = rows.iter().filter(|other| other.name == row.name).count() == 1;
    if is_unique {
        row.name.to_string()
    } else {
        row.content_id.to_string()
    }
}

fn labels(rows: &[Row]) -> Vec<String> {
    // The prompt's own marks take up to eight columns; a line that wraps would be drawn twice.
    let width = usize::from(Term::stderr().size().1).saturating_sub(8);
    let label = |row: &Row| {
        let text = format!(
            "{:>10}  {:>2}×  {}",
            human_size(row.size),
            row.source_count,
            escape(row.name.as_str())
        );
        truncate_str(&text, width, "…").into_owned()
    };
    rows.iter().map(label).collect()
}

fn select(prompt: &str, items: &[&str]) -> Result<Option<usize>> {
    let theme = ColorfulTheme::default();
    answer(
        Select::with_theme(&theme)
            .with_prompt(prompt)
            .items(items)
            .default(0)
            .report(false)
            .interact_opt(),
    )
}

fn confirm(prompt: &str) -> Result<bool> {
    let theme = ColorfulTheme::default();
    Ok(answer(
        Confirm::with_theme(&theme)
            .with_prompt(prompt)
            .default(true)
            .interact_opt(),
    )?
    .unwrap_or(false))
}

fn input(prompt: &str, suggested: &str, check: fn(&str) -> Result<(), String>) -> Result<String> {
    let theme = ColorfulTheme::default();
    let mut question = Input::<String>::with_theme(&theme)
        .with_prompt(prompt)
        .allow_empty(true);
    if !suggested.is_empty() {
        question = question.with_initial_text(suggested);
    }
    let text = answer(
        question
            .validate_with(|text: &String| check(text.trim()))
            .interact_text(),
    )?;
    Ok(text.trim().to_owned())
}

/// Ctrl-C in a question ends the menu.
fn answer<T>(result: dialoguer::Result<T>) -> Result<T> {
    result.map_err(|dialoguer::Error::IO(error)| {
        cli::show_cursor();
        match error.kind() {
            io::ErrorKind::Interrupted => Ended {
                code: INTERRUPTED,
                message: String::new(),
            }
            .into(),
            _ => Failed::new(Exit::Usage, format!("the terminal cannot be used: {error}")).into(),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{content::ContentId, safe_path::SafeName};

    #[test]
    fn a_name_with_two_contents_is_asked_for_by_content() {
        let row = |name: &str, content: u8| Row {
            name: SafeName::parse(name).unwrap(),
            size: 1,
            content_id: ContentId::from_bytes([content; 32]),
            sources: vec![],
            source_count: 1,
        };
        let rows = [row("a", 1), row("b", 2), row("b", 3)];
        let words: Vec<String> = rows.iter().map(|one| word(one, &rows)).collect();
        assert_eq!(words, ["a".to_owned(), "02".repeat(32), "03".repeat(32)]);
    }

    #[test]
    fn whatever_is_asked_for_is_an_action() {
        for words in [
            &["ls", "--peers"][..],
            &["status"],
            &["tracker", "token", "create", "--uses", "1", "--ttl", "24h"],
            &["join", "sprat://host:7700/x"],
            &["get", "-o", "/x/", "--", "-odd name"],
            &["share", "--name", "n", "--", "-dir"],
        ] {
            let words: Vec<String> = words.iter().map(ToString::to_string).collect();
            assert!(Action::from_words(&words).is_ok(), "{words:?}");
        }
    }
}
