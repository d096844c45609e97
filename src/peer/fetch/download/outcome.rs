//! What became of each file that could not be had, and how the get ends because of it.
//!
//! Invariant: every file that was wanted has its name, or is told of here with a reason.

use std::{
    collections::{HashMap, HashSet},
    io,
};

use crate::{
    exit::{Exit, Failed},
    peer::fetch::{
        contents::{Aside, Position},
        destination::Want,
        engine::Engine,
        progress::Happening,
        storage::StorageError,
    },
    safe_path::escape,
};

/// What is known of files that could not be had.
#[derive(Default)]
pub(super) struct Unfinished {
    failed: Vec<(Want, Aside, String)>,
    /// What this machine said of contents that it set aside.
    pub(super) texts: HashMap<Position, String>,
}

impl Unfinished {
    /// A file that was never begun.
    pub(super) fn failed(&mut self, want: Want, why: Aside, text: String) {
        self.failed.push((want, why, text));
    }

    /// All files that could not be had, and the error that the get ends with because of them. `n_done` files are here, and
    /// `fetched` bytes came. What is `replaced` is listed with other bytes by now.
    pub(super) fn settle<H>(
        mut self,
        engine: &Engine<H>,
        replaced: &HashSet<Position>,
        want: impl Fn(Position) -> Want,
        (n_done, fetched): (u64, u64),
    ) -> (Vec<Happening>, Option<anyhow::Error>) {
        for (at, why) in engine.contents.unnamed() {
            let why = match replaced.contains(&at) {
                true => Aside::Changed,
                false => why,
            };
            let want = want(at);
            let text = self.texts.remove(&at);
            let text = text.unwrap_or_else(|| {
                let name = escape(want.name.as_str());
                let of = engine.contents.original(at);
                explain(&name, why, engine.sources.trouble(of))
            });
            self.failed.push((want, why, text));
        }
        let error = self.error(n_done, fetched);
        let failed = self.failed.into_iter();
        let failed = failed.map(|(want, why, text)| Happening::FileFailed { want, why, text });
        (failed.collect(), error)
    }

    fn error(&self, n_done: u64, fetched: u64) -> Option<anyhow::Error> {
        let (_, why, text) = self.failed.first()?;
        let is_unreachable = |(_, why, _): &(_, Aside, _)| *why == Aside::Unreachable;
        let has_some = n_done > 0 || fetched > 0 && self.failed.iter().all(is_unreachable);
        let exit = if has_some { Exit::Partly } else { exit(*why) };
        let text = match (self.failed.len(), n_done) {
            (1, 0) => text.clone(),
            (n, 0) => format!("none of {n} files could be had: {text}"),
            (n, _) => format!("{n} files could not be had, {n_done} are here: {text}"),
        };
        Some(Failed::new(exit, text).into())
    }
}

/// The exit code of a reason, if nothing at all was got.
const fn exit(why: Aside) -> Exit {
    match why {
        Aside::Unreachable | Aside::Gone | Aside::Changed | Aside::Unreadable => Exit::NoSource,
        Aside::Bad => Exit::Integrity,
        Aside::Exists => Exit::Exists,
        Aside::Disk | Aside::Name | Aside::Denied => Exit::NoSpace,
    }
}

fn explain(name: &str, why: Aside, trouble: Option<(crate::identity::PeerId, &str)>) -> String {
    let trouble = trouble
        .map(|(peer, text)| format!(" (source {}: {text})", peer.short()))
        .unwrap_or_default();
    match why {
        Aside::Unreachable => format!(
            "{name}: no source is left to fetch from{trouble}; what arrived is kept, run the same command to continue"
        ),
        Aside::Gone => format!("{name}: no source has it any more{trouble}"),
        Aside::Changed => format!(
            "{name}: it changed at the source; list it again to get what is there now{trouble}"
        ),
        Aside::Unreadable => format!("{name}: the source cannot read it{trouble}"),
        Aside::Bad => {
            format!("{name}: every source sent wrong bytes; nothing wrong was kept{trouble}")
        }
        Aside::Disk | Aside::Exists | Aside::Name | Aside::Denied => {
            format!("{name}: this machine does not take it")
        }
    }
}

/// The reason of something that went wrong on this machine.
pub(super) fn why(error: &anyhow::Error) -> Aside {
    let exit = error.downcast_ref::<Failed>().map(|failed| failed.exit);
    let io = match error.downcast_ref::<StorageError>() {
        Some(StorageError::Exists(_) | StorageError::Busy(_)) => return Aside::Exists,
        Some(StorageError::Io(error)) => Some(error),
        _ => error.downcast_ref::<io::Error>(),
    };
    match io.map(io::Error::kind) {
        _ if exit == Some(Exit::Exists) => Aside::Exists,
        Some(io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem) => Aside::Denied,
        Some(
            io::ErrorKind::InvalidFilename
            | io::ErrorKind::InvalidInput
            | io::ErrorKind::NotADirectory
            | io::ErrorKind::IsADirectory,
        ) => Aside::Name,
        _ => Aside::Disk,
    }
}

/// Can the same be tried again when there is room?
pub(super) fn is_full(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<StorageError>()
        .is_some_and(|error| matches!(error, StorageError::NoSpace { .. }))
}
