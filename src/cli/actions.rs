//! Performs every [`Action`], whether typed or built by the menu.
//!
//! Invariant: each action has one place in [`run`], and nothing else starts one.

use anyhow::Result;

use super::{
    about, commands::Action, get, limit, list, log_level, output, peer, session::Session, status,
    tracker,
};

/// Performs an action to its end.
///
/// # Errors
/// What [`finish`](super::finish) turns into a line and an exit code.
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
