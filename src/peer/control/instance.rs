//! Who runs in a state directory: one process, which holds the lock and serves the control socket.
//!
//! Invariant: a directory whose lock is free has no peer, whatever lies in it.

use std::{
    fs::File,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::Result;

use crate::{
    exit::{Exit, Failed},
    net::{self, Connection},
    safe_path,
};

const LOCK: &str = "lock";
pub(in crate::peer) const SOCKET: &str = "control.sock";
const LOCK_WAIT: Duration = Duration::from_secs(5);

/// The control connection of the peer that runs in `state_dir`; `None` if nobody does.
///
/// # Errors
/// If a peer holds the directory but does not answer.
pub async fn attach(state_dir: &Path) -> Result<Option<Connection>> {
    if !state_dir.exists() {
        return Ok(None);
    }
    let until = Instant::now() + LOCK_WAIT;
    loop {
        if safe_path::lock(&state_dir.join(LOCK))?.is_some() {
            return Ok(None);
        }
        // The holder may just be starting, or just ending.
        match net::dial_unix(state_dir, SOCKET, net::CONTROL).await {
            Ok(connection) => return Ok(Some(connection)),
            Err(error) if Instant::now() > until => {
                let text = format!(
                    "a peer runs in {}, but its control socket does not answer",
                    state_dir.display()
                );
                return Err(anyhow::Error::from(error).context(text));
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

/// Becomes the one that runs here.
pub(in crate::peer) async fn lock(state_dir: &Path) -> Result<File> {
    let until = Instant::now() + LOCK_WAIT;
    loop {
        if let Some(lock) =
            safe_path::lock(&state_dir.join(LOCK)).map_err(|error| Failed::state_dir(&error))?
        {
            return Ok(lock);
        }
        if Instant::now() > until {
            let text = format!(
                "a peer already runs in {}; use it, or another --state-dir",
                state_dir.display()
            );
            return Err(Failed::new(Exit::Failure, text).into());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
