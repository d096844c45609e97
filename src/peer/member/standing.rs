//! How a peer stands with its tracker: what follows from a call that failed.
//!
//! Invariant: it follows from the kind of the error, never from its text.

use tonic::Status;

use crate::{
    exit::{Exit, Failed},
    net::{DialError, DialRefusal},
};

pub use crate::proto::status_response::TrackerState;

/// How a peer stands with its tracker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrackerStanding {
    /// What programs decide by.
    pub state: TrackerState,
    /// What the last call brought, for people; empty if nothing went wrong.
    pub error: String,
}

impl TrackerStanding {
    /// Before the first answer.
    pub const CONNECTING: Self = Self {
        state: TrackerState::Connecting,
        error: String::new(),
    };
    /// After an answer.
    pub const ONLINE: Self = Self {
        state: TrackerState::Online,
        error: String::new(),
    };

    /// After a call that failed.
    #[must_use]
    pub fn after(error: &anyhow::Error) -> Self {
        let (state, error) = match (
            error.downcast_ref::<DialError>(),
            error.downcast_ref::<Status>(),
        ) {
            (Some(error), _) => (state_of(error), error.to_string()),
            (None, Some(status)) => (TrackerState::Failing, status.message().to_owned()),
            (None, None) => (TrackerState::Failing, one_line(error)),
        };
        Self { state, error }
    }
}

/// The state after a call that found no tracker.
const fn state_of(error: &DialError) -> TrackerState {
    match error {
        DialError::NoAddress | DialError::Unreachable(..) => TrackerState::Unreachable,
        DialError::Refused(_, refusal) => match refusal {
            DialRefusal::OtherNetwork(_) => TrackerState::OtherNetwork,
            DialRefusal::Clock(_) => TrackerState::Clock,
            DialRefusal::NotAMember => TrackerState::NotAMember,
            DialRefusal::Revoked | DialRefusal::SomebodyElse | DialRefusal::NotSprat(_) => {
                TrackerState::NoTracker
            }
            DialRefusal::Broken(_) => TrackerState::Unreachable,
        },
    }
}

/// How a command ends that needs the tracker.
#[must_use]
pub const fn exit_of(state: TrackerState) -> Exit {
    match state {
        TrackerState::OtherNetwork | TrackerState::Clock | TrackerState::NotAMember => Exit::Auth,
        TrackerState::Unspecified
        | TrackerState::Connecting
        | TrackerState::Online
        | TrackerState::Unreachable
        | TrackerState::NoTracker
        | TrackerState::Failing => Exit::Tracker,
    }
}

/// What a person may do about it, to follow the error; may be empty.
#[must_use]
pub const fn advice(state: TrackerState) -> &'static str {
    match state {
        TrackerState::Unreachable => "; is the tracker running, and its port open?",
        TrackerState::NoTracker => "; is this the tracker's address and port?",
        TrackerState::OtherNetwork => "; is this link or state directory of that tracker?",
        TrackerState::Clock => "; is either clock wrong?",
        TrackerState::NotAMember => "; ask for a new link, and join again",
        TrackerState::Unspecified
        | TrackerState::Connecting
        | TrackerState::Online
        | TrackerState::Failing => "",
    }
}

/// A tracker that was not found, with its exit code; [`TrackerStanding::after`] finds the error inside.
#[must_use]
pub fn failed(error: DialError) -> anyhow::Error {
    let state = state_of(&error);
    let text = format!("tracker: {error}{}", advice(state));
    anyhow::Error::from(error).context(Failed::new(exit_of(state), text))
}

/// An error for the log: the text of a [`Failed`] says all that lies below it.
#[must_use]
pub fn one_line(error: &anyhow::Error) -> String {
    error
        .downcast_ref::<Failed>()
        .map_or_else(|| format!("{error:#}"), ToString::to_string)
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn an_error_says_how_the_peer_stands_and_how_a_command_ends() {
        let refused = |refusal| DialError::Refused("t:7700".into(), refusal);
        let silent = io::Error::from(io::ErrorKind::ConnectionRefused);
        for (error, state, exit) in [
            (
                DialError::Unreachable("t:7700".into(), silent),
                TrackerState::Unreachable,
                Exit::Tracker,
            ),
            (
                refused(DialRefusal::NotSprat("it does not speak TLS")),
                TrackerState::NoTracker,
                Exit::Tracker,
            ),
            (
                // Words of other endings in the text change nothing.
                refused(DialRefusal::Broken("clock, network, certificate".into())),
                TrackerState::Unreachable,
                Exit::Tracker,
            ),
            (
                refused(DialRefusal::OtherNetwork("of others")),
                TrackerState::OtherNetwork,
                Exit::Auth,
            ),
            (
                refused(DialRefusal::Clock("too late".into())),
                TrackerState::Clock,
                Exit::Auth,
            ),
            (
                refused(DialRefusal::NotAMember),
                TrackerState::NotAMember,
                Exit::Auth,
            ),
        ] {
            let text = error.to_string();
            let failed = failed(error).context("while testing");
            let standing = TrackerStanding::after(&failed);
            assert_eq!((standing.state, standing.error), (state, text.clone()));
            let failed = failed.downcast_ref::<Failed>().unwrap();
            assert_eq!(failed.exit, exit);
            assert_eq!(failed.message, format!("tracker: {text}{}", advice(state)));
        }
    }

    #[test]
    fn an_answer_with_an_error_is_told_in_its_words() {
        let answer = anyhow::Error::from(Status::unavailable("later"))
            .context(Failed::new(Exit::Tracker, "tracker t:7700: later"));
        let standing = TrackerStanding::after(&answer);
        assert_eq!(
            (standing.state, standing.error.as_str()),
            (TrackerState::Failing, "later")
        );
    }
}
