//! Signals: the first one asks to stop, the second one ends the process.
//!
//! Invariant: from [`Stop::listen`] on, no signal ends the process before it had the chance to stop cleanly.

use std::process;

use anyhow::{Context, Result};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};
use tokio_util::task::AbortOnDropHandle;

use super::{ending::Ended, output::show_cursor};

/// Ctrl-C.
const SIGINT: u8 = 128 + 2;
const SIGTERM: u8 = 128 + 15;

/// Whether this process was asked to stop.
pub struct Stop {
    code: watch::Receiver<u8>,
    _task: AbortOnDropHandle<()>,
}

impl Stop {
    /// Begins to listen; must run inside the runtime.
    ///
    /// # Errors
    /// If the system has no room for a handler.
    pub fn listen() -> Result<Self> {
        let mut interrupt = signal(SignalKind::interrupt()).context("listening for Ctrl-C")?;
        let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
        let (sender, code) = watch::channel(0);
        let task = tokio::spawn(async move {
            loop {
                let code = tokio::select! {
                    _ = interrupt.recv() => SIGINT,
                    _ = terminate.recv() => SIGTERM,
                };
                if sender.send_replace(code) != 0 {
                    show_cursor();
                    process::exit(code.into());
                }
            }
        });
        Ok(Self {
            code,
            _task: AbortOnDropHandle::new(task),
        })
    }

    /// Waits for the first signal; gives the exit code that it stands for.
    pub async fn requested(&self) -> u8 {
        let mut code = self.code.clone();
        match code.wait_for(|code| *code != 0).await {
            Ok(code) => *code,
            // Only if the task is gone, which lives as long as `self`.
            Err(_) => std::future::pending().await,
        }
    }

    /// What `work` gives, unless a signal comes first; then the work is dropped and the error is [`Ended`].
    ///
    /// # Errors
    /// Those of `work`.
    pub async fn unless<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::select! {
            result = work => result,
            code = self.requested() => Err(Ended { code, message: "stopped".into() }.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn work_that_is_done_is_not_disturbed() {
        let stop = Stop::listen().unwrap();
        assert_eq!(stop.unless(async { Ok(7) }).await.unwrap(), 7);
        assert_eq!(*stop.code.borrow(), 0);
    }
}
