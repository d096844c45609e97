//! The command line: what each command does, and how the process ends.
//!
//! Invariant: [`run`] performs every [`Action`], whether typed or built by the menu; results go to standard output and
//! nothing else does; an error becomes one line and one exit code, in [`finish`] alone. The files here import one
//! another, none of them this one.

mod about;
mod actions;
mod args;
mod commands;
mod ending;
mod get;
mod host;
mod limit;
mod list;
mod listen;
mod log_level;
pub mod output;
mod peer;
pub mod progress;
mod session;
mod signals;
mod status;
mod tracker;
mod unattended;
mod whole;
mod words;

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;

pub use self::{
    actions::run,
    args::Args,
    commands::{Action, Command, DemoOptions, Filters},
    ending::{Ended, exit_code, message},
    host::Host,
    list::{list, total},
    output::{note, shell, show_cursor},
    session::{AskPassphrase, Session},
    signals::Stop,
};

/// Reads the command line; help, version and wrong usage end the process.
#[must_use]
pub fn parse() -> Args {
    Args::parse()
}

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
