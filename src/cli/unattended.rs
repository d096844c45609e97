//! Services that nobody watches: what keeps one from starting or from writing is said in one line when it begins, and
//! `sprat status --check` finds it.
//!
//! Invariant: the reason lies in the state directory only while a service waits there. Trouble with a folder is read off
//! the folder itself, so it can be told where nothing can be written.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Result;
use tokio::time::{MissedTickBehavior, interval, sleep};

use super::ending::message;
use crate::{backoff::Backoff, safe_path};

/// In the state directory: why the service there has not started yet.
const WAITING: &str = "waiting";
const FIRST: Duration = Duration::from_millis(500);
const LONGEST: Duration = Duration::from_secs(5);
const LOOK: Duration = Duration::from_secs(5);

/// Starts a service by `attempt`, again and again until it works if it is to keep trying.
///
/// # Errors
/// Those of the first attempt, unless it is to keep trying.
pub(super) async fn start<T>(
    keep_trying: bool,
    state_dir: &Path,
    attempt: impl AsyncFn() -> Result<T>,
) -> Result<T> {
    let mut reason = Reason {
        path: state_dir.join(WAITING),
        said: String::new(),
    };
    let mut backoff = Backoff::new(FIRST, LONGEST);
    loop {
        match attempt().await {
            Err(error) if keep_trying => reason.say(message(&error)),
            ended => return ended,
        }
        sleep(backoff.delay(rand::random())).await;
    }
}

struct Reason {
    path: PathBuf,
    said: String,
}

impl Reason {
    fn say(&mut self, text: String) {
        if text == self.said {
            return;
        }
        // Where it cannot be written, the folder is the trouble, and `status` sees that by itself.
        let _ = self.path.parent().map(safe_path::private_dir);
        let _ = safe_path::write_private(&self.path, text.as_bytes());
        tracing::warn!("cannot start yet: {text}");
        self.said = text;
    }
}

impl Drop for Reason {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// Why no service runs on a state directory, if that can be told.
pub(super) fn why_not_running(state_dir: &Path) -> Option<String> {
    trouble(state_dir).or_else(|| {
        let text = safe_path::read_private(&state_dir.join(WAITING)).ok()?;
        Some(format!(
            "not started yet: {}",
            String::from_utf8_lossy(&text)
        ))
    })
}

/// Why nothing can be written to a folder, if so.
pub(super) fn trouble(folder: &Path) -> Option<String> {
    safe_path::writable(folder)
        .err()
        .map(|error| error.to_string())
}

/// Says when one of `folders` cannot be written to, and when it can be again. Never ends.
pub(super) async fn watch(folders: Vec<PathBuf>) {
    let mut ticks = interval(LOOK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut known: BTreeMap<&Path, String> = BTreeMap::new();
    loop {
        ticks.tick().await;
        for folder in &folders {
            match trouble(folder) {
                Some(text) if known.get(folder.as_path()) != Some(&text) => {
                    tracing::error!("{text}");
                    known.insert(folder, text);
                }
                None if known.remove(folder.as_path()).is_some() => {
                    tracing::info!("{}: can be written to again", folder.display());
                }
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_start_is_tried_until_it_works_and_says_why_meanwhile() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        let (tries, seen) = (Cell::new(0), Cell::new(None));
        let attempt = async || {
            tries.set(tries.get() + 1);
            seen.set(why_not_running(&state));
            if tries.get() < 4 {
                Err(anyhow::anyhow!("no link"))
            } else {
                Ok(())
            }
        };
        assert!(start(false, &state, attempt).await.is_err());
        assert!(!state.exists());
        start(true, &state, attempt).await.unwrap();
        assert_eq!(
            (tries.get(), seen.take()),
            (4, Some("not started yet: no link".into()))
        );
        assert_eq!(why_not_running(&state), None);
    }

    #[test]
    fn a_folder_tells_its_own_trouble() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(trouble(dir.path()), None);
        assert!(
            trouble(&dir.path().join("gone"))
                .unwrap()
                .contains("gone: No such file")
        );
        assert!(trouble(Path::new("/proc/1")).is_some());
    }
}
