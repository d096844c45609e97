//! How a command ends: the exit codes, and an error that carries one.
//!
//! Invariant: the codes are an interface; a code is never given another meaning.

use std::{
    fmt,
    io::{self, ErrorKind},
};

/// Exit codes other than 0 (done) and 130/143 (ended by a signal).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Anything without a code of its own.
    Failure = 1,
    /// Wrong flags, wrong configuration, or a question that needs a terminal.
    Usage = 2,
    /// No such file, member, token or tracker state.
    NotFound = 3,
    /// Nobody who holds the content can be reached.
    NoSource = 4,
    /// Took too long.
    Timeout = 5,
    /// Every source sent wrong bytes.
    Integrity = 6,
    /// Interrupted; run the same command again to continue.
    Incomplete = 7,
    /// The disk is full, or the folder cannot be written.
    NoSpace = 8,
    /// The target exists.
    Exists = 9,
    /// The tracker cannot be reached, or is none.
    Tracker = 10,
    /// Not a member, token refused, certificate not accepted.
    Auth = 11,
    /// Some of the files are here, the others could not be had.
    Partly = 12,
    /// The tracker's listing is not whole yet: those who were here before it restarted are not all back.
    NotWhole = 13,
}

impl Exit {
    /// All of them with what they mean, for `--help` and the man page.
    pub const TABLE: [(Self, &'static str); 13] = [
        (Self::Failure, "failure without a code of its own"),
        (
            Self::Usage,
            "wrong usage or configuration, or a terminal is needed",
        ),
        (Self::NotFound, "not found"),
        (Self::NoSource, "no source can be reached"),
        (Self::Timeout, "took too long"),
        (Self::Integrity, "sources sent wrong bytes only"),
        (Self::Incomplete, "interrupted; the same command continues"),
        (Self::NoSpace, "no space, or the folder cannot be written"),
        (Self::Exists, "the target exists"),
        (Self::Tracker, "the tracker cannot be reached, or is none"),
        (
            Self::Auth,
            "not a member, or the token or certificate was refused",
        ),
        (
            Self::Partly,
            "partly: some files are here, the others are named",
        ),
        (
            Self::NotWhole,
            "the tracker's listing is not whole yet; try again soon",
        ),
    ];

    /// The code of a number, [`Exit::Failure`] for an unknown one.
    #[must_use]
    pub fn from_code(code: u32) -> Self {
        Self::TABLE
            .iter()
            .map(|row| row.0)
            .find(|exit| *exit as u32 == code)
            .unwrap_or(Self::Failure)
    }
}

/// An error that knows its exit code. Its text is one line: what failed, on which name or address, what to do.
#[derive(Clone, Debug)]
pub struct Failed {
    /// How the process ends.
    pub exit: Exit,
    /// What a person reads.
    pub message: String,
}

impl Failed {
    /// An error with this code and text.
    #[must_use]
    pub fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self {
            exit,
            message: message.into(),
        }
    }

    /// A state directory that cannot be used; `error` names the path.
    #[must_use]
    pub fn state_dir(error: &io::Error) -> Self {
        let exit = match error.kind() {
            ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => Exit::NoSpace,
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Exit::NoSpace,
            _ => Exit::Failure,
        };
        let advice =
            "it must be this user's own and writable; mend that, or choose another --state-dir";
        Self::new(
            exit,
            format!("the state directory cannot be used: {error}; {advice}"),
        )
    }
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failed {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_distinct_and_read_back() {
        for (i, (exit, _)) in Exit::TABLE.iter().enumerate() {
            assert_eq!(
                (*exit as usize, Exit::from_code(*exit as u32)),
                (i + 1, *exit)
            );
        }
        assert_eq!(Exit::from_code(99), Exit::Failure);
    }
}
