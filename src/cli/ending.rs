//! How a command ends: an error becomes one line and one exit code.
//!
//! Invariant: the code follows from the kinds of the errors, never from their text.

use std::{fmt, io};

use crate::{
    config::ConfigError,
    exit::{Exit, Failed},
    safe_path::escape,
    token::TokenError,
};

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
}
